"""Weights in blocks of 32 numbers, as GGUF files store them: their values, and how they are made.

A weight `[M, K]` is uint8 `[M, K / 32, S]`, the bytes of the file as they are. S tells the kind:

    34  q8_0   float16 scale, 32 int8            int8 * scale
    18  q4_0   float16 scale, 32 of four bits    (four bits - 8) * scale
    20  q4_1   float16 scale, float16 lowest, 32 of four bits    four bits * scale + lowest

Byte i of the four bits holds number i in its low half and number i + 16 in its high half.
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)
"""

from __future__ import annotations

import torch
from torch import Tensor

from arcore import _extension as _extension
from arcore.ops._checks import checked_call

OP = "arcore.block_values"
# Numbers of a block: kBlockValues of csrc/common/weights.h.
BLOCK = 32
# Bytes of a block, by its kind.
KINDS = {"q8_0": 34, "q4_0": 18, "q4_1": 20}


def block_kind(op: str, blocks: Tensor) -> str:
    """The name of the kind of blocks.

    Raises:
        TypeError: they are no tensor of uint8.
        ValueError: their shape is that of no kind.
    """
    if not isinstance(blocks, Tensor) or blocks.dtype != torch.uint8:
        got = blocks.dtype if isinstance(blocks, Tensor) else type(blocks).__name__
        raise TypeError(
            f"{op}: expected blocks to be a tensor of uint8 but got {got}; make them with arcore.ops.quantise_blocks"
        )
    for name, size in KINDS.items():
        if blocks.dim() == 3 and blocks.shape[2] == size:
            return name
    raise ValueError(
        f"{op}: expected blocks of shape [M, K / {BLOCK}, S] with S one of "
        f"{', '.join(f'{size} ({name})' for name, size in KINDS.items())} but got {list(blocks.shape)}; make them with "
        "arcore.ops.quantise_blocks"
    )


def block_values(blocks: Tensor) -> Tensor:
    """The numbers that blocks stand for.

    Args:
        blocks: uint8 `[M, K / 32, S]`, contiguous on a CPU; S is 34 (q8_0), 18 (q4_0) or 20 (q4_1).

    Returns:
        float32 `[M, K]`: products of the scale are exact, what `lowest` is added to is rounded once.

    Raises:
        TypeError: `blocks` is no tensor of uint8.
        ValueError: its shape or layout does not fit.
        NotImplementedError: it is not on a CPU.
    """
    block_kind(OP, blocks)
    found: Tensor = checked_call("block_values", torch.ops.arcore.block_values.default, blocks)
    return found


def reference_block_values(blocks: Tensor) -> Tensor:
    """`block_values` in plain PyTorch, on any device and for any strides."""
    kind = block_kind(OP, blocks)
    rows = blocks.shape[0]

    def half(start: int) -> Tensor:
        return blocks[..., start : start + 2].contiguous().view(torch.float16).float()

    scale = half(0)  # [M, K / 32, 1]
    if kind == "q8_0":
        values = blocks[..., 2:].contiguous().view(torch.int8).float() * scale
    else:
        pairs = blocks[..., KINDS[kind] - BLOCK // 2 :]
        four = torch.cat([pairs & 15, pairs >> 4], dim=-1).float()
        values = four * scale + half(2) if kind == "q4_1" else (four - 8) * scale
    return values.reshape(rows, blocks.shape[1] * BLOCK)


def quantise_blocks(weight: Tensor, kind: str) -> Tensor:
    """The blocks of a kind that lie nearest to a weight, or nearly so.

    The scale of q8_0 puts the largest number at 127, that of q4_0 at -8, and q4_1 spreads from the lowest to the
    highest. Numbers are rounded with the scale as it is stored.

    Args:
        weight: floats `[M, K]`, finite, K a multiple of 32.
        kind: "q8_0", "q4_0" or "q4_1".

    Returns:
        uint8 `[M, K / 32, S]` on the weight's device.

    Raises:
        TypeError: `weight` is no tensor of floats.
        ValueError: unknown kind, an unfit shape, or numbers that are not finite or too large for float16 scales.
    """
    op = "arcore.quantise_blocks"
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{op}: expected weight to be a tensor of floats but got {got}")
    if kind not in KINDS:
        raise ValueError(f"{op}: expected kind to be one of {', '.join(KINDS)} but got {kind!r}")
    if weight.dim() != 2 or weight.shape[1] % BLOCK or not weight.shape[1]:
        raise ValueError(
            f"{op}: expected weight of shape [M, K] with K a multiple of {BLOCK} but got {list(weight.shape)}; keep "
            "such a weight in floats"
        )
    x = weight.detach().float().reshape(weight.shape[0], weight.shape[1] // BLOCK, BLOCK)
    if kind == "q4_1":
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        lowest = low.half()
        scale = ((high - lowest.float()) / 15).half()
    else:
        lowest = None
        most = x.gather(-1, x.abs().argmax(-1, keepdim=True))
        scale = (most.abs() / 127).half() if kind == "q8_0" else (most / -8).half()
    if not all(bool(t.isfinite().all()) for t in (scale, lowest) if t is not None):
        raise ValueError(
            f"{op}: expected finite numbers whose scales fit float16 but got up to {float(x.abs().max())}; keep such a "
            "weight in floats"
        )
    # A scale of 0 belongs to blocks whose numbers are all alike.
    steps = torch.where(scale == 0, torch.inf, scale.float())
    if kind == "q8_0":
        signed = (x / steps).round().clamp(-127, 127).to(torch.int8)
        return torch.cat([scale.view(torch.uint8), signed.view(torch.uint8)], dim=-1)
    shifted = (x - lowest.float()) / steps if lowest is not None else x / steps + 8
    four = shifted.round().clamp(0, 15).to(torch.uint8)
    pairs = four[..., : BLOCK // 2] | four[..., BLOCK // 2 :] << 4
    heads = [scale] if lowest is None else [scale, lowest]
    return torch.cat([*(t.view(torch.uint8) for t in heads), pairs], dim=-1)


@torch.library.register_fake("arcore::block_values")
def _fake(blocks: Tensor) -> Tensor:
    block_kind(OP, blocks)
    return blocks.new_empty(blocks.shape[0], blocks.shape[1] * BLOCK, dtype=torch.float32)
