"""The pictures of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from arcore._files import atomic_path
from arcore.data import InMemoryImages

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
GAP = 1


def samples(images: Tensor, right: Tensor, classes: Sequence[str], preset: str, path: Path) -> None:
    """One row per class; `images` is `[classes, n, 1, H, W]`, `right` says which were read as their class."""
    figure = Figure(figsize=(0.6 * images.shape[1] + 0.8, 0.6 * images.shape[0] + 1.1))
    ax = figure.add_subplot()
    _mosaic(ax, images, classes)
    size = images.shape[-1] + GAP
    for row, column in (~right).nonzero().tolist():
        corner = (column * size - 0.5, row * size - 0.5)
        ax.add_patch(Rectangle(corner, size - GAP, size - GAP, fill=False, edgecolor=ORANGE, linewidth=2.5))
    title = f"Digits drawn by {preset}, one row per class"
    if not bool(right.all()):
        title += "\n(framed: the classifier reads another digit)"
    ax.set_title(title, loc="left", fontsize=11, pad=10)
    _save(figure, path)


def reconstructions(tokenizer: Any, digits: InMemoryImages, path: Path, columns: int = 10) -> None:
    """Held-out digits above what the tokenizer keeps of them after each scale."""
    chosen = torch.stack([(digits.labels == label).nonzero()[0, 0] for label in range(columns)])
    originals = digits.images[chosen]
    rows, titles = [originals], ["original"]
    tokens = 0
    with torch.no_grad():
        indices = tokenizer.encode(originals)
        latent = tokenizer.empty_latent(len(originals))
        for k, codes in enumerate(indices):
            latent = tokenizer.add_scale(k, codes, latent)
            tokens += codes.shape[1]
            rows.append(tokenizer.decode_latent(latent))
            titles.append(f"{tokens} token{'s' if tokens > 1 else ''}")
    # The full reconstruction stands right below the original, the coarser ones after it.
    order = [0, *range(len(rows) - 1, 0, -1)]
    figure = Figure(figsize=(0.62 * columns + 1.4, 0.62 * len(rows) + 0.9))
    ax = figure.add_subplot()
    _mosaic(ax, torch.stack([rows[i] for i in order]), [titles[i] for i in order])
    ax.set_title("Held-out digits and what the tokenizer keeps of them", loc="left", fontsize=11, pad=10)
    _save(figure, path)


def losses(tokenizer: list[dict[str, Any]], model: list[dict[str, Any]], path: Path) -> None:
    """Training and held-out loss of both networks."""
    figure = Figure(figsize=(9, 3.4))
    left, right = figure.subplots(1, 2)
    _curves(left, tokenizer, "mse", "Tokenizer", "mean squared pixel error")
    left.set_yscale("log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(_some_minor_labels)
    _curves(right, model, "loss", "VAR", "cross entropy, nats per token")
    figure.tight_layout()
    _save(figure, path)


def _curves(ax: Axes, history: list[dict[str, Any]], name: str, title: str, label: str) -> None:
    for split, colour, style, text in (("train", BLUE, "-", "training"), ("test", ORANGE, "o-", "held out")):
        rows = [row for row in history if row["split"] == split]
        ax.plot(
            [row["step"] for row in rows],
            [row[name] for row in rows],
            style,
            color=colour,
            label=text,
            linewidth=1.6,
            markersize=4,
        )
    ax.set_title(title, loc="left", fontsize=11)
    ax.set_xlabel("step")
    ax.set_ylabel(label)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, which="both")
    ax.legend(frameon=False)


def _some_minor_labels(value: float, _: int | None = None) -> str:
    """On a logarithmic axis label 2 and 5 between the powers of ten, and nothing else."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def _mosaic(ax: Axes, images: Tensor, rows: Sequence[str]) -> None:
    """Grey images `[R, n, 1, H, W]` in a grid with a thin gap, the name of each row to its left."""
    count, columns, _, height, width = images.shape
    # NaN is drawn in the colour of the page.
    canvas = torch.full((count * (height + GAP) - GAP, columns * (width + GAP) - GAP), float("nan"))
    for row in range(count):
        for column in range(columns):
            top, left = row * (height + GAP), column * (width + GAP)
            canvas[top : top + height, left : left + width] = images[row, column, 0]
    ax.imshow(canvas.numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([row * (height + GAP) + height / 2 - 0.5 for row in range(count)], rows, fontsize=10)
    ax.tick_params(length=0, colors=GREY)
    ax.spines[:].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(
            temporary, dpi=130, bbox_inches="tight", facecolor="white", metadata={"Software": None}
        )
