"""Generates what README and the docs say about speed from bench/results/cpu-*.json.

    python tools/bench_table.py           writes README.md's op table and docs/assets/bench.svg
    python tools/bench_table.py --check   writes nothing; exit code 1 when one of them is out of date

The page docs/benchmarks.md is made from all bench/results/cpu-*.json, one part per machine, while the docs are built
(tools/docs_hooks.py).

The input is what `pytest bench --benchmark-json=...` writes. Each benchmark carries in `extra_info`: op (or a model),
case, impl, direction ("forward", "backward", "forward+backward" or what else was timed), and where they make sense
dtype, seconds (process CPU time; else the run's median), gflops (of the pairs that the mask allows) and peak_gflops
(the FMA peak of the same machine, measured in the same run).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from marked import ROOT, replace_marked, update

OURS = "arcore"
KEYS = ("op", "case", "impl", "direction")
DIRECTIONS = ("forward", "backward")
# What a cell of README's table quotes, in this order.
QUOTED = {"forward": ("forward", "step"), "backward": ("backward", "forward+backward")}
# Columns of the op table: those of CPUs, and those of GPUs with the suffix of their kernels' files.
CPU_BACKENDS = ("CPU AVX2", "CPU AVX-512")
GPU_BACKENDS = {"CUDA sm_80": "sm80", "CUDA sm_90a": "sm90"}
# Instruction sets by the name that the library reports.
ISAS = {"default": "baseline x86-64", "avx2": "AVX2", "avx512": "AVX-512"}
IMPLEMENTATIONS = {
    "sdpa_mask": "SDPA, bool mask",
    "sdpa_loop": "SDPA, loop",
    "sdpa_causal": "SDPA, is_causal",
    "flex_compiled": "FlexAttention",
    "transformers": "transformers",
    "pytorch": "PyTorch",
    "arcore, op per part": "arcore's op per part",
    "compiled": "torch.compile",
    "cross_entropy": "F.cross_entropy",
    "loop": "loop (multinomial)",
    "loop_cdf": "loop (cumsum)",
}


@dataclass(frozen=True)
class Row:
    op: str
    case: str
    impl: str
    direction: str
    dtype: str
    seconds: float
    gflops: float | None = None
    peak_gflops: float | None = None


@dataclass(frozen=True)
class Results:
    rows: tuple[Row, ...]
    cpu: str
    isa: str  # a key of ISAS
    date: str
    torch: str
    # Others worked on the machine meanwhile, so the same call takes half as long again at times.
    shared: bool = False

    @property
    def peak(self) -> float:
        peaks = [row.peak_gflops for row in self.rows if row.peak_gflops is not None]
        return sum(peaks) / len(peaks) if peaks else 0.0


def records(folder: Path) -> list[Path]:
    """The cpu-*.json of `folder`: those of quiet machines, then those of shared ones, both from the newest.

    Raises:
        FileNotFoundError: there is none.
    """
    files = sorted(folder.glob("cpu-*.json"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no cpu-*.json; run `make bench` and keep its JSON there")

    def order(path: Path) -> tuple[bool, str]:
        data = json.loads(path.read_text())
        return not data["machine_info"].get("shared", False), data["datetime"]

    return sorted(files, key=order, reverse=True)


def load(path: Path) -> Results:
    """Reads a pytest-benchmark JSON file.

    Raises:
        ValueError: a benchmark lacks one of the keys that the table needs, or the file holds no benchmark.
    """
    data = json.loads(path.read_text())
    rows = []
    for benchmark in data["benchmarks"]:
        info = benchmark["extra_info"]
        missing = [key for key in KEYS if key not in info]
        if missing:
            raise ValueError(f"{path.name}: {benchmark['name']} lacks {', '.join(missing)} in extra_info")
        rows.append(
            Row(
                **{key: info[key] for key in KEYS},
                dtype=info.get("dtype", "float32"),
                seconds=info.get("seconds", benchmark["stats"]["median"]),
                gflops=info.get("gflops"),
                peak_gflops=info.get("peak_gflops"),
            )
        )
    if not rows:
        raise ValueError(f"{path.name}: expected at least one benchmark but found none")
    machine: dict[str, Any] = data["machine_info"]
    lacking = [key for key in ("cpu_model", "isa", "torch") if key not in machine]
    if lacking:
        raise ValueError(f"{path.name}: machine_info lacks {', '.join(lacking)}")
    if machine["isa"] not in ISAS:
        raise ValueError(
            f"{path.name}: expected isa to be one of {', '.join(ISAS)} but got {machine['isa']!r}"
        )
    return Results(
        tuple(rows),
        machine["cpu_model"],
        machine["isa"],
        data["datetime"][:10],
        machine["torch"],
        machine.get("shared", False),
    )


def groups(results: Results, **wanted: str) -> dict[tuple[str, str, str, str], list[Row]]:
    """Rows by (op, case, direction, dtype), arcore first and then the fastest first."""
    found: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in results.rows:
        if all(getattr(row, key) == value for key, value in wanted.items()):
            found.setdefault((row.op, row.case, row.direction, row.dtype), []).append(row)
    return {key: sorted(rows, key=lambda row: (row.impl != OURS, row.seconds)) for key, rows in found.items()}


def headline(
    machines: list[Results], backend: str, op: str, direction: str
) -> tuple[Results, list[Row]] | None:
    """Our float32 row of the case that README's table quotes, and its peers' rows: the first one measured on the first
    machine of that instruction set that has any."""
    for results in machines:
        if backend != f"CPU {ISAS[results.isa]}":
            continue
        for wanted in QUOTED[direction]:
            for rows in groups(results, op=op, direction=wanted, dtype="float32").values():
                if rows[0].impl == OURS:
                    return results, rows
    return None


def quote(rows: list[Row]) -> str:
    """What a cell says of its measurement: the fraction of the peak, or the distance to the fastest peer."""
    ours, *peers = rows
    if ours.gflops is not None and ours.peak_gflops is not None:
        return f"yes, {ours.gflops / ours.peak_gflops:.0%} of peak"
    if not peers:
        return "yes"
    return f"yes, {peers[0].seconds / ours.seconds:.3g}x {label(peers[0].impl)}"


def seen_on_gpus(folder: Path) -> dict[str, str]:
    """The ops whose checks are green in the newest committed result of a GPU, and that GPU."""
    found: tuple[str, dict[str, str]] = ("", {})
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if "tests" not in content or content.get("dry_run", True):
            continue
        green = {
            name: content["machine_info"]["gpu"]
            for name, result in content["tests"].items()
            if result["finished"] and result["passed"] and not result["failed"]
        }
        found = max(found, (content["datetime"], green), key=lambda x: x[0])
    return found[1]


def op_table(machines: list[Results], csrc: Path, seen: dict[str, str] | None = None) -> str:
    """README's table of ops and backends. A cell of a GPU is blank until a committed result fills it."""
    seen = seen or {}
    columns = [*CPU_BACKENDS, *GPU_BACKENDS]
    lines = [f"| op | direction | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
    cases: dict[Results, list[str]] = {}
    written: dict[str, list[str]] = {backend: [] for backend in GPU_BACKENDS}
    ops = (p for p in csrc.iterdir() if (p / "schema.cpp").is_file() and p.name != "common")
    for folder in sorted(ops):
        for backend, suffix in GPU_BACKENDS.items():
            if any(folder.glob(f"*_{suffix}.cuh")):
                written[backend].append(folder.name)
        differentiable = f'"{folder.name}_backward' in (folder / "schema.cpp").read_text()
        for i, direction in enumerate(DIRECTIONS[: 1 + differentiable]):
            cells = []
            for backend in CPU_BACKENDS:
                cell = "yes"
                if found := headline(machines, backend, folder.name, direction):
                    cell = quote(found[1])
                    cases.setdefault(found[0], []).append(
                        f"{folder.name} {found[1][0].case}" + (" backward" if i else "")
                    )
                cells.append(cell)
            for suffix in GPU_BACKENDS.values():
                name = folder.name if suffix == "sm80" else f"{folder.name}_sm90a"
                cells.append(f"yes, on {seen[name]}" if name in seen else "")
            name = f"[`{folder.name}`](csrc/{folder.name}/README.md)" if i == 0 else ""
            lines.append(f"| {name} | {direction} | {' | '.join(cells)} |")
    if cases:
        kernels = "; ".join(
            f"{backend.split()[1]}: {', '.join(ops)}" for backend, ops in written.items() if ops
        )
        lines += [
            "",
            "Peak: the FMA peak of one core, measured in the same run. Multiples: of the fastest peer's speed in "
            f"the same run. Cases, float32: {'; '.join(_cases(*item) for item in cases.items())}.",
        ]
        if kernels:
            lines[-1] += (
                " Cells of GPUs are filled by committed results alone. Written, compiled, and tested on the CPU in "
                f"place of a GPU are {kernels}."
            )
    return "\n".join(lines)


def _cases(results: Results, cases: list[str]) -> str:
    """What was quoted of a machine; a backward is named where the machine has that alone."""
    named = [
        case
        for case in cases
        if case.removesuffix(" backward") not in cases or not case.endswith(" backward")
    ]
    return f"on {_machine(results)}: {', '.join(named)}"


def _machine(results: Results) -> str:
    shared = " shared with other work" if results.shared else ""
    return f"{results.cpu} with {ISAS[results.isa]}{shared}, {results.date}"


def where(results: Results) -> str:
    text = (
        f"{results.cpu}, {ISAS[results.isa]}, one thread, torch {results.torch}, {results.date}; "
        f"measured FMA peak {results.peak:.0f} GFLOP/s"
    )
    if results.shared:
        text += ". Others worked on the machine meanwhile: the same call takes half as long again at times"
    return text


def label(impl: str) -> str:
    return IMPLEMENTATIONS.get(impl, impl)


def page(machines: list[Results]) -> str:
    """The docs' page of all measurements, a part per machine."""
    lines = [
        "# Benchmarks",
        "",
        "This page is generated by `tools/bench_table.py` from `bench/results/cpu-*.json`, a part per",
        "machine.",
        "",
        "GFLOP/s count only the pairs that the mask allows, so an implementation that computes forbidden pairs and",
        "throws them away shows a lower number. Times are medians of process CPU time; every implementation of a case",
        "was timed in the same run, after its result was compared with a float64 one. Measure on your machine with",
        "`make bench`.",
        "",
        "SDPA is torch's `scaled_dot_product_attention`: with the mask as a dense bool matrix; as a loop of calls",
        "without a mask, one per scale or block; or with `is_causal`. FlexAttention is compiled; it has no backward on",
        "CPUs.",
    ]
    for i, results in enumerate(machines):
        lines += ["", f"## {_machine(results)}", "", f"{where(results)}."]
        if i == 0:
            lines += ["", "![GFLOP/s of block_sparse_attention and its peers](assets/bench.svg)"]
        for (op, direction, dtype), cases in _by_table(results).items():
            lines += ["", f"### {op}: {direction}, {dtype}", ""]
            impls = sorted(
                {row.impl for rows in cases.values() for row in rows}, key=lambda impl: (impl != OURS, impl)
            )
            lines += _gflops_table(cases, impls) if _counted(cases) else _time_table(cases, impls)
    return "\n".join(lines) + "\n"


def _counted(cases: dict[str, list[Row]]) -> bool:
    return all(row.gflops is not None for rows in cases.values() for row in rows)


def _gflops_table(cases: dict[str, list[Row]], impls: list[str]) -> list[str]:
    lines = [
        f"| case, GFLOP/s | {' | '.join(map(label, impls))} | {OURS}, ms | {OURS}, of peak |",
        "|---|" + "---:|" * (len(impls) + 2),
    ]
    for case, rows in cases.items():
        by_impl = {row.impl: row for row in rows}
        cells = [f"{by_impl[impl].gflops:.1f}" if impl in by_impl else "" for impl in impls]
        ours = by_impl.get(OURS)
        if ours is not None and ours.gflops is not None and ours.peak_gflops:
            cells += [f"{ours.seconds * 1e3:.2f}", f"{ours.gflops / ours.peak_gflops:.0%}"]
        else:
            cells += ["", ""]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return lines


def _time_table(cases: dict[str, list[Row]], impls: list[str]) -> list[str]:
    lines = [
        f"| case, ms | {' | '.join(map(label, impls))} | fastest peer / {OURS} |",
        "|---|" + "---:|" * (len(impls) + 1),
    ]
    for case, rows in cases.items():
        by_impl = {row.impl: row for row in rows}
        cells = [_three_digits(by_impl[impl].seconds * 1e3) if impl in by_impl else "" for impl in impls]
        peers = [row.seconds for row in rows if row.impl != OURS]
        ours = by_impl.get(OURS)
        cells.append(_three_digits(min(peers) / ours.seconds) if ours is not None and peers else "")
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return lines


def _three_digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    text = f"{value:.3g}"
    return f"{float(text):.0f}" if "e+" in text else text


def _by_table(results: Results) -> dict[tuple[str, str, str], dict[str, list[Row]]]:
    tables: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
    for (op, case, direction, dtype), rows in groups(results).items():
        tables.setdefault((op, direction, dtype), {})[case] = rows
    return tables


def figure(results: Results, op: str = "block_sparse_attention") -> str:
    """An SVG of float32 GFLOP/s: a panel per direction, a group of bars per case, the peak as a dashed line."""
    panels = [groups(results, op=op, dtype="float32", direction=direction) for direction in DIRECTIONS]
    bar, gap, title, width, left = 13, 14, 22, 430, 132
    rows_high = max(sum(title + bar * len(rows) + gap for rows in panel.values()) for panel in panels)
    height = 58 + rows_high + 26
    peak = results.peak
    scale = (width - left - 52) / peak if peak else 0.0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * width}" height="{height}" '
        f'viewBox="0 0 {2 * width} {height}" font-family="Helvetica, Arial, sans-serif" font-size="11">',
        f"<title>{escape(op)}: GFLOP/s</title>",
        f'<rect width="{2 * width}" height="{height}" fill="#ffffff"/>',
    ]
    for i, panel in enumerate(panels):
        x, y = i * width, 30
        parts.append(
            _text(
                x + 12, y - 8, f"{DIRECTIONS[i]}, float32, GFLOP/s of allowed pairs", size=13, weight="bold"
            )
        )
        peak_x = x + left + scale * peak
        parts.append(
            f'<line x1="{peak_x:.1f}" y1="{y + 6}" x2="{peak_x:.1f}" y2="{height - 26}" stroke="#888888" '
            'stroke-dasharray="4 3"/>'
        )
        parts.append(_text(peak_x, y + 2, f"FMA peak {peak:.0f}", anchor="middle", fill="#666666"))
        y += 10
        for (_, case, _, _), rows in panel.items():
            parts.append(_text(x + 12, y + 14, case, weight="bold"))
            y += title
            for row in rows:
                colour = "#1f6feb" if row.impl == OURS else "#b8c0cc"
                gflops = row.gflops or 0.0
                length = scale * gflops
                parts.append(_text(x + left - 6, y + bar - 3, label(row.impl), anchor="end"))
                parts.append(
                    f'<rect x="{x + left}" y="{y + 1}" width="{length:.1f}" height="{bar - 2}" fill="{colour}"/>'
                )
                parts.append(_text(x + left + length + 4, y + bar - 3, f"{gflops:.0f}"))
                y += bar
            y += gap
    parts.append(_text(12, height - 10, where(results), fill="#666666"))
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, text: str, **style: str | int) -> str:
    names = {"size": "font-size", "weight": "font-weight", "anchor": "text-anchor", "fill": "fill"}
    attributes = "".join(f' {names[key]}="{value}"' for key, value in style.items())
    return f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{escape(text)}</text>'


