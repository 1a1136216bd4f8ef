"""Float32 matrix products of the CPU by oneDNN in place of the BLAS that torch was built with.

PyTorch hands float32 products to MKL, which takes its AVX2 code on processors of AMD: on those whose units are 512 bits
wide (Zen 5 and later) that is half of what they can do. oneDNN, which PyTorch contains too and uses for convolutions
and bfloat16, has AVX-512 code for all of them.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Backend = Literal["torch", "onednn", "auto"]

# Below these sizes nothing is gained (measured on Zen 5: equal at about 2^20 multiply-adds). Rows count once, what is
# summed over four times and columns eight times less.
LEAST_ROWS = 4
LEAST_PRODUCTS = 1 << 20
LEAST_TURNED = 64
# AMD's families whose 512-bit operations take one pass through the units.
WIDE_FAMILY = 26

_lock = threading.RLock()
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
            _use(resolve(self.backend))

    def __exit__(self, *error: object) -> None:
        with _lock:
            _use(self._before.pop())


def current() -> str:
    """What computes large float32 products on the CPU now, `"torch"` or `"onednn"`."""
    return "torch" if _library is None else "onednn"


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


def _use(backend: str) -> None:
    global _library
    if backend == current():
        return
    if backend == "torch":
        _library._destroy()
        _library = None
        return
    linear = _by_onednn()
    own_mm, own_addmm = (torch.library.get_kernel(f"aten::{name}", "CPU") for name in ("mm", "addmm"))
    here = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def mm(a: Tensor, b: Tensor) -> Tensor:
        if _suits(a, b):
            return linear(a, b.t(), None)
        return own_mm.call_boxed(here, a, b)  # type: ignore[no-any-return]

    def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
        simple = (
            bias.dim() == 1 and bias.dtype is torch.float32 and bias.stride(0) == 1 and beta == alpha == 1
        )
        if simple and bias.shape[0] == b.shape[-1] and _suits(a, b):
            return linear(a, b.t(), bias)
        return own_addmm.call_boxed(here, bias, a, b, beta=beta, alpha=alpha)  # type: ignore[no-any-return]

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        # torch says that a kernel is replaced, which is the purpose.
        warnings.simplefilter("ignore")
        library.impl("mm", mm, "CPU", allow_override=True)
        library.impl("addmm", addmm, "CPU", allow_override=True)
    _library = library
