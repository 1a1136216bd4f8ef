"""Settings as device constants: what needs no GPU to be seen."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from arcore.ops import _constants
from arcore.ops._constants import OnAnyStream, constant

GPU = torch.device("cuda", 0)


class Stream:
    """Stands in for a CUDA stream, and notes what is asked of it."""

    def __init__(self, number):
        self.number, self.waited = number, []

    def record_event(self):
        return f"event of {self.number}"

    def wait_event(self, event):
        self.waited.append(event)


class Buffer:
    device = GPU

    def __init__(self):
        self.recorded = []

    def record_stream(self, stream):
        self.recorded.append(stream.number)


@pytest.fixture
def streams(monkeypatch):
    """Two streams; the returned object says which is current, whether a graph is captured, and what has ended."""
    state = SimpleNamespace(one=Stream(1), two=Stream(2), capturing=False, done=False)
    state.current = state.one
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state.current)
    monkeypatch.setattr(_constants, "_raw_stream", lambda device: state.current.number)
    monkeypatch.setattr(_constants, "capturing", lambda: state.capturing)
    monkeypatch.setattr(_constants, "event_done", lambda event: state.done)
    return state


def test_another_stream_waits_once_and_holds_the_memory(streams):
    buffer = Buffer()
    kept = OnAnyStream("value", (buffer,))
    assert kept.get() == "value" and streams.one.waited == [] and buffer.recorded == []
    streams.current = streams.two
    assert kept.get() == "value" and kept.get() == "value"
    assert streams.two.waited == ["event of 1"] and buffer.recorded == [2]


def test_what_has_ended_is_not_waited_for(streams):
    buffer = Buffer()
    kept = OnAnyStream("value", (buffer,))
    streams.current, streams.done = streams.two, True
    assert kept.get() == "value"
    assert streams.two.waited == [] and buffer.recorded == [2]


@pytest.mark.parametrize("same", [True, False])
def test_a_capture_takes_only_what_has_ended(streams, same):
    kept = OnAnyStream("value", (Buffer(),))
    streams.current, streams.capturing = streams.one if same else streams.two, True
    assert kept.get() is None
    streams.done = True
    assert kept.get() == "value"
    assert streams.two.waited == []


def test_on_the_cpu_there_is_nothing_to_wait_for():
    assert OnAnyStream(3, (torch.zeros(1),)).get() == 3


def test_on_the_cpu():
    made = constant((1.0, 2.5), torch.float64, torch.device("cpu"))
    assert made.tolist() == [1.0, 2.5] and made.dtype == torch.float64
    made.fill_(9)
    assert constant((1.0, 2.5), torch.float64, torch.device("cpu")).tolist() == [1.0, 2.5]
    assert constant((), torch.int64, torch.device("cpu")).shape == (0,)


def test_fake_tensors_are_not_kept():
    before = len(_constants._kept)
    with FakeTensorMode():
        made = constant((-1, 0), torch.int64, GPU)
    assert made.shape == (2,) and made.dtype == torch.int64 and made.device == GPU
    assert len(_constants._kept) == before
