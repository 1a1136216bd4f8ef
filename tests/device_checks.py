"""What the checks of all ops on a device share: moving a call there, replaying it in a graph, repeating it.

A check is a function `check_*(device, small)` in tests/<op>/gpu_cases.py. It runs on a GPU (`pytest -m cuda`), under
compute-sanitizer (bench/gpu/sanitize.py) and on the CPU, where the checks themselves are tested: each must pass with
the op's CPU kernels and fail when the op's results are disturbed (`disturbed`).
"""

from __future__ import annotations

import fcntl
import functools
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from arcore import _C
from arcore.masks import IntervalMask, TreeMask

Check = Callable[[str, bool], None]


def reason_to_skip_cuda() -> str | None:
    """Why tests marked `cuda` cannot run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not _C.build_info()["cuda_archs"]:
        return "arcore was built without CUDA; build with ARCORE_CUDA=on"
    return None


LINE = 128  # bytes; allocators start tensors at multiples of it or of half of it


def with_strides(x: Tensor, strides: Sequence[int], skew: int = 0) -> Tensor:
    """`x` with exactly these strides; dimensions of stride 0 are expanded. Differentiable.

    Its first element lies `skew` bytes behind a multiple of 64, so that what was not aligned is not aligned here.
    """
    if list(x.stride()) == list(strides) and x.data_ptr() % 64 == skew:
        return x
    kept = [1 if stride == 0 else size for size, stride in zip(x.shape, strides, strict=True)]
    dense = x[tuple(slice(0, size) for size in kept)]
    # What an allocation of gaps holds is NaN under the tests' fill: nobody may read it.
    extent = 1 + sum((size - 1) * stride for size, stride in zip(kept, strides, strict=True) if size > 0)
    storage = torch.empty(max(extent, 0) + LINE, dtype=x.dtype, device=x.device)
    offset = (skew - storage.data_ptr()) % 64 // x.element_size()
    fresh = storage.as_strided(kept, strides, offset)
    return fresh.copy_(dense).expand(x.shape)


def skew_of(x: Tensor) -> int:
    """Bytes by which the first element misses a multiple of 64."""
    return x.data_ptr() % 64 // x.element_size() * x.element_size()


def moved(x: Any, device: str) -> Any:
    """A tensor or mask on `device`, with the same strides and alignment; anything else as it is."""
    if isinstance(x, (IntervalMask, TreeMask)):
        return x.to(device)
    if isinstance(x, Tensor) and x.device.type != device:
        return with_strides(x.to(device), x.stride(), skew_of(x))
    return x


def on(device: str, function: Callable[..., Any], written: tuple[int, ...] = ()) -> Callable[..., Any]:
    """`function` run on `device` for callers with CPU tensors; gradients flow back to them.

    `written` are the positions of arguments that the function changes in place.
    """
    if device == "cpu":
        return function

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        there = [pytree.tree_map(lambda x: moved(x, device), a) for a in args]
        named = pytree.tree_map(lambda x: moved(x, device), kwargs)
        results = function(*there, **named)
        for i in written:
            args[i].copy_(there[i])
        return pytree.tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, results)

    return run


def tensors_of(results: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(results) if isinstance(x, Tensor)]


def equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit up to the payload of NaN."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def assert_equal(got: Any, expected: Any, what: str) -> None:
    pairs = list(zip(tensors_of(got), tensors_of(expected), strict=True))
    assert pairs, what
    for i, (a, b) in enumerate(pairs):
        assert a.shape == b.shape and a.dtype == b.dtype, f"{what}: result {i} has another shape or dtype"
        if not equal(a, b):
            where = (a != b) & ~(a.isnan() & b.isnan()) if a.is_floating_point() else a != b
            first = tuple(where.nonzero()[0].tolist()) if where.any() else ()
            raise AssertionError(f"{what}: result {i} differs in {int(where.sum())} places, first {first}")


def assert_repeatable(run: Callable[[], Any], times: int = 50) -> None:
    """The same bits again and again, with memory in another state each time."""
    expected = [x.clone() for x in tensors_of(run())]
    device = expected[0].device
    for i in range(times):
        # Another block of the allocator, with other content, takes part each time.
        disturbance = torch.full((1 + 997 * (i % 7),), float(i), device=device)
        assert_equal(run(), expected, f"repetition {i}")
        del disturbance


@contextmanager
def no_host_sync(device: str) -> Iterator[None]:
    """On a GPU an operation that waits for the device raises."""
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Replay:
    """`function(*inputs)` captured as a CUDA graph; a call gives it new values for the same inputs.

    On the CPU, where there are no graphs, a call runs the function on the refilled inputs.
    """

    def __init__(self, device: str, function: Callable[..., Any], *inputs: Tensor) -> None:
        self._function = function
        self._inputs = [with_strides(x.detach().clone().to(device), x.stride(), skew_of(x)) for x in inputs]
        self._inputs = [a.requires_grad_(b.requires_grad) for a, b in zip(self._inputs, inputs, strict=True)]
        self._graph = None
        if device == "cuda":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    function(*self._inputs)
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._outputs = function(*self._inputs)

    def __call__(self, *values: Tensor) -> list[Tensor]:
        with torch.no_grad():
            for place, value in zip(self._inputs, values, strict=True):
                place.copy_(value)
        if self._graph is None:
            self._outputs = self._function(*self._inputs)
        else:
            for output in tensors_of(self._outputs):
                output.detach().fill_(torch.nan if output.is_floating_point() else 1)
            self._graph.replay()
        return [x.detach().clone() for x in tensors_of(self._outputs)]


def assert_replays(device: str, function: Callable[..., Any], draws: Sequence[Sequence[Tensor]]) -> None:
    """A graph captured on the first inputs gives, on each of the others, the bits of a plain call."""
    there = [[moved(x.detach(), device).requires_grad_(x.requires_grad) for x in inputs] for inputs in draws]
    replay = Replay(device, function, *there[0])
    for i, inputs in enumerate([*there[1:], there[0]]):
        # Arguments that the function changes in place must not reach the replay changed.
        copies = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        expected = [x.detach().clone() for x in tensors_of(function(*copies))]
        assert_equal(replay(*(x.detach() for x in inputs)), expected, f"replay {i}")


def assert_compiles(function: Callable[..., Any], *inputs: Tensor, backend: str = "inductor") -> None:
    """One graph without breaks, with the numbers and gradients of the plain call."""

    def run(f: Callable[..., Any]) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        outputs = tensors_of(f(*leaves))
        wanted = [x for x in leaves if x.requires_grad]
        losses = [x.float().tanh().mean() for x in outputs if x.requires_grad]
        grads = torch.autograd.grad(losses, wanted) if losses else ()
        return [x.detach() for x in (*outputs, *grads)]

    expected = run(function)
    for a, b in zip(
        run(torch.compile(function, fullgraph=True, backend=backend, dynamic=False)), expected, strict=True
    ):
        if not a.is_floating_point():
            assert torch.equal(a, b)
            continue
        tolerance = 2e-2 if a.dtype in (torch.bfloat16, torch.float16) else 1e-4
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance / 10, equal_nan=True)


def backend_for(small: bool) -> str:
    """Inductor takes seconds per function; where only the checks are tested, tracing is enough."""
    return "aot_eager" if small else "inductor"


def far_apart(x: Tensor, small: bool, device: str) -> Tensor:
    """A copy on `device` whose entries along the first dimension lie more than 2^31 elements apart.

    With `small` they lie a few thousand elements apart. Skips where there is not enough memory.
    """
    gap = (1 << 12 if small else 1 << 31) + 64
    gap = max(gap, x[0].numel() + 64)
    elements = gap * (x.shape[0] - 1) + x[0].numel()
    need_memory(elements * x.element_size(), device)
    storage = torch.empty(elements, dtype=x.dtype, device=device)
    inner = [1]
    for size in reversed(x.shape[2:]):
        inner.insert(0, inner[0] * size)
    view = storage.as_strided(x.shape, (gap, *inner[: x.dim() - 1]))
    return view.copy_(x)


# Held by the one process that fills a GPU which several test processes share.
_MEMORY_LOCK = Path(tempfile.gettempdir()) / f"arcore-device-memory-{os.getuid()}.lock"
_held: list[IO[str]] = []


LOCK_SECONDS = 120.0


def _wait_for(file: IO[str]) -> None:
    """The lock, or a skip that says who may hang: a process that never lets go must not take the others along."""
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                file.close()
                pytest.skip(
                    f"another process held the device's memory for {LOCK_SECONDS:.0f} s ({_MEMORY_LOCK})"
                )
            time.sleep(0.2)


def need_memory(size: int, device: str) -> None:
    """Skips where less than `size` bytes and some room are free on the device; a CPU is never filled.

    Processes that share a GPU wait here for each other; `run_check` lets the next one go on.
    """
    if device != "cuda":
        free = 1 << 30
    else:
        if not _held:
            file = _MEMORY_LOCK.open("w")
            _wait_for(file)
            _held.append(file)
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
    if size > 0.9 * free:
        pytest.skip(f"needs {size / 2**30:.1f} GiB of device memory, {free / 2**30:.1f} GiB are free")


def _let_go(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()
    while _held:
        _held.pop().close()


def disturbed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with wrong results, other ones at each call: what every check must notice."""

    def wrong(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.numel() == 0:
            return x
        noise = torch.rand(x.shape, device=x.device)
        if x.dtype == torch.bool:
            return x ^ (noise < 0.5)
        if not x.is_floating_point():
            return x + (noise < 0.5).to(x.dtype)
        return x + (0.1 + noise).to(x.dtype) * x.detach().abs().nan_to_num(0, 0, 0).amax().clamp(min=0.1)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return pytree.tree_map(wrong, function(*args, **kwargs))

    return call


def run_check(check: Check, device: str) -> None:
    """On a GPU in full size; elsewhere small, to test the check."""
    try:
        check(device, device == "cpu")
    finally:
        _let_go(device)


def parameters(checks: Sequence[Check]) -> list[Any]:
    """For pytest.mark.parametrize(("check", "device")): all checks on the CPU, all again on a GPU."""
    return [
        pytest.param(check, device, id=f"{check.__name__.removeprefix('check_')}-{device}", marks=marks)
        for device, marks in (("cpu", ()), ("cuda", (pytest.mark.cuda,)))
        for check in checks
    ]


def assert_notices(check: Check, module: Any, names: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`check` fails when the results of the op's functions in its module are disturbed."""
    for name in names:
        monkeypatch.setattr(module, name, disturbed(getattr(module, name)))
    with pytest.raises(AssertionError):
        check("cpu", True)
