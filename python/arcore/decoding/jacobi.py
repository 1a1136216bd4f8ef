"""Speculative Jacobi decoding: a window of guesses is refined in parallel, without a draft model (SJD).

Each call of the model reads the last token and a window of drafts; those that still stand are kept, the others drawn
anew from what the model now says, and the window is filled up by an initialiser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from arcore.decoding._evaluating import evaluating
from arcore.decoding._rows import Decode, Ends, Rows
from arcore.decoding.draws import row_seeds
from arcore.decoding.next_token import left_padded
from arcore.decoding.sampling import Sampling
from arcore.decoding.speculative import SpeculativeOutput, draw_first, forget
from arcore.nn.checks import check_choice, check_whole
from arcore.nn.kinds import check_kinds
from arcore.nn.protocols import DraftableModel
from arcore.ops import verify_jacobi

# The prompt's length, all tokens so far and how many to guess; gives the guesses.
Initialiser = Callable[[int, list[int], int], list[int]]


def random_tokens(vocab_size: int, seed: int = 0) -> Initialiser:
    """Guesses are uniform; the same text gets the same ones."""
    vocab_size, seed = check_whole("vocab_size", vocab_size, 1), check_whole("seed", seed, -(2**63))

    def guess(prompt: int, text: list[int], count: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed + 1_000_003 * len(text))
        return torch.randint(vocab_size, (count,), generator=generator).tolist()

    return guess


@check_kinds
def repeat_last(prompt: int, text: list[int], count: int) -> list[int]:
    """Guesses repeat the last token; right behind the prompt, which may have tokens of other kinds, the token 0."""
    return [text[-1] if len(text) > prompt else 0] * count


def copy_above(width: int) -> Initialiser:
    """Guesses repeat the token one row above in an image `width` tokens wide; in its first row the last token."""
    width = check_whole("width", width, 1, "token")

    def guess(prompt: int, text: list[int], count: int) -> list[int]:
        full = list(text)
        for _ in range(count):
            above = len(full) - width
            full.append(full[above] if above >= prompt else repeat_last(prompt, full, 1)[0])
        return full[len(text) :]

    return guess


def jacobi(
    model: DraftableModel,
    prompt: Tensor | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    window: int = 16,
    initialiser: Initialiser | None = None,
    coupling: Literal["fresh", "common"] = "fresh",
    mask: Tensor | None = None,
    sampling: Sampling | None = None,
    eos: int | Sequence[int] | None = None,
    stop: Sequence[Sequence[int] | str] = (),
    decode: Decode | None = None,
    seed: int | Sequence[int] = 0,
    pad_id: int = 0,
    **settings: Any,
) -> SpeculativeOutput:
    """Continue prompts with a window of guesses; the tokens have the law of plain sampling.

    Args:
        model: the model.
        prompt: as for `generate`.
        max_new_tokens: as for `generate`.
        window: tokens read in a call, the last one and `window - 1` drafts; 1 is plain decoding.
        initialiser: fills the window; `repeat_last` by default.
        coupling: "fresh": drafts are judged against what they were drawn from, as in the paper. "common": a draft
            stands where the number that belongs to its place still draws it, so the tokens are those of `generate`
            with the same seed.
        mask: as for `generate`.
        sampling: how tokens are drawn; or give its fields, such as `temperature`, by name.
        eos: as for `generate`.
        stop: as for `generate`.
        decode: as for `generate`.
        seed: as for `generate`.
        pad_id: as for `generate`.
        **settings: fields of `Sampling`.

    Returns:
        New tokens, how many each row has, and the calls that it took.

    Raises:
        TypeError: the model cannot read drafts, or ids are no integers.
        ValueError: a row is empty, an argument is out of range, or the model gave NaN.

    Reference: SJD (arXiv:2410.01699, algorithm 1).
    """
    if not isinstance(model, DraftableModel):
        raise TypeError(
            f"{type(model).__name__} cannot read drafted tokens: it has no `extend`; use generate, or another model"
        )
    window = check_whole("window", window, 1, "token")
    check_choice("coupling", coupling, ("fresh", "common"))
    chosen = Sampling.of(sampling, **settings)
    fill = repeat_last if initialiser is None else initialiser
    ends = Ends.of(max_new_tokens, eos, stop, decode, model)
    ids, mask = left_padded(prompt, mask)
    seeds = row_seeds(seed, len(ids), ids.device)
    rows = Rows(len(ids), ends)
    texts = [row[n].tolist() for row, n in zip(ids, mask, strict=True)] if mask is not None else ids.tolist()
    prompts = [len(text) for text in texts]
    counts = [0] * len(ids)
    if max_new_tokens == 0 or len(ids) == 0:
        return SpeculativeOutput(*rows.table(pad_id), rounds=torch.tensor(counts, dtype=torch.int64))
    vocab, calls = model.vocab_size, 1
    # Drafts of each row and, for "fresh", what each was drawn from; guesses were drawn from themselves.
    drafts: list[list[int]] = [[] for _ in texts]
    drawn_from = torch.empty(len(texts), 0, vocab, device=ids.device)
    with torch.no_grad(), evaluating(model):
        cache = model.make_cache(len(ids), ids.shape[1] + max_new_tokens + window)
        logits = model.prefill(ids, cache, mask)
        for row, token in enumerate(draw_first(logits[:, :vocab], texts, seeds, chosen)):
            texts[row] += [token][: rows.add(row, [token])]
            counts[row] = 1
        while any(rows.active):
            # What a row drafts must not depend on the others: each has its own number, the rest is padding.
            sizes = [
                min(window, max_new_tokens - len(new)) - 1 if on else 0
                for new, on in zip(rows.new, rows.active, strict=True)
            ]
            size = max(sizes)
            for row, text in enumerate(texts):
                have = drafts[row][: sizes[row]]
                wanted = sizes[row] - len(have)
                guesses = fill(prompts[row], text + have, wanted) if wanted else []
                if len(guesses) != wanted or any(not 0 <= token < vocab for token in guesses):
                    raise ValueError(
                        f"expected the initialiser to give {wanted} tokens from 0 to {vocab - 1} but got {guesses}"
                    )
                drafts[row] = have + guesses
            padded = [row + [-1] * (size - len(row)) for row in drafts]
            tokens = torch.tensor(padded, dtype=torch.int64, device=ids.device).view(len(texts), size)
            before = None
            if coupling == "fresh":
                before = torch.zeros(len(texts), size, vocab, device=ids.device)
                before.scatter_(2, tokens.clamp(min=0).unsqueeze(2), 1.0)
                for row, known in enumerate(_known(drawn_from, size)):
                    before[row, : len(known)] = known
            last = torch.tensor([[text[-1]] for text in texts], device=ids.device)
            out = model.extend(torch.cat([last, tokens.clamp(min=0)], 1), cache)
            calls += 1
            probs = chosen.probs(out.logits[..., :vocab])
            offsets = torch.tensor([len(text) for text in texts], device=ids.device)
            found = verify_jacobi(probs, tokens, before, seed=seeds, offset=offsets)
            if not bool(found.valid.all()):
                row = int((~found.valid).nonzero()[0])
                raise ValueError(
                    f"the model gave no distribution for row {row}: its logits are NaN or all -inf"
                )
            accepted = found.accepted.tolist()
            emitted, fresh = found.tokens.tolist(), found.drafts.tolist()
            cache.commit([n + 1 if on else 0 for n, on in zip(accepted, rows.active, strict=True)])
            kept = []
            for row, n in enumerate(accepted):
                if not rows.active[row]:
                    drafts[row] = []
                    kept.append(probs[row, :0])
                    continue
                counts[row] += 1
                new = emitted[row][: n + 1]
                texts[row] += new[: rows.add(row, new)]
                drafts[row] = [token for token in fresh[row] if token >= 0]
                kept.append(probs[row, n + 1 : n + 1 + len(drafts[row])])
            forget(cache, texts)
            drawn_from = torch.nn.utils.rnn.pad_sequence(kept, batch_first=True, padding_value=-1.0)
    table, lengths = rows.table(pad_id)
    return SpeculativeOutput(table, lengths, calls=calls, rounds=torch.tensor(counts))


def _known(drawn_from: Tensor, size: int) -> list[Tensor]:
    """What each row's drafts were drawn from, without padding, at most `size` of them."""
    if drawn_from.shape[1] == 0:
        return [row[:0] for row in drawn_from]
    real = (drawn_from[:, :, 0] >= 0).sum(1).tolist()
    return [row[: min(n, size)] for row, n in zip(drawn_from, real, strict=True)]
