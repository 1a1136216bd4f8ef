"""Builds an op's CUDA sources for the CPU and swaps them in for its CPU kernels.

The sources are those that nvcc compiles for sm_80: csrc/<op>/cuda.cpp and csrc/<op>/instantiations/*_sm80.cu, here
compiled by g++ with tests/cuda_host/executor.cpp in the place of a GPU.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import mmap
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "cuda_host"
HERE = Path(__file__).resolve().parent
STATISTICS = (
    "blocks",
    "barriers",
    "collectives",
    "matrix_products",
    "async_copies",
    "bank_conflicts",
    "all_async_copies",
)


def cuda_include() -> Path | None:
    """The folder of the CUDA toolkit's headers, whose host-side types the kernels use."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc:
        homes.insert(0, str(Path(nvcc).resolve().parents[1]))
    for home in homes:
        if home and (Path(home) / "include" / "cuda_bf16.h").exists():
            return Path(home) / "include"
    return None


def unavailable() -> str | None:
    """Why the executor cannot be built here, or None."""
    if os.uname().machine != "x86_64":
        return "the executor needs an x86-64 processor"
    if shutil.which("g++") is None:
        return "g++ was not found"
    if cuda_include() is None:
        return "the CUDA toolkit's headers were not found"
    return None


@functools.cache
def _has_avx2() -> bool:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return {"avx2", "fma", "f16c", "bmi2", "lzcnt"} <= {"lzcnt" if f == "abm" else f for f in flags}


