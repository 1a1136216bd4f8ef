"""`arcore run`"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arcore._files import atomic_path
from arcore.catalog import catalog
from arcore.catalog.running import Report, Runnable, runnable
from arcore.cli._output import check_file
from arcore.cli._parse import Group, parse_groups

TEXT = """\
Use a system that is neither trained nor sampled: an estimator, an analysis, an agent.

Example: arcore run icl_gradient_descent
"""


@dataclass(frozen=True)
class Common:
    """The system and what is written.

    Attributes:
        name: the system.
        figure: file for the figure, if the system draws one. Default: out/run/NAME.png.
        json: file for what was found, for programs. Default: none.
    """

    name: str | None = field(default=None, metadata={"positional": True, "metavar": "NAME"})
    figure: Path | None = None
    json: Path | None = None


def main(argv: Sequence[str]) -> int:
    named = argv[0] if argv and not argv[0].startswith("-") else None
    found = runnable(named) if named else None
    if found is None and not {"-h", "--help"} & set(argv):
        raise ValueError(f"name a system first; what can be run: {', '.join(_names())}")
    groups = {"run": Group(Common)}
    text = (
        f"{TEXT}\n`arcore run NAME --help` shows what that one takes. What can be run: {', '.join(_names())}."
    )
    if found is not None:
        system = catalog()[found.name].system
        groups[found.name] = Group(found.options)
        text = f"{system.title} ({system.paper}): {system.summary}"
    chosen = parse_groups(f"run {named}" if named else "run", text, groups, argv)
    assert found is not None, "help ends the program"
    figure = chosen["run"].get("figure") or Path("out/run") / f"{found.name}.png"
    for option, path in (("--figure", figure), ("--json", chosen["run"].get("json"))):
        if path is not None:
            check_file(path, option)
    report = found.run(_options(found, chosen[found.name]))
    print(report.text)
    if report.draw is not None:
        _write_figure(report, figure)
    elif "figure" in chosen["run"]:
        raise ValueError(f"{found.name} draws no figure: leave --figure out")
    if "json" in chosen["run"]:
        with atomic_path(chosen["run"]["json"]) as temporary:
            temporary.write_text(json.dumps(report.values, indent=1) + "\n", encoding="utf-8")
    return 0


def _options(found: Runnable, given: dict[str, Any]) -> Any:
    missing = [
        entry.name
        for entry in dataclasses.fields(found.options)
        if entry.default is dataclasses.MISSING
        and entry.default_factory is dataclasses.MISSING
        and entry.name not in given
    ]
    if missing:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise ValueError(f"arcore run {found.name} needs {flags} (see `arcore run {found.name} --help`)")
    options = found.options(**given)
    for entry in dataclasses.fields(options):
        _check_number(f"--{entry.name.replace('_', '-')}", getattr(options, entry.name), entry.default)
    return options


def _check_number(flag: str, value: Any, default: Any) -> None:
    """Refuse numbers that no system can mean: NaN, infinity where it is not the default, and more than 64 bits."""
    for one in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(one, float) and not math.isfinite(one) and one != default:
            raise ValueError(f"{flag} must be a finite number but got {one}")
        if isinstance(one, int) and not -(2**63) <= one < 2**63:
            raise ValueError(f"{flag} must fit into 64 bits but got {one}")


def _write_figure(report: Report, path: Path) -> None:
    from arcore._optional import require

    agg = require("matplotlib.backends.backend_agg", extra="plot")
    figure = require("matplotlib.figure", extra="plot").Figure(figsize=report.size, layout="constrained")
    agg.FigureCanvasAgg(figure)
    assert report.draw is not None
    report.draw(figure)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    print(f"figure: {path}")


def _names() -> list[str]:
    return [name for name, entry in catalog().items() if "run" in entry.functions]
