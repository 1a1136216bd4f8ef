"""The check of the claim."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore.catalog import create_model
from arcore.catalog.claims import Claim, at_least, at_most, equals, shaken, steps
from arcore.decoding import generate
from arcore.decoding.laws import small_model
from arcore.nn.causal import CausalDecoder
from arcore.zoo.acceleration.first.routing import (
    FirstPatch,
    Routers,
    SkippingModel,
    calibrate,
    config_for,
    routed_loss,
    routed_skipping_loss,
    without,
)


def two_tasks(count: int, length: int = 6, symbols: int = 8) -> Tensor:
    """Texts of two kinds: a mark of the kind, symbols, a separator, and the symbols again, as they are or reversed.

    Returns:
        int64 `[count, 2 length + 2]`.
    """
    words = torch.randint(symbols, (count, length))
    kind = torch.arange(count) % 2
    answer = torch.where(kind.unsqueeze(1) == 0, words, words.flip(1))
    marks = (symbols + kind).unsqueeze(1)
    return torch.cat([marks, words, torch.full_like(marks, symbols + 2), answer], dim=1)


def _train(parameters: Any, loss_of: Any, count: int, what: str, lr: float) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    for _ in steps(count, what):
        loss = loss_of(two_tasks(64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def _answer_loss(model: CausalDecoder, ids: Tensor, skipped: Sequence[int]) -> float:
    with without(model, skipped):
        visible, angles = model.behind((0,), ids.shape[1] - 1, ids.device)
        logits = model.logits(model.run(model.embed(ids[:, :-1]), angles, visible))
    answer = slice(ids.shape[1] // 2 - 1, None)
    return float(F.cross_entropy(logits[:, answer].flatten(0, 1), ids[:, 1:][:, answer].flatten()))


def _learned(count: int) -> dict[str, float]:
    """Cross entropies of answers: without skipping, under routed skipping, under the best fixed skipping of as many
    layers, and under routed skipping with adapters; and how many layers are skipped."""
    model: Any = small_model(11, seed=1, layers=5, scale=0.0).requires_grad_(True)
    _train(
        model.parameters(),
        lambda ids: F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()),
        count,
        "training the model",
        3e-3,
    )
    model.requires_grad_(False)
    patch = FirstPatch(config_for(model))
    routers = patch.routers
    turn = iter(range(count))
    _train(
        routers.parameters(),
        lambda ids: routed_loss(model, routers, ids, price=0.3, sharpness=next(turn) / count)[0],
        count // 2,
        "training the routers",
        2e-2,
    )
    ids, prompt = two_tasks(200), 8
    calibrate(
        model, routers, [two_tasks(2)[kind : kind + 1, :prompt] for kind in (0, 1) for _ in range(20)], 0.2
    )

    def measured() -> tuple[float, list[tuple[int, ...]]]:
        decided = [SkippingModel(model, routers).decide(ids[kind::2, :prompt]) for kind in (0, 1)]
        return sum(_answer_loss(model, ids[kind::2], decided[kind]) for kind in (0, 1)) / 2, decided

    routed, decided = measured()
    most = max(len(one) for one in decided)
    fixed = min(_answer_loss(model, ids, one) for one in itertools.combinations(range(1, 4), most))
    whole = _answer_loss(model, ids, ())
    patch.attach(model)
    _train(
        patch.adapters.parameters(),
        lambda ids: routed_skipping_loss(model, routers, ids, prompt=prompt)[0],
        count // 2,
        "adapting the model",
        5e-3,
    )
    adapted, _ = measured()
    return {"whole": whole, "routed": routed, "fixed": fixed, "adapted": adapted,
            "count": sum(len(one) for one in decided) / 2}  # fmt: skip


def _seconds(models: Sequence[Any], prompt: Tensor, rounds: int = 7) -> list[float]:
    """Process CPU time of steps of each model, the least of several rounds in which they take turns."""
    caches = [model.make_cache(1, 8 * rounds + prompt.shape[1]) for model in models]
    best = [float("inf")] * len(models)
    for model, cache in zip(models, caches, strict=True):
        model.prefill(prompt, cache)
    for _ in range(rounds):
        for i, (model, cache) in enumerate(zip(models, caches, strict=True)):
            start = time.process_time()
            for _ in range(8):
                model.step(prompt[:, 0], cache)
            best[i] = min(best[i], time.process_time() - start)
    return best


def claim(*, quick: bool) -> Claim:
    """Keeping all, caches of skipped layers, time; in full also routers trained on texts of two kinds."""
    model = small_model(11, layers=6)
    prompt = torch.tensor([[1, 2, 3]])
    plain = generate(model, prompt, max_new_tokens=20, seed=1).ids
    kept = generate(SkippingModel(model, Routers(32, 6)), prompt, max_new_tokens=20, seed=1).ids  # type: ignore[arg-type]
    skipping = SkippingModel(model, skip=[2, 4])
    cache, full = skipping.make_cache(1, 10), model.make_cache(1, 10)
    skipping.prefill(prompt, cache)
    wide = _wide_model(12)
    times = _seconds([SkippingModel(wide, skip=[]), SkippingModel(wide, skip=[2, 4, 6, 8])], prompt)
    rows = [
        equals("tokens that keeping all layers changes", int((plain != kept).sum()), 0),
        equals("bytes of the cache for two layers skipped of six, over those of six", cache.nbytes / full.nbytes, 4 / 6,
               tolerance=1e-9),
        at_least("share of the time saved by skipping 4 of 12 layers", 1 - times[1] / times[0], 0.7 * 4 / 12),
    ]  # fmt: skip
    if not quick:
        found = _learned(600)
        rows += [
            at_least("layers of five that routers skip, mean", found["count"], 1.0),
            at_most("cross entropy of routed skipping less that of the best fixed one",
                    found["routed"] - found["fixed"], 1e-4),
            at_most("loss of cross entropy by routed skipping that is left after adapting",
                    (found["adapted"] - found["whole"]) / (found["routed"] - found["whole"]), 0.5),
        ]  # fmt: skip
    return Claim(tuple(rows))


def _wide_model(layers: int) -> Any:
    """A random model whose layers take the time."""
    model = create_model(
        "llama_tiny", dim=512, num_layers=layers, num_heads=8, num_kv_heads=8, hidden_dim=1376, vocab_size=16
    )
    return shaken(model).eval().requires_grad_(False)
