"""Everything that a machine with a GPU settles, in one run: build, tests, sanitizers, benchmarks (bench/gpu.sh).

Each stage has its own time limit and runs in processes of its own; one that fails or hangs does not stop the next,
and the exit code tells. A benchmark of an op whose tests are red is not run. What comes out, in OUTPUT_DIR:

    <gpu>-<date>.json   for bench/results/: machine, tests, sanitizers, ceilings, benchmarks in the form of cpu-*.json
    build.log  tests.log  tests.xml  sanitizer.log  bench.log

The process reads the state of the card and changes none of it. With --dry-run the CPU takes the GPU's part, nothing
is built, inputs are tiny, and the JSON is named dry-run-<date>.json: a test of this program, not of any kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OPS = (
    "block_sparse_attention",
    "selective_scan",
    "sample",
    "selective_state_update",
    "causal_conv1d",
    "token_logprobs",
    "speculative",
)
# Tested, never measured: it must refuse a GPU.
REFUSING = ("ssd",)
# Seconds that a stage may take, and what later stages are left at least.
LIMITS = {"machine": 60, "build": 280, "tests": 190, "sanitizer": 90, "bench": 200}
LEAST = {"machine": 10, "build": 60, "tests": 60, "sanitizer": 30, "bench": 90}
# One check of each op that needs no GPU and no time.
DRY_CHECK = {"speculative": "many_rows-cpu", "sample": "bad_rows_stay_alone-cpu"}
LOG_BYTES = 8 << 20
GRACE = 5.0  # seconds between being asked to end and being ended
FACTS = """
import json, torch
facts = {"torch": torch.__version__, "torch_cuda": torch.version.cuda, "gpu": None}
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    facts.update(gpu=p.name, compute_capability=f"{p.major}.{p.minor}", multiprocessors=p.multi_processor_count,
                 memory_gib=round(p.total_memory / 2**30, 1), l2_mib=round(p.L2_cache_size / 2**20, 1))
print(json.dumps(facts))
"""


ATTENTION, SM90A = "block_sparse_attention", "block_sparse_attention_sm90a"


@dataclass
class Outcome:
    """A finished, failed or killed process."""

    code: int | None  # None when its time was up
    seconds: float
    output: str

    @property
    def good(self) -> bool:
        return self.code == 0

    @property
    def how(self) -> str:
        return "time was up" if self.code is None else f"exit code {self.code}"


@dataclass
class Battery:
    folder: Path
    ops: tuple[str, ...]
    deadline: float
    dry: bool
    machine: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    tests: dict[str, dict[str, Any]] = field(default_factory=dict)
    sanitizer: dict[str, dict[str, str]] = field(default_factory=dict)
    bench: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def limit(self, stage: str) -> float:
        """Seconds for a stage: its own limit, or less where the later ones need the rest."""
        names = list(LIMITS)
        later = sum(LEAST[name] for name in names[names.index(stage) + 1 :])
        return max(5.0, min(LIMITS[stage], self.deadline - time.monotonic() - later))

    def run(self, stage: str, work: Callable[[float], bool]) -> bool:
        """Runs `work` with the seconds it has; notes whether it succeeded and how long it took."""
        start, limit = time.monotonic(), self.limit(stage)
        print(f"== {stage} (at most {limit:.0f} s)", flush=True)
        try:
            good = work(limit)
        except Exception as error:  # a stage's own mistake must not stop the next
            print(f"{stage}: {type(error).__name__}: {error}", flush=True)
            good = False
        seconds = round(time.monotonic() - start, 1)
        self.stages[stage] = {"good": good, "seconds": seconds}
        print(f"== {stage}: {'good' if good else 'NOT GOOD'}, {seconds} s", flush=True)
        return good

    def log(self, name: str, text: str) -> None:
        """Appends to a log in the output folder; a log stays below LOG_BYTES."""
        path = self.folder / name
        with path.open("a") as file:
            file.write(text[: max(0, LOG_BYTES - file.tell())])


def environment(cores: int) -> dict[str, str]:
    # What was built in place comes first; without it, the installed package is measured.
    built = [str(ROOT / "python")] if (ROOT / "python/arcore/_ops.so").is_file() else []
    path = os.pathsep.join([*built, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    threads = str(max(1, cores))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": threads,
        "ARCORE_TEST_THREADS": threads,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONUNBUFFERED": "1",
    }


def run_all(
    commands: dict[str, list[str]], seconds: float, variables: dict[str, str] | None = None
) -> dict[str, Outcome]:
    """Runs commands side by side, each in a process group of its own; kills what is left when the time is up."""
    started = time.monotonic()
    outcomes = {}
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(tempfile.TemporaryFile()) for name in commands}
        processes = {
            name: subprocess.Popen(
                command, cwd=ROOT, env=variables, stdout=files[name], stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )
            for name, command in commands.items()
        }  # fmt: skip
        for name, process in processes.items():
            code: int | None = None
            try:
                code = process.wait(max(0.1, started + seconds - time.monotonic()))
            except subprocess.TimeoutExpired:
                _stop(process)
            took = time.monotonic() - started
            files[name].seek(0)
            outcomes[name] = Outcome(code, took, files[name].read().decode(errors="replace"))
    return outcomes


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Asks a process group to end, so that it can write what it has, and ends it."""
    for sign, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def run_one(command: list[str], seconds: float, variables: dict[str, str] | None = None) -> Outcome:
    return run_all({"": command}, seconds, variables)[""]


