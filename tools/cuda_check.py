"""Compiles every .cu file and reports registers, shared memory, stack and spills of its kernels.

No GPU and no CUDA build of torch is needed: `make cuda-check`. Fails if a file does not compile, a kernel spills
registers, ptxas could not keep wgmma asynchronous, or the code is not what a comment of the file claims:

    // claims: mma.sync, cp.async                     in the PTX of the file
    // sass backward_rows: STG.E.128 >= 1; no STG.E.U16; no LDL
    // sass forward_kernel: MUFU.EX2 >= 60 between WARPGROUP.DEPBAR.LE gsb0, 0x1 and WARPGROUP.DEPBAR.LE gsb0, 0x0

The machine code is read with nvdisasm, of the CUDA toolkit or of PyPI's nvidia-cuda-nvdisasm. "sass NAME" holds for
every kernel whose name contains NAME, on every architecture, "sass NAME on sm_90" on that one alone; "between" counts
from the first instruction to the next.
Reports of files that have not changed are kept under build/.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import cutlass
from cuda_config import _nvcc_jobs, find_nvcc, flags_of, gencodes, nvcc_version

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
SASS_CLAIMS = re.compile(r"^// sass ([^:]+?)(?: on (sm_\w+))?: (.+)$", re.MULTILINE)
CLAUSE = re.compile(
    r"no (?P<absent>\S.*)|(?P<token>\S.*?) >= (?P<count>\d+)(?: between (?P<first>.+) and (?P<last>.+))?"
)
TARGET = re.compile(r"^\s*\.target\s+(\w+)", re.MULTILINE)
SECTION = re.compile(r"^\.text\.(\w+):")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?(.+?)\s*;")
NO_NVDISASM = (
    "claims about machine code cannot be checked: nvdisasm was not found; "
    "install it with `pip install nvidia-cuda-nvdisasm`"
)


@dataclass
class Kernel:
    name: str
    arch: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spilled: int = 0
    instructions: int = 0


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


def find_nvdisasm(nvcc: str) -> str | None:
    """That of the CUDA toolkit or on PATH, else the one of PyPI's nvidia-cuda-nvdisasm in this environment."""
    found = shutil.which("nvdisasm", path=str(Path(nvcc).resolve().parent)) or shutil.which("nvdisasm")
    packages = [Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib"))]
    others = sorted(path for folder in packages for path in folder.glob("nvidia/*/bin/nvdisasm"))
    return found or (str(others[-1]) if others else None)


def read_sass(text: str) -> dict[str, list[str]]:
    """The instructions of each kernel, without predicates, by mangled name."""
    kernels: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in text.splitlines():
        if match := SECTION.match(line):
            current = kernels.setdefault(match.group(1), [])
        elif current is not None and (match := INSTRUCTION.match(line)):
            current.append(match.group(1))
    return kernels


def count_between(code: list[str], token: str, first: str, last: str) -> int:
    """The most instructions `token` between an instruction `first` and the next `last`."""
    best, inside = 0, None
    for line in code:
        if line.startswith(first):
            inside = 0
        elif inside is not None and line.startswith(last):
            best, inside = max(best, inside), None
        elif inside is not None and line.startswith(token):
            inside += 1
    return best


def broken_sass_claims(source: str, kernels: dict[str, list[str]], arch: str = "") -> list[str]:
    """What the source claims of the machine code for `arch` and is not so; `kernels` by readable name."""
    faults = []
    for name, only, clauses in SASS_CLAIMS.findall(source):
        if only and only != arch:
            continue
        found = {k: code for k, code in kernels.items() if name in k}
        if not found:
            faults.append(f"claims machine code of {name}, which is no kernel of this file")
        for clause in (c.strip() for c in clauses.split(";")):
            match = CLAUSE.fullmatch(clause)
            if match is None:
                faults.append(f"claims {clause!r}, which is no claim this program knows")
                continue
            for kernel, code in found.items():
                if match["absent"]:
                    got = sum(line.startswith(match["absent"]) for line in code)
                    good = got == 0
                elif match["first"]:
                    got = count_between(code, match["token"], match["first"], match["last"])
                    good = got >= int(match["count"])
                else:
                    got = sum(line.startswith(match["token"]) for line in code)
                    good = got >= int(match["count"])
                if not good:
                    faults.append(f"{kernel} claims {clause!r} but has {got}")
    return faults


def check_sass(nvdisasm: str | None, source: str, folder: str, report: Report) -> None:
    """Reads the machine code that nvcc left in `folder`."""
    if nvdisasm is None:
        report.faults += [NO_NVDISASM] if SASS_CLAIMS.search(source) else []
        return
    for cubin in sorted(Path(folder).glob("*.cubin")):
        result = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=False)
        if result.returncode != 0:
            report.faults.append(f"{cubin.name} cannot be read by nvdisasm: {result.stderr.strip()}")
            continue
        by_name = {short_name(symbol): code for symbol, code in read_sass(result.stdout).items()}
        match = TARGET.search(result.stdout)
        arch = match.group(1) if match else "unknown architecture"
        for kernel in report.kernels:
            if kernel.arch == arch:
                kernel.instructions = len(by_name.get(kernel.name, ()))
        report.faults += [f"[{arch}] {fault}" for fault in broken_sass_claims(source, by_name, arch)]


