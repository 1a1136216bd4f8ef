"""What computes matrix products on the CPU, where PyTorch's own choice is slow.

PyTorch hands float32 products to MKL, which takes its AVX2 code on processors of AMD: on those whose units are 512 bits
wide (Zen 5 and later) that is half of what they can do. oneDNN, which PyTorch contains too and uses for convolutions
and bfloat16, has AVX-512 code for all of them.

On processors that oneDNN has no bfloat16 or float16 code for (AVX2 for the one, nearly all for the other) PyTorch
multiplies such numbers with loops of its own, 8 to 160 times slower than float32. There they are widened to float32,
multiplied, and rounded once.
"""

from __future__ import annotations

import functools
import math
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Backend = Literal["torch", "onednn", "auto"]
HalfBackend = Literal["torch", "float32", "auto"]

# Below these sizes nothing is gained (measured on Zen 5: equal at about 2^20 multiply-adds). Rows count once, what is
# summed over four times and columns eight times less.
LEAST_ROWS = 4
LEAST_PRODUCTS = 1 << 20
LEAST_TURNED = 64
# AMD's families whose 512-bit operations take one pass through the units.
WIDE_FAMILY = 26

# Widened weights are made in pieces of at most so many numbers: 16 MiB of floats.
PIECE = 2**22
# Up to so many rows bfloat16 goes through the op that widens a weight as it reads it.
STEP_ROWS = 32

HALVES = (torch.bfloat16, torch.float16)
# What is replaced for them; what they are made of (linear layers, einsum, transposed convolutions) follows.
_HALF_OPS = (
    "bmm",
    "baddbmm",
    "convolution",
    "convolution_backward",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)


@dataclass(frozen=True)
class _Choice:
    """What computes products now: float32 ones, and the types that are widened to float32."""

    float32: str = "torch"
    widened: frozenset[torch.dtype] = frozenset()


_lock = threading.RLock()
_choice = _Choice()
_library: Any = None


class float32_matmul(AbstractContextManager[None]):
    """Chooses what computes float32 matrix products on the CPU: `with arcore.float32_matmul("auto"): ...`.

    It holds for the whole process, all threads, `torch.mm` and `torch.addmm` and so what is made of them: linear
    layers, and products of two matrices by `@`; forward and backward. Small products (fewer than 2^20 multiply-adds, 4
    rows, 32 columns), weights that are slices of wider ones, and products of other types stay with torch. Rounding
    differs as it does between two BLAS libraries; both keep float32 sums. Compiled code (`torch.compile`) calls torch's
    own products and is not changed.

    The command line chooses `"auto"`, or what the environment variable `ARCORE_MATMUL` names.

    Args:
        backend: `"torch"`: as torch does it. `"onednn"`: by oneDNN. `"auto"`: by oneDNN on AMD processors with 512-bit
            units (family 26, Zen 5, and later), else as torch does it.

    Raises:
        ValueError: the backend is not one of these.
        RuntimeError: `"onednn"` is asked for and this torch has none that can be called.
    """

    def __init__(self, backend: Backend = "auto") -> None:
        if backend not in get_args(Backend):
            names = ", ".join(repr(name) for name in get_args(Backend))
            raise ValueError(f"backend must be one of {names} but got {backend!r}")
        if backend == "onednn" and (reason := why_not()):
            raise RuntimeError(f"backend='onednn': {reason}; choose 'torch' or 'auto'")
        self.backend = backend
        self._before: list[str] = []

    def __enter__(self) -> None:
        with _lock:
            self._before.append(current())
            _use(replace(_choice, float32=resolve(self.backend)))

    def __exit__(self, *error: object) -> None:
        with _lock:
            _use(replace(_choice, float32=self._before.pop()))


class half_matmul(AbstractContextManager[None]):
    """Chooses what computes products in bfloat16 and float16 on the CPU: `with arcore.half_matmul(): ...`.

    It holds for the whole process, all threads, for matrix products and batches of them, convolutions, and the backward
    of `scaled_dot_product_attention`; forward and backward, under autocast too. In float32 the factors are widened, and
    sums are kept in float32 and rounded once, so results are at least as near to the exact ones as torch's. Large
    weights are widened in pieces of 16 MiB. Compiled code (`torch.compile`) calls torch's own products and is not
    changed.

    Commands and `arcore.training` choose `"auto"` where they compute in such a type, unless the environment variable
    `ARCORE_MATMUL` is `torch`; `arcore.nn.linear` does so by itself where no gradients are recorded.

    Args:
        backend: `"torch"`: as torch does it. `"float32"`: in float32. `"auto"`: in float32 those types that oneDNN has
            no code for on this processor: bfloat16 without AVX-512, float16 without units for it.

    Raises:
        ValueError: the backend is not one of these.
    """

    def __init__(self, backend: HalfBackend = "auto") -> None:
        if backend not in get_args(HalfBackend):
            names = ", ".join(repr(name) for name in get_args(HalfBackend))
            raise ValueError(f"backend must be one of {names} but got {backend!r}")
        self.backend = backend
        self._before: list[frozenset[torch.dtype]] = []

    def __enter__(self) -> None:
        kinds = {"torch": (), "float32": HALVES, "auto": slow_halves()}[self.backend]
        with _lock:
            self._before.append(_choice.widened)
            _use(replace(_choice, widened=frozenset(kinds)))

    def __exit__(self, *error: object) -> None:
        with _lock:
            _use(replace(_choice, widened=self._before.pop()))


