"""Decides whether and for which GPU architectures the CUDA kernels are built (used by setup.py and cuda_check.py)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

DEFAULT_ARCHS = "8.0+PTX;9.0a"
# Ops that promise equal bits: no a * b + c may become a fused multiply-add by itself (CMakeLists.txt has the list too).
EXACT = ("sample", "speculative", "token_logprobs")


@dataclass(frozen=True)
class CudaConfig:
    enabled: bool
    reason: str
    nvcc: str = ""
    version: str = ""
    archs: list[str] = field(default_factory=list)
    gencode_sm80: list[str] = field(default_factory=list)
    gencode_sm90a: list[str] = field(default_factory=list)
    jobs: int = 1

    @property
    def summary(self) -> str:
        return f"{self.version} for {' '.join(self.archs)}" if self.enabled else f"off ({self.reason})"


def find_nvcc() -> str | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    found = shutil.which("nvcc")
    if found:
        return found
    return "/usr/local/cuda/bin/nvcc" if Path("/usr/local/cuda/bin/nvcc").exists() else None


def nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    return match.group(1) if match else "unknown"


def _known_to_nvcc(nvcc: str) -> set[str]:
    text = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
    return set(re.findall(r"compute_(\d+)", text))


def gencodes(nvcc: str, arch_list: str | None = None) -> tuple[list[str], list[str], list[str]]:
    """(names, flags of the sm_80 kernels, flags of the sm_90a kernels) for an arch list like "8.0+PTX;9.0a".

    Kernels named `_sm80` are compiled for every listed architecture, for 9.0 where 9.0a is listed: a GPU of that kind
    runs them as the machine code of its own, not through the driver's compiler. Those named `_sm90` are compiled for
    9.0a only, because sm_90a code runs on compute capability 9.0 and nothing else.
    """
    text = arch_list or os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
    known = _known_to_nvcc(nvcc)
    names, sm80, sm90a = [], [], []
    for item in re.split(r"[;, ]+", text.strip()):
        if not item:
            continue
        ptx = item.endswith("+PTX")
        number = item.removesuffix("+PTX").replace(".", "")
        plain = number.rstrip("af")
        if not plain.isdigit():
            sys.exit(
                f"arcore: TORCH_CUDA_ARCH_LIST: expected entries like 8.0, 8.0+PTX or 9.0a but got {item!r}"
            )
        if known and plain not in known:
            print(
                f"arcore: warning: this nvcc does not know compute capability {item}; left out",
                file=sys.stderr,
            )
            continue
        if int(plain) < 80:
            print(
                f"arcore: warning: arcore's kernels need compute capability 8.0; {item} left out",
                file=sys.stderr,
            )
            continue
        names.append(item)
        if plain == "90":
            sm90a.append("-gencode=arch=compute_90a,code=sm_90a")
        portable = "90" if number == "90a" else number
        sm80.append(f"-gencode=arch=compute_{portable},code=sm_{portable}")
        if ptx:
            sm80.append(f"-gencode=arch=compute_{portable},code=compute_{portable}")
    return names, list(dict.fromkeys(sm80)), list(dict.fromkeys(sm90a))


def flags_of(source: Path) -> list[str]:
    """Compiler flags of one .cu file beside those that all have."""
    return ["-fmad=false"] if source.parent.parent.name in EXACT else []


def _nvcc_jobs() -> int:
    """One nvcc per 6 GiB of memory, at most one per core."""
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return max(1, min(int(pages * size / 2**30 / 6), os.cpu_count() or 1))


def detect_cuda(torch_cuda: str | None) -> CudaConfig:
    """CUDA is built iff this torch was built for CUDA and an nvcc of the same major version is found.

    A GPU need not be present. `ARCORE_CUDA=off` turns it off, `on` makes every obstacle a hard error.
    """
    wish = os.environ.get("ARCORE_CUDA", "auto").lower()
    if wish not in ("auto", "on", "off"):
        sys.exit(f"arcore: ARCORE_CUDA: expected auto, on or off but got {wish!r}")
    if wish == "off":
        return CudaConfig(False, "ARCORE_CUDA=off")

    def refuse(reason: str) -> CudaConfig:
        if wish == "on":
            sys.exit(f"arcore: ARCORE_CUDA=on but {reason}")
        return CudaConfig(False, reason)

    if torch_cuda is None:
        return refuse("the installed torch is a CPU build")
    nvcc = find_nvcc()
    if nvcc is None:
        return refuse("nvcc was not found; set CUDA_HOME or put nvcc on PATH")
    version = nvcc_version(nvcc)
    if version.split(".")[0] != torch_cuda.split(".")[0]:
        return refuse(
            f"nvcc is {version} while torch was built for CUDA {torch_cuda}; their major versions must agree"
        )
    names, sm80, sm90a = gencodes(nvcc)
    if not names:
        return refuse("no architecture of TORCH_CUDA_ARCH_LIST can be built")
    return CudaConfig(True, "", nvcc, version, names, sm80, sm90a, _nvcc_jobs())
