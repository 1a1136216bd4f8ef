"""`arcore check`"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from arcore._files import atomic_path
from arcore._version import __version__
from arcore.catalog import catalog, find, list_systems
from arcore.catalog.claims import Outcome, described, run_claim, shown
from arcore.cli._output import check_file, check_folder
from arcore.cli._parse import PlainParser
from arcore.env import cpu_model

DESCRIPTION = """\
Ask systems of the zoo to prove the central claim of their papers. Prints what was measured beside what
the claim requires, writes the figure where there is one, and exits with code 1 if a claim does not hold.

Example: arcore check var"""


def main(argv: Sequence[str]) -> int:
    parser = PlainParser("check", DESCRIPTION)
    parser.add_argument("names", metavar="NAME", nargs="*", help="systems or presets to check")
    parser.add_argument("--all", action="store_true", help="check every system")
    parser.add_argument("--quick", action="store_true", help="the checks that end in seconds")
    parser.add_argument(
        "--json",
        metavar="FILE",
        type=Path,
        help="enter the results into this file, with machine, commit and seconds; others in it stay",
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        type=Path,
        default=Path("out/check"),
        help="for figures (default: out/check)",
    )
    options = parser.parse_args(argv)
    if options.all == bool(options.names):
        raise ValueError("name the systems to check, or give --all (`arcore zoo` lists them)")
    names = (
        list_systems()
        if options.all
        else list(dict.fromkeys(find(n).entry.system.name for n in options.names))
    )
    if options.json:
        _read(options.json)
    check_folder(options.out)
    failed = []
    for name in names:
        outcome = run_claim(name, quick=options.quick, listener=_progress(name))
        figure = options.out / f"{name}.png"
        outcome = _with_figure(outcome, figure)
        _clear_line()
        print(_report(outcome), flush=True)
        if not outcome.holds:
            failed.append(name)
        elif outcome.claim is not None and outcome.claim.draw is not None and figure.is_file():
            print(f"  figure: {figure}")
        if options.json:
            # Read anew: other checks may have written meanwhile.
            _write(options.json, {**_read(options.json), name: _record(outcome)})
    verdict = f"{len(failed)} do not hold: {', '.join(failed)}" if failed else "all hold"
    print(f"{len(names)} {'claim' if len(names) == 1 else 'claims'} checked; {verdict}")
    return 1 if failed else 0


def _report(outcome: Outcome) -> str:
    system = catalog()[outcome.system].system
    mode = "quick check" if outcome.quick else "full check"
    lines = [f"{system.title} ({system.name}): {system.claim}"]
    if outcome.claim is None or outcome.error is not None:
        return "\n".join([*lines, f"  FAILED after {outcome.seconds:.1f} s: {outcome.error}"])
    rows = [(row.what, shown(row.measured), row.required) for row in outcome.claim.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for row, (what, value, required) in zip(outcome.claim.rows, rows, strict=True):
        verdict = "holds" if row.holds else "FAILS"
        lines.append(f"  {verdict}   {what:{widths[0]}}  {value:>{widths[1]}}  {required}")
    if system.reported:
        lines.append(f"  the paper reports {system.reported}")
    return "\n".join([*lines, f"  {mode} on {system.checked_on}, {outcome.seconds:.1f} s"])


def _record(outcome: Outcome) -> dict[str, Any]:
    rows = outcome.claim.rows if outcome.claim else ()
    return {
        "holds": outcome.holds,
        "quick": outcome.quick,
        "error": outcome.error,
        "rows": [
            {"what": row.what, "measured": row.measured, "required": row.required, "holds": row.holds}
            for row in rows
        ],
        "seconds": round(outcome.seconds, 1),
        "machine": cpu_model(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "arcore": __version__,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _commit() -> str | None:
    """Of the checkout that this package is part of; with a + where tracked files were changed since."""
    root = Path(__file__).resolve().parents[3]

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "python", "csrc")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _read(path: Path) -> dict[str, Any]:
    check_file(path, "--json")
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"the file {path} is damaged: {error}; move it away or choose another --json"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a table of claims in {path}; move it away or choose another --json")
    return content


def _write(path: Path, recorded: dict[str, Any]) -> None:
    text = json.dumps(dict(sorted(recorded.items())), indent=1, allow_nan=True) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _with_figure(outcome: Outcome, path: Path) -> Outcome:
    """Draw the figure of a claim, if it has one; a figure that cannot be drawn is an error of the claim."""
    if outcome.claim is None or outcome.claim.draw is None:
        return outcome
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("  figure: not drawn, matplotlib is missing (extra `plot`)")
        return outcome
    figure = Figure(figsize=outcome.claim.size, layout="constrained")
    FigureCanvasAgg(figure)
    try:
        outcome.claim.draw(figure)
    except Exception as error:
        return dataclasses.replace(outcome, error=f"the figure: {described(error)}")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    return outcome


def _progress(name: str) -> Any:
    """Rewrites one line on a terminal; elsewhere says nothing, so that logs stay short."""
    if not sys.stderr.isatty():
        return None
    width = os.get_terminal_size(sys.stderr.fileno()).columns

    def listener(what: str, step: int, count: int) -> None:
        if step % max(1, count // 100) == 0:
            text = f"{name}: {what} {step}/{count}"[: width - 1]
            print(f"\r{text:{width - 1}}", end="", file=sys.stderr, flush=True)

    return listener


def _clear_line() -> None:
    if sys.stderr.isatty():
        width = os.get_terminal_size(sys.stderr.fileno()).columns
        print("\r" + " " * (width - 1) + "\r", end="", file=sys.stderr, flush=True)
