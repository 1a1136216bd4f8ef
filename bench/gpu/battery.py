"""Everything that a machine with a GPU settles, in one run (bench/gpu.sh): what is known earliest comes first.

    machine    what the GPU is
    build      for this GPU; with --library only the small part that depends on Python, beside a library built before
    smoke      one small call of each op, each in a process of its own: a hang or a broken context names its op
    bench      arcore's own times of every op, the sm_90a kernels too, whatever the tests will say of them
    tests      pytest -m cuda, one process per op; what failed runs once more alone
    peers      one process per op and implementation
    sanitizer  compute-sanitizer: synccheck, then memcheck and racecheck; Nsight Compute on the attention kernels

Each stage has a time limit and writes what it has as it goes, so that one that is cut leaves what it had. What comes
out, in OUTPUT_DIR (a second run with other --stages adds to it):

    <gpu>-<date>.json   for bench/results/: machine, tests, sanitizers, ceilings, benchmarks in the form of cpu-*.json;
                        a benchmark whose op has red tests or whose result was wrong is marked "red"
    battery.json        the same, for the next run into this folder
    build.log  smoke.log  tests.log  tests.xml  sanitizer.log  bench.log

The process reads the state of the card and changes none of it. With --dry-run the CPU takes the GPU's part, nothing
is built, inputs are tiny, and the JSON is named dry-run-<date>.json: a test of this program, not of any kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
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
    "ssd",
)
# Seconds that a stage may take, and what later stages are left at least.
LIMITS = {
    "machine": 60, "build": 400, "smoke": 180, "bench": 300, "tests": 420, "peers": 420, "sanitizer": 300,
}  # fmt: skip
LEAST = {"machine": 10, "build": 60, "smoke": 30, "bench": 90, "tests": 90, "peers": 60, "sanitizer": 30}
STAGES = tuple(LIMITS)
SMOKE_SECONDS = 20.0  # for one op, its start included
OWN = ("arcore", "arcore_sm90a", "arcore_sm90a_fused")  # the last two of attention alone
# Implementations beside arcore's, best known first; attention's are those of bench/gpu/attention.py.
PEERS = {
    "block_sparse_attention": (
        "sdpa_loop_cudnn", "cudnn_flex", "flash3", "flash4", "flex_flash", "flex_compiled", "sdpa_causal", "varlen",
        "sdpa_loop_flash", "sdpa_loop", "sdpa_loop_efficient", "sdpa_mask",
    ),
    "selective_scan": ("mamba_ssm", "mambapy", "transformers"),
    "sample": ("torch",),
    "selective_state_update": ("torch",),
    "causal_conv1d": ("conv1d",),
    "token_logprobs": ("cross_entropy",),
    "ssd": ("mamba_ssm",),
}  # fmt: skip
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


ATTENTION = "block_sparse_attention"
# Kernels of attention that are off until they were seen to be right, with what switches them on. Tests and
# records of theirs go by these names, as if they were ops of their own.
VARIANTS = {
    f"{ATTENTION}_sm90a": ("ARCORE_SM90A=1", "ARCORE_SM90A_BACKWARD=two"),
    f"{ATTENTION}_sm90a_fused": ("ARCORE_SM90A=1", "ARCORE_SM90A_BACKWARD=fused"),
}


TIME_WAS_UP = "time was up"


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
        return TIME_WAS_UP if self.code is None else f"exit code {self.code}"


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
    smoke: dict[str, str] = field(default_factory=dict)
    chosen: tuple[str, ...] = STAGES
    library: Path | None = None
    date: str = ""

    def load(self) -> None:
        """What an earlier run into this folder has found."""
        path = self.folder / "battery.json"
        if path.is_file():
            for name, value in json.loads(path.read_text()).items():
                setattr(self, name, value)

    def save(self) -> None:
        """Everything that is known, to be read by people and by the next run; called as things become known."""
        kept = {n: getattr(self, n) for n in ("machine", "stages", "tests", "sanitizer", "bench", "smoke")}
        names = [(self.folder / "battery.json", kept)]
        if self.date:
            names.append((self.folder / result_name(self, self.date[:10]), result(self)))
        for path, content in names:
            fresh = path.with_suffix(".new")
            fresh.write_text(json.dumps(content, indent=1) + "\n")
            fresh.replace(path)

    def add_records(self, path: Path) -> None:
        """Takes over what a benchmark process wrote, in the place of older records of the same measurement."""
        if not path.is_file():
            return
        fresh = json.loads(path.read_text())
        keys = ("op", "case", "impl", "direction")
        for name in ("records", "skipped"):
            new = {tuple(r[k] for k in keys) for r in fresh[name]}
            old = [r for r in self.bench.get(name, []) if tuple(r[k] for k in keys) not in new]
            self.bench[name] = old + fresh[name]
        self.bench["ceilings"] = fresh["ceilings"]

    def leave_out(self, op: str, impl: str, reason: str | None) -> None:
        """Notes why an implementation was not measured, or not to its end; None takes an older reason back."""
        old = [
            r for r in self.bench.get("skipped", []) if (r["op"], r["impl"], r["case"]) != (op, impl, "all")
        ]
        new = (
            [{"op": op, "case": "all", "impl": impl, "direction": "all", "reason": reason}] if reason else []
        )
        self.bench["skipped"] = old + new

    def with_variants(self, command_of: Callable[[str], list[str]]) -> dict[str, list[str]]:
        """The command of each op, and that of attention for each of its variants that was built."""
        commands = {op: command_of(op) for op in self.ops}
        if self.machine.get("sm_90a") and ATTENTION in self.ops:
            commands |= {
                name: ["env", *switches, *command_of(ATTENTION)] for name, switches in VARIANTS.items()
            }
        return commands

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def limit(self, stage: str) -> float:
        """Seconds for a stage: its own limit, or less where the later ones need the rest."""
        names = [name for name in LIMITS if name in self.chosen or name == stage]
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
        self.save()
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
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # a pool of its processes outlives the benchmark that started it
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
    if battery.library is not None:
        variables |= {"ARCORE_OPS_LIBRARY": str(battery.library.resolve()), "ARCORE_CUDA": "off"}
        variables["TORCH_CUDA_ARCH_LIST"] = battery.machine["built_for"] = "8.0+PTX 9.0a"
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


def smoke(battery: Battery, seconds: float) -> bool:
    """The first small check of each op alone. What the stage's end cut before its own time was up may not hang."""
    ended, patience = time.monotonic() + seconds, SMOKE_SECONDS * (6 if battery.dry else 1)
    commands = battery.with_variants(
        lambda op: [sys.executable, "bench/gpu/sanitize.py", op, "--first", "--device", battery.device]
    )
    for op, command in commands.items():
        limit = max(5.0, min(patience, ended - time.monotonic()))
        outcome = run_one(command, limit, environment(1))
        battery.log("smoke.log", f"==== {op}: {outcome.how}\n{outcome.output}\n")
        last = (outcome.output.strip().splitlines() or [""])[-1][:200]
        how = outcome.how if outcome.code is not None or limit >= patience else f"cut after {limit:.0f} s"
        battery.smoke[op] = "good" if outcome.good else f"{how}: {last}"
        print(f"   {op}: {battery.smoke[op]} ({outcome.seconds:.1f} s)", flush=True)
        battery.save()
    return all(said == "good" for said in battery.smoke.values())


