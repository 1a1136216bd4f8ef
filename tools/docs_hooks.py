"""mkdocs hook: adds the pages that are made from the registry and from the benchmark results."""

from __future__ import annotations

import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_table
import zoo_table

from arcore.catalog import Entry
from arcore.zoo.alignment.generative_rl import taxonomy as generative_rl
from arcore.zoo.language.nar.registry import taxonomy as nar

# Pages of surveys, made from what the systems declare.
TAXONOMIES = {"taxonomy/nar.md": nar, "taxonomy/generative_rl.md": generative_rl}


def _pages() -> dict[str, str]:
    results = bench_table.load(bench_table.newest(bench_table.ROOT / "bench/results"))
    surveys = {name: made() for name, made in TAXONOMIES.items()}
    return {"benchmarks.md": bench_table.page(results), **surveys, **zoo_table.pages()}


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
