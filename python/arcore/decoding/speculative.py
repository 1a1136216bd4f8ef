"""Generation with drafts that the model verifies, several tokens per call.

Every row of a batch accepts as many drafts as stand in it. With exact verification the tokens have the law of plain
sampling; where drafts were chosen and not drawn, they are the tokens that `generate` draws with the same seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from arcore.decoding._evaluating import evaluating
from arcore.decoding._rows import Decode, Ends, Rows
from arcore.decoding.drafters import Context, Draft, Drafter
from arcore.decoding.draws import row_seeds
from arcore.decoding.next_token import GenerateOutput, left_padded
from arcore.decoding.sampling import Sampling
from arcore.nn.checks import check_choice, check_instance, check_number, check_tensor
from arcore.nn.protocols import DraftableModel
from arcore.ops import verify_chain, verify_relaxed, verify_tree, verify_typical
from arcore.ops.speculative import Verified

Verify = Callable[[Tensor, Draft, Tensor, Tensor], Verified]
# `hidden`, `states` and `kept` of a `Context`.
_States = tuple[Tensor | None, Tensor | None, list[int] | None]


@dataclass(frozen=True)
class SpeculativeOutput(GenerateOutput):
    """What a run with drafts made.

    Attributes:
        calls: calls of the model, that of the prompt included, which gives the first token.
        rounds: int64 `[B]`, calls in which each row took part.
    """

    calls: int = 0
    rounds: Tensor | None = None

    @property
    def tokens_per_round(self) -> float:
        """New tokens of a row for each call that it took part in; 1 is plain decoding."""
        assert self.rounds is not None
        return float(self.lengths.sum()) / max(int(self.rounds.sum()), 1)


def exact(method: Literal["token", "block"] = "token") -> Verify:
    """Verification after which tokens have the model's law; at temperature 0 the likeliest ones, as in plain decoding.

    Args:
        method: see `arcore.ops.verify_chain`; "block" is for drawn chains.
    """
    check_choice("method", method, ("token", "block"))

    def verify(probs: Tensor, draft: Draft, seeds: Tensor, offsets: Tensor) -> Verified:
        if draft.parents is None:
            return verify_chain(
                probs,
                draft.tokens,
                draft.probs,
                seed=seeds,
                offset=offsets,
                method=method if draft.probs is not None else "token",
            )
        return verify_tree(
            probs,
            draft.tokens,
            draft.parents,
            draft.probs,
            seed=seeds,
            offset=offsets,
            replacement=draft.replacement,
        )

    return verify


def typical(
    epsilon: float = 0.09, delta: float = 0.3, bonus: Literal["greedy", "sample"] = "greedy"
) -> Verify:
    """Medusa's typical acceptance, which is not exact; arguments as for `arcore.ops.verify_typical`."""
    epsilon, delta = check_number("epsilon", epsilon), check_number("delta", delta)
    check_choice("bonus", bonus, ("greedy", "sample"))

    def verify(probs: Tensor, draft: Draft, seeds: Tensor, offsets: Tensor) -> Verified:
        return verify_typical(
            probs,
            draft.tokens,
            draft.parents,
            seed=seeds,
            offset=offsets,
            epsilon=epsilon,
            delta=delta,
            bonus=bonus,
        )

    return verify


def relaxed(neighbours: Tensor, **settings: Any) -> Verify:
    """LANTERN's relaxed verification, which is not exact; arguments as for `arcore.ops.verify_relaxed`."""
    check_tensor("neighbours", neighbours)

    def verify(probs: Tensor, draft: Draft, seeds: Tensor, offsets: Tensor) -> Verified:
        return verify_relaxed(
            probs,
            draft.tokens,
            neighbours,
            draft.parents,
            draft.probs,
            seed=seeds,
            offset=offsets,
            **settings,
        )

    return verify


def speculative_chain(
    model: DraftableModel,
    drafter: Drafter,
    prompt: Tensor | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    method: Literal["token", "block"] = "token",
    **options: Any,
) -> SpeculativeOutput:
    """Continue prompts with chains of drafts and exact verification.

    Args:
        model: the model whose law counts.
        drafter: proposes tokens.
        prompt: as for `generate`.
        max_new_tokens: as for `generate`.
        method: see `arcore.ops.verify_chain`.
        **options: those of `speculative_tree`, apart from `verify`.

    Raises:
        TypeError, ValueError: as for `speculative_tree`.

    Reference: Leviathan et al. (arXiv:2211.17192), Chen et al. (arXiv:2302.01318).
    """
    return speculative_tree(
        model, drafter, prompt, max_new_tokens=max_new_tokens, verify=exact(method), **options
    )