def generated(root: Path) -> dict[Path, str]:
    """File -> content, of every file that this tool writes or has a part in."""
    machines = [load(path) for path in records(root / "bench/results")]
    seen = seen_on_gpus(root / "bench/results")
    readme = root / "README.md"
    return {
        readme: replace_marked(
            readme.read_text(encoding="utf-8"), "ops", op_table(machines, root / "csrc", seen)
        ),
        root / "docs/assets/bench.svg": figure(machines[0]),
        root / "python/arcore/_gpu_results.py": module_of(seen),
    }


def module_of(seen: dict[str, str]) -> str:
    """What the package itself knows of GPUs, for `arcore env`."""
    entries = "".join(f'    "{op}": "{gpu}",\n' for op, gpu in sorted(seen.items()))
    return (
        '"""The ops whose kernels a GPU has run rightly, by committed results; written by tools/bench_table.py."""\n\n'
        "SEEN: dict[str, str] = {" + ("\n" + entries if entries else "") + "}\n"
    )


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, fail when a file is out of date")
    check = parser.parse_args(argv).check
    try:
        files = generated(root)
    except (OSError, ValueError) as error:
        print(f"bench_table: {error}", file=sys.stderr)
        return 2
    stale = [path.relative_to(root) for path, content in files.items() if not update(path, content, check)]
    for path in stale:
        print(
            f"bench_table: {path} {'is out of date; run python tools/bench_table.py' if check else 'written'}"
        )
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
