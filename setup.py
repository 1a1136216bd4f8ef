"""Builds the two native parts of arcore with CMake + Ninja; everything else is declared in pyproject.toml.

Environment: ARCORE_CUDA=auto|on|off, TORCH_CUDA_ARCH_LIST, ARCORE_OPS_LIBRARY (an _ops.so built elsewhere), MAX_JOBS,
CMAKE_{C,CXX,CUDA}_COMPILER_LAUNCHER (ccache).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))


def tool(name: str) -> str:
    """Path of cmake or ninja: from PATH, or from the PyPI package of that name."""
    import build_tools

    try:
        return build_tools.find(name)
    except FileNotFoundError as error:
        wanted = shlex.quote(build_tools.requirement(name))
        sys.exit(f"arcore: {error}; run `pip install {wanted}`, then the same command again")


class CMakeBuild(build_ext):
    def run(self) -> None:
        try:
            import torch
        except ImportError:
            sys.exit("arcore: torch>=2.11 must be installed before arcore is built: pip install torch")
        import cutlass
        from cuda_config import DEFAULT_ARCHS, detect_cuda

        torch_root = Path(torch.__file__).parent
        cuda = detect_cuda(torch.version.cuda)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 2)
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        folder = (
            ROOT
            / "build"
            / f"cmake-{sys.implementation.cache_tag}-torch{torch.__version__}-cuda{cuda.version or 'off'}"
        )
        print(
            f"arcore: torch {torch.__version__}, CUDA {cuda.summary}, jobs {jobs}",
            flush=True,
        )
        # _ops.so depends on neither Python nor, from 2.11 on, torch's version: one that was built for CUDA elsewhere
        # is taken as it is, and TORCH_CUDA_ARCH_LIST says for what.
        ahead = os.environ.get("ARCORE_OPS_LIBRARY")
        if ahead and not Path(ahead).is_file():
            sys.exit(f"arcore: ARCORE_OPS_LIBRARY: expected a file but got {ahead!r}")
        cute = cutlass.include_folder()
        if cuda.gencode_sm90a and cute is None:
            print(f"arcore: built without the sm_90a kernels: {cutlass.ABSENT}", flush=True)
        definitions = {
            "CMAKE_BUILD_TYPE": os.environ.get("ARCORE_BUILD_TYPE", "Release"),
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "ARCORE_TORCH_INCLUDE": torch_root / "include",
            "ARCORE_TORCH_LIB": torch_root / "lib",
            "ARCORE_TORCH_VERSION": torch.__version__,
            "ARCORE_PYTHON_INCLUDE": sysconfig.get_paths()["include"],
            "ARCORE_EXT_SUFFIX": suffix,
            "ARCORE_CUDA": "ON" if cuda.enabled else "OFF",
            "ARCORE_CUDA_GENCODE_SM80": ";".join(cuda.gencode_sm80),
            "ARCORE_CUDA_GENCODE_SM90A": ";".join(cuda.gencode_sm90a) if cute else "",
            "ARCORE_CUTE_INCLUDE": cute or "",
            "ARCORE_CUDA_ARCHS": " ".join(cuda.archs),
            "ARCORE_NVCC_JOBS": str(cuda.jobs),
        }
        if ahead:
            archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
            definitions |= {"ARCORE_CUDA": "OFF", "ARCORE_CUDA_ARCHS": archs.replace(";", " ")}
        elif cuda.enabled:
            definitions["CMAKE_CUDA_COMPILER"] = cuda.nvcc
        if shutil.which("ccache") and "CMAKE_CXX_COMPILER_LAUNCHER" not in os.environ:
            definitions["CMAKE_CXX_COMPILER_LAUNCHER"] = "ccache"
        configure = [tool("cmake"), "-G", "Ninja", "-S", ROOT, "-B", folder]
        subprocess.run([*configure, *(f"-D{k}={v}" for k, v in definitions.items())], check=True)
        targets = ["--target", "_C"] if ahead else []
        subprocess.run([tool("cmake"), "--build", folder, "--parallel", jobs, *targets], check=True)

        target = Path(self.get_ext_fullpath("arcore._C")).parent
        target.mkdir(parents=True, exist_ok=True)
        copies = {f"_C{suffix}": folder / f"_C{suffix}", "_ops.so": ahead or folder / "_ops.so"}
        for name, source in copies.items():
            # A running process may have the old file mapped: replace it, never write into it.
            fresh = target / f".{name}.new"
            shutil.copy2(source, fresh)
            os.replace(fresh, target / name)

    def get_outputs(self) -> list[str]:
        target = Path(self.get_ext_fullpath("arcore._C")).parent
        return [str(target / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"), str(target / "_ops.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(ext_modules=[Extension("arcore._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
