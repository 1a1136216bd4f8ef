"""State of modules that share memory, or hold more than tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

EXTRA_STATE = "_extra_state"


def is_extra(key: str, value: Any) -> bool:
    """Whether an entry of a state dict is what `get_extra_state` gave, or no tensor."""
    return key.rpartition(".")[2] == EXTRA_STATE or not isinstance(value, Tensor)


def overlaps(tensor: Tensor) -> bool:
    """Whether elements of a tensor may share a place in memory, as in an expanded one."""
    if tensor.layout is not torch.strided:
        return False
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach += stride * (size - 1)
    return False


@torch.no_grad()
def load(module: nn.Module, state: Mapping[str, Any]) -> None:
    """`module.load_state_dict(state, strict=True)`, for tensors with overlapping elements too.

    Raises:
        RuntimeError: names or shapes do not fit.
    """
    own = module.state_dict()
    shared = {
        key: value
        for key, value in own.items()
        if key in state and not is_extra(key, value) and overlaps(value)
    }
    missing, unexpected = nn.Module.load_state_dict(
        module, {key: value for key, value in state.items() if key not in shared}, strict=False
    )
    left = [key for key in missing if key not in shared]
    if left or unexpected:
        raise RuntimeError(f"the state does not fit: missing {left}, unexpected {unexpected}")
    for key, target in shared.items():
        # Elements that share a place have equal values, so the order of writing does not matter.
        reach = (
            sum((size - 1) * stride for size, stride in zip(target.shape, target.stride(), strict=True)) + 1
        )
        flat = target.as_strided((reach,), (1,), target.storage_offset())
        places = torch.arange(reach, device=target.device).as_strided(target.shape, target.stride())
        flat[places.flatten()] = state[key].to(target).flatten()