def speculative_tree(
    model: DraftableModel,
    drafter: Drafter,
    prompt: Tensor | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    verify: Verify | None = None,
    mask: Tensor | None = None,
    sampling: Sampling | None = None,
    eos: int | Sequence[int] | None = None,
    stop: Sequence[Sequence[int] | str] = (),
    decode: Decode | None = None,
    seed: int | Sequence[int] = 0,
    pad_id: int = 0,
    **settings: Any,
) -> SpeculativeOutput:
    """Continue prompts with trees (or chains) of drafts, read in one call of the model and verified.

    Args:
        model: the model whose law counts.
        drafter: proposes tokens.
        prompt: as for `generate`.
        max_new_tokens: as for `generate`.
        verify: `exact()` by default, `typical()` or `relaxed(...)`.
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
        ValueError: a row is empty, an argument is out of range, vocabularies differ, or the model gave NaN.
    """
    if not isinstance(model, DraftableModel):
        raise TypeError(
            f"{type(model).__name__} cannot read drafted tokens: it has no `extend`; use generate, or another model"
        )
    chosen = Sampling.of(sampling, **settings)
    check_instance("drafter", drafter, Drafter, "; take one of arcore.decoding, such as LookupDrafter()")
    judge = exact() if verify is None else verify
    ends = Ends.of(max_new_tokens, eos, stop, decode, model)
    ids, mask = left_padded(prompt, mask)
    seeds = row_seeds(seed, len(ids), ids.device)
    rows = Rows(len(ids), ends)
    texts = [row[n].tolist() for row, n in zip(ids, mask, strict=True)] if mask is not None else ids.tolist()
    counts = [0] * len(ids)
    if max_new_tokens == 0 or len(ids) == 0:
        return SpeculativeOutput(*rows.table(pad_id), rounds=torch.tensor(counts, dtype=torch.int64))
    most = ids.shape[1] + max_new_tokens + drafter.max_nodes
    calls = 1
    with torch.no_grad(), evaluating(model):
        drafter.start(model, len(ids), ids.shape[1] + max_new_tokens)
        cache = model.make_cache(len(ids), most)
        states: _States = None, None, None
        # Of its class: what stands in front of a model and hands on what it lacks has a prefill of its own.
        if hasattr(type(model), "read_prompt"):
            reader: Any = model
            logits, read, kept = reader.read_prompt(ids, cache, mask)
            states = read[torch.arange(len(ids), device=ids.device), [n - 1 for n in kept]], read, kept
        else:
            logits = model.prefill(ids, cache, mask)
        first = draw_first(logits[:, : model.vocab_size], texts, seeds, chosen)
        for row, token in enumerate(first):
            texts[row] += [token][: rows.add(row, [token])]
            counts[row] = 1
        while any(rows.active):
            limits = [max(max_new_tokens - len(new), 1) for new in rows.new]
            context = Context(texts, seeds, calls - 1, limits, ids.device, *states)
            draft = drafter.propose(context)
            verified, hidden, read = _round(model, cache, context, draft, chosen, judge, rows.active)
            calls += 1
            emitted = verified.tokens.tolist()
            stand = [0] * len(texts)
            for row, accepted in enumerate(verified.accepted.tolist()):
                if rows.active[row]:
                    counts[row] += 1
                    new = emitted[row][: accepted + 1]
                    # Fewer than were accepted where the text ends before the last of them.
                    stand[row] = rows.add(row, new)
                    texts[row] += new[: stand[row]]
            states = hidden, read, stand
            forget(cache, texts)
    table, lengths = rows.table(pad_id)
    return SpeculativeOutput(table, lengths, calls=calls, rounds=torch.tensor(counts))


def draw_first(logits: Tensor, texts: list[list[int]], seeds: Tensor, sampling: Sampling) -> list[int]:
    """The first new token of each row; each later call of the model reads the token before its drafts again."""
    offsets = torch.tensor([len(text) for text in texts], device=logits.device)
    drawn = sampling.draw(logits, seeds, offsets)
    assert isinstance(drawn, Tensor)
    return list(drawn.tolist())


def forget(cache: Any, texts: list[list[int]]) -> None:
    """Cut what a row that has just ended read beyond its text; a state cannot be cut and needs no room."""
    if hasattr(cache, "truncate"):
        cache.truncate([min(len(text) - 1, have) for text, have in zip(texts, cache.lengths, strict=True)])


def _round(
    model: DraftableModel,
    cache: Any,
    context: Context,
    draft: Draft,
    sampling: Sampling,
    judge: Verify,
    active: list[bool],
) -> tuple[Verified, Tensor, Tensor]:
    """Read a draft behind each text's last token, verify it, keep what stands in the rows that go on.

    Returns:
        What stands; the state behind the last token that stands, `[B, C]`; those of all tokens on the way, `[B, N, C]`.
    """
    tokens, vocab = draft.tokens, model.vocab_size
    last = torch.tensor([[text[-1]] for text in context.texts], device=context.device)
    parents: Any = None
    if draft.parents is not None:
        hanging = draft.parents + 1
        root = torch.full_like(hanging[..., :1], -1)
        parents = torch.cat([root, hanging], -1)
        parents = parents.tolist()
    out = model.extend(torch.cat([last, tokens.clamp(min=0)], 1), cache, parents)
    probs = sampling.probs(out.logits[..., :vocab])
    offsets = torch.tensor([len(text) for text in context.texts], device=context.device)
    verified = judge(probs, draft, context.seeds, offsets)
    if not bool(verified.valid.all()):
        row = int((~verified.valid).nonzero()[0])
        raise ValueError(f"the model gave no distribution for row {row}: its logits are NaN or all -inf")
    path = torch.cat([torch.zeros_like(last), torch.where(verified.path >= 0, verified.path + 1, -1)], 1)
    going = torch.tensor(active, device=path.device).unsqueeze(1)
    cache.keep(path.masked_fill(~going, -1))
    index = path.clamp(min=0).unsqueeze(2).expand(-1, -1, out.hidden.shape[2])
    states = out.hidden.gather(1, index)
    hidden = states[torch.arange(len(states), device=path.device), verified.accepted.tolist()]
    return verified, hidden, states
