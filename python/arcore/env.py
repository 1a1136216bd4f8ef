"""What this installation is made of and what it lacks: `arcore env`, `python -m arcore env`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path

import torch

from arcore import _C, _extension, matmul
from arcore._gpu_results import SEEN
from arcore._optional import how_to_install
from arcore._version import __version__

# Optional packages by the extra that brings them: (distribution, module).
EXTRAS = {
    "zoo": (("numpy", "numpy"), ("safetensors", "safetensors"), ("pillow", "PIL"), ("tyro", "tyro")),
    "plot": (("matplotlib", "matplotlib"),),
    "train": (
        ("pytorch-lightning", "pytorch_lightning"),
        ("rich", "rich"),
        ("scikit-learn", "sklearn"),
        ("mlxtend", "mlxtend"),
    ),
}


def cpu_model() -> str:
    """What the processor calls itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_lines() -> list[tuple[str, str]]:
    used, supported = torch.ops.arcore.cpu_isa(), torch.ops.arcore.cpu_isa_supported()
    forced = os.environ.get("ATEN_CPU_CAPABILITY")
    reason = f"ATEN_CPU_CAPABILITY={forced}" if forced else "the best this CPU runs"
    built = torch.ops.arcore.cpu_isas_built().split()
    above = built[built.index(supported) + 1 :]
    untested = f"; {', '.join(above)} compiled but never run here: this CPU lacks it" if above else ""
    return [
        ("CPU", cpu_model()),
        ("CPU kernels", f"{used} in use ({reason}); built: {', '.join(built)}{untested}"),
        ("  bfloat16 units", f"{torch.ops.arcore.cpu_bf16()} in use; this CPU has {_units()}"),
        ("  default is", f"{torch.ops.arcore.cpu_default_isa()} ({platform.machine()})"),
        ("float32 products", _products()),
        ("16-bit products", _halves()),
        ("threads", f"{torch.get_num_threads()} (torch.set_num_threads or OMP_NUM_THREADS changes it)"),
    ]


def _products() -> str:
    if matmul.resolve("auto") == "onednn":
        return 'oneDNN in commands, as MKL leaves this CPU\'s AVX-512 idle; in Python: arcore.float32_matmul("auto")'
    return "as torch computes them; arcore.float32_matmul can choose oneDNN"


def _halves() -> str:
    slow = [str(dtype).removeprefix("torch.") for dtype in matmul.slow_halves()]
    if not slow:
        return "as torch computes them; oneDNN has code for bfloat16 and float16 on this CPU"
    return (
        f"{' and '.join(slow)} in float32 in commands, as oneDNN has no code for them on this CPU; in Python: "
        "arcore.half_matmul()"
    )


def _units() -> str:
    names = torch.ops.arcore.cpu_bf16_supported().split()[1:]
    return " and ".join(names) if names else "none"


def _cuda_lines(built_archs: str) -> tuple[list[tuple[str, str]], list[str]]:
    lines, missing = [], []
    if not built_archs:
        lines.append(("CUDA kernels", "not built"))
        if torch.version.cuda is None:
            missing.append(
                "GPU kernels: this torch is a CPU build; install a CUDA torch, then `pip install .` again"
            )
        else:
            missing.append(
                f"GPU kernels: torch has CUDA {torch.version.cuda} but arcore was built without; put an nvcc of CUDA "
                f"{torch.version.cuda.split('.')[0]} on PATH, then `ARCORE_CUDA=on pip install .` says what fails"
            )
        return lines, missing
    seen = ", ".join(f"{op} on {gpu}" for op, gpu in SEEN.items())
    state = f"seen to be right: {seen}" if seen else "no result of a GPU is committed yet"
    lines.append(("CUDA kernels", f"built for {built_archs}; {state}"))
    if not torch.cuda.is_available():
        lines.append(("GPU", "none visible to torch"))
        return lines, missing
    major, minor = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"
    try:
        lines.append(("GPU", f"{name}, runs arcore's sm_{torch.ops.arcore.cuda_arch_probe()} code"))
    except RuntimeError as error:
        lines.append(("GPU", name))
        missing.append(f"GPU kernels: {error}")
    return lines, missing


def report() -> str:
    """Versions, instruction set, architectures, threads, and what is missing with the command that mends it."""
    built = _C.build_info()
    lines = [
        ("arcore", f"{__version__} ({_extension.FOLDER})"),
        ("Python", f"{platform.python_version()} ({sys.executable})"),
        ("torch", f"{torch.__version__}, arcore was built with {built['torch']} and {built['compiler']}"),
        ("system", platform.platform()),
        *_cpu_lines(),
    ]
    cuda, missing = _cuda_lines(built["cuda_archs"])
    lines += cuda
    for extra, packages in EXTRAS.items():
        absent = [name for name, module in packages if importlib.util.find_spec(module) is None]
        found = [f"{name} {_version(name)}" for name, _ in packages if name not in absent]
        lines.append((f"extra [{extra}]", ", ".join(found) or "nothing installed"))
        if absent:
            missing.append(f"{', '.join(absent)}: {how_to_install(extra, *absent)}")
    width = max(len(name) for name, _ in lines)
    text = [f"{name:<{width}}  {value}" for name, value in lines]
    text.append("")
    text += [f"missing  {item}" for item in missing] or ["nothing is missing"]
    return "\n".join(text)
