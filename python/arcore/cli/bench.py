"""`arcore bench`"""

from __future__ import annotations

import difflib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import arcore
from arcore._optional import how_to_install
from arcore.cli._parse import PlainParser

SOURCE = Path(arcore.__file__).resolve().parents[2]
DESCRIPTION = """\
Run the pytest-benchmark suites on one thread, each op beside its peers.
They are part of the source checkout and not of an installed package: with that, call this in the checkout.

Example: arcore bench block_sparse_attention -k forward

`arcore bench decoding MODEL` compares decoding loops on a language model instead, and needs no checkout."""


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] == "decoding":
        from arcore.cli._decoding import main as decoding

        return decoding(argv[1:])
    parser = PlainParser("bench", DESCRIPTION)
    parser.usage = "arcore bench [-h] [OP] [pytest options ...]"
    parser.add_argument("op", metavar="OP", nargs="?", help="folder of bench/ to run (default: all of them)")
    parser.add_argument(
        "pytest_options", metavar="pytest options", nargs="*", help="handed to pytest, for example -k forward"
    )
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        return 0
    op = argv[0] if argv and not argv[0].startswith("-") else None
    options = list(argv[1:] if op else argv)
    bench = _bench_folder()
    suite = _suite(bench, op)
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise ImportError(
            f"the benchmarks need pytest-benchmark: run {how_to_install('bench', 'pytest-benchmark')}"
        )
    # Threads of OpenMP and MKL are decided when torch is loaded, hence a new process.
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(suite), *options]
    return subprocess.run(command, cwd=bench.parent, env=os.environ | one_thread, check=False).returncode


def _bench_folder() -> Path:
    """The benchmarks of the checkout that this package runs from, or else of the one that we stand in."""
    for source in (SOURCE, Path.cwd()):
        if (source / "bench").is_dir() and (source / "csrc").is_dir():
            return source / "bench"
    raise FileNotFoundError(
        "the benchmarks are not part of an installed package: get arcore's source and run `arcore bench` in its folder"
    )


def _suite(bench: Path, op: str | None) -> Path:
    """The folder to run."""
    if op is None:
        return bench
    suites = sorted(path.parent.relative_to(bench).as_posix() for path in bench.rglob("bench_*.py"))
    if op not in suites:
        close = difflib.get_close_matches(op, suites, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(dict.fromkeys(suites))}"
        raise ValueError(f"there is no benchmark {op!r}: {hint}")
    return bench / op
