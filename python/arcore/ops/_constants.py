"""Plain numbers as tensors on a device, without waiting for it."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

_Key = tuple[tuple[float, ...], torch.dtype, torch.device]
_MOST = 1024
_kept: OrderedDict[_Key, Tensor] = OrderedDict()


def capturing() -> bool:
    """Whether calls are recorded into a CUDA graph: nothing runs, and results exist from its first replay on."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[len(values)]``; on a GPU the same tensor for the same numbers, so nobody may write to it.

    ``torch.tensor(values, device="cuda")`` copies from the host and waits for the device, which also ends the capture
    of a CUDA graph. Here the numbers travel as arguments of fills, once: a decoder uses the same settings at each step.
    """
    if device.type != "cuda" or not values or torch.compiler.is_compiling():
        return torch.tensor(values, dtype=dtype, device=device)
    key = (values, dtype, device)
    found = _kept.get(key)
    if found is not None:
        _kept.move_to_end(key)
        return found
    with torch.inference_mode(False):
        made = torch.cat([torch.full((1,), value, dtype=dtype, device=device) for value in values])
    # What a capture records runs with its first replay only, and a fake tensor never: neither may serve other calls.
    if type(made) is Tensor and not capturing():
        _kept[key] = made
        if len(_kept) > _MOST:
            _kept.popitem(last=False)
    return made
