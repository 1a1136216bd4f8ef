"""Plain numbers as tensors on a device, without waiting for it; what one stream makes, for use on all."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_Key = tuple[tuple[float, ...], torch.dtype, torch.device]
_MOST = 1024


def capturing() -> bool:
    """Whether calls are recorded into a CUDA graph: nothing runs, and results exist from its first replay on."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class OnAnyStream(Generic[T]):
    """A value whose tensors were made by work queued on the current stream, kept for calls on whatever stream.

    The work may still wait there when another stream reads its results, so that stream waits for an event; and the
    allocator must not give the memory away while that stream reads it.
    """

    def __init__(self, value: T, tensors: Iterable[Tensor]) -> None:
        self._value = value
        self._tensors = tuple(tensors)
        self._event: torch.cuda.Event | None = None
        self._known: set[int] = set()  # streams that have waited, or made the value
        device = self._tensors[0].device if self._tensors else torch.device("cpu")
        if device.type == "cuda":
            self._event = torch.cuda.current_stream(device).record_event()
            self._known.add(_raw_stream(device))

    def get(self) -> T | None:
        """The value, safe to use on the current stream; None if a capture is under way that cannot wait for it.

        Inside a capture no stream can wait for work outside of it: the value serves if that work has ended.
        """
        if not self._known:
            return self._value
        device = self._tensors[0].device
        stream = _raw_stream(device)
        capture = capturing() if self._event is not None or stream not in self._known else False
        # A graph may be replayed on another stream than it is captured on.
        if stream in self._known and not (capture and self._event is not None):
            return self._value
        if self._event is not None and event_done(self._event):
            self._event = None
        if capture:
            # Who captures keeps what the graph reads alive, as with every tensor that a graph reads.
            return self._value if self._event is None else None
        current = torch.cuda.current_stream(device)
        if self._event is not None:
            current.wait_event(self._event)
        for tensor in self._tensors:
            tensor.record_stream(current)
        self._known.add(stream)
        return self._value


def _raw_stream(device: torch.device) -> int:
    return int(torch._C._cuda_getCurrentRawStream(device.index))


def event_done(event: torch.cuda.Event) -> bool:
    """Whether what came before the event has ended; unlike `Event.query`, also while a graph is captured."""
    return bool(torch.ops.arcore.cuda_event_done(event.cuda_event))


_kept: OrderedDict[_Key, OnAnyStream[Tensor]] = OrderedDict()
# What a captured graph reads lives as long as the process: nobody tells when a graph is gone.
_captured: dict[_Key, Tensor] = {}


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
        tensor = found.get()
        if tensor is not None:
            _kept.move_to_end(key)
            if capturing():
                _captured[key] = tensor
            return tensor
    with torch.inference_mode(False):
        made = torch.cat([torch.full((1,), value, dtype=dtype, device=device) for value in values])
    # What a capture records runs with its first replay only, and a fake tensor never: neither may serve other calls.
    if type(made) is Tensor and not capturing():
        _kept[key] = OnAnyStream(made, (made,))
        if len(_kept) > _MOST:
            _kept.popitem(last=False)
    return made
