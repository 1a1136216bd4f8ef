"""Writes docs/resolution.md: what a picture costs with VAR, HMAR and raster order, from 256 to 2048 pixels.

    python tools/resolution_table.py            counts, and measures one layer's attention up to 1024 pixels (a minute)
    python tools/resolution_table.py --counts   counts alone; measured times stay as they are

Counts come from the masks and their tile plans; shapes are those of the d16 models (width 1024, 16 heads, 16 layers).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import dataclass

import torch
from marked import ROOT

from arcore import masks
from arcore.env import cpu_model
from arcore.masks import IntervalMask

sys.path.insert(0, str(ROOT / "bench"))
from measure import cpu_seconds

PAGE = ROOT / "docs/resolution.md"
TIMES = ROOT / "bench/results/resolution.json"
WIDTH, HEADS, DEPTH = 1024, 16, 16
# Side lengths in codes. Those of 2048 pixels are ours: the published ones go to 1024.
SCALES = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
    2048: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64, 85, 128),
}
MEASURED = (256, 512, 1024)


@dataclass(frozen=True)
class Cost:
    """One picture, no guidance.

    Attributes:
        tokens: in all.
        passes: of the network that are needed to draw it.
        mask: of a training pass.
        cached: tokens whose keys and values are kept while drawing.
    """

    tokens: int
    passes: int
    mask: IntervalMask
    cached: int

    @property
    def pairs(self) -> float:
        """Query-key pairs of a layer and head."""
        return self.mask.density * self.tokens**2

    @property
    def attention_flops(self) -> float:
        """Of all layers: two products of two operations."""
        return 4 * self.pairs * WIDTH * DEPTH

    @property
    def dense_flops(self) -> float:
        """Of all linear layers of all blocks: 12 C^2 weights per token."""
        return 2 * 12 * WIDTH**2 * self.tokens * DEPTH

    @property
    def cache_bytes(self) -> int:
        """In bfloat16."""
        return 2 * 2 * self.cached * WIDTH * DEPTH

    def visited(self, tile: int) -> float:
        """Share of all pairs in the tiles that a GPU kernel visits."""
        return self.mask.plan(tile, tile).num_tiles * tile * tile / self.tokens**2


def costs(size: int) -> dict[str, Cost]:
    """By system."""
    sides = SCALES[size]
    tokens, grid = sum(side * side for side in sides), (size // 16) ** 2
    return {
        "VAR": Cost(tokens, len(sides), masks.next_scale(sides), tokens),
        "HMAR, first stage": Cost(tokens, len(sides), masks.next_scale_markov(sides), 0),
        "raster order": Cost(grid, grid, masks.causal(grid), grid),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", action="store_true", help="leave the measured times as they are")
    parser.add_argument(
        "--shared", action="store_true", help="note that the machine ran other work meanwhile"
    )
    options = parser.parse_args()
    if not options.counts:
        measure(options.shared)
    write()
    return 0


def measure(shared: bool) -> None:
    """Attention of one layer, forward, float32, one thread."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    for size in MEASURED:
        for name, cost in costs(size).items():
            q, k, v = torch.randn(3, 1, HEADS, cost.tokens, WIDTH // HEADS).unbind(0)
            rounds = 3 if size < 1024 else 1

            def run(
                q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v, cost: Cost = cost
            ) -> object:
                from arcore.ops import block_sparse_attention

                return block_sparse_attention(q, k, v, cost.mask)

            seconds = cpu_seconds(run, rounds=rounds, warm_up=size < 1024)
            found.setdefault(str(size), {})[name] = round(seconds, 4)
            print(f"{size} {name}: {seconds:.4f} s", file=sys.stderr)
    record = {"machine": cpu_model(), "torch": torch.__version__, "shared machine": shared, "seconds": found}
    TIMES.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def write() -> None:
    """The page."""
    record = json.loads(TIMES.read_text(encoding="utf-8")) if TIMES.is_file() else {"seconds": {}}
    lines = [INTRO]
    lines += [
        "| pixels | system | tokens | passes | pairs, of all | attention, TFLOP | linear layers, TFLOP | cache, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in SCALES:
        for name, cost in costs(size).items():
            lines.append(
                f"| {size} | {name} | {cost.tokens:,} | {cost.passes:,} | {cost.mask.density:.0%} | "
                f"{cost.attention_flops / 1e12:.3g} | {cost.dense_flops / 1e12:.3g} | {cost.cache_bytes / 1e6:.0f} |"
            )
    lines += [
        "",
        "## Tiles",
        "",
        "A GPU kernel computes whole tiles. This is the share of all pairs in the tiles that it visits:",
        "",
        "| pixels | system | allowed | tiles of 64 | tiles of 128 |",
        "|---|---|---|---|---|",
    ]
    for size, name in itertools.product(MEASURED, ("VAR", "HMAR, first stage")):
        found = costs(size)[name]
        lines.append(
            f"| {size} | {name} | {found.mask.density:.0%} | {found.visited(64):.0%} | {found.visited(128):.0%} |"
        )
    if record["seconds"]:
        lines += [
            "",
            "## Measured",
            "",
            f"Attention of one layer, forward, float32, one thread, {record['machine']}, torch {record['torch']}. For "
            "raster order this is a training pass; drawing takes as many passes as tokens."
            + (" The machine ran other work meanwhile." if record.get("shared machine") else ""),
            "",
            "| pixels | system | seconds | GFLOP/s of allowed pairs |",
            "|---|---|---|---|",
        ]
        for size, row in record["seconds"].items():
            for name, seconds in row.items():
                flops = costs(int(size))[name].attention_flops / DEPTH
                lines.append(f"| {size} | {name} | {seconds:.3g} | {flops / seconds / 1e9:.0f} |")
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(PAGE.relative_to(ROOT))


INTRO = """# Cost against resolution

What one picture costs without guidance: with VAR (scale by scale, each sees all before it), with HMAR's first stage
(each scale sees itself alone), and in raster order (code by code). Shapes are those of the d16 models: width 1024, 16
heads, 16 layers; a code stands for 16 x 16 pixels. Made by `python tools/resolution_table.py`; the counts come from the
masks, and the scales of 2048 pixels are ours, since the published ones go to 1024.

A pass reads all weights once, so the number of passes bounds the time of a single picture on a GPU; the operations
bound that of a large batch. Keys and values are counted in bfloat16; HMAR keeps none.
"""


if __name__ == "__main__":
    raise SystemExit(main())