def half_matmul_of_commands() -> half_matmul:
    """What commands and training use: `"auto"`, unless ARCORE_MATMUL is `torch`."""
    return half_matmul("torch" if os.environ.get("ARCORE_MATMUL") == "torch" else "auto")


def current() -> str:
    """What computes large float32 products on the CPU now, `"torch"` or `"onednn"`."""
    return _choice.float32


@functools.cache
def slow_halves() -> tuple[torch.dtype, ...]:
    """The types of 16 bits that oneDNN has no code for on this processor: torch multiplies them in plain loops."""
    there: dict[torch.dtype, bool] = {}
    for dtype, name in zip(HALVES, ("bf16", "fp16"), strict=True):
        asked: Any = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
        there[dtype] = torch.backends.mkldnn.is_available() and asked is not None and bool(asked())
    return tuple(dtype for dtype in HALVES if not there[dtype])


@functools.cache
def why_not() -> str | None:
    """Why oneDNN cannot be called here, or None where it can."""
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    try:
        torch.library.get_kernel("aten::mm", "CPU")
        _by_onednn()(torch.ones(2, 3), torch.ones(2, 3), None)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        return f"torch {torch.__version__} does not let it be called ({str(error).splitlines()[0]})"
    return None


def resolve(backend: Backend) -> str:
    """`"torch"` or `"onednn"`, for `"auto"` what is faster on this processor."""
    if backend != "auto":
        return backend
    narrow = torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return "onednn" if narrow and _wide_amd() and why_not() is None else "torch"


@functools.cache
def _wide_amd() -> bool:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    facts: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    family = facts.get("cpu family", "")
    return facts.get("vendor_id") == "AuthenticAMD" and family.isdecimal() and int(family) >= WIDE_FAMILY


def _by_onednn() -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """x [M, K] and w [N, K] and a bias [N] -> x w^T + bias, without derivatives."""
    op: Any = torch.ops.mkldnn._linear_pointwise.default

    def linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return op(x, w, bias, "none", [], "")  # type: ignore[no-any-return]

    return linear


def fills_its_memory(weight: Tensor) -> bool:
    """Whether a matrix is no slice of a wider one: for those oneDNN has plain loops alone, a thousand times slower."""
    return weight.is_contiguous() or weight.t().is_contiguous()