def build_library(sources: list[Path], sanitize: bool = False) -> Path:
    """Compiles `sources` with the executor; a library of the same sources and flags is reused."""
    torch_root = Path(torch.__file__).parent
    include = cuda_include()
    assert include is not None
    flags = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    flags += ["-Wno-unknown-pragmas", "-Wno-psabi", "-DARCORE_CUDA_HOST", "-ffp-contract=off"]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}"]
    flags += ["-isystem", str(include), "-isystem", str(torch_root / "include")]
    if _has_avx2():
        # Same bits (nothing is contracted), but a fused multiply-add is an instruction and no call.
        flags += ["-march=x86-64-v3"]
    if sanitize:
        flags += ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        flags += ["-fno-omit-frame-pointer"]
    # Compiling takes longer than the tests: -O2 would take half as long again.
    flags += ["-O1"]
    folders = {
        source.parent.parent if source.parent.name == "instantiations" else source.parent
        for source in sources
    }
    digest = hashlib.sha256(repr((flags, torch.__version__, [str(s) for s in sources])).encode())
    for folder in sorted({*folders, ROOT / "csrc" / "common", HERE}):
        for path in sorted(folder.rglob("*")):
            if path.suffix in {".h", ".cuh", ".cu", ".cpp"}:
                digest.update(path.read_bytes())
    CACHE.mkdir(parents=True, exist_ok=True)
    library = CACHE / f"{digest.hexdigest()[:20]}.so"
    with open(CACHE / f"{library.stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            return library
        folder = CACHE / library.stem
        folder.mkdir(exist_ok=True)
        objects, commands = [], []
        for i, source in enumerate([HERE / "executor.cpp", *sources]):
            target = folder / f"{i}.o"
            objects.append(str(target))
            commands.append(["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(target)])
        # As many compilers at once as setup.py would start.
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(jobs) as pool:
            done = list(pool.map(_run, commands))
        failed = [process.stdout for process in done if process.returncode]
        if failed:
            raise RuntimeError("cuda_host: a source does not compile\n" + "\n".join(failed))
        link = ["g++", "-shared", *objects, "-o", f"{library}.part", f"-L{torch_root / 'lib'}", "-ltorch_cpu"]
        link += ["-lc10", f"-Wl,-rpath,{torch_root / 'lib'}"]
        link += ["-fsanitize=address,undefined"] if sanitize else []
        subprocess.run(link, check=True)
        os.replace(f"{library}.part", library)
        shutil.rmtree(folder)
    return library


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy whose last byte lies before a page that may not be touched."""
    page = mmap.PAGESIZE
    size = tensor.numel() * tensor.element_size()
    pages = (size + page - 1) // page * page
    memory = mmap.mmap(-1, pages + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(start + pages), ctypes.c_size_t(page), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages - size)
    return flat.view(tensor.shape).copy_(tensor)


def native(path: Path) -> ctypes.CDLL:
    """The executor's own functions in a library, which then refuse other numbers and kinds of arguments: one array
    that is too short would be written past its end."""
    library = ctypes.CDLL(str(path))
    library.arcore_cuda_host_set_seed.argtypes = [ctypes.c_uint64]
    library.arcore_cuda_host_set_cluster_limit.argtypes = [ctypes.c_int]
    library.arcore_cuda_host_statistics.argtypes = [ctypes.POINTER(ctypes.c_int64 * len(STATISTICS))]
    return library


def statistics_of(library: ctypes.CDLL) -> dict[str, int]:
    """Counts of the last launch; `all_async_copies` of all launches."""
    values = (ctypes.c_int64 * len(STATISTICS))()
    library.arcore_cuda_host_statistics(ctypes.byref(values))
    return dict(zip(STATISTICS, values, strict=True))


def probe_library(sanitize: bool = False) -> ctypes.CDLL:
    """probe.cu, whose `probe` takes: kernel, out, in, n, mistake, blocks, threads, shared bytes, blocks of a cluster,
    message, its room."""
    library = native(build_library([HERE / "probe.cu"], sanitize))
    library.probe.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int64, ctypes.c_int,
        ctypes.c_int64, ctypes.c_int, ctypes.c_char_p, ctypes.c_int64,
    ]  # fmt: skip
    return library


class CudaHost:
    """The CUDA kernels of one op, compiled for the CPU."""

    def __init__(self, op: str, sanitize: bool = False) -> None:
        folder = ROOT / "csrc" / op
        sources = [folder / "cuda.cpp", *sorted((folder / "instantiations").glob("*_sm80.cu"))]
        path = build_library(sources, sanitize)
        before = _registered()
        torch.ops.load_library(str(path))
        self.names = sorted(_registered() - before)
        self._native = native(path)

    def set_seed(self, seed: int) -> None:
        """Picks the order in which warps and blocks run."""
        self._native.arcore_cuda_host_set_seed(seed)

    def set_cluster_limit(self, blocks: int) -> None:
        """Plays a GPU whose clusters have up to so many blocks; 0, the default, is one without clusters."""
        self._native.arcore_cuda_host_set_cluster_limit(blocks)

    def statistics(self) -> dict[str, int]:
        """Counts of the last launch; `all_async_copies` of all launches."""
        return statistics_of(self._native)


def _registered() -> set[str]:
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    return {
        name.removeprefix("arcore_cuda_host::") for name in names if name.startswith("arcore_cuda_host::")
    }


@functools.cache
def load(op: str) -> CudaHost:
    """`CudaHost` of an op; torch.ops.arcore_cuda_host.* holds its functions afterwards."""
    return CudaHost(op, sanitize=bool(os.environ.get("ARCORE_CUDA_HOST_SANITIZE")))


@functools.cache
def _define(name: str) -> torch.library.Library:
    """Gives torch.ops.arcore_cuda_host.<name> the schema of torch.ops.arcore.<name>."""
    library = torch.library.Library("arcore_cuda_host", "FRAGMENT")
    schema = str(getattr(torch.ops.arcore, name).default._schema)
    library.define(schema.removeprefix("arcore::"))
    return library


@contextmanager
def installed(op: str, seed: int = 0) -> Iterator[CudaHost]:
    """Inside, the functions of torch.ops.arcore that belong to `op` run its CUDA kernels on CPU tensors."""
    host = load(op)
    host.set_seed(seed)
    override = torch.library.Library("arcore", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for name in host.names:
                _define(name)
                kernel = getattr(torch.ops.arcore_cuda_host, name).default
                override.impl(name, kernel, "CPU", allow_override=True)
        yield host
    finally:
        override._destroy()
