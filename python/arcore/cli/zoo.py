"""`arcore zoo`"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from arcore.catalog import list_models, model_info
from arcore.cli._parse import PlainParser

DESCRIPTION = """\
List the systems of the zoo with their presets, or show one of them: paper, source file, ops,
presets with their sizes, and the test that checks the paper's claim.

Example: arcore zoo var"""


def main(argv: Sequence[str]) -> int:
    parser = PlainParser("zoo", DESCRIPTION)
    parser.add_argument(
        "name", metavar="NAME", nargs="?", help="system or preset (default: list all of them)"
    )
    parser.add_argument(
        "--filter", metavar="PATTERN", default="*", help="presets to list, e.g. '*_tiny' (default: *)"
    )
    options = parser.parse_args(argv)
    print(_details(options.name) if options.name else _table(options.filter))
    return 0


def _table(pattern: str) -> str:
    names = list_models(pattern)
    if not names:
        raise ValueError(f"no preset matches {pattern!r}: `arcore zoo` lists all of them")
    rows = [("PRESET", "PARAMETERS", "TOPIC", "SUMMARY")]
    for name in names:
        info = model_info(name)
        preset = next(preset for preset in info.presets if preset.name == name)
        rows.append((name, preset.size, info.topic, preset.summary))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{name:{widths[0]}}  {size:>{widths[1]}}  {topic:{widths[2]}}  {summary}"
        for name, size, topic, summary in rows
    )


def _details(name: str) -> str:
    info = model_info(name)
    lines = [
        f"{info.title} ({info.name}): {info.summary}",
        "",
        f"  paper    {info.paper}  {info.url}",
        f"  topic    {info.topic}",
        f"  ops      {', '.join(info.ops) or 'none of arcore.ops'}",
        f"  source   {os.path.relpath(info.path)}:{info.line}",
        f"  claim    {info.claim}",
        f"  checked  on {info.checked_on}",
        "",
        "  presets",
    ]
    width = max(len(preset.name) for preset in info.presets)
    for preset in info.presets:
        needs = f" Tokenizer: {preset.tokenizer}." if preset.tokenizer else ""
        lines.append(f"    {preset.name:{width}}  {preset.size:>7}  {preset.summary}{needs}")
    chosen = [preset for preset in info.presets if preset.name == name]
    if chosen:
        lines += ["", f"  settings of {name}"]
        fields = dataclasses.fields(chosen[0].config)
        width = max(len(field.name) for field in fields)
        lines += [f"    {field.name:{width}}  {getattr(chosen[0].config, field.name)}" for field in fields]
    return "\n".join(lines)
