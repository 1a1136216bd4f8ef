from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import bench_table
import pytest
from marked import replace_marked


def benchmark(
    impl: str, gflops: float, direction: str = "forward", case: str = "next_scale N=680"
) -> dict[str, Any]:
    info = {
        "op": "block_sparse_attention",
        "case": case,
        "impl": impl,
        "direction": direction,
        "dtype": "float32",
        "gflops": gflops,
        "peak_gflops": 100.0,
    }
    return {"name": f"{case}-{impl}", "stats": {"median": 0.002}, "extra_info": info}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for folder in (
        "bench/results",
        "csrc/block_sparse_attention",
        "csrc/common",
        "docs/assets",
        "python/arcore",
    ):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("schema.cpp", "kernel_cpu.cpp", "fwd_sm80.cuh"):
        (tmp_path / "csrc/block_sparse_attention" / file).touch()
    (tmp_path / "csrc/block_sparse_attention/schema.cpp").write_text(
        'm.def("block_sparse_attention_backward(")'
    )
    (tmp_path / "README.md").write_text("before\n<!-- ops:begin -->\nold\n<!-- ops:end -->\nafter\n")
    write(
        tmp_path,
        [benchmark("sdpa_mask", 37.0), benchmark("arcore", 80.0), benchmark("arcore", 71.0, "backward")],
    )
    return tmp_path


def write(
    project: Path,
    benchmarks: list[dict[str, Any]],
    name: str = "cpu-a",
    date: str = "2026-11-23",
    shared: bool = False,
    isa: str = "avx512",
) -> None:
    machine = {"cpu_model": "Some <CPU> & Co", "isa": isa, "torch": "2.13.0", "shared": shared}
    data = {"machine_info": machine, "datetime": f"{date}T01:00:00", "benchmarks": benchmarks}
    (project / f"bench/results/{name}.json").write_text(json.dumps(data))


