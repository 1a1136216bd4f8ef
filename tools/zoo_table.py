"""Generates README's zoo table and the docs' zoo pages from the registry.

    python tools/zoo_table.py           writes the table between README.md's zoo markers
    python tools/zoo_table.py --check   writes nothing; exit code 1 when the table is out of date

The pages zoo/*.md are made while the docs are built (tools/docs_hooks.py).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from marked import ROOT, replace_marked, update

from arcore.catalog import ModelInfo, list_systems, model_info


def infos() -> list[ModelInfo]:
    """Every system, grouped by topic."""
    every = [model_info(name) for name in list_systems()]
    return sorted(every, key=lambda info: (info.topic, info.name))


def source(info: ModelInfo) -> str:
    """The path of the system's file below the project."""
    return info.path.resolve().relative_to(ROOT).as_posix()


def table(link: str) -> str:
    """The table of all systems; `link` is a format for the address of a system, given its `info` and `source`."""
    lines = [
        "| system | topic | paper | presets | ops | what is checked |",
        "|---|---|---|---|---|---|",
    ]
    for info in infos():
        address = link.format(info=info, source=source(info))
        paper = f"[{info.paper}]({info.url})"
        presets = ", ".join(f"`{preset.name}` ({preset.size})" for preset in info.presets)
        ops = ", ".join(f"`{op}`" for op in info.ops) or "plain PyTorch"
        lines.append(
            f"| [{info.title}]({address}) | {info.topic} | {paper} | {presets} | {ops} | {info.claim} |"
        )
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """Name -> content of the docs' pages: an index and a page per system."""
    found = {
        "zoo/index.md": "\n".join(
            [
                "# Zoo",
                "",
                "One file per published system. `arcore zoo` prints this table in a terminal, `arcore zoo NAME` one",
                'system; `arcore.create_model("PRESET")` makes the module. This page is generated from the registry.',
                "",
                table("{info.name}.md"),
                "",
            ]
        )
    }
    for info in infos():
        found[f"zoo/{info.name}.md"] = page(info)
    return found


def page(info: ModelInfo) -> str:
    """The docs' page of one system."""
    module_class = info.model
    lines = [
        f"# {info.title}",
        "",
        info.summary,
        "",
        "| | |",
        "|---|---|",
        f"| paper | [{info.paper}]({info.url}) |",
        f"| topic | {info.topic} |",
        f"| source | `{source(info)}`, line {info.line} |",
        f"| ops | {', '.join(f'[`{op}`](../ops/{op}.md)' for op in info.ops) or 'plain PyTorch'} |",
        f"| checked claim | {info.claim}; on {info.checked_on} |",
        "",
        "## Presets",
        "",
        "| preset | parameters | |",
        "|---|---:|---|",
    ]
    for preset in info.presets:
        note = f" Tokenizer: `{preset.tokenizer}`." if preset.tokenizer else ""
        lines.append(f"| `{preset.name}` | {preset.size} | {preset.summary}{note} |")
    names = [preset.name for preset in info.presets]
    lines += ["", f"| setting | {' | '.join(f'`{name}`' for name in names)} |", "|---|" + "---|" * len(names)]
    for field in fields(info.presets[0].config):
        values = [str(getattr(preset.config, field.name)) for preset in info.presets]
        lines.append(f"| `{field.name}` | {' | '.join(values)} |")
    lines += ["", "## Reference", "", f"::: {module_class.__module__}.{module_class.__qualname__}", ""]
    return "\n".join(lines)


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
        content = replace_marked(readme.read_text(encoding="utf-8"), "zoo", table("{source}"))
    except (OSError, ValueError) as error:
        print(f"zoo_table: {error}", file=sys.stderr)
        return 2
    if update(readme, content, check):
        return 0
    print(f"zoo_table: README.md {'is out of date; run python tools/zoo_table.py' if check else 'written'}")
    return 1 if check else 0


if __name__ == "__main__":
    sys.exit(main())
