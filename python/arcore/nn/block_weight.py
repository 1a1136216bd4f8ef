"""Weights in 8 or 4 bits that stand where weights in floats stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from arcore.nn.kinds import check_kinds
from arcore.ops import block_values, quantise_blocks, reference_block_values
from arcore.ops._block_values import BLOCK, KINDS, block_kind


class BlockWeight(Tensor):
    """A weight `[M, K]` in blocks of 8- or 4-bit numbers, for inference.

    It has the shape and dtype of the weight that it stands for, and any op of torch takes it: the op gets the numbers,
    expanded for the time of the call. `arcore.nn.linear`, an embedding, `arcore.ops.decoder_step` and
    `arcore.ops.mamba_step` read the blocks themselves. `to(dtype)` changes the dtype in which the numbers come and
    keeps the blocks. Nothing can be written into it, so it cannot be trained; gradients pass through it to activations.

    Args:
        blocks: uint8 `[M, K / 32, S]`, as for `arcore.ops.block_values`.
        dtype: of the numbers when an op of torch asks for them.

    Attributes:
        blocks: as given.

    Raises:
        TypeError: `blocks` is no tensor of uint8, or `dtype` is no dtype of floats.
        ValueError: the shape of `blocks` is that of no kind.
    """

    blocks: Tensor

    @staticmethod
    def __new__(cls, blocks: Tensor, dtype: torch.dtype = torch.float32) -> BlockWeight:
        block_kind("arcore.nn.BlockWeight", blocks)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"arcore.nn.BlockWeight: expected a dtype of floats but got {dtype}")
        shape = (blocks.shape[0], blocks.shape[1] * BLOCK)
        made: BlockWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=blocks.device)
        return made

    def __init__(self, blocks: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self.blocks = blocks

    @property
    def kind(self) -> str:
        """Of the blocks: q8_0, q4_0 or q4_1."""
        return block_kind("arcore.nn.BlockWeight", self.blocks)

    def expanded(self) -> Tensor:
        """The numbers, a plain tensor `[M, K]` of the dtype."""
        blocks = self.blocks
        # Under a transform or a trace the reference shows what it does; the op is for plain calls.
        plain = blocks.is_cpu and blocks.is_contiguous() and type(blocks) is Tensor
        return (block_values(blocks) if plain else reference_block_values(blocks)).to(self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"BlockWeight({list(self.shape)}, kind={self.kind!r}, dtype={self.dtype})"

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["blocks"], self.dtype

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], dtype: torch.dtype, size: Any, stride: Any
    ) -> BlockWeight:
        return BlockWeight(inner["blocks"], dtype)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.overloadpacket is torch.ops.aten.to:
            # Arrives in inference mode alone; else torch has taken it apart before.
            return func.decompose(*args, **(kwargs or {}))
        # In inference mode too a view of a tensor that was made outside has to be one of outside.
        if (
            torch.is_inference_mode_enabled()
            and any(result.alias_info is not None for result in func._schema.returns)
            and not any(isinstance(value, BlockWeight) and value.is_inference() for value in args)
        ):
            with torch.inference_mode(False):
                return cls._dispatched(func, args, kwargs or {})
        return cls._dispatched(func, args, kwargs or {})

    @staticmethod
    def _dispatched(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rule = _RULES.get(func)
        if rule is not None and (found := rule(*args, **kwargs)) is not None:
            return found
        for value, argument in zip(args, func._schema.arguments, strict=False):
            if (
                isinstance(value, BlockWeight)
                and argument.alias_info is not None
                and argument.alias_info.is_write
            ):
                raise RuntimeError(
                    f"{func} would write into a weight in {value.kind} blocks, which is read only: expand it with "
                    "expanded(), or load the weights in floats"
                )
        plain, named = tree_map_only(BlockWeight, BlockWeight.expanded, (args, kwargs))
        return func(*plain, **named)


def _detach(weight: BlockWeight) -> BlockWeight:
    return BlockWeight(weight.blocks, weight.dtype)


def _clone(weight: BlockWeight, *, memory_format: Any = None) -> BlockWeight:
    return BlockWeight(weight.blocks.clone(), weight.dtype)


def _to(
    weight: BlockWeight, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any
) -> BlockWeight | None:
    dtype = weight.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        return None
    return BlockWeight(weight.blocks.to(device or weight.device, copy=True), dtype)


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> BlockWeight | None:
    first = tensors[0]
    if dim != 0 or not isinstance(first, BlockWeight):
        return None
    for other in tensors:
        if not isinstance(other, BlockWeight) or other.kind != first.kind or other.dtype != first.dtype:
            return None
    return BlockWeight(torch.cat([t.blocks for t in tensors]), first.dtype)  # type: ignore[attr-defined]


def _embedding(weight: Tensor, ids: Tensor, *_: Any) -> Tensor | None:
    if not isinstance(weight, BlockWeight):
        return None
    rows = BlockWeight(weight.blocks.index_select(0, ids.flatten()), weight.dtype)
    return rows.expanded().view(*ids.shape, weight.shape[1])


def _new(func: Any) -> Callable[..., Tensor]:
    """A factory of new tensors needs the dtype and the device alone, not the numbers."""

    def rule(weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made: Tensor = func(torch.empty(0, dtype=weight.dtype, device=weight.device), *args, **kwargs)
        return made

    return rule


_aten = torch.ops.aten
_RULES: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _detach,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to,
    _aten.cat.default: _cat,
    _aten.embedding.default: _embedding,
    **{f: _new(f) for f in (_aten.new_zeros.default, _aten.new_empty.default, _aten.new_full.default)},
}


def stored(weight: Tensor) -> Tensor:
    """What an op that takes blocks as well as floats reads of a weight."""
    return weight.blocks if isinstance(weight, BlockWeight) else weight


@check_kinds
@torch.no_grad()
def quantise(module: nn.Module, kind: str) -> nn.Module:
    """Put the weights of all linear layers and embeddings of a model into blocks, in place, for inference.

    Layers whose inputs are no multiple of 32 keep their floats, as do norms, biases and convolutions. A weight that two
    layers share stays shared.

    Args:
        module: a model in float32 or bfloat16 whose matrices are `torch.nn.Linear` and `torch.nn.Embedding`.
        kind: q8_0 (8.5 bits a number), q4_1 (5) or q4_0 (4.5).

    Returns:
        The module.

    Raises:
        ValueError: unknown kind, no such layer, or a weight whose numbers do not fit, named.
    """
    if kind not in KINDS:
        raise ValueError(
            f"arcore.nn.quantise: expected kind to be one of {', '.join(KINDS)} but got {kind!r}"
        )
    made: dict[int, nn.Parameter] = {}
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear | nn.Embedding):
            continue
        weight = layer.weight
        if (
            isinstance(weight, BlockWeight)
            or weight.dim() != 2
            or weight.shape[1] % BLOCK
            or not weight.shape[1]
        ):
            continue
        if id(weight) not in made:
            try:
                blocks = quantise_blocks(weight, kind)
            except ValueError as error:
                raise ValueError(f"{name}.weight: {error}") from error
            made[id(weight)] = nn.Parameter(BlockWeight(blocks, weight.dtype), requires_grad=False)
        layer.weight = made[id(weight)]
    if not made:
        raise ValueError(
            f"arcore.nn.quantise: expected a model with linear layers of a multiple of {BLOCK} inputs but "
            f"{type(module).__name__} has none in floats"
        )
    return module
