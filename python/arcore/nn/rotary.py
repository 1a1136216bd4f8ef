"""Rotary positions of text, with the ways to stretch them that published models use (RoPE, arXiv:2104.09864).

Channel i of a head is paired with channel i + D / 2. Rates and angles are computed in float32, like in transformers:
the models were trained with these angles, which differ from exact ones far from the start of a text.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from arcore.nn.kinds import Axes, check_kinds, explain_kinds

RopeType = Literal["default", "linear", "llama3"]


class Angles(NamedTuple):
    """Cosines and sines of N tokens.

    Attributes:
        cos: float32 `[B or 1, N, 1, D]`.
        sin: like `cos`, with the sign that `turn` needs: negative in the first half of the channels.
    """

    cos: Tensor
    sin: Tensor

    @explain_kinds
    def turn(self, x: Annotated[Tensor, Axes("B N H D")]) -> Tensor:
        """Turn queries or keys `[B, N, H, D]`; computed in float32, returned in the dtype of x."""
        first, second = x.chunk(2, dim=-1)
        return torch.addcmul(x * self.cos, torch.cat([second, first], -1), self.sin).to(x.dtype)


@explain_kinds
def signed_angles(angles: Annotated[Tensor, Axes("... N D/2", floating=True)]) -> Angles:
    """`Angles` from those of each channel pair, `[..., N, D / 2]` with zero or one dimension in front."""
    cos, sin = angles.cos(), angles.sin()
    cos, sin = torch.cat([cos, cos], -1).unsqueeze(-2), torch.cat([-sin, sin], -1).unsqueeze(-2)
    return Angles(cos, sin) if cos.dim() == 4 else Angles(cos.unsqueeze(0), sin.unsqueeze(0))


@check_kinds
class RotaryTable:
    """Angles by position, computed once up to the largest position asked for.

    Args:
        head_dim: channels D of a head, even.
        theta: base of the rates, which go from 1 down to almost 1 / theta.
        kind: `"default"`; `"linear"`, all rates divided by `factor` (arXiv:2306.15595); `"llama3"`, slow rates divided
            by `factor`, those between the two wavelengths in part (Llama 3.1).
        factor: of the stretch.
        low_freq_factor: wavelengths above `original_length` over this are divided (llama3).
        high_freq_factor: wavelengths below `original_length` over this stay (llama3).
        original_length: tokens that the model was trained on before the stretch (llama3).

    Raises:
        ValueError: an argument is out of range or `kind` unknown.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        theta: float = 10000.0,
        kind: RopeType = "default",
        factor: float = 1.0,
        low_freq_factor: float = 1.0,
        high_freq_factor: float = 4.0,
        original_length: int = 8192,
    ) -> None:
        if kind not in get_args(RopeType):
            raise ValueError(f"expected a rope type of {', '.join(get_args(RopeType))} but got {kind!r}")
        if head_dim < 2 or head_dim % 2 or not theta > 0 or not factor > 0:
            raise ValueError(
                f"expected an even head_dim, theta > 0 and factor > 0 but got {head_dim}, {theta} and {factor}"
            )
        if kind == "llama3" and not 0 < low_freq_factor < high_freq_factor:
            raise ValueError(
                f"expected 0 < low_freq_factor < high_freq_factor but got {low_freq_factor} and {high_freq_factor}"
            )
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
        rates = 1.0 / (theta**exponents)
        if kind == "linear":
            rates = rates / factor
        elif kind == "llama3":
            turns = original_length / (2 * math.pi / rates)
            share = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
            mixed = (1 - share) * rates / factor + share * rates
            rates = torch.where(
                turns < low_freq_factor, rates / factor, torch.where(turns > high_freq_factor, rates, mixed)
            )
        self.rates = rates
        self._table = signed_angles(torch.zeros(0, head_dim // 2, device="cpu"))

    @explain_kinds
    def at(self, positions: Tensor) -> Angles:
        """Angles of tokens at positions, int64 `[N]` or `[B, N]`, at any place of a text."""
        return signed_angles(positions.unsqueeze(-1).float() * self.rates.to(positions.device))

    @explain_kinds
    def span(self, start: int, stop: int, device: torch.device) -> Angles:
        """Angles of the positions from `start` to `stop`, from a table that grows when needed."""
        if self._table.cos.shape[1] < stop or self._table.cos.device != device:
            # Tensors of inference mode could not be saved for a backward.
            with torch.inference_mode(False), torch.no_grad():
                size = max(256, 1 << (stop - 1).bit_length())
                self._table = self.at(torch.arange(size, device=device))
        return Angles(self._table.cos[:, start:stop], self._table.sin[:, start:stop])
