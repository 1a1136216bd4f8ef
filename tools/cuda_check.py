"""Compiles every .cu file for every architecture it is meant for and reports registers, shared memory and spills.

No GPU and no CUDA build of torch is needed: `make cuda-check`. Exits with 1 if a file does not compile, if a kernel
spills registers, or if ptxas could not keep wgmma asynchronous.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cutlass
from cuda_config import find_nvcc, gencodes, nvcc_version

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
    "-std=c++20",
    "-O3",
    "--expt-relaxed-constexpr",
    "--threads",
    "1",
    "-Xptxas",
    "-v",
    "-I",
    str(ROOT / "csrc"),
]
KERNEL = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
# ptxas gives way instead of failing: wgmma one at a time, register budgets ignored.
GAVE_WAY = re.compile(r"wgmma.*serialized|warpgroup.wait is injected|setmaxnreg.*ignored")
USED = re.compile(r"Used (\d+) registers(?:.*?, (\d+) bytes smem)?")


def demangle(name: str) -> str:
    result = subprocess.run(["c++filt", name], capture_output=True, text=True, check=False)
    return result.stdout.strip() or name


def check(nvcc: str, source: Path, gencode: list[str], cute: Path | None) -> bool:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        include = ["-isystem", str(cute)] if cute else []
        command = [nvcc, *FLAGS, *include, *gencode, "-c", str(source), "-o", f"{folder}/out.o"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    name = source.relative_to(ROOT)
    if result.returncode != 0:
        print(f"{name}: does not compile\n{result.stderr}")
        return False
    print(f"{name}: {seconds:.1f} s")
    good, kernel, spilled = True, "", 0
    for line in result.stderr.splitlines():
        if match := KERNEL.search(line):
            kernel = f"{demangle(match.group(1))} [{match.group(2)}]"
        elif match := SPILL.search(line):
            spilled = int(match.group(1)) + int(match.group(2))
        elif match := USED.search(line):
            note = f", {spilled} BYTES SPILLED" if spilled else ""
            print(
                f"  {kernel}: {match.group(1)} registers, {match.group(2) or 0} bytes of static shared memory{note}"
            )
            good &= spilled == 0
        elif GAVE_WAY.search(line):
            print(f"  {line.strip()}")
            good = False
    return good


def main() -> int:
    nvcc = find_nvcc()
    if nvcc is None:
        print("cuda_check: nvcc was not found; install the CUDA toolkit, or set CUDA_HOME", file=sys.stderr)
        return 1
    names, sm80, sm90a = gencodes(nvcc)
    print(f"nvcc {nvcc_version(nvcc)}, architectures {' '.join(names)}")
    sources = sorted((ROOT / "csrc").glob("**/*.cu"))
    good, cute = True, cutlass.include_folder()
    for source in sources:
        hopper = source.stem.endswith("_sm90")
        if hopper and cute is None:
            print(f"cuda_check: {source.relative_to(ROOT)}: {cutlass.ABSENT}", file=sys.stderr)
            good = False
            continue
        good &= check(nvcc, source, sm90a if hopper else sm80, cute if hopper else None)
    print(f"{len(sources)} files, {'all good' if good else 'FAILED'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
