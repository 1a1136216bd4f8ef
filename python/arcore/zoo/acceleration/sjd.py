"""SJD: speculative Jacobi decoding, several tokens per call without training or a draft model (arXiv:2410.01699).

A window of guesses is read at once. What the model says about them is both the verdict on the old guesses (accepted
with probability min(1, p / q), q being what they were drawn from one call ago) and the source of new ones. The tokens
keep the law of plain sampling. It pays on images, where neighbours are alike and many guesses stand.

The loop is `arcore.decoding.jacobi`, for any `DraftableModel`; here are the paper's settings and the claim.
The released code applies temperature and filters to the residual a second time, which at temperatures other than 1 is
not exact; here they are applied once. A window counts the last token, as the paper's 16 does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from arcore.catalog import System, create_model
from arcore.catalog.claims import Claim, Row, at_least, at_most, equals
from arcore.decoding import Sampling, SpeculativeOutput, copy_above, generate, jacobi, random_tokens
from arcore.decoding.laws import g_test, outcomes, small_model, text_law
from arcore.nn.kinds import check_kinds
from arcore.nn.protocols import DraftableModel
from arcore.zoo.acceleration._common import train_raster

SYSTEM = System(
    name="sjd",
    title="Speculative Jacobi decoding",
    paper="arXiv:2410.01699",
    paper_title="Accelerating Auto-regressive Text-to-Image Generation with Training-free Speculative Jacobi Decoding",
    topic="acceleration",
    kind="decoder",
    builds_on=("llamagen",),
    ops=("speculative", "sample"),
    summary="Lossless parallel decoding of any autoregressive model by a window of guesses; no training, no drafter.",
    claim="Texts have the law of plain sampling; images of digits take at most 0.6 calls per code.",
    checked_on="real data",
)

WINDOW = 16


@check_kinds
def decode_image(
    model: DraftableModel,
    prompt: Tensor | Sequence[Sequence[int]],
    *,
    side: int,
    window: int = WINDOW,
    **options: Any,
) -> SpeculativeOutput:
    """The codes of a square image with a Jacobi window that guesses from the row above.

    Args:
        model: of the codes; `LlamaGen`, also under guidance.
        prompt: what stands before the codes.
        side: codes of a side.
        window: tokens read in a call.
        **options: those of `arcore.decoding.jacobi`.
    """
    return jacobi(
        model, prompt, max_new_tokens=side * side, window=window, initialiser=copy_above(side), **options
    )


def wall_gain(model: Any, batch: int, *, window: int, side: int, tokens: int, rounds: int = 5) -> float:
    """Process CPU time of a call that reads one code of each image over that of a call that reads a window of each.

    A window saves calls; this is the share of what it saves that remains as time. Texts accept more or fewer drafts,
    calls cost the same, so the weights may be random.
    """
    prompt = model.prompt(torch.arange(batch) % 10)
    fill = copy_above(side)
    best, calls = [float("inf")] * 2, [tokens, tokens]
    for turn in range(rounds + 1):
        for i in (0, 1):
            start = time.process_time()
            if i == 0:
                generate(model, prompt, max_new_tokens=tokens, seed=turn)
            else:
                out = jacobi(
                    model, prompt, max_new_tokens=tokens + window, window=window, initialiser=fill, seed=turn
                )
                calls[1] = out.calls
            spent = (time.process_time() - start) / calls[i]
            best[i] = min(best[i], spent) if turn else float("inf")
    return best[0] / best[1]


def claim(*, quick: bool) -> Claim:
    """The law of short texts, a check that would notice another law, and calls per code of digits."""
    vocab, length, prompt = 3, 3, [1, 2]
    model, sampling = small_model(vocab), Sampling(temperature=1.3, top_p=0.95)
    law = text_law(model, prompt, length, sampling)
    rows = [prompt] * (1200 if quick else 100_000)
    options: dict[str, Any] = {
        "max_new_tokens": length,
        "window": 3,
        "initialiser": random_tokens(vocab),
        "seed": 5,
    }
    found = outcomes(jacobi(model, rows, sampling=sampling, **options).ids, vocab)
    other = outcomes(jacobi(model, rows, temperature=1.0, **options).ids, vocab)
    prompts = [[1, 2, 0], [2], [0, 0]]
    plain = generate(model, prompts, max_new_tokens=20, temperature=0.0)
    greedy = jacobi(model, prompts, max_new_tokens=20, temperature=0.0, window=6)
    images = train_raster(8 if quick else 600)
    labels = torch.arange(10)
    count = 5 if quick else 30
    prompt_ids = images.prompt(labels.repeat(count // 5))
    calls = {}
    for name, fill in (("row above", copy_above(8)), ("random", random_tokens(4))):
        out = jacobi(images, prompt_ids, max_new_tokens=64, window=9, initialiser=fill, seed=1)
        calls[name] = 1 / out.tokens_per_round
    timed: tuple[Row, ...] = ()
    if not quick:
        # At batch 8 a call reads 64 codes, and a CPU that was busy with 8 takes as long as they are.
        small: dict[str, Any] = {"window": 8, "side": 8, "tokens": 64}
        # Random weights of the published size, 444 MB: what reading them costs decides there.
        large, size = create_model("llamagen_b").eval(), {"side": 16, "tokens": 12, "rounds": 3}
        timed = (
            at_least(
                "gain of time over calls saved, one digit, windows of 8", wall_gain(images, 1, **small), 0.8
            ),
            at_least("the same, 8 digits at a time", wall_gain(images, 8, **small), 0.8),
            at_least("the same, LlamaGen-B's size, windows of 5", wall_gain(large, 1, window=5, **size), 0.8),
            at_least("the same, windows of 8", wall_gain(large, 1, window=8, **size), 0.8),
        )
    return Claim(
        (
            at_least("p-value of the law of texts (G-test)", g_test(found, law), 0.01),
            at_most("p-value of another temperature's texts under that law", g_test(other, law), 1e-6),
            equals("greedy tokens that a window changes", int((plain.ids != greedy.ids).sum()), 0),
            at_most("calls per code of digits, 8 drafts from the row above", calls["row above"], 0.6),
            at_most("calls per code of digits, 8 random drafts", calls["random"], 0.6),
            *timed,
        )
    )