def test(battery: Battery, seconds: float) -> bool:
    """pytest -m cuda, one process per op: a kernel that corrupts its context takes no other op with it."""
    with tempfile.TemporaryDirectory() as folder:
        shared = battery.with_variants(lambda op: _pytest(battery, op))
        reports = {name: Path(folder) / f"{name}.xml" for name in shared}
        commands = {name: [*command, f"--junitxml={reports[name]}"] for name, command in shared.items()}
        cores = 1 if battery.dry else max(1, (os.cpu_count() or 1) // len(commands))
        started = time.monotonic()
        outcomes = run_all(commands, 0.8 * seconds, environment(cores))
        for name, outcome in outcomes.items():
            battery.log("tests.log", f"==== {name}: {outcome.how}\n{outcome.output}\n")
            battery.tests[name] = counts(reports[name], outcome)
        battery.save()
        # Side by side, one op's use of memory can fail another's check: what failed gets a second chance alone.
        for name, counted in battery.tests.items():
            left = seconds - (time.monotonic() - started)
            if name not in commands or not counted["failures"] or left < 10:
                continue
            again = Path(folder) / f"{name}-alone.xml"
            cases = [line.partition(":")[0].partition("[")[2].rstrip("]") for line in counted["failures"]]
            command = [part.replace(str(reports[name]), str(again)) for part in commands[name]]
            outcome = run_one([*command, "-k", " or ".join(filter(None, cases))], left, environment(cores))
            battery.log("tests.log", f"==== {name}, what failed, alone: {outcome.how}\n{outcome.output}\n")
            counted["alone"] = counts(again, outcome)
        merge_reports(list(reports.values()), battery.folder / "tests.xml")
    for name, result in battery.tests.items():
        print(f"   {name}: {describe(result)}")
        for line in (*result["failures"][:6], *result["skips"], *result["notes"]):
            print(f"      {line}")
    return all(not red(result) for result in battery.tests.values())


def _pytest(battery: Battery, name: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", f"tests/{name}/test_cuda.py", "-v"]
    # Warnings of packages that this machine happens to have are no failures.
    command += ["-W", "default", "-p", "no:cacheprovider", "--tb=short", "-o", "junit_family=xunit2"]
    # What checks print belongs into the report; where one hangs, a traceback shows in which call.
    command += ["-o", "junit_logging=system-out", "-o", "faulthandler_timeout=60"]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["-p", "pytest_timeout", "--timeout", "150", "--timeout-method", "thread"]
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
    """Nothing passed, something failed (and failed again alone), or the run broke off."""
    alone = result.get("alone")
    if alone and result["finished"] and alone["finished"] and not alone["failed"] and alone["passed"]:
        return result["passed"] == 0
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
        print("   compute-sanitizer was not found: synccheck, memcheck and racecheck did not run")
        battery.sanitizer = {
            op: {tool: "not run" for tool in ("synccheck", "memcheck", "racecheck")} for op in battery.ops
        }
        return True
    names = battery.with_variants(lambda op: [sys.executable, "bench/gpu/sanitize.py", op])
    commands = {
        f"{name} {tool}": [
            program, "--tool", tool, "--error-exitcode", "99", "--target-processes", "all", *command,
        ]
        for tool in ("synccheck", "memcheck", "racecheck")
        for name, command in names.items()
    }  # fmt: skip
    # PyTorch's cache would hide accesses past the end of a tensor.
    variables = environment(1) | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    battery.sanitizer = {name: {} for name in names}
    ended = time.monotonic() + 0.9 * seconds
    for tools in (("synccheck",), ("memcheck", "racecheck")):
        some = {name: command for name, command in commands.items() if name.split()[1] in tools}
        limit = max(5.0, (ended - time.monotonic()) / (2 if tools == ("synccheck",) else 1))
        for name, outcome in run_all(some, limit, variables).items():
            op, tool = name.split()
            battery.log("sanitizer.log", f"==== {name}: {outcome.how}\n{outcome.output}\n")
            battery.sanitizer[op][tool] = sanitizer_verdict(outcome)
        battery.save()
    profile(battery, max(5.0, 0.1 * seconds))
    for op, results in battery.sanitizer.items():
        print(f"   {op}: {', '.join(f'{t} {r}' for t, r in results.items())}")
    return all(verdict == "clean" for results in battery.sanitizer.values() for verdict in results.values())


def sanitizer_verdict(outcome: Outcome) -> str:
    """ "clean", what was found, or why there is no answer."""
    match = re.search(r"(ERROR SUMMARY: \d+ errors?|RACECHECK SUMMARY: .*)", outcome.output)
    summary = match.group(1) if match else None
    if summary is not None and re.search(r"SUMMARY: 0 ", summary):
        return "clean" if outcome.good else f"no error found, but {outcome.how}"
    if outcome.code is None:
        done = outcome.output.count(" passed\n")
        return f"{TIME_WAS_UP} after {done} checks"
    return summary or outcome.how


def _compute_sanitizer() -> str | None:
    found = shutil.which("compute-sanitizer")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [Path(home) / "bin" / "compute-sanitizer" for home in homes if home]
    return found or next((str(path) for path in candidates if path.is_file()), None)


def profile(battery: Battery, seconds: float) -> None:
    """Hardware counters of the attention kernels, where Nsight Compute is installed and may read them."""
    program = shutil.which("ncu")
    if program is None or ATTENTION not in battery.ops:
        return
    command = [program, "--clock-control", "none", "--launch-count", "4"]
    for section in ("SpeedOfLight", "LaunchStats", "Occupancy", "ComputeWorkloadAnalysis", "WarpStateStats"):
        command += ["--section", section]
    command += [
        "--kernel-name",
        "regex:forward|backward|fused",
        sys.executable,
        "bench/gpu/sanitize.py",
        ATTENTION,
        "--first",
    ]
    for name in VARIANTS if battery.machine.get("sm_90a") else (ATTENTION,):
        switches = dict(switch.split("=") for switch in VARIANTS.get(name, ()))
        outcome = run_one(command, seconds / 2, environment(1) | switches)
        battery.log("sanitizer.log", f"==== ncu {name}: {outcome.how}\n{outcome.output}\n")
        print(f"   ncu {name}: {outcome.how}")


def benchmark(battery: Battery, op: str, impls: str, seconds: float) -> bool:
    """One process of bench/gpu/benchmark.py; what it measured before its end is kept."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "bench.json"
        command = [
            sys.executable,
            "bench/gpu/benchmark.py",
            "--out",
            str(target),
            "--ops",
            op,
            "--impls",
            impls,
        ]
        command += ["--ceilings", str(battery.folder / "ceilings.json"), "--device", battery.device]
        outcome = run_one(command, seconds, environment(1 if battery.dry else os.cpu_count() or 1))
        battery.log("bench.log", f"==== {op} {impls}: {outcome.how}\n{outcome.output}\n")
        battery.add_records(target)
    battery.leave_out(op, impls, None if outcome.code is not None else f"{TIME_WAS_UP} ({seconds:.0f} s)")
    battery.save()
    if not outcome.good:
        print(f"   {op} {impls}: {outcome.how}; the end of its output:\n{outcome.output[-600:]}", flush=True)
    return outcome.good


def measure(battery: Battery, seconds: float) -> bool:
    """arcore's own times, green or red, a process each; one may take what the others leave.

    What hung in the smoke stage is left out: it would hang again and use up the others' time.
    """
    ended, good = time.monotonic() + seconds, True
    todo = [(op, "arcore") for op in battery.ops]
    if ATTENTION in battery.ops and (battery.machine.get("sm_90a") or battery.dry):
        todo[1:1] = [(ATTENTION, impl) for impl in OWN[1:]]
    for i, (op, impl) in enumerate(todo):
        if battery.smoke.get(tested_as(op, impl), "").startswith(TIME_WAS_UP):
            print(f"   {op} {impl}: hung in the smoke stage, so it is not timed", flush=True)
            battery.leave_out(op, impl, "hung in the smoke stage")
            good = False
            continue
        left = ended - time.monotonic()
        good &= benchmark(battery, op, impl, max(5.0, left if i == len(todo) - 1 else left / 2))
    return good


def measure_peers(battery: Battery, seconds: float) -> bool:
    """Peers, one process each: one that breaks its context or hangs takes no other with it.

    The best known of every op come first, since the attention's many could take all the time there is.
    """
    ended = time.monotonic() + seconds
    places = range(max(map(len, PEERS.values())))
    todo = [(op, PEERS[op][i]) for i in places for op in battery.ops if i < len(PEERS.get(op, ()))]
    for i, (op, impl) in enumerate(todo):
        left = ended - time.monotonic()
        if left < 5:
            print(f"   no time for {', '.join(' '.join(pair) for pair in todo[i:])}")
            for late in todo[i:]:
                battery.leave_out(*late, "no time was left")
            judge(battery)
            return False
        benchmark(battery, op, impl, max(5.0, min(90.0, left)))
    judge(battery)
    return True


def judge(battery: Battery) -> None:
    """Which goals are met, over all records that there are."""
    if not battery.bench.get("records"):
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.json"
        path.write_text(json.dumps({**battery.bench, "skipped": []}))
        command = [
            sys.executable,
            "bench/gpu/benchmark.py",
            "--verdicts",
            str(path),
            "--device",
            battery.device,
        ]
        outcome = run_one(command, 60, environment(1))
    if outcome.good:
        battery.bench["verdicts"] = json.loads(outcome.output.strip().splitlines()[-1])


def tested_as(op: str, impl: str) -> str:
    """The name in "tests" and "smoke" of what an implementation of arcore's own runs."""
    return op + impl.removeprefix("arcore")


def is_red(battery: Battery, record: dict[str, Any]) -> bool:
    """Whether a number of arcore's own is of a kernel that was seen to be wrong."""
    if not record["impl"].startswith("arcore"):
        return False
    tested = battery.tests.get(tested_as(record["op"], record["impl"]))
    return "wrong" in record or (tested is not None and red(tested))


def result_name(battery: Battery, date: str) -> str:
    if battery.dry:
        return f"dry-run-{date}.json"
    gpu = battery.machine.get("gpu") or "no-gpu"
    match = re.search(r"[A-Z]+\d+", gpu)
    return f"{(match.group() if match else gpu.replace(' ', '-')).lower()}-{date}.json"


def result(battery: Battery) -> dict[str, Any]:
    """The JSON: benchmarks as pytest-benchmark writes them, with what was tested beside them."""
    benchmarks = [
        {
            "name": f"{r['op']}-{r['case']}-{r['impl']}-{r['direction']}",
            "extra_info": {**r, "red": is_red(battery, r)},
            "stats": {"median": r["seconds"], "rounds": r["rounds"]},
        }
        for r in battery.bench.get("records", [])
    ]
    return {
        "machine_info": battery.machine,
        "datetime": battery.date,
        "dry_run": battery.dry,
        "stages": battery.stages,
        "smoke": battery.smoke,
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
    lines += [f"SMOKE {op}: {said}" for op, said in content["smoke"].items() if said != "good"]
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
                     f"{r['seconds'] * 1e3:9.4f} ms {extra}{' RED' if r['red'] else ''}")  # fmt: skip
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
    parser.add_argument("--seconds", type=float, default=1700.0, help="for everything together")
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated, in this order")
    parser.add_argument(
        "--library", type=Path, help="an _ops.so built for CUDA elsewhere: only _C is built here"
    )
    parser.add_argument("--ops", default=",".join(OPS), help="comma-separated")
    parser.add_argument("--dry-run", action="store_true", help="the CPU in place of a GPU, nothing is built")
    options = parser.parse_args(argv)
    ops = tuple(options.ops.split(","))
    unknown = sorted(set(ops) - set(OPS))
    if unknown:
        parser.error(f"unknown ops {', '.join(unknown)}; choose from {', '.join(OPS)}")
    chosen = tuple(name for name in STAGES if name in options.stages.split(","))
    unknown = sorted(set(options.stages.split(",")) - set(STAGES))
    if unknown:
        parser.error(f"unknown stages {', '.join(unknown)}; choose from {', '.join(STAGES)}")
    if options.library and not options.library.is_file():
        parser.error(f"--library: expected a file but got {options.library}")
    lacking = [name for name in ("torch", "numpy", "pytest") if importlib.util.find_spec(name) is None]
    if lacking:
        parser.error(
            f"{sys.executable} has no {', '.join(lacking)}: activate the environment that has, or name its "
            "interpreter with PYTHON=..."
        )
    options.output.mkdir(parents=True, exist_ok=True)
    battery = Battery(options.output, ops, time.monotonic() + options.seconds, options.dry_run, chosen=chosen)
    battery.library = options.library
    battery.load()
    # The machine is looked at in every run, since it may be another one.
    good = battery.run("machine", lambda s: examine(battery, s))
    battery.date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    work = {"build": build, "smoke": smoke, "bench": measure, "tests": test, "peers": measure_peers,
            "sanitizer": sanitize}  # fmt: skip
    if battery.dry:
        work = {name: stage for name, stage in work.items() if name not in ("build", "sanitizer")}
    for name, stage in work.items():
        if name not in chosen or not battery.stages["machine"]["good"]:
            continue
        good &= battery.run(name, lambda s, stage=stage: stage(battery, s))
        if name == "build" and not good:
            break
    judge(battery)
    battery.save()
    content = result(battery)
    path = options.output / result_name(battery, battery.date[:10])
    print("\n".join(table(content)))
    print(f"{'good' if good else 'NOT GOOD'}: {path}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
