"""The settings of a draw, checked once and used by every loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from arcore.decoding.bans import allow_without_repeats, allow_without_words
from arcore.decoding.draws import check_settings
from arcore.nn.checks import check_choice, check_instance, check_number, check_whole
from arcore.nn.kinds import check_kinds, explain_kinds
from arcore.ops import filter_probs, sample
from arcore.ops.sample import Guidance, Order, Sampled, TopPTies


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from logits; the fields are arguments of `arcore.ops.sample`, with its ranges, and two bans.

    Attributes:
        without_words: token ids of words that are not completed, see `allow_without_words`.
        without_repeats: tokens of an n-gram that does not occur twice, see `allow_without_repeats`; None for none. Bans
            look at the text so far, prompt included: `generate`, `stream` and `next_token` know it, the loops that
            verify drafts do not and refuse them.

    Raises:
        TypeError: a setting is no number, or words are no ids.
        ValueError: a setting is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    epsilon: float | None = None
    eta: float | None = None
    order: Order = "hf"
    guidance: Guidance = "before"
    min_tokens_to_keep: int = 1
    top_p_ties: TopPTies = "together"
    without_words: Sequence[Sequence[int]] = ()
    without_repeats: int | None = None

    def __post_init__(self) -> None:
        check_settings(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
        check_choice("order", self.order, get_args(Order))
        for name in ("typical_p", "epsilon", "eta"):
            value = getattr(self, name)
            if value is not None:
                check_number(name, value)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"expected 0 <= {name} <= 1 but got {value}; None switches it off")
        check_whole("min_tokens_to_keep", self.min_tokens_to_keep, 1)
        check_choice("guidance", self.guidance, get_args(Guidance))
        check_choice("top_p_ties", self.top_p_ties, get_args(TopPTies))
        if self.top_p_ties == "sorted" and self.order == "joint":
            raise ValueError("expected top_p_ties='together' with order='joint' but got 'sorted'")
        if self.without_repeats is not None:
            check_whole("without_repeats", self.without_repeats, 1)
        words: Any = self.without_words
        if isinstance(words, str) or not all(
            isinstance(word, Sequence)
            and not isinstance(word, str)
            and word
            and all(type(x) is int for x in word)
            for word in words
        ):
            raise TypeError(
                f"expected without_words as lists of token ids but got {words!r}; encode words with the tokenizer"
            )
        object.__setattr__(self, "without_words", tuple(tuple(word) for word in words))

    @classmethod
    def of(cls, given: Sampling | None, **fields: Any) -> Sampling:
        """`given`, or one made of named fields; both together are refused."""
        if given is not None:
            check_instance("sampling", given, Sampling)
        if given is not None and fields:
            raise ValueError(f"expected sampling or {', '.join(fields)} but got both; put them into sampling")
        return cls(**fields) if given is None else given

    @property
    def bans(self) -> bool:
        """Whether the text so far decides what may come next."""
        return bool(self.without_words) or self.without_repeats is not None

    @check_kinds
    def allowed(self, ids: Tensor, vocab_size: int) -> Tensor | None:
        """What the bans leave after the texts `ids` `[B, L]`, bool `[B, V]`; None where there are none.

        Numbers outside of [0, vocab_size) are padding.
        """
        mask = None
        if self.without_words:
            mask = allow_without_words(ids, self.without_words, vocab_size)
        if self.without_repeats is not None:
            others = allow_without_repeats(ids, self.without_repeats, vocab_size)
            mask = others if mask is None else mask & others
        return mask

    @explain_kinds
    def draw(self, logits: Tensor, seeds: Tensor, offsets: Tensor, **more: Any) -> Tensor | Sampled:
        """Tokens of rows of logits `[..., V]`; raises ValueError for a row without a distribution.

        Args:
            logits: of the rows.
            seeds: of the rows.
            offsets: positions of the new tokens.
            **more: arguments of `arcore.ops.sample`; with bans, `mask=self.allowed(...)` or stricter.
        """
        return sample(logits, **self._fields("mask" in more), seed=seeds, offset=offsets, check=True, **more)

    @explain_kinds
    def probs(self, logits: Tensor) -> Tensor:
        """What `draw` draws from, float32 `[..., V]`; raises ValueError for a row without a distribution."""
        probs = filter_probs(logits, **self._fields(), check=True)
        assert isinstance(probs, torch.Tensor)
        return probs

    def _fields(self, banned: bool = False) -> dict[str, Any]:
        if self.bans and not banned:
            raise ValueError(
                "expected sampling without without_words and without_repeats but got some: this loop does not follow "
                "the text; use generate"
            )
        names = [field.name for field in dataclasses.fields(self)]
        return {n: getattr(self, n) for n in names if n not in ("without_words", "without_repeats")}
