"""Models made of models: guidance, and log-linear mixes of several.

Each is a model itself, so every loop decodes it: `generate`, `jacobi`, `speculative_tree`. Weighted sums of logits are
weighted products of distributions, renormalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from arcore.nn.checks import check_number, check_sequence, check_tensor
from arcore.nn.kinds import check_kinds, explain_kinds
from arcore.nn.protocols import Extended


class Caches:
    """Caches that move together; what they hold may differ in length by a fixed offset.

    Args:
        parts: the caches; the first one's lengths count.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)
        # What each row of each part holds more than the first one's, known from the first tokens on.
        self._more: list[list[int]] | None = None
        # Tokens that each row has read, -1 for padding; where penalties need them.
        self.read: Tensor | None = None

    @property
    def batch(self) -> int:
        return int(self.parts[0].batch)

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self.parts[0].lengths)

    @property
    def length(self) -> int:
        return int(self.parts[0].length)

    def align(self) -> None:
        """Remember how the parts differ in length now."""
        self._more = [
            [own - first for own, first in zip(part.lengths, self.lengths, strict=True)]
            for part in self.parts
        ]

    @explain_kinds
    def commit(self, counts: Any) -> None:
        for part in self.parts:
            part.commit(counts)

    @explain_kinds
    def keep(self, path: Any) -> None:
        for part in self.parts:
            part.keep(path)

    @explain_kinds
    def truncate(self, length: Any) -> None:
        self._check_plain()
        numbers = [length] * self.batch if isinstance(length, int) else list(length)
        more = self._more or [[0] * self.batch] * len(self.parts)
        for part, offsets in zip(self.parts, more, strict=True):
            part.truncate([n + offset for n, offset in zip(numbers, offsets, strict=True)])

    def snapshot(self) -> list[Any]:
        self._check_plain()
        return [part.snapshot() for part in self.parts]

    @explain_kinds
    def restore(self, snapshot: list[Any]) -> None:
        for part, one in zip(self.parts, snapshot, strict=True):
            part.restore(one)

    @explain_kinds
    def select(self, rows: Any) -> None:
        index = torch.as_tensor(rows).tolist()
        for part in self.parts:
            part.select(index)
        if self.read is not None:
            self.read = self.read[index]
        if self._more is not None:
            self._more = [[offsets[row] for row in index] for offsets in self._more]

    @explain_kinds
    def fork(self, rows: Any = None) -> Caches:
        other = Caches([part.fork(rows) for part in self.parts])
        if self._more is not None:
            index = list(range(self.batch)) if rows is None else torch.as_tensor(rows).tolist()
            other._more = [[offsets[row] for row in index] for offsets in self._more]
        if self.read is not None:
            other.read = self.read if rows is None else self.read[torch.as_tensor(rows).tolist()]
        return other

    @explain_kinds
    def note(self, ids: Tensor) -> Tensor:
        """Add tokens `[B, L]` to those that were read; returns all."""
        self.read = ids if self.read is None else torch.cat([self.read, ids], dim=1)
        return self.read

    def _check_plain(self) -> None:
        if self.read is not None:
            raise ValueError(
                "a GuidedModel with a repetition_penalty of its own cannot go back to fewer tokens: decode with "
                "generate, or give the penalty to the decoder"
            )


def penalised(logits: Tensor, read: Tensor, penalty: float) -> Tensor:
    """Logits `[B, V]` with those of the tokens in `read` divided by the penalty if positive, times it if not.

    Args:
        logits: of the next token.
        read: ids `[B, L]`; numbers outside of [0, V) are padding.
        penalty: above 0; 1 changes nothing (CTRL, arXiv:1909.05858).
    """
    vocab = logits.shape[-1]
    place = torch.where((read >= 0) & (read < vocab), read, vocab)
    wide = torch.cat([logits, logits.new_zeros(len(logits), 1)], dim=1)
    found = wide.gather(1, place)
    return wide.scatter(1, place, torch.where(found > 0, found / penalty, found * penalty))[:, :vocab]


def _check_model(name: str, model: object) -> None:
    if not hasattr(model, "vocab_size") or not hasattr(model, "make_cache"):
        raise TypeError(
            f"expected {name} to be a model of tokens but got {type(model).__name__}; it lacks vocab_size or make_cache"
        )


