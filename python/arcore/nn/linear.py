"""Linear layers for inference on a CPU."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore import matmul
from arcore.matmul import fills_its_memory, in_float32, slow_halves
from arcore.nn.block_weight import BlockWeight
from arcore.nn.kinds import Axes, Features, explain_kinds
from arcore.ops import block_values
from arcore.ops._registration import call_below

# oneDNN's product with a weight as it lies in memory. On processors that MKL does not favour it takes less time than
# MKL, which torch uses for float32: about half for some rows and a vocabulary, a fifth less for many rows.
_onednn: Any = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)
# Below this many multiplications, what oneDNN spends on a call counts.
MIN_PRODUCTS = 2**23
# Up to so many rows the bytes of the weight decide, and products made for many rows take longer than one pass over it.
STEP_ROWS = {torch.float32: 32, torch.bfloat16: 8}
# Up to so many rows of float16 are read faster by torch than widened.
FEW_HALVES = 4
# Blocks would have to be expanded for torch, which takes longer than the op for all rows that it takes.
BLOCK_ROWS = 64
# Numbers of blocks that are expanded at a time for torch's products: 16 MiB of floats.
EXPANDED = 2**22
# In float32 that holds for weights that no cache keeps from token to token, and for smaller ones from two rows on.
MIN_OF_ONE, MIN_OF_FEW = 2**19, 2**16


@explain_kinds
def linear(
    x: Features,
    weight: Annotated[Tensor, Axes("O C", floating=True)],
    bias: Annotated[Tensor, Axes("O", floating=True)] | None = None,
    *,
    rows: int | None = None,
) -> Tensor:
    """`torch.nn.functional.linear` by what is faster on a CPU without gradients: few rows through an op that reads the
    weight once, many rows in float32 through oneDNN; bfloat16 and float16 in float32 where torch has only plain loops
    for them (`arcore.half_matmul`).

    Args:
        x: `[..., K]`.
        weight: `[M, K]`; a `BlockWeight` is read as it is for few rows, and expanded piece by piece for many.
        bias: `[M]`.
        rows: up to so many rows, at most 64, each gets the same bits however many there are, even where that is slower;
            where the weight is contiguous. None: speed decides.

    Returns:
        `[..., M]`.
    """
    if (
        not x.is_cpu
        or x.dtype != weight.dtype
        or (x.dtype not in (torch.float32, torch.bfloat16) and x.dtype not in slow_halves())
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
    ):
        return F.linear(x, weight, bias)
    columns = weight.shape[-1]
    count = x.numel() // max(columns, 1)
    blocks = weight.blocks if isinstance(weight, BlockWeight) else None
    wanted = count <= rows if rows is not None else _reads_once(weight, count, blocks is not None)
    plain = x.shape[-1] == columns and _plain(x, weight if blocks is None else blocks, bias, x.dtype)
    if count and wanted and plain:
        few = call_below(
            torch.ops.arcore.linear_step.default,
            x.reshape(count, columns).contiguous(),
            weight if blocks is None else blocks,
            bias,
        )
        out: Tensor = few.view(*x.shape[:-1], weight.shape[0])
        return out
    if blocks is not None:
        return _expanding(x, blocks, bias) if plain else F.linear(x, weight, bias)
    if x.dtype != torch.float32:
        slow = plain and x.dtype in slow_halves() and (count > FEW_HALVES or x.dtype == torch.bfloat16)
        return in_float32(x, weight, bias) if slow else F.linear(x, weight, bias)
    if _onednn is None or x.numel() * weight.shape[0] < MIN_PRODUCTS or not fills_its_memory(weight):
        return F.linear(x, weight, bias)
    out = _onednn(x, weight, bias, "none", [], "")
    return out


def _expanding(x: Tensor, blocks: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` for many rows, with some rows of a weight in blocks as floats at a time."""
    outputs, columns, dtype = len(blocks), x.shape[-1], x.dtype
    if dtype in slow_halves():
        x, bias = x.float(), None if bias is None else bias.float()
    step = max(1, EXPANDED // max(columns, 1))
    if outputs <= step:
        return linear(x, block_values(blocks).to(x.dtype), bias).to(dtype)
    out = x.new_empty(*x.shape[:-1], outputs, dtype=dtype)
    for start in range(0, outputs, step):
        piece = slice(start, start + step)
        values = block_values(blocks[piece]).to(x.dtype)
        out[..., piece] = linear(x, values, None if bias is None else bias[piece])
    return out


def _reads_once(weight: Tensor, rows: int, blocks: bool) -> bool:
    """Whether the op that reads the weight once takes less time than torch."""
    if blocks:
        return rows <= BLOCK_ROWS
    if weight.dtype == torch.bfloat16 and torch.bfloat16 in slow_halves():
        return rows <= matmul.STEP_ROWS
    if rows > STEP_ROWS.get(weight.dtype, 0):
        return False
    return weight.dtype == torch.bfloat16 or weight.numel() >= (MIN_OF_ONE if rows == 1 else MIN_OF_FEW)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> bool:
    """Nothing that only torch's own product knows: wrapped tensors, transforms, strides, a bias of another kind."""
    return (
        all(type(t) in (Tensor, nn.Parameter) for t in (x, weight))
        and weight.is_contiguous()
        and torch._C._functorch.peek_interpreter_stack() is None
        and (bias is None or (bias.dtype == dtype and bias.is_contiguous()))
    )


class Linear(nn.Linear):
    """`torch.nn.Linear` on `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., K]` to `[..., M]`."""
        return linear(input, self.weight, self.bias)