def _suits(a: Tensor, b: Tensor) -> bool:
    """Whether the product of a `[M, K]` and b `[K, N]` gains."""
    if not (a.dtype is b.dtype is torch.float32 and a.dim() == b.dim() == 2):
        return False
    (rows, inner), columns = a.shape, b.shape[1]
    if (
        inner != b.shape[0]
        or rows * inner * columns < LEAST_PRODUCTS
        or min(rows, inner // 4, columns // 8) < LEAST_ROWS
    ):
        return False
    if not fills_its_memory(b):
        return False
    # Turning `a` costs a pass over it.
    down, right = a.stride()
    return (right == 1 and down >= inner) or (a.t().is_contiguous() and min(rows, columns) >= LEAST_TURNED)


def _use(wanted: _Choice) -> None:
    global _library, _choice
    if wanted == _choice:
        return
    if _library is not None:
        _library._destroy()
        _library = None
    _choice = wanted
    if wanted == _Choice():
        return
    kernels = _kernels(wanted)
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        # torch says that a kernel is replaced, which is the purpose.
        warnings.simplefilter("ignore")
        for name, kernel in kernels.items():
            library.impl(name, kernel, "CPU", allow_override=True)
    _library = library


def _kernels(wanted: _Choice) -> dict[str, Callable[..., Any]]:
    """What replaces torch's kernels, by the names of their ops."""
    linear = _by_onednn() if wanted.float32 == "onednn" else None
    here = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def own(name: str) -> Callable[..., Any]:
        return functools.partial(torch.library.get_kernel(f"aten::{name}", "CPU").call_boxed, here)

    own_mm, own_addmm = own("mm"), own("addmm")

    def mm(a: Tensor, b: Tensor) -> Tensor:
        if a.dtype in wanted.widened and b.dtype is a.dtype and a.dim() == b.dim() == 2:
            return _widened_mm(own_mm, a, b)
        if linear is not None and _suits(a, b):
            return linear(a, b.t(), None)
        return own_mm(a, b)  # type: ignore[no-any-return]

    def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
        if bias.dtype in wanted.widened and bias.dtype is a.dtype is b.dtype:
            return _widened_addmm(own_addmm, bias, a, b, beta, alpha)
        simple = (
            bias.dim() == 1 and bias.dtype is torch.float32 and bias.stride(0) == 1 and beta == alpha == 1
        )
        if linear is not None and simple and bias.shape[0] == b.shape[-1] and _suits(a, b):
            return linear(a, b.t(), bias)
        return own_addmm(bias, a, b, beta=beta, alpha=alpha)  # type: ignore[no-any-return]

    kernels: dict[str, Callable[..., Any]] = {"mm": mm, "addmm": addmm}
    if wanted.widened:
        kernels |= {name: _widening(own(name), wanted.widened) for name in _HALF_OPS}
    return kernels


def _widening(own: Callable[..., Any], kinds: frozenset[torch.dtype]) -> Callable[..., Any]:
    """A kernel that takes tensors of these types as float32 and rounds its results to the type that they had."""

    def call(*args: Any, **options: Any) -> Any:
        floats = {
            value.dtype
            for value in (*args, *options.values())
            if isinstance(value, Tensor) and value.dtype.is_floating_point
        }
        # Sums that attention keeps are float32 beside factors of 16 bits.
        (*halves,) = floats - {torch.float32}
        if len(halves) != 1 or halves[0] not in kinds:
            return own(*args, **options)
        (dtype,) = halves

        def wide(value: Any) -> Any:
            return value.float() if isinstance(value, Tensor) and value.dtype is dtype else value

        found = own(*map(wide, args), **{name: wide(value) for name, value in options.items()})
        if isinstance(found, Tensor):
            return found.to(dtype)
        return tuple(part.to(dtype) if isinstance(part, Tensor) else part for part in found)

    return call


def _widened_mm(own: Callable[..., Any], a: Tensor, b: Tensor) -> Tensor:
    """a `[M, K]` times b `[K, N]` of 16 bits, in float32."""
    if _reads_once(a, b):
        return torch.ops.arcore.linear_step(a, b.t(), None)  # type: ignore[no-any-return]
    return _by_pieces(lambda a, b, _: own(a, b), a, b)


def _widened_addmm(
    own: Callable[..., Any], bias: Tensor, a: Tensor, b: Tensor, beta: Any, alpha: Any
) -> Tensor:
    simple = bias.dim() == 1 and bias.shape == b.shape[1:]
    if simple and beta == alpha == 1 and bias.is_contiguous() and _reads_once(a, b):
        return torch.ops.arcore.linear_step(a, b.t(), bias)  # type: ignore[no-any-return]
    if not simple:
        out = own(bias.float(), a.float(), b.float(), beta=beta, alpha=alpha)
        return out.to(a.dtype)  # type: ignore[no-any-return]
    wide = bias.float()
    return _by_pieces(lambda a, b, piece: own(wide[piece], a, b, beta=beta, alpha=alpha), a, b)


def _reads_once(a: Tensor, b: Tensor) -> bool:
    """Whether the op that widens a weight as it reads it takes less time: bfloat16, few rows, a layer's weight."""
    return (
        a.dtype is torch.bfloat16
        and a.dim() == b.dim() == 2
        and 0 < a.shape[0] <= STEP_ROWS
        and 0 < b.shape[0] == a.shape[1]
        and b.shape[1] > 0
        and a.is_contiguous()
        and b.t().is_contiguous()
    )


def _by_pieces(multiply: Callable[[Tensor, Tensor, slice], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Products of widened a `[M, K]` with pieces of columns of b `[K, N]`, widened one after the other."""
    (inner, columns), dtype = b.shape, a.dtype
    a = a.float()
    step = max(1, PIECE // max(inner, 1))
    if columns <= step or a.shape[1] != inner:
        return multiply(a, b.float(), slice(None)).to(dtype)
    out = torch.empty(a.shape[0], columns, dtype=dtype)
    for start in range(0, columns, step):
        piece = slice(start, start + step)
        out[:, piece] = multiply(a, b[:, piece].float(), piece)
    return out


def in_float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` of 16-bit numbers with the product in float32; without derivatives.

    Args:
        x: `[..., K]`.
        weight: `[N, K]`, of the same type.
        bias: `[N]`, of the same type, or None.

    Returns:
        `[..., N]` in that type, rounded once.
    """
    rows = x.reshape(math.prod(x.shape[:-1]), weight.shape[1])
    wide = None if bias is None else bias.float()

    def multiply(a: Tensor, b: Tensor, piece: slice) -> Tensor:
        return torch.nn.functional.linear(a, b.t(), None if wide is None else wide[piece])

    return _by_pieces(multiply, rows, weight.t()).view(*x.shape[:-1], weight.shape[0])