@check_kinds
def mix_logits(logits: Sequence[Tensor], weights: Sequence[float | Tensor]) -> Tensor:
    """`weights[0] * logits[0] + weights[1] * logits[1] + ...`.

    A token that the first tensor forbids (-inf) stays forbidden; where a tensor of negative weight has -inf, the first
    one's logit stands in, as in `arcore.ops.sample`.
    """
    first = logits[0]
    mixed = first * weights[0]
    for other, weight in zip(logits[1:], weights[1:], strict=True):
        negative = torch.as_tensor(weight < 0)
        other = torch.where((other == -torch.inf) & negative, first, other)
        # 0 * -inf would be NaN: a tensor of weight 0 says nothing.
        mixed = mixed + torch.where(torch.as_tensor(weight == 0), 0.0, other * weight)
    return mixed.masked_fill(first == -torch.inf, -torch.inf)


class MixedModel:
    """Several models of one vocabulary whose logits are added up with weights: log p = sum of w_i log p_i + const.

    Args:
        models: the models; hidden states come from the first one.
        weights: one number each.

    Raises:
        ValueError: numbers differ, or vocabularies do.
    """

    def __init__(self, models: Sequence[Any], weights: Sequence[float]) -> None:
        check_sequence("models", models, "models")
        check_sequence("weights", weights, "numbers")
        for model in models:
            _check_model("models", model)
        if not models or len(models) != len(weights):
            raise ValueError(
                f"expected a weight for each of at least one model but got {len(weights)} for {len(models)}"
            )
        sizes = [model.vocab_size for model in models]
        if len(set(sizes)) != 1:
            raise ValueError(f"expected models of one vocabulary but theirs have {sizes} tokens")
        self.models, self.weights = list(models), [check_number("weights", weight) for weight in weights]

    @property
    def vocab_size(self) -> int:
        return int(self.models[0].vocab_size)

    @explain_kinds
    def make_cache(self, batch: int, max_length: int) -> Caches:
        """An empty cache of each model."""
        return Caches([model.make_cache(batch, max_length) for model in self.models])

    @explain_kinds
    def prefill(self, ids: Tensor, cache: Caches, mask: Tensor | None = None) -> Tensor:
        """See `TokenModel`."""
        return self._mix(
            [model.prefill(ids, part, mask) for model, part in zip(self.models, cache.parts, strict=True)]
        )

    @explain_kinds
    def step(self, ids: Tensor, cache: Caches) -> Tensor:
        """See `TokenModel`."""
        return self._mix(
            [model.step(ids, part) for model, part in zip(self.models, cache.parts, strict=True)]
        )

    @explain_kinds
    def extend(self, ids: Tensor, cache: Caches, parents: Any = None) -> Extended:
        """See `DraftableModel`."""
        out = [model.extend(ids, part, parents) for model, part in zip(self.models, cache.parts, strict=True)]
        return Extended(self._mix([one.logits for one in out]), out[0].hidden)

    def _mix(self, logits: list[Tensor]) -> Tensor:
        return mix_logits([one[..., : self.vocab_size] for one in logits], self.weights)


