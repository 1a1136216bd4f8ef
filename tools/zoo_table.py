"""Generates README's zoo table and the docs' zoo pages from what the systems declare and bench/results/claims.json.

    python tools/zoo_table.py           writes the table between README.md's zoo markers
    python tools/zoo_table.py --check   writes nothing; exit code 1 when the table is out of date

The pages zoo/*.md are made while the docs are built (tools/docs_hooks.py).
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from marked import ROOT, replace_marked, update

import arcore
from arcore.catalog import Entry, catalog, model_info
from arcore.catalog.claims import shown

PACKAGE = Path(arcore.__file__).parent
ZOO = ROOT / "python/arcore/zoo"
EXAMPLES = ROOT / "docs/examples"
CLAIMS = ROOT / "bench/results/claims.json"
FLAGSHIPS = 10


def claims() -> dict[str, Any]:
    """What `make claims` recorded, by system."""
    return dict(json.loads(CLAIMS.read_text(encoding="utf-8"))) if CLAIMS.is_file() else {}


def by_topic() -> dict[str, list[Entry]]:
    """Systems by topic, those that most others build on first."""
    built_on = Counter(name for entry in catalog().values() for name in entry.system.builds_on)
    found: dict[str, list[Entry]] = defaultdict(list)
    for entry in catalog().values():
        found[entry.system.topic].append(entry)
    for entries in found.values():
        entries.sort(key=lambda entry: (-built_on[entry.system.name], entry.system.name))
    return dict(sorted(found.items()))


def topic_text(topic: str) -> str:
    """What a topic is about: the docstring of its folder."""
    return ast.get_docstring(ast.parse((ZOO / topic / "__init__.py").read_text(encoding="utf-8"))) or ""


def source(entry: Entry) -> str:
    """The path of the system's file below the project, also where the package is installed elsewhere."""
    return (Path("python/arcore") / entry.source.path.relative_to(PACKAGE)).as_posix()


def measured(name: str, recorded: dict[str, Any]) -> str:
    """The first row of a system's claim, measured beside required."""
    if name not in recorded or not recorded[name]["rows"]:
        return "not measured yet"
    row = recorded[name]["rows"][0]
    verdict = "" if row["holds"] else " **does not hold**"
    return f"{row['what']}: {shown(row['measured'])} (required {row['required']}){verdict}"


def table() -> str:
    """README's table: the topics with most systems and followers, each with the system that most others build on.

    A system whose claim is not measured yet is shown only where none of its topic is.
    """
    recorded, topics = claims(), by_topic()
    lines = ["| topic | systems | for example | measured for its claim |", "|---|---:|---|---|"]
    built_on = Counter(name for entry in catalog().values() for name in entry.system.builds_on)
    weight = {
        topic: len(entries) + sum(built_on[entry.system.name] for entry in entries)
        for topic, entries in topics.items()
    }
    largest = sorted(topics, key=lambda topic: (-weight[topic], topic))[:FLAGSHIPS]
    for topic in sorted(largest):
        entry = next((one for one in topics[topic] if one.system.name in recorded), topics[topic][0])
        system = entry.system
        example = f"[{system.title}]({source(entry)}), [{system.paper}]({system.url})"
        count = len(topics[topic])
        lines.append(
            f"| {topic_text(topic)} | {count} | {example} | {_cell(measured(system.name, recorded))} |"
        )
    rest = [topic for topic in topics if topic not in largest]
    if rest:
        lines.append(f"| {', '.join(rest)} | {sum(len(topics[topic]) for topic in rest)} | | |")
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """Name -> content of the docs' pages: an index, the papers, and a page per system."""
    recorded = claims()
    found = {"zoo/index.md": index(recorded), "zoo/papers.md": papers()}
    for entry in catalog().values():
        found[f"zoo/{entry.system.name}.md"] = page(entry, recorded)
    return found


def index(recorded: dict[str, Any]) -> str:
    """The docs' page of all systems, by topic."""
    lines = [
        "# Zoo",
        "",
        f"{len(catalog())} published systems, one file or folder each. `arcore zoo WORDS` finds one in a terminal by",
        "name, title, arXiv number or topic; `arcore check NAME` repeats the check of its claim.",
        "[Papers](papers.md) lists them by number. This page is generated from what the systems declare.",
    ]
    for topic, entries in by_topic().items():
        lines += [
            "",
            f"## {topic}",
            "",
            topic_text(topic),
            "",
            "| system | what it is, and what its claim was checked on |",
            "|---|---|",
        ]
        for entry in sorted(entries, key=lambda entry: entry.system.name):
            system = entry.system
            holds = recorded.get(system.name, {}).get("holds")
            state = {True: "holds", False: "does not hold", None: "not recorded"}[holds]
            lines.append(
                f"| [{system.title}]({system.name}.md) | {system.summary}<br>*{system.checked_on}: {state}* |"
            )
    return "\n".join([*lines, ""])


def papers() -> str:
    """The docs' page of all papers, by number."""
    rows: dict[str, list[Entry]] = defaultdict(list)
    for entry in catalog().values():
        rows[entry.system.paper].append(entry)
    lines = ["# Papers", "", "| paper | systems |", "|---|---|"]
    for paper, entries in sorted(rows.items()):
        names = ", ".join(f"[{entry.system.title}]({entry.system.name}.md)" for entry in entries)
        title = entries[0].system.paper_title
        number = f"[{paper}]({entries[0].system.url})"
        lines.append(f"| {f'{title}<br>{number}' if title else number} | {names} |")
    return "\n".join([*lines, ""])


