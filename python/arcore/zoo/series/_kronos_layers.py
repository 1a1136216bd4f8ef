"""What Kronos's tokenizer and language model share: their layer, and weights under the released names."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.masks import IntervalMask
from arcore.nn import Angles, DecoderLayer, GatedMLP, GroupedAttention, RotaryTable


class KronosLayer(DecoderLayer):
    """A pre-norm layer with biases in the attention and none in the feed-forward network.

    Args:
        dim: width D.
        num_heads: heads.
        hidden_dim: width of the feed-forward network.
        dropout: of what both parts add.
    """

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, dropout: float = 0.0) -> None:
        head_dim = dim // num_heads
        attention = GroupedAttention(
            dim, num_heads=num_heads, num_kv_heads=num_heads, head_dim=head_dim, qkv_bias=True, out_bias=True
        )
        super().__init__(dim, attention=attention, mlp=GatedMLP(dim, hidden_dim))
        self.dropout = dropout

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`; the other arguments go to the attention."""
        x = x + F.dropout(self.attention(self.norm1(x), *args), self.dropout, self.training)
        out: Tensor = x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)
        return out


def causal(length: int, device: torch.device) -> IntervalMask:
    """Each row sees itself and those before it."""
    stop = torch.arange(1, length + 1, dtype=torch.int32, device=device)
    return IntervalMask.trusted(torch.stack([torch.zeros_like(stop), stop], -1)[None, None], length)


def packed_paths(prefix: int, paths: int, length: int, device: torch.device) -> tuple[IntervalMask, Tensor]:
    """The mask and positions of one row in which a prefix is followed by several continuations of it.

    Args:
        prefix: rows P that all paths share.
        paths: how many.
        length: rows S of each path.
        device: of the result.

    Returns:
        A causal mask of P + paths * S rows in which no path sees another, and positions int64 `[P + paths * S]`.
    """
    row = torch.arange(prefix + paths * length, dtype=torch.int32, device=device)
    behind = row >= prefix
    begin = torch.where(behind, row - (row - prefix) % max(length, 1), prefix)
    shared = torch.where(behind, prefix, row + 1)
    own = torch.where(behind, row + 1, prefix)
    bounds = torch.stack([torch.zeros_like(row), shared, begin, own], -1)
    positions = torch.where(behind, prefix + (row - prefix) % max(length, 1), row).long()
    return IntervalMask(bounds, nk=len(row)), positions


def angles_of(rotary: RotaryTable, length: int, device: torch.device) -> Angles:
    """Angles of the rows of a window, from 0."""
    return rotary.span(0, length, device)


def layers_from_official(
    left: dict[str, Tensor], theirs: str, ours: str, count: int, head_dim: int
) -> dict[str, Tensor]:
    """Take the layers `theirs.{i}` out of a table of released weights and return them as `ours.{i}`.

    Raises:
        ValueError: the rotary rates are those of heads of another width.
    """
    made = {}
    names = {
        "norm1.weight": "norm1.weight",
        "norm2.weight": "norm2.weight",
        "ffn.w2.weight": "mlp.down.weight",
        "self_attn.out_proj.weight": "attention.out.weight",
        "self_attn.out_proj.bias": "attention.out.bias",
    }
    joined = {
        "mlp.gate_up.weight": ("ffn.w1.weight", "ffn.w3.weight"),
        "attention.qkv.weight": tuple(f"self_attn.{n}_proj.weight" for n in "qkv"),
        "attention.qkv.bias": tuple(f"self_attn.{n}_proj.bias" for n in "qkv"),
    }
    for i in range(count):
        first, last = f"{theirs}.{i}.", f"{ours}.{i}."
        check_rates(left.pop(f"{first}self_attn.rotary.inv_freq", None), head_dim)
        for key, name in names.items():
            if (found := left.pop(f"{first}{key}", None)) is not None:
                made[f"{last}{name}"] = found
        for name, keys in joined.items():
            if all(f"{first}{key}" in left for key in keys):
                made[f"{last}{name}"] = torch.cat([left.pop(f"{first}{key}") for key in keys])
    return made


def check_rates(rates: Tensor | None, head_dim: int) -> None:
    """Raise ValueError where stored rotary rates belong to heads of another width; that tells the number of heads."""
    if rates is not None and len(rates) * 2 != head_dim:
        raise ValueError(
            f"the weights have heads of width {2 * len(rates)} but the model has {head_dim}: change num_heads"
        )


def init_linear(module: nn.Module) -> None:
    """Xavier-normal weights and zero biases in all linear layers, as Kronos starts."""
    for part in module.modules():
        if isinstance(part, nn.Linear) and not part.weight.is_meta:
            nn.init.xavier_normal_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
