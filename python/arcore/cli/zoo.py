"""`arcore zoo`"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

from arcore.catalog import Entry, ModelInfo, list_models, model_info, search
from arcore.cli._parse import PlainParser

DESCRIPTION = """\
List the systems of the zoo with their presets, or find some: by name, title, arXiv number, topic, kind,
or words of their summaries. One system is shown in full: paper, source file, ops, presets with their
sizes, and what its claim was checked on.

Example: arcore zoo var
Example: arcore zoo 2404.02905
Example: arcore zoo video diffusion"""


def main(argv: Sequence[str]) -> int:
    parser = PlainParser("zoo", DESCRIPTION)
    parser.add_argument(
        "words", metavar="WORDS", nargs="*", help="what to look for (default: list everything)"
    )
    parser.add_argument("--filter", metavar="PATTERN", help="list the presets whose names fit, e.g. '*_tiny'")
    parser.add_argument("--json", action="store_true", help="print what was found for programs")
    options = parser.parse_args(argv)
    if options.filter is not None and (options.words or options.json):
        raise ValueError("--filter lists presets: leave out the words to look for, and --json")
    words = " ".join(options.words)
    found = search(words)
    if options.json:
        print(json.dumps([_facts(entry) for entry in found], indent=1))
    elif options.filter is not None:
        print(_table(options.filter))
    elif not words:
        print(f"{_table('*')}\n\n{_without_presets(found)}".rstrip())
    elif len(found) == 1:
        print(_details(found[0], words))
    else:
        print(_lines(found))
        print("\n`arcore zoo SYSTEM` shows one of them with its presets and how it is used.")
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


def _without_presets(entries: Sequence[Entry]) -> str:
    others = [entry for entry in entries if not entry.presets]
    if not others:
        return ""
    rows = [("SYSTEM", "KIND", "TOPIC", "SUMMARY")]
    rows += [(e.system.name, e.system.kind, e.system.topic, e.system.summary) for e in others]
    return _columns(rows)


def _lines(entries: Sequence[Entry]) -> str:
    rows = [("SYSTEM", "TITLE", "PAPER", "TOPIC", "SOURCE", "SUMMARY")]
    rows += [
        (e.system.name, e.system.title, e.system.paper, e.system.topic, _source(e), e.system.summary)
        for e in entries
    ]
    return _columns(rows)


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _source(entry: Entry) -> str:
    path = os.path.relpath(entry.source.path)
    # Up and down again through the whole disk tells less than where it is.
    return f"{entry.source.path if path.startswith(os.pardir) else path}:{entry.source.line}"


def _facts(entry: Entry) -> dict[str, Any]:
    system, source = entry.system, entry.source
    kept = (
        *(
            "name",
            "title",
            "paper",
            "paper_title",
            "topic",
            "kind",
            "recipe",
            "summary",
            "claim",
            "checked_on",
        ),
        "reported",
    )
    return {
        **{name: getattr(system, name) for name in kept},
        "url": system.url,
        "builds_on": list(system.builds_on),
        "ops": list(system.ops),
        "path": str(source.path),
        "line": source.line,
        "presets": list(entry.presets),
    }


def _details(entry: Entry, name: str) -> str:
    info: ModelInfo = model_info(entry.system.name)
    lines = [
        f"{info.title} ({info.name}): {info.summary}",
        "",
        f"  paper    {info.paper}  {info.url}",
        *([f"           {info.paper_title}"] if info.paper_title else []),
        f"  topic    {info.topic}",
        f"  kind     {info.kind}",
        f"  ops      {', '.join(info.ops) or 'none of arcore.ops'}",
        f"  source   {_source(entry)}",
        f"  claim    {info.claim}",
        f"  checked  on {info.checked_on}; `arcore check {info.name}` repeats it",
    ]
    if info.reported:
        lines.append(f"  paper's  {info.reported}")
    if info.builds_on:
        lines.insert(
            lines.index(f"  ops      {', '.join(info.ops) or 'none of arcore.ops'}"),
            f"  builds   on {', '.join(info.builds_on)}",
        )
    if "run" in entry.functions:
        lines += ["", f"  use      arcore run {info.name} --help"]
    elif info.recipe and info.presets:
        lines += ["", f"  use      arcore train {info.presets[0].name} --help"]
    if info.presets:
        lines += ["", "  presets"]
    width = max((len(preset.name) for preset in info.presets), default=0)
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
