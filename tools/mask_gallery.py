"""Draws the pictures of docs/masks.md and the README.

    python tools/mask_gallery.py [FOLDER]      (default: docs/assets)

The same masks give the same files. docs/masks.md shows each expression below as code beside its picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from arcore import masks
from arcore._files import atomic_path
from arcore.masks import IntervalMask, TreeMask

ROOT = Path(__file__).resolve().parent.parent

# Picture name -> the mask, as the page writes it.
GALLERY = {
    "causal": "masks.causal(8, offset=4)",
    "full": "masks.full(6, 10)",
    "next_scale": "masks.next_scale((1, 2, 3, 4))",
    "next_scale_markov": "masks.next_scale_markov((1, 2, 3, 4))",
    "skip_causal": "masks.skip_causal(3, 4)",
    "skip_causal_noisy_first": 'masks.skip_causal(3, 4, order="noisy_first", drop_last_clean=True)',
    "skip_causal_step": "masks.skip_causal_step(2, 4)",
    "prefix_lm": "masks.prefix_lm(12, prefix=5)",
    "documents": "masks.documents([5, 3, 8])",
    "sliding_window": "masks.sliding_window(16, window=5, sinks=2)",
    "block_causal": "masks.block_causal([4, 6, 3, 5])",
    "tree": "masks.tree([-1, -1, 0, 0, 1, 2, 2, 5], prefix=6)",
    "padding": "masks.causal(12).with_padding([9])",
    "algebra": "masks.documents([6, 10]) & masks.sliding_window(16, window=4)",
}
OVERVIEW = ("next_scale", "next_scale_markov", "skip_causal")


def build(expression: str) -> IntervalMask | TreeMask:
    """The mask that an expression of the gallery stands for."""
    mask = eval(expression, {"masks": masks})
    assert isinstance(mask, IntervalMask | TreeMask)
    return mask


def draw(folder: Path) -> list[Path]:
    """Writes `masks/<name>.png` for each mask of the gallery and `masks.png`, the overview; returns their paths."""
    paths = []
    for name, expression in GALLERY.items():
        paths.append(folder / "masks" / f"{name}.png")
        build(expression).plot(path=paths[-1], title="")
    paths.append(folder / "masks.png")
    figure = Figure(figsize=(12, 3.4))
    figure.subplots_adjust(wspace=0.3)
    for ax, name in zip(figure.subplots(1, len(OVERVIEW)), OVERVIEW, strict=True):
        mask = build(GALLERY[name])
        mask.plot(ax, title=f"{name}: {mask.density:.0%} of the pairs")
    with atomic_path(paths[-1]) as temporary:
        figure.savefig(temporary, dpi=85, bbox_inches="tight", metadata={"Software": None})
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "docs/assets")
    for path in draw(parser.parse_args().folder):
        print(f"{path} ({path.stat().st_size / 1024:.0f} KiB)")


if __name__ == "__main__":
    main()
