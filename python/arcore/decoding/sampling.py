"""The settings of a draw, checked once and used by every loop."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from arcore.decoding.draws import check_settings
from arcore.nn.checks import check_choice, check_instance, check_number
from arcore.ops import filter_probs, sample
from arcore.ops.sample import Order, Sampled


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from logits; the fields are arguments of `arcore.ops.sample`.

    Raises:
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

    def __post_init__(self) -> None:
        check_settings(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
        check_choice("order", self.order, get_args(Order))
        for name in ("typical_p", "epsilon", "eta"):
            value = getattr(self, name)
            if value is not None:
                check_number(name, value)
            if value is not None and not 0.0 < value <= 1.0:
                raise ValueError(f"expected 0 < {name} <= 1 but got {value}; None switches it off")

    @classmethod
    def of(cls, given: Sampling | None, **fields: Any) -> Sampling:
        """`given`, or one made of named fields; both together are refused."""
        if given is not None:
            check_instance("sampling", given, Sampling)
        if given is not None and fields:
            raise ValueError(f"expected sampling or {', '.join(fields)} but got both; put them into sampling")
        return cls(**fields) if given is None else given

    def draw(self, logits: Tensor, seeds: Tensor, offsets: Tensor, **more: Any) -> Tensor | Sampled:
        """Tokens of rows of logits `[..., V]`; raises ValueError for a row without a distribution."""
        return sample(logits, **self._fields(), seed=seeds, offset=offsets, check=True, **more)

    def probs(self, logits: Tensor) -> Tensor:
        """What `draw` draws from, float32 `[..., V]`; raises ValueError for a row without a distribution."""
        probs = filter_probs(logits, **self._fields(), check=True)
        assert isinstance(probs, torch.Tensor)
        return probs

    def _fields(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