def key_of(source: Path, command: list[str], version: str) -> str:
    """Changes with everything that the compiler sees of our own."""
    op = source.parent.parent if source.parent.name == "instantiations" else source.parent
    digest = hashlib.sha256(repr((command, version)).encode())
    for folder in sorted({op, ROOT / "csrc" / "common"}):
        for path in sorted(folder.rglob("*")):
            if path.suffix in {".h", ".cuh"} or path == source:
                digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def check(
    nvcc: str,
    version: str,
    source: Path,
    gencode: list[str],
    cute: Path | None = None,
    nvdisasm: str | None = None,
    sass: bool = True,
) -> Report:
    report = Report(str(source.relative_to(ROOT)))
    include = ["-isystem", str(cute)] if cute else []
    command = [nvcc, *FLAGS, *flags_of(source), *include, *gencode, "-c", str(source)]
    kept = CACHE / f"{key_of(source, [*command, str(sass)], version)}.json"
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
        read_log(result.stderr, report)
        if result.returncode == 0 and sass:
            check_sass(nvdisasm, source.read_text(), folder, report)
    report.seconds = time.perf_counter() - start
    if result.returncode != 0:
        report.faults.append(f"does not compile\n{result.stderr}")
        return report
    report.faults += [f"claims {c} but its code has none" for c in missing_claims(source.read_text(), ptx)]
    if not report.faults:
        CACHE.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(asdict(report)))
    return report


def show(report: Report) -> None:
    print(f"{report.file}: {report.seconds:.1f} s")
    for k in report.kernels:
        notes = [f"{k.registers} registers"]
        notes += [f"{k.instructions} instructions"] if k.instructions else []
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
    parser.add_argument("parts", nargs="*", help="only files whose path contains one of these")
    options = parser.parse_args(arguments)
    nvcc = find_nvcc()
    if nvcc is None:
        print("cuda_check: nvcc was not found; install the CUDA toolkit, or set CUDA_HOME", file=sys.stderr)
        return 1
    names, sm80, sm90a = gencodes(nvcc)
    version, nvdisasm = nvcc_version(nvcc), find_nvdisasm(nvcc)
    print(f"nvcc {version}, {'sm_80 only' if options.quick else 'architectures ' + ' '.join(names)}")
    sources, cute = sorted((ROOT / "csrc").glob("**/*.cu")), cutlass.include_folder()
    sources = [s for s in sources if not options.parts or any(part in str(s) for part in options.parts)]
    if not sources:
        parser.error(f"no .cu file has any of {', '.join(options.parts)} in its path")
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
            headers = cute if hopper else None
            tasks.append(
                pool.submit(check, nvcc, version, source, gencode, headers, nvdisasm, not options.quick)
            )
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
