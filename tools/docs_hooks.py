"""mkdocs hook: adds the pages that are made from the registry and from the benchmark results."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_table
import zoo_table

from arcore.catalog import Entry
from arcore.zoo.alignment.generative_rl import taxonomy as generative_rl
from arcore.zoo.language.nar.registry import taxonomy as nar

# Pages of surveys, made from what the systems declare.
TAXONOMIES = {"taxonomy/nar.md": nar, "taxonomy/generative_rl.md": generative_rl}

# A cell of a table, and code in it that is nothing but text.
_CELL = re.compile(r"<td[^>]*>.*?</td>", re.DOTALL)
_CODE = re.compile(r"<code>([^<]+)</code>")
# Longer code takes more than a phone's width.
LONG = 24


def _pages() -> dict[str, str]:
    machines = [bench_table.load(path) for path in bench_table.records(bench_table.ROOT / "bench/results")]
    surveys = {name: made() for name, made in TAXONOMIES.items()}
    return {"benchmarks.md": bench_table.page(machines), **surveys, **zoo_table.pages()}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists a page per system below "Zoo" in the navigation, by topic."""
    for entry in config.nav or []:
        if isinstance(entry, dict) and "Zoo" in entry:
            topics = [
                {topic: [f"zoo/{found.system.name}.md" for found in sorted(entries, key=_title)]}
                for topic, entries in zoo_table.by_topic().items()
            ]
            entry["Zoo"] = ["zoo/index.md", "zoo/papers.md", *topics, *TAXONOMIES]
    return config


def _title(entry: Entry) -> str:
    return entry.system.title.casefold()


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, content in _pages().items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lets commands and messages in tables go on in the next line, between words alone."""
    return _CELL.sub(lambda cell: _CODE.sub(_words, cell[0]), html)


def _words(code: re.Match[str]) -> str:
    text = code[1]
    if len(text) <= LONG or " " not in text:
        return code[0]
    return f'<code class="words">{" ".join(f"<span>{word}</span>" for word in text.split(" "))}</code>'
