"""Weights that are sharded over processes (FSDP2): each holds a part, and gathers a block when it is computed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    OptimStateKeyType,
    fully_shard,
    register_fsdp_forward_method,
)

from arcore.nn.kinds import check_kinds

_WHOLE = StateDictOptions(full_state_dict=True)


@check_kinds
def shard(network: nn.Module, mesh: Any) -> None:
    """Shard the weights of a network in place, block by block.

    A block is what the network's `shard_units()` gives, or else an element of a `nn.ModuleList` with a forward of its
    own; the rest is gathered with the network itself. A block is gathered when it is called, so it must be called.

    Args:
        network: all of its weights are trained, or none, which leaves it whole.
        mesh: one-dimensional device mesh.

    Raises:
        ValueError: the network, or a part of it, says `shardable = False`.
    """
    if not any(parameter.requires_grad for parameter in network.parameters()):
        return
    if not all(getattr(part, "shardable", True) for part in network.modules()):
        raise ValueError(
            f"the weights of a {type(network).__name__} cannot be sharded (fsdp): use the strategy 'ddp'"
        )
    # Taken now: sharding gives the network a class that has torch's own methods too, such as `reshard`.
    methods = _methods(type(network))
    units: Any = getattr(network, "shard_units", None)
    for block in units() if units is not None else _blocks(network):
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    # Losses call other methods than `forward` too, such as a forecaster's `objective`.
    calls = _Calls()
    network.register_forward_pre_hook(calls.enter)
    network.register_forward_hook(calls.leave, always_call=True)
    for name in methods:
        _gather_at(network, name, calls)


class _Calls:
    """How many calls of a network are under way."""

    def __init__(self) -> None:
        self.depth = 0

    def enter(self, *_: Any) -> None:
        self.depth += 1

    def leave(self, *_: Any) -> None:
        self.depth -= 1


def _gather_at(network: nn.Module, name: str, calls: _Calls) -> None:
    """Gather the weights for calls of a method from outside.

    One from within another call finds them gathered; to gather them twice would let go of them while the outer call
    still needs them, and its backward would read freed memory.
    """
    plain = getattr(network, name)
    register_fsdp_forward_method(network, name)
    gathering = getattr(network, name)

    @functools.wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        if calls.depth:
            return plain(*args, **kwargs)
        calls.enter()
        try:
            return gathering(*args, **kwargs)
        finally:
            calls.leave()

    setattr(network, name, call)


def _methods(kind: type) -> set[str]:
    """Names of the public methods that a class of network has beside those of every module."""
    return {
        name
        for base in kind.__mro__
        if base not in nn.Module.__mro__
        for name, value in vars(base).items()
        if inspect.isfunction(value) and name[0] != "_" and not hasattr(nn.Module, name)
    }


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost elements of lists that can be called."""
    for child in module.children():
        for part in child if isinstance(child, nn.ModuleList) else ():
            callable_part = type(part).forward is not nn.Module.forward
            yield from [part] if callable_part else _blocks(part)
        if not isinstance(child, nn.ModuleList):
            yield from _blocks(child)


class Sharded(ModelParallelStrategy):
    """Lightning's strategy for sharded weights, with checkpoints that any number of processes can read.

    Args:
        processes: of the run.
    """

    def __init__(self, processes: int) -> None:
        super().__init__(
            data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False
        )

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return dict(self.checkpoint_io.load_checkpoint(checkpoint_path))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.model is not None
        set_model_state_dict(self.model, dict(checkpoint["state_dict"]), options=_WHOLE)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.model is not None
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            by_name = FullyShardedDataParallel.rekey_optim_state_dict(
                state, OptimStateKeyType.PARAM_NAME, self.model
            )
            set_optimizer_state_dict(self.model, optimizer, by_name, options=_WHOLE)