def examine(battery: Battery, seconds: float) -> bool:
    outcome = run_one([sys.executable, "-c", FACTS], seconds)
    if not outcome.good:
        print(outcome.output[-2000:])
        return False
    battery.machine = {
        **json.loads(outcome.output.strip().splitlines()[-1]),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "nvcc": _first_match(["nvcc", "--version"], r"release (\S+),"),
        "driver": _first_match(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], r"(\S+)"
        ),
        "commit": _first_match(["git", "rev-parse", "--short", "HEAD"], r"(\w+)"),
    }
    for name, value in battery.machine.items():
        print(f"   {name}: {value}")
    if battery.dry:
        battery.machine["gpu"] = None
        return True
    if battery.machine["gpu"] is None:
        print("   torch sees no GPU: nothing can be tested or measured here")
    return battery.machine["gpu"] is not None


def _first_match(command: list[str], pattern: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    match = re.search(pattern, run_one(command, 20).output)
    return match.group(1) if match else None


def build(battery: Battery, seconds: float) -> bool:
    variables = environment(os.cpu_count() or 1) | {"ARCORE_CUDA": "on"}
    variables["MAX_JOBS"] = str(os.cpu_count() or 2)
    # Machine code for this GPU and no other: half the compile time, and nothing is left to the driver's compiler.
    variables["TORCH_CUDA_ARCH_LIST"] = battery.machine["compute_capability"]
    battery.machine["built_for"] = battery.machine["compute_capability"]
    outcome = run_one([sys.executable, "setup.py", "build_ext", "--inplace"], seconds, variables)
    battery.log("build.log", outcome.output)
    absent = re.search(r"built without the sm_90a kernels:.*", outcome.output)
    battery.machine["sm_90a"] = (
        outcome.good and absent is None and battery.machine["compute_capability"] == "9.0"
    )
    if absent:
        print(f"   {absent.group()}")
    if not outcome.good:
        print(f"   the build failed ({outcome.how}); the end of build.log:\n{outcome.output[-3000:]}")
    return outcome.good


def test(battery: Battery, seconds: float) -> bool:
    """pytest -m cuda, one process per op: a kernel that corrupts its context takes no other op with it."""
    names = [*battery.ops, *(() if battery.dry else REFUSING)]
    with tempfile.TemporaryDirectory() as folder:
        reports = {name: Path(folder) / f"{name}.xml" for name in names}
        commands = {name: _pytest(battery, name, reports[name]) for name in names}
        if battery.machine.get("sm_90a"):
            # The same checks through the kernels that are off until they were seen to be right.
            reports[SM90A] = Path(folder) / f"{SM90A}.xml"
            commands[SM90A] = ["env", "ARCORE_SM90A=1", *_pytest(battery, ATTENTION, reports[SM90A])]
        cores = 1 if battery.dry else max(1, (os.cpu_count() or 1) // len(names))
        outcomes = run_all(commands, seconds, environment(cores))
        for name, outcome in outcomes.items():
            battery.log("tests.log", f"==== {name}: {outcome.how}\n{outcome.output}\n")
            battery.tests[name] = counts(reports[name], outcome)
        merge_reports(list(reports.values()), battery.folder / "tests.xml")
    for name, result in battery.tests.items():
        print(f"   {name}: {describe(result)}")
        for line in (*result["failures"][:6], *result["skips"], *result["notes"]):
            print(f"      {line}")
    return all(not red(result) for result in battery.tests.values())


def _pytest(battery: Battery, name: str, report: Path) -> list[str]:
    command = [sys.executable, "-m", "pytest", f"tests/{name}/test_cuda.py", "-v", f"--junitxml={report}"]
    # Warnings of packages that this machine happens to have are no failures.
    command += ["-W", "default", "-p", "no:cacheprovider", "--tb=short", "-o", "junit_family=xunit2"]
    # What checks print belongs into the report; where one hangs, a traceback shows in which call.
    command += ["-o", "junit_logging=system-out", "-o", "faulthandler_timeout=60"]
    if not battery.dry:
        return [*command, "-m", "cuda"]
    return [*command, "-k", DRY_CHECK.get(name, "batch_mates-cpu")]


def counts(report: Path, outcome: Outcome) -> dict[str, Any]:
    """Numbers and names out of a junit file, which is missing or cut short where pytest did not come to its end."""
    result: dict[str, Any] = {
        "passed": 0, "failed": 0, "skipped": 0, "finished": report.is_file() and outcome.code is not None,
        "failures": [], "skips": [], "notes": [], "seconds": round(outcome.seconds, 1), "how": outcome.how,
    }  # fmt: skip
    if not report.is_file():
        return result
    for case in ET.parse(report).getroot().iter("testcase"):
        problem = next((c for c in case if c.tag in ("failure", "error")), None)
        if problem is not None:
            result["failed"] += 1
            message = (problem.get("message") or "").strip().splitlines()
            result["failures"].append(f"{case.get('name')}: {message[0][:200] if message else problem.tag}")
        elif (skip := case.find("skipped")) is not None:
            result["skipped"] += 1
            result["skips"].append(f"{case.get('name')}: {(skip.get('message') or '')[:200]}")
        else:
            result["passed"] += 1
        printed = case.findtext("system-out") or ""
        result["notes"] += [
            line[:200] for line in printed.splitlines() if line and not line.startswith("---")
        ]
    return result


def red(result: dict[str, Any]) -> bool:
    """Nothing passed, something failed, or the run broke off."""
    return not result["finished"] or result["failed"] > 0 or result["passed"] == 0


def describe(result: dict[str, Any]) -> str:
    text = f"{result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped"
    return text if result["finished"] else f"{text}, did not finish ({result['how']})"


def merge_reports(reports: list[Path], target: Path) -> None:
    suites = ET.Element("testsuites")
    for report in reports:
        if report.is_file():
            suites.extend(ET.parse(report).getroot().iter("testsuite"))
    for suite in suites:
        suite.attrib.pop("hostname", None)
    ET.ElementTree(suites).write(target, encoding="utf-8", xml_declaration=True)


def sanitize(battery: Battery, seconds: float) -> bool:
    program = _compute_sanitizer()
    if program is None:
        print("   compute-sanitizer was not found: memcheck and racecheck did not run")
        battery.sanitizer = {op: {"memcheck": "not run", "racecheck": "not run"} for op in battery.ops}
        return True
    green = [op for op in battery.ops if not red(battery.tests[op])]
    commands = {
        f"{op} {tool}": [
            program, "--tool", tool, "--error-exitcode", "99", "--target-processes", "all",
            sys.executable, "bench/gpu/sanitize.py", op,
        ]
        for op in green
        for tool in ("memcheck", "racecheck")
    }  # fmt: skip
    # PyTorch's cache would hide accesses past the end of a tensor.
    variables = environment(1) | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    battery.sanitizer = {op: {} for op in battery.ops}
    for name, outcome in run_all(commands, seconds, variables).items():
        op, tool = name.split()
        battery.log("sanitizer.log", f"==== {name}: {outcome.how}\n{outcome.output}\n")
        battery.sanitizer[op][tool] = sanitizer_verdict(outcome)
    for op, results in battery.sanitizer.items():
        print(f"   {op}: {', '.join(f'{t} {r}' for t, r in results.items()) or 'not run, its tests are red'}")
    return all(verdict == "clean" for results in battery.sanitizer.values() for verdict in results.values())


def sanitizer_verdict(outcome: Outcome) -> str:
    """ "clean", what was found, or why there is no answer."""
    match = re.search(r"(ERROR SUMMARY: \d+ errors?|RACECHECK SUMMARY: .*)", outcome.output)
    summary = match.group(1) if match else None
    if summary is not None and re.search(r"SUMMARY: 0 ", summary):
        return "clean" if outcome.good else f"no error found, but {outcome.how}"
    if outcome.code is None:
        done = outcome.output.count(" passed\n")
        return f"time was up after {done} checks"
    return summary or outcome.how


def _compute_sanitizer() -> str | None:
    found = shutil.which("compute-sanitizer")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [Path(home) / "bin" / "compute-sanitizer" for home in homes if home]
    return found or next((str(path) for path in candidates if path.is_file()), None)


def measure(battery: Battery, seconds: float) -> bool:
    green = [op for op in battery.ops if not red(battery.tests[op])]
    held_back = [op for op in battery.ops if op not in green]
    for op in held_back:
        print(f"   {op}: no number, its tests are red ({describe(battery.tests[op])})")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "bench.json"
        command = [sys.executable, "bench/gpu/benchmark.py", "--out", str(target), "--ops", ",".join(green)]
        command += ["--device", battery.device]
        variables = environment(1 if battery.dry else os.cpu_count() or 1)
        if SM90A not in battery.tests or red(battery.tests[SM90A]):
            variables["ARCORE_SM90A_HELD_BACK"] = "1"
        outcome = run_one(command, seconds, variables)
        battery.log("bench.log", outcome.output)
        if target.is_file():
            battery.bench = json.loads(target.read_text())
    if not outcome.good:
        print(
            f"   the benchmarks did not all run ({outcome.how}); the end of bench.log:\n{outcome.output[-1500:]}"
        )
    return outcome.good and not held_back


def result_name(battery: Battery, date: str) -> str:
    if battery.dry:
        return f"dry-run-{date}.json"
    gpu = battery.machine.get("gpu") or "no-gpu"
    match = re.search(r"[A-Z]+\d+", gpu)
    return f"{(match.group() if match else gpu.replace(' ', '-')).lower()}-{date}.json"


def result(battery: Battery, now: datetime.datetime) -> dict[str, Any]:
    """The JSON: benchmarks as pytest-benchmark writes them, with what was tested beside them."""
    benchmarks = [
        {
            "name": f"{r['op']}-{r['case']}-{r['impl']}-{r['direction']}",
            "extra_info": r,
            "stats": {"median": r["seconds"], "rounds": r["rounds"]},
        }
        for r in battery.bench.get("records", [])
    ]
    return {
        "machine_info": battery.machine,
        "datetime": now.isoformat(timespec="seconds"),
        "dry_run": battery.dry,
        "stages": battery.stages,
        "tests": battery.tests,
        "sanitizer": battery.sanitizer,
        "ceilings": battery.bench.get("ceilings"),
        "benchmarks": benchmarks,
        "skipped": battery.bench.get("skipped", []),
        "verdicts": battery.bench.get("verdicts", []),
    }


def table(content: dict[str, Any]) -> list[str]:
    """Some forty lines for whoever sees only the end of the output."""
    machine, lines = content["machine_info"], [""]
    if content["dry_run"]:
        lines.append("DRY RUN ON A CPU: tiny inputs, no GPU, no figure below means anything")
    lines.append(
        f"{machine.get('gpu') or 'no GPU'}, torch {machine.get('torch')}, driver {machine.get('driver')}, "
        f"commit {machine.get('commit')}, sm_90a kernels {'built' if machine.get('sm_90a') else 'not built'}"
    )
    ceilings = content["ceilings"]
    if ceilings:
        lines.append(
            f"ceilings: bf16 matmul {ceilings['matmul_tflops']:.0f} TFLOP/s, "
            f"copy {ceilings['copy_gb_per_s']:.0f} GB/s, launch in a graph {ceilings['launch_seconds'] * 1e6:.2f} us"
        )
    for op, result in content["tests"].items():
        checked = content["sanitizer"].get(op, {})
        found = ", ".join(f"{tool} {verdict}" for tool, verdict in checked.items())
        lines.append(
            f"{'RED  ' if red(result) else 'green'} {op}: {describe(result)}{'; ' + found if found else ''}"
        )
    for entry in content["benchmarks"]:
        r = entry["extra_info"]
        extra = ""
        if "tflops" in r:
            extra = f"{r['tflops']:7.1f} TFLOP/s {r['fraction_of_matmul']:4.0%} of matmul"
        elif "times_floor" in r:
            extra = f"{r['times_floor']:7.2f} x floor"
        lines.append(f"{r['op'][:22]:<22} {r['case']:<18} {r['direction']:<8} {r['impl']:<16} "
                     f"{r['seconds'] * 1e3:9.4f} ms {extra}")  # fmt: skip
    reasons = {(s["op"], s["impl"], s["reason"]) for s in content["skipped"]}
    lines += [f"skipped {op} {impl}: {reason[:120]}" for op, impl, reason in sorted(reasons)]
    lines += content["verdicts"]
    lines.append("stages: " + ", ".join(
        f"{name} {'good' if s['good'] else 'NOT GOOD'} {s['seconds']} s" for name, s in content["stages"].items()
    ))  # fmt: skip
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT_DIR")
    parser.add_argument("--seconds", type=float, default=570.0, help="for everything together")
    parser.add_argument("--ops", default=",".join(OPS), help="comma-separated")
    parser.add_argument("--dry-run", action="store_true", help="the CPU in place of a GPU, nothing is built")
    options = parser.parse_args(argv)
    ops = tuple(options.ops.split(","))
    unknown = sorted(set(ops) - set(OPS))
    if unknown:
        parser.error(f"unknown ops {', '.join(unknown)}; choose from {', '.join(OPS)}")
    options.output.mkdir(parents=True, exist_ok=True)
    battery = Battery(options.output, ops, time.monotonic() + options.seconds, options.dry_run)
    now = datetime.datetime.now(datetime.timezone.utc)
    good = battery.run("machine", lambda s: examine(battery, s))
    if good and not battery.dry:
        good = battery.run("build", lambda s: build(battery, s))
    if good:
        good = battery.run("tests", lambda s: test(battery, s))
        good &= battery.run("sanitizer", lambda s: sanitize(battery, s)) if not battery.dry else True
        good &= battery.run("bench", lambda s: measure(battery, s))
    content = result(battery, now)
    path = options.output / result_name(battery, now.date().isoformat())
    path.write_text(json.dumps(content, indent=1) + "\n")
    print("\n".join(table(content)))
    print(f"{'good' if good else 'NOT GOOD'}: {path}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
