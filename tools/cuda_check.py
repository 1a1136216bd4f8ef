"""Compiles every .cu file and reports registers, shared memory, stack and spills of its kernels.

No GPU and no CUDA build of torch is needed: `make cuda-check`. Fails if a file does not compile, a kernel spills
registers, ptxas could not keep wgmma asynchronous, or the code lacks an instruction that the file claims in a comment
such as `// claims: mma.sync, cp.async, ldmatrix`. Reports of files that have not changed are kept under build/.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import cutlass
from cuda_config import _nvcc_jobs, find_nvcc, gencodes, nvcc_version

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "cuda_check"
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "--threads", "1", "-Xptxas", "-v"]
FLAGS += ["-I", str(ROOT / "csrc")]
# --quick: machine code of the portable kernels for one architecture.
QUICK = ["-gencode=arch=compute_80,code=sm_80"]

KERNEL = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
# ptxas gives way instead of failing: wgmma one at a time, register budgets ignored.
GAVE_WAY = re.compile(r"wgmma.*serialized|warpgroup.wait is injected|setmaxnreg.*ignored")
USED = re.compile(r"Used (\d+) registers(?:.*?, (\d+) bytes smem)?")
CLAIMS = re.compile(r"^// claims: (.+)$", re.MULTILINE)


@dataclass
class Kernel:
    name: str
    arch: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spilled: int = 0


@dataclass
class Report:
    file: str
    seconds: float = 0.0
    kernels: list[Kernel] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def short_name(symbol: str) -> str:
    """A kernel's name without namespaces and arguments."""
    result = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=False)
    name = result.stdout.strip() or symbol
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0 and not name.startswith("(anonymous", i):
            name = name[:i]
            break
    return re.sub(r"(?:\w+|\(anonymous namespace\))::", "", name).removeprefix("void ")


def read_log(log: str, report: Report) -> None:
    """Adds what ptxas said to the report."""
    kernel = Kernel("", "")
    for line in log.splitlines():
        if match := KERNEL.search(line):
            kernel = Kernel(short_name(match.group(1)), match.group(2))
            report.kernels.append(kernel)
        elif match := SPILL.search(line):
            kernel.stack = int(match.group(1))
            kernel.spilled = int(match.group(2)) + int(match.group(3))
        elif match := USED.search(line):
            kernel.registers, kernel.shared = int(match.group(1)), int(match.group(2) or 0)
            if kernel.spilled:
                report.faults.append(f"{kernel.name} [{kernel.arch}] spills {kernel.spilled} bytes")
        elif GAVE_WAY.search(line):
            report.faults.append(line.strip())


def missing_claims(source: str, ptx: str) -> list[str]:
    """Instructions that the source claims and the PTX lacks."""
    claims = [c.strip() for found in CLAIMS.findall(source) for c in found.split(",")]
    return [claim for claim in claims if claim not in ptx]


def key_of(source: Path, command: list[str], version: str) -> str:
    """Changes with everything that the compiler sees of our own."""
    op = source.parent.parent if source.parent.name == "instantiations" else source.parent
    digest = hashlib.sha256(repr((command, version)).encode())
    for folder in sorted({op, ROOT / "csrc" / "common"}):
        for path in sorted(folder.rglob("*")):
            if path.suffix in {".h", ".cuh"} or path == source:
                digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def check(nvcc: str, version: str, source: Path, gencode: list[str], cute: Path | None) -> Report:
    report = Report(str(source.relative_to(ROOT)))
    include = ["-isystem", str(cute)] if cute else []
    command = [nvcc, *FLAGS, *include, *gencode, "-c", str(source)]
    kept = CACHE / f"{key_of(source, command, version)}.json"
    if kept.is_file():
        stored = json.loads(kept.read_text())
        report.seconds = stored["seconds"]
        report.kernels = [Kernel(**k) for k in stored["kernels"]]
        return report
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        keep = ["--keep", "--keep-dir", folder, "-o", f"{folder}/out.o"]
        result = subprocess.run([*command, *keep], capture_output=True, text=True, check=False)
        ptx = "\n".join(path.read_text(errors="replace") for path in Path(folder).glob("*.ptx"))
    report.seconds = time.perf_counter() - start
    if result.returncode != 0:
        report.faults.append(f"does not compile\n{result.stderr}")
        return report
    read_log(result.stderr, report)
    report.faults += [f"claims {c} but its code has none" for c in missing_claims(source.read_text(), ptx)]
    if not report.faults:
        CACHE.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(asdict(report)))
    return report


def show(report: Report) -> None:
    print(f"{report.file}: {report.seconds:.1f} s")
    for k in report.kernels:
        notes = [f"{k.registers} registers"]
        notes += [f"{k.shared} B shared"] if k.shared else []
        notes += [f"{k.stack} B stack"] if k.stack else []
        notes += [f"{k.spilled} B SPILLED"] if k.spilled else []
        print(f"  {k.name} [{k.arch}]: {', '.join(notes)}")
    for fault in report.faults:
        print(f"  FAULT: {fault}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="compile the CUDA files without a GPU")
    parser.add_argument(
        "--quick", action="store_true", help="sm_80 machine code of the portable kernels only"
    )
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    options = parser.parse_args(arguments)
    nvcc = find_nvcc()
    if nvcc is None:
        print("cuda_check: nvcc was not found; install the CUDA toolkit, or set CUDA_HOME", file=sys.stderr)
        return 1
    names, sm80, sm90a = gencodes(nvcc)
    version = nvcc_version(nvcc)
    print(f"nvcc {version}, {'sm_80 only' if options.quick else 'architectures ' + ' '.join(names)}")
    sources, cute = sorted((ROOT / "csrc").glob("**/*.cu")), cutlass.include_folder()
    reports = []
    with ThreadPoolExecutor(_nvcc_jobs()) as pool:
        tasks = []
        for source in sources:
            hopper = source.stem.endswith("_sm90")
            if hopper and options.quick:
                continue
            if hopper and cute is None:
                reports.append(Report(str(source.relative_to(ROOT)), faults=[cutlass.ABSENT]))
                continue
            gencode = QUICK if options.quick else sm90a if hopper else sm80
            tasks.append(pool.submit(check, nvcc, version, source, gencode, cute if hopper else None))
        reports += [task.result() for task in tasks]
    bad = [report for report in reports if report.faults]
    for report in reports if not options.quick else bad:
        show(report)
    if options.json:
        options.json.write_text(json.dumps([asdict(report) for report in reports], indent=1) + "\n")
    kernels = sum(len(report.kernels) for report in reports)
    print(f"{len(reports)} files, {kernels} kernels, {'all good' if not bad else f'{len(bad)} files FAILED'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