def test_table_has_numbers_where_measured_and_blanks_where_nothing_is(project: Path) -> None:
    assert bench_table.main([], root=project) == 0
    text = (project / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    rows = [line for line in text.splitlines() if "ward |" in line]
    assert [cell.strip() for cell in rows[0].split("|")[2:-1]] == [
        "forward", "yes", "yes, 80% of peak", "", "",
    ]  # fmt: skip
    assert [cell.strip() for cell in rows[1].split("|")[2:-1]] == [
        "backward", "yes", "yes, 71% of peak", "", "",
    ]  # fmt: skip


def test_cells_of_gpus_come_from_committed_green_results_alone(project: Path) -> None:
    def result(passed: int, failed: int) -> dict[str, Any]:
        return {"finished": True, "passed": passed, "failed": failed}

    def commit(name: str, dry: bool, tests: dict[str, Any]) -> None:
        content = {
            "machine_info": {"gpu": "Some GPU"}, "datetime": f"2026-11-2{name[-1]}T01:00:00",
            "benchmarks": [], "tests": tests, "dry_run": dry,
        }  # fmt: skip
        (project / f"bench/results/{name}.json").write_text(json.dumps(content))

    def cells() -> list[str]:
        assert bench_table.main([], root=project) == 0
        row = next(line for line in (project / "README.md").read_text().splitlines() if "| forward |" in line)
        return [cell.strip() for cell in row.split("|")[5:-1]]

    op = "block_sparse_attention"
    assert cells() == ["", ""]
    commit("gpu-1", True, {op: result(9, 0)})
    assert cells() == ["", ""]
    commit("gpu-2", False, {op: result(9, 1)})
    assert cells() == ["", ""]
    commit("gpu-3", False, {op: result(9, 0), f"{op}_sm90a": result(8, 1)})
    assert cells() == ["yes, on Some GPU", ""]
    assert f'"{op}": "Some GPU"' in (project / "python/arcore/_gpu_results.py").read_text()


def test_figure_is_xml_with_a_bar_per_measurement(project: Path) -> None:
    assert bench_table.main([], root=project) == 0
    root = ET.parse(project / "docs/assets/bench.svg").getroot()
    bars = [float(node.get("width", "0")) for node in root.iter("{http://www.w3.org/2000/svg}rect")][1:]
    assert len(bars) == 3
    assert bars[0] / bars[1] == pytest.approx(80.0 / 37.0, rel=1e-2)
    assert bars[0] / bars[2] == pytest.approx(80.0 / 71.0, rel=1e-2)


def test_check_notices_a_newer_measurement(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_table.main(["--check"], root=project) == 1
    assert bench_table.main([], root=project) == 0
    assert bench_table.main(["--check"], root=project) == 0
    write(project, [benchmark("arcore", 50.0)], name="cpu-b", date="2026-12-01")
    assert bench_table.main(["--check"], root=project) == 1
    assert "README.md is out of date" in capsys.readouterr().out
    assert "80%" in (project / "README.md").read_text()


def test_page_lists_every_case_with_all_peers(project: Path) -> None:
    page = bench_table.page([bench_table.load(project / "bench/results/cpu-a.json")])
    assert "| case, GFLOP/s | arcore | SDPA, bool mask | arcore, ms | arcore, of peak |" in page
    assert "| next_scale N=680 | 80.0 | 37.0 | 2.00 | 80% |" in page


def test_ops_without_a_peak_quote_the_fastest_peer(project: Path) -> None:
    def timed(impl: str, seconds: float) -> dict[str, Any]:
        info = {"op": "sample", "case": "V=7", "impl": impl, "direction": "forward", "seconds": seconds}
        return {"name": f"sample-{impl}", "stats": {"median": 1.0}, "extra_info": info}

    (project / "csrc/sample").mkdir()
    for file in ("schema.cpp", "kernel_cpu.cpp"):
        (project / "csrc/sample" / file).touch()
    write(project, [timed("slow", 0.9), timed("quick", 0.3), timed("arcore", 0.1), benchmark("arcore", 80.0)])
    assert bench_table.main([], root=project) == 0
    text = (project / "README.md").read_text()
    assert "| [`sample`](csrc/sample/README.md) | forward | yes | yes, 3x quick |  |  |" in text
    assert text.count("| backward |") == 1
    page = bench_table.page([bench_table.load(project / "bench/results/cpu-a.json")])
    assert "| case, ms | arcore | quick | slow | fastest peer / arcore |" in page
    assert "| V=7 | 100 | 300 | 900 | 3 |" in page


def test_missing_results_are_one_clear_line(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "bench/results/cpu-a.json").unlink()
    assert bench_table.main([], root=project) == 2
    assert "holds no cpu-*.json; run `make bench`" in capsys.readouterr().err


def test_missing_key_names_the_benchmark(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = benchmark("arcore", 1.0)
    del broken["extra_info"]["impl"]
    write(project, [broken])
    assert bench_table.main([], root=project) == 2
    assert "next_scale N=680-arcore lacks impl" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["no markers", "<!-- a:end --><!-- a:begin -->", "<!-- a:begin --><!-- a:begin --><!-- a:end -->"]
)
def test_markers_must_be_one_pair(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected one <!-- a:begin"):
        replace_marked(text, "a", "body")


@pytest.mark.parametrize(
    ("value", "text"),
    [(1751.4, "1750"), (99960.0, "100000"), (999.6, "1000"), (58.25, "58.2"), (0.004, "0.004")],
)
def test_milliseconds_have_three_digits_and_no_exponent(value: float, text: str):
    assert bench_table._three_digits(value) == text


def test_the_page_has_a_part_per_machine_newest_first(project: Path) -> None:
    write(project, [benchmark("arcore", 60.0)], "cpu-b", date="2026-12-01")
    paths = bench_table.records(project / "bench/results")
    assert [path.stem for path in paths] == ["cpu-b", "cpu-a"]
    page = bench_table.page([bench_table.load(path) for path in paths])
    headings = [line for line in page.splitlines() if line.startswith("## ")]
    assert headings == [
        "## Some <CPU> & Co with AVX-512, 2026-12-01",
        "## Some <CPU> & Co with AVX-512, 2026-11-23",
    ]
    assert page.index("60.0") < page.index("80.0")
    assert page.count("assets/bench.svg") == 1


def test_each_instruction_set_has_its_own_figures(project: Path) -> None:
    write(project, [benchmark("arcore", 30.0)], "cpu-b", date="2026-12-01", shared=True, isa="avx2")
    assert bench_table.main([], root=project) == 0
    text = (project / "README.md").read_text()
    assert "| forward | yes, 30% of peak | yes, 80% of peak |" in text
    assert "on Some <CPU> & Co with AVX2 shared with other work, 2026-12-01: block_sparse_attention" in text


def test_a_shared_machine_fills_what_no_quiet_one_has(project: Path) -> None:
    (project / "csrc/ssd").mkdir()
    (project / "csrc/ssd/schema.cpp").touch()
    ssd = benchmark("arcore", 27.0, case="mamba2")
    ssd["extra_info"]["op"] = "ssd"
    write(project, [benchmark("arcore", 10.0), ssd], "cpu-b", date="2026-12-01", shared=True)
    assert [path.stem for path in bench_table.records(project / "bench/results")] == ["cpu-a", "cpu-b"]
    assert bench_table.main([], root=project) == 0
    text = (project / "README.md").read_text()
    assert "yes, 80% of peak" in text and "yes, 71% of peak" in text and "yes, 10% of peak" not in text
    assert "| [`ssd`](csrc/ssd/README.md) | forward | yes | yes, 27% of peak |" in text
    assert (
        "on Some <CPU> & Co with AVX-512, 2026-11-23: block_sparse_attention next_scale N=680; "
        "on Some <CPU> & Co with AVX-512 shared with other work, 2026-12-01: ssd mamba2."
    ) in text