class GuidedModel:
    """Classifier-free guidance: `uncond + scale * (cond - uncond)` (arXiv:2207.12598, arXiv:2306.17806).

    The conditional and the unconditional text of each row have caches of their own and get the same new tokens.

    Args:
        model: the model.
        scale: strength; 1 is no guidance, and costs no second pass.
        uncond: what stands in the prompt's place without the condition, int64 `[1 or B, L]` without padding.
        interval: new tokens to guide, from the first number up to the second, which is left out; None for all.
        repetition_penalty: put on the logits of both texts before they are mixed, for the tokens of the conditional
            one, as `arcore.ops.sample(guidance="after")` and transformers' processors for guidance behind penalties do;
            the decoder's own `repetition_penalty` acts on the mixed logits. Not with drafts.
    """

    def __init__(
        self,
        model: Any,
        *,
        scale: float,
        uncond: Tensor,
        interval: tuple[int, int] | None = None,
        repetition_penalty: float = 1.0,
    ) -> None:
        _check_model("model", model)
        check_tensor("uncond", uncond)
        self.penalty = check_number("repetition_penalty", repetition_penalty)
        if not 0 < self.penalty < float("inf"):
            raise ValueError(
                f"expected repetition_penalty to be positive and finite but got {repetition_penalty}; 1 changes nothing"
            )
        if uncond.dim() != 2 or uncond.shape[1] == 0:
            raise ValueError(
                f"expected uncond of shape [1 or B, L] with L >= 1 but got {tuple(uncond.shape)}"
            )
        if interval is not None and not 0 <= interval[0] <= interval[1]:
            raise ValueError(f"expected an interval of two numbers that do not fall but got {interval}")
        self.model, self.scale, self.uncond, self.interval = (
            model,
            check_number("scale", scale),
            uncond,
            interval,
        )
        self._prompts: list[int] = []

    @property
    def vocab_size(self) -> int:
        return int(self.model.vocab_size)

    @explain_kinds
    def make_cache(self, batch: int, max_length: int) -> Caches:
        """Empty caches of the conditional and the unconditional text."""
        if len(self.uncond) not in (1, batch):
            raise ValueError(f"expected uncond for 1 or {batch} rows but got {len(self.uncond)}")
        return Caches(
            [
                self.model.make_cache(batch, max_length),
                self.model.make_cache(batch, max_length + self.uncond.shape[1]),
            ]
        )

    @explain_kinds
    def prefill(self, ids: Tensor, cache: Caches, mask: Tensor | None = None) -> Tensor:
        """See `TokenModel`; the first tokens are the prompt, in whose place the other text has `uncond`."""
        cond, other = cache.parts
        first = cache.length == 0
        logits = self.model.prefill(ids, cond, mask)
        uncond = self.model.prefill(self.uncond.expand(len(ids), -1) if first else ids, other)
        if first:
            self._prompts = list(cache.lengths)
            cache.align()
        read = ids if mask is None else ids.masked_fill(~mask, -1)
        cond, uncond = self._penalised(read, cache, logits, uncond)
        return self._guide(cond, uncond, self._place(cache, ids.device))

    @explain_kinds
    def step(self, ids: Tensor, cache: Caches) -> Tensor:
        """See `TokenModel`."""
        cond, uncond = (self.model.step(ids, part) for part in cache.parts)
        cond, uncond = self._penalised(ids.unsqueeze(1), cache, cond, uncond)
        return self._guide(cond, uncond, self._place(cache, ids.device))

    def _penalised(self, ids: Tensor, cache: Caches, *logits: Tensor) -> tuple[Tensor, ...]:
        """Logits of both texts after new tokens `[B, L]`."""
        if self.penalty == 1.0:
            return logits
        read = cache.note(ids)
        return tuple(penalised(one[:, : self.vocab_size].float(), read, self.penalty) for one in logits)

    @explain_kinds
    def extend(self, ids: Tensor, cache: Caches, parents: Any = None) -> Extended:
        """See `DraftableModel`.

        Raises:
            ValueError: there is a `repetition_penalty`, which would have to follow each draft.
        """
        if self.penalty != 1.0:
            raise ValueError(
                "a GuidedModel with a repetition_penalty of its own reads no drafts: decode with generate, or give the "
                "penalty to the decoder"
            )
        cond, uncond = (self.model.extend(ids, part, parents) for part in cache.parts)
        depth = torch.arange(1, ids.shape[1] + 1, device=ids.device).expand(ids.shape)
        if parents is not None:
            table = torch.as_tensor(parents).to(ids.device).expand(ids.shape)
            depth = torch.ones_like(ids)
            for i in range(ids.shape[1]):
                above = depth.gather(1, table[:, i : i + 1].clamp(min=0)).squeeze(1)
                depth[:, i] = torch.where(table[:, i] >= 0, above + 1, 1)
        place = self._place(cache, ids.device).unsqueeze(1) + depth
        return Extended(self._guide(cond.logits, uncond.logits, place), cond.hidden)

    def _place(self, cache: Caches, device: torch.device) -> Tensor:
        """Which new token of each row the logits after the cache's last one are for."""
        new = [n - prompt for n, prompt in zip(cache.lengths, self._prompts, strict=True)]
        return torch.tensor(new, device=device)

    def _guide(self, cond: Tensor, uncond: Tensor, place: Tensor) -> Tensor:
        vocab = self.vocab_size
        scale = torch.full(place.shape, self.scale, device=cond.device)
        if self.interval is not None:
            guided = (place >= self.interval[0]) & (place < self.interval[1])
            scale = torch.where(guided, scale, 1.0)
        scale = scale.unsqueeze(-1)
        return mix_logits([cond[..., :vocab], uncond[..., :vocab]], [scale, 1.0 - scale])