def page(entry: Entry, recorded: dict[str, Any]) -> str:
    """The docs' page of one system."""
    system = entry.system
    every = catalog()
    builds = ", ".join(f"[{every[name].system.title}]({name}.md)" for name in system.builds_on)
    lines = [
        f"# {system.title}",
        "",
        system.summary,
        "",
        "| | |",
        "|---|---|",
        f"| paper | {f'{system.paper_title}, ' if system.paper_title else ''}[{system.paper}]({system.url}) |",
        f"| topic, kind | {system.topic}, {system.kind} |",
        *([f"| builds on | {builds} |"] if builds else []),
        f"| source | `{source(entry)}`, line {entry.source.line} |",
        f"| ops | {', '.join(f'[`{op}`](../ops/{op}.md)' for op in system.ops) or 'plain PyTorch'} |",
        "",
        entry.doc,
        "",
        *_claim(entry, recorded),
        *_presets(entry),
        *_example(entry),
        "## Reference",
        "",
        *(f"::: {place.module}.{name}\n" for name, place in _documented(entry)),
    ]
    return "\n".join(lines)


def _claim(entry: Entry, recorded: dict[str, Any]) -> list[str]:
    system = entry.system
    lines = [
        "## Claim",
        "",
        system.claim,
        "",
        f"Checked on {system.checked_on}; `arcore check {system.name}` repeats it.",
    ]
    if system.reported:
        lines += ["", f"The paper reports {system.reported}.", ""]
    found = recorded.get(system.name)
    if found is None:
        return [*lines, "No full check is recorded yet.", ""]
    if found["error"]:
        return [*lines, "", f"The recorded check failed: {found['error']}", ""]
    # The sentence comes last: the last column takes what width there is.
    lines += ["", "| claim | measured | required | what was measured |", "|---|---:|---|---|"]
    for row in found["rows"]:
        verdict = "holds" if row["holds"] else "**does not hold**"
        lines.append(f"| {verdict} | {shown(row['measured'])} | {row['required']} | {_cell(row['what'])} |")
    commit = f", commit {found['commit']}" if found["commit"] else ""
    return [
        *lines,
        "",
        f"{found['machine']}, {found['seconds']} s on one thread{commit}, {found['date']}.",
        "",
    ]


def _presets(entry: Entry) -> list[str]:
    if not entry.presets:
        return []
    info = model_info(entry.system.name)
    lines = ["## Presets", "", "| preset | parameters | what it is for |", "|---|---:|---|"]
    for preset in info.presets:
        note = f" Tokenizer: `{preset.tokenizer}`." if preset.tokenizer else ""
        lines.append(f"| `{preset.name}` | {preset.size} | {preset.summary}{note} |")
    names = [preset.name for preset in info.presets]
    lines += ["", f"| setting | {' | '.join(f'`{name}`' for name in names)} |", "|---|" + "---|" * len(names)]
    for field in dataclasses.fields(info.presets[0].config):
        values = [_cell(_value(getattr(preset.config, field.name))) for preset in info.presets]
        lines.append(f"| `{field.name}` | {' | '.join(values)} |")
    return [*lines, ""]


def _value(value: Any) -> str:
    """A setting, numbers to four digits: 2 / 30 is 0.06667."""
    if isinstance(value, float):
        short = f"{value:.4g}"
        return str(value) if len(str(value)) <= len(short) + 1 else short
    if isinstance(value, tuple):
        inner = ", ".join(map(_value, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return str(value)


def example(entry: Entry) -> tuple[Path, str] | None:
    """The system's example: a file in docs/examples, of its own or of its recipe, and its argument."""
    own = EXAMPLES / f"{entry.system.name}.py"
    if own.is_file():
        return own, ""
    shared = EXAMPLES / f"recipe_{entry.system.recipe}.py"
    tiny = [name for name in entry.presets if name.endswith("_tiny")]
    return (shared, tiny[0]) if shared.is_file() and tiny else None


def _example(entry: Entry) -> list[str]:
    name = entry.system.name
    found = example(entry)
    commands = [f"arcore run {name} --help", f"arcore run {name}"] if "run" in entry.functions else []
    if found is None and not commands:
        commands = [f"arcore check {name} --quick"]
    lines = ["## Example", ""]
    if commands:
        lines += ["```sh", *commands, "```", ""]
    if found is not None:
        path, argument = found
        command = f"python {path.relative_to(ROOT).as_posix()} {argument}".rstrip()
        lines += [f"`{command}` runs this file:", "", "```python", path.read_text().rstrip(), "```", ""]
    return lines


def _documented(entry: Entry) -> list[tuple[str, Any]]:
    """What the reference shows: the model's class, or the public classes and functions of the file."""
    if entry.system.model is not None:
        return [(entry.system.model, entry.source)]
    every = {**entry.classes, **entry.functions}
    return [
        (name, place)
        for name, place in every.items()
        if name not in ("claim", "run", "Options") and place.summary
    ]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing, fail when the table is out of date"
    )
    check = parser.parse_args(argv).check
    readme = root / "README.md"
    try:
        content = replace_marked(readme.read_text(encoding="utf-8"), "zoo", table())
    except (OSError, ValueError) as error:
        print(f"zoo_table: {error}", file=sys.stderr)
        return 2
    if update(readme, content, check):
        return 0
    print(f"zoo_table: README.md {'is out of date; run python tools/zoo_table.py' if check else 'written'}")
    return 1 if check else 0


if __name__ == "__main__":
    sys.exit(main())
