"""bench/gpu.sh without a GPU: its stages, limits, counting and table; what a GPU shows is not claimed here."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from tests import device_checks

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def battery() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_battery", ROOT / "bench/gpu/battery.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_battery"] = module
    spec.loader.exec_module(module)
    return module


def junit(path: Path, *cases: str) -> Path:
    path.write_text(f'<testsuites><testsuite hostname="here">{"".join(cases)}</testsuite></testsuites>')
    return path


PASSED = '<testcase name="good"><system-out>--- Captured ---\n3 of 10 draws differ\n</system-out></testcase>'
FAILED = '<testcase name="bad"><failure message="AssertionError: off by 1&#10;more"/></testcase>'
SKIPPED = '<testcase name="big"><skipped message="needs 9 GiB"/></testcase>'


def test_dry_run(tmp_path: Path) -> None:
    """The script from end to end for one op, on the CPU."""
    run = subprocess.run(
        ["bash", "bench/gpu.sh", str(tmp_path / "out"), "--dry-run", "--ops", "sample"],
        cwd=ROOT, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    (file,) = (tmp_path / "out").glob("dry-run-*.json")
    content = json.loads(file.read_text())
    assert content["dry_run"] and content["machine_info"]["gpu"] is None
    assert content["tests"]["sample"]["passed"] == 1 and content["smoke"] == {"sample": "good"}
    assert list(content["stages"]) == ["machine", "smoke", "bench", "tests", "peers"]
    keys = {"op", "case", "impl", "direction", "dtype", "seconds"}
    assert content["benchmarks"] and all(keys <= b["extra_info"].keys() for b in content["benchmarks"])
    assert {b["extra_info"]["impl"] for b in content["benchmarks"]} == {"arcore", "torch"}
    assert "DRY RUN" in run.stdout and "green sample: 1 passed" in run.stdout
    assert len(list((tmp_path / "out").iterdir())) <= 8
    assert len(run.stdout.split("DRY RUN")[1]) < 12_000


def test_junit_is_counted(battery: ModuleType, tmp_path: Path) -> None:
    ended = battery.Outcome(1, 2.0, "")
    result = battery.counts(junit(tmp_path / "a.xml", PASSED, PASSED, FAILED, SKIPPED), ended)
    assert (result["passed"], result["failed"], result["skipped"]) == (2, 1, 1)
    assert result["failures"] == ["bad: AssertionError: off by 1"]
    assert result["skips"] == ["big: needs 9 GiB"]
    assert result["notes"] == ["3 of 10 draws differ"] * 2


def test_what_is_red(battery: ModuleType, tmp_path: Path) -> None:
    def red(*cases: str, code: int | None = 0) -> bool:
        return battery.red(battery.counts(junit(tmp_path / "b.xml", *cases), battery.Outcome(code, 1.0, "")))

    assert not red(PASSED) and not red(PASSED, SKIPPED)
    assert red(PASSED, FAILED) and red(SKIPPED) and red()
    assert red(PASSED, code=None)  # broken off: what came after it is unknown
    assert battery.red(battery.counts(tmp_path / "none.xml", battery.Outcome(-11, 1.0, "")))


def test_reports_are_merged_without_the_name_of_the_machine(battery: ModuleType, tmp_path: Path) -> None:
    reports = [junit(tmp_path / "a.xml", PASSED), tmp_path / "missing.xml", junit(tmp_path / "c.xml", FAILED)]
    battery.merge_reports(reports, tmp_path / "all.xml")
    text = (tmp_path / "all.xml").read_text()
    assert text.count("<testcase") == 2 and "hostname" not in text


def test_a_hanging_process_is_ended_and_its_output_kept(battery: ModuleType, monkeypatch) -> None:
    monkeypatch.setattr(battery, "GRACE", 0.5)
    stubborn = (
        "import signal, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "print('so far', flush=True); time.sleep(60)"
    )
    start = time.monotonic()
    outcomes = battery.run_all(
        {"hang": [sys.executable, "-c", stubborn], "quick": [sys.executable, "-c", "print('done')"]}, 2.0
    )
    assert time.monotonic() - start < 20
    assert outcomes["hang"].code is None and outcomes["hang"].output == "so far\n"
    assert outcomes["quick"].good and outcomes["quick"].output == "done\n"


def test_numbers_of_red_kernels_are_kept_and_marked(battery: ModuleType, tmp_path: Path) -> None:
    run = battery.Battery(tmp_path, ("sample", "speculative"), time.monotonic() + 100, dry=True)
    ended = battery.Outcome(1, 1.0, "")
    run.tests = {
        "sample": battery.counts(junit(tmp_path / "a.xml", PASSED, FAILED), ended),
        "speculative": battery.counts(junit(tmp_path / "b.xml", PASSED), ended),
    }
    record = {"case": "x", "direction": "forward", "seconds": 1.0, "rounds": 3}
    run.bench["records"] = [
        {"op": "sample", "impl": "arcore", **record},
        {"op": "sample", "impl": "torch", **record},
        {"op": "speculative", "impl": "arcore", **record},
        {"op": "speculative", "impl": "arcore", **record, "case": "y", "wrong": "off by 1"},
    ]
    marks = [b["extra_info"]["red"] for b in battery.result(run)["benchmarks"]]
    assert marks == [True, False, False, True]
    # What failed beside the others and passes alone is not red.
    run.tests["sample"]["alone"] = battery.counts(junit(tmp_path / "c.xml", PASSED), ended)
    assert not battery.red(run.tests["sample"])


def test_records_of_a_later_process_replace_older_ones(battery: ModuleType, tmp_path: Path) -> None:
    run = battery.Battery(tmp_path, ("sample",), time.monotonic() + 100, dry=True)
    keys = {"op": "sample", "case": "x", "direction": "forward"}
    first = {"ceilings": {"a": 1}, "skipped": [], "records": [{**keys, "impl": "arcore", "seconds": 2.0}]}
    second = {"ceilings": {"a": 1}, "skipped": [{**keys, "impl": "torch", "reason": "no"}],
              "records": [{**keys, "impl": "arcore", "seconds": 1.0}]}  # fmt: skip
    for content in (first, second):
        path = tmp_path / "bench.json"
        path.write_text(json.dumps(content))
        run.add_records(path)
    assert [r["seconds"] for r in run.bench["records"]] == [1.0] and len(run.bench["skipped"]) == 1
    run.save()
    later = battery.Battery(tmp_path, ("sample",), time.monotonic() + 100, dry=True)
    later.load()
    assert later.bench == run.bench


def test_variants_of_attention_are_run_where_they_were_built(battery: ModuleType, tmp_path: Path) -> None:
    run = battery.Battery(tmp_path, battery.OPS, time.monotonic() + 100, dry=False)
    assert set(run.with_variants(lambda op: [op])) == set(battery.OPS)
    run.machine["sm_90a"] = True
    commands = run.with_variants(lambda op: [op])
    assert set(commands) == {*battery.OPS, *battery.VARIANTS}
    assert commands["block_sparse_attention_sm90a_fused"] == [
        "env", "ARCORE_SM90A=1", "ARCORE_SM90A_BACKWARD=fused", "block_sparse_attention",
    ]  # fmt: skip
    names = {battery.tested_as("block_sparse_attention", impl) for impl in battery.OWN}
    assert names == {"block_sparse_attention", *battery.VARIANTS}


def test_what_hung_in_the_smoke_stage_is_not_timed(
    battery: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = battery.Battery(tmp_path, battery.OPS, time.monotonic() + 100, dry=True)
    run.smoke = {"block_sparse_attention_sm90a_fused": f"{battery.TIME_WAS_UP}: ", "ssd": "exit code 1: no"}
    timed = []
    monkeypatch.setattr(battery, "benchmark", lambda _, op, impl, seconds: not timed.append((op, impl)))
    assert not battery.measure(run, 50.0)
    assert timed[:2] == [("block_sparse_attention", impl) for impl in battery.OWN[:2]]
    assert timed[2:] == [(op, "arcore") for op in battery.OPS[1:]]
    (skipped,) = run.bench["skipped"]
    assert (skipped["impl"], skipped["reason"]) == ("arcore_sm90a_fused", "hung in the smoke stage")


def test_what_the_end_of_the_smoke_stage_cut_is_timed(
    battery: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = battery.Battery(tmp_path, ("sample", "ssd", "speculative"), time.monotonic() + 100, dry=True)
    clock = [0.0]
    monkeypatch.setattr(battery.time, "monotonic", lambda: clock[0])

    def hangs(command: list[str], seconds: float, variables: object) -> object:
        clock[0] += seconds
        return battery.Outcome(None, seconds, "")

    monkeypatch.setattr(battery, "run_one", hangs)
    assert not battery.smoke(run, 130.0)
    assert run.smoke == {
        "sample": f"{battery.TIME_WAS_UP}: ",
        "ssd": "cut after 10 s: ",
        "speculative": "cut after 5 s: ",
    }
    timed = []
    monkeypatch.setattr(battery, "benchmark", lambda _, op, impl, seconds: not timed.append(op))
    battery.measure(run, 50.0)
    assert timed == ["ssd", "speculative"]


def test_every_op_has_its_turn_at_peers(
    battery: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = battery.Battery(tmp_path, battery.OPS, time.monotonic() + 100, dry=True)
    timed = []
    clock = iter(range(0, 10_000, 40))
    monkeypatch.setattr(battery.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(battery, "benchmark", lambda _, op, impl, seconds: not timed.append((op, impl)))
    assert not battery.measure_peers(run, 420.0)
    assert timed[: len(battery.PEERS)] == [(op, impls[0]) for op, impls in battery.PEERS.items()]
    late = {(r["op"], r["impl"]) for r in run.bench["skipped"]}
    assert {r["reason"] for r in run.bench["skipped"]} == {"no time was left"}
    assert late | set(timed) == {(op, impl) for op, impls in battery.PEERS.items() for impl in impls}


def test_a_process_that_was_cut_is_noted_until_one_ends(battery: ModuleType, tmp_path: Path) -> None:
    run = battery.Battery(tmp_path, ("sample",), time.monotonic() + 100, dry=True)
    other = {"op": "ssd", "case": "all", "impl": "arcore", "direction": "all", "reason": "no"}
    run.bench["skipped"] = [other]
    run.leave_out("sample", "torch", "time was up (9 s)")
    run.leave_out("sample", "torch", "time was up (10 s)")
    assert [r["reason"] for r in run.bench["skipped"]] == ["no", "time was up (10 s)"]
    run.leave_out("sample", "torch", None)
    assert run.bench["skipped"] == [other]


def test_peers_are_those_of_the_benchmarks(battery: ModuleType) -> None:
    text = "".join(
        (ROOT / "bench/gpu" / name).read_text() for name in ("attention.py", "scan.py", "sampling.py")
    )
    for impls in battery.PEERS.values():
        assert all(f'"{impl}"' in text for impl in impls)
    listed = set(
        re.findall(
            r'^    "(\w+)": ', text[text.index("IMPLEMENTATIONS = {") : text.index("def _check(")], re.M
        )
    )
    assert listed == {*battery.PEERS["block_sparse_attention"], *battery.OWN}


@pytest.mark.parametrize(
    ("code", "output", "verdict"),
    [
        (0, "========= ERROR SUMMARY: 0 errors\n", "clean"),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", "clean"),
        (99, "========= ERROR SUMMARY: 12 errors\n", "ERROR SUMMARY: 12 errors"),
        (1, "AssertionError\n========= ERROR SUMMARY: 0 errors\n", "no error found, but exit code 1"),
        (0, "no summary at all", "exit code 0"),
        (None, "x: check_a passed\nx: check_b passed\n", "time was up after 2 checks"),
    ],
)
def test_what_a_sanitizer_said(battery: ModuleType, code: int | None, output: str, verdict: str) -> None:
    assert battery.sanitizer_verdict(battery.Outcome(code, 1.0, output)) == verdict


def test_later_stages_keep_their_time(battery: ModuleType, tmp_path: Path) -> None:
    run = battery.Battery(tmp_path, ("sample",), time.monotonic() + 400, dry=True)
    later = sum(battery.LEAST[name] for name in ("smoke", "bench", "tests", "peers", "sanitizer"))
    assert run.limit("build") == pytest.approx(400 - later, abs=1)
    run.chosen = ("machine", "build", "smoke")
    assert run.limit("build") == pytest.approx(400 - battery.LEAST["smoke"], abs=1)
    run.deadline = time.monotonic() + 1700
    assert run.limit("machine") == battery.LIMITS["machine"]
    assert sum(battery.LEAST.values()) < 570


def test_unknown_stages_are_refused(battery: ModuleType, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        battery.main([str(tmp_path), "--stages", "machine,lunch"])
    assert "unknown stages lunch; choose from machine, build, smoke" in capsys.readouterr().err


def test_an_interpreter_without_torch_is_one_sentence(
    battery: ModuleType, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(battery.importlib.util, "find_spec", lambda name: None if name == "torch" else name)
    with pytest.raises(SystemExit):
        battery.main([str(tmp_path / "out")])
    assert re.search(r"has no torch: .* PYTHON=", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_stage_that_raises_stops_no_other(battery: ModuleType, tmp_path: Path) -> None:
    run = battery.Battery(tmp_path, ("sample",), time.monotonic() + 500, dry=True)
    assert not run.run("build", lambda seconds: 1 / 0)
    assert run.run("tests", lambda seconds: True)
    assert run.stages["build"]["good"] is False and run.stages["tests"]["good"] is True


def test_ops_of_the_battery_are_those_with_checks(battery: ModuleType) -> None:
    with_checks = {path.parent.name for path in ROOT.glob("tests/*/gpu_cases.py")}
    assert with_checks == set(battery.OPS)
    for op in battery.OPS:
        cases = importlib.import_module(f"tests.{op}.gpu_cases")
        assert cases.SANITIZED and set(cases.SANITIZED) <= set(cases.CHECKS), op
    text = (ROOT / "bench/gpu/benchmark.py").read_text()
    assert all(f'"{op}": ' in text for op in battery.OPS)


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-2026-01-02.json"),
        ("NVIDIA A100-SXM4-80GB", "a100-2026-01-02.json"),
        (None, "no-gpu-2026-01-02.json"),
    ],
)
def test_name_of_the_result(battery: ModuleType, tmp_path: Path, gpu: str | None, name: str) -> None:
    run = battery.Battery(tmp_path, ("sample",), 0.0, dry=False, machine={"gpu": gpu})
    assert battery.result_name(run, "2026-01-02") == name


def test_numbers_are_printed_beside_their_goals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench/gpu"))
    report = importlib.import_module("report")
    timing = importlib.import_module("timing")
    kept = report.Report("cpu", timing.Ceilings(1.0, 1.0, 1e-6), lambda _: None)
    number = timing.Timing(1e-3, 1e-3, 1e-3, 3, "calls")
    names = {"op": "x", "case": "c", "direction": "forward", "dtype": "float32", "timing": number}
    kept.add(impl="arcore_sm90a", tflops=211.4, goal_sm80=240, goal_sm90a=380, **names)
    kept.add(impl="arcore_sm90a_fused", tflops=250.0, goal_sm80=240, goal_sm90a=380, **names)
    kept.add(impl="arcore", times_floor=2.5, goal_times_floor=3.0, **names)
    kept.add(impl="flash3", tflops=460.0, goal_sm80=240, goal_sm90a=380, **names)
    kept.add(impl="arcore", **names)
    lines = [line.partition("ms")[2] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        " (211 TFLOP/s, goal 380 TFLOP/s)",
        " (250 TFLOP/s, goal 380 TFLOP/s)",
        " (2.50 x floor, goal 3.0 x floor)",
        " (460 TFLOP/s)",
        " (no goal)",
    ]


def test_a_lock_that_is_never_released_is_waited_for_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_checks, "LOCK_SECONDS", 0.3)
    holder, waiter = (tmp_path / "lock").open("w"), (tmp_path / "lock").open("w")
    device_checks._wait_for(holder)
    with pytest.raises(pytest.skip.Exception, match="another process held the device's memory"):
        device_checks._wait_for(waiter)
    holder.close()
    with (tmp_path / "lock").open("w") as free:
        device_checks._wait_for(free)
