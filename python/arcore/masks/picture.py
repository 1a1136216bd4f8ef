"""Pictures of masks: queries down, keys across, allowed pairs in the colour of their key."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arcore.masks import _spans
from arcore.masks.labels import Labels, Segment

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from arcore.masks.interval_mask import IntervalMask
    from arcore.masks.tree_mask import TreeMask

# Okabe and Ito's colours, which colour-blind readers tell apart too. What is known has the same colour everywhere.
_BLUE, _ORANGE, _GREEN = "#0072B2", "#E69F00", "#009E73"
_KNOWN = {
    **dict.fromkeys(("allowed", "keys", "tokens", "clean", "the node itself"), _BLUE),
    **dict.fromkeys(("noisy", "ancestors"), _ORANGE),
    **dict.fromkeys(("cache", "prefix", "sinks"), _GREEN),
}
_OTHERS = ("#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_FORBIDDEN = "#EDEDED"
# Longer sides are sampled: a screen shows no more.
_MAX_PIXELS = 1200
# Up to so many tokens, lines separate the tokens; up to so many segments, lines separate the segments.
_MAX_TOKEN_LINES, _MAX_SEGMENT_LINES = 48, 80
# Letters of a title that fit side by side on an inch, and lines that fit below each other.
_LETTERS, _LINES = 18, 10
_MAX_LEGEND = 8


def draw_interval_mask(
    mask: IntervalMask, ax: Axes | None, *, batch: int, head: int, title: str | None, path: str | Path | None
) -> Axes:
    """See `IntervalMask.plot`."""
    _check_index("batch", batch, mask.batch)
    _check_index("head", head, mask.heads)
    queries, keys = _sample(mask.nq), _sample(mask.nk)
    bounds = mask.bounds[batch % mask.bounds.shape[0], head].cpu()[queries]
    key_bounds = mask.key_bounds
    if key_bounds is not None:
        key_bounds = key_bounds[batch % key_bounds.shape[0]].cpu()[keys]
    allowed = _spans.allowed_pairs(bounds, key_bounds, queries, keys)
    labels = mask.labels or Labels((), (Segment(0, mask.nk, "allowed", ""),))
    groups = list(dict.fromkeys(segment.group for segment in labels.keys))
    # Keys that the labels leave out are drawn as a group of their own.
    group = torch.full((mask.nk,), len(groups))
    for segment in labels.keys:
        group[segment.start : segment.stop] = groups.index(segment.group)
    groups += ["other"] if mask.nk and bool((group == len(groups)).any()) else []
    kinds = torch.where(allowed, group[keys] + 1, 0)
    return _draw(kinds, groups, labels, (mask.nq, mask.nk), ax, repr(mask) if title is None else title, path)


def draw_tree_mask(
    mask: TreeMask, ax: Axes | None, *, batch: int, title: str | None, path: str | Path | None
) -> Axes:
    """See `TreeMask.plot`."""
    _check_index("batch", batch, mask.batch)
    prefix = int(mask.prefix[batch % mask.prefix.shape[0]])
    keys = _sample(mask.nk)
    node = keys - prefix
    own = node == torch.arange(mask.nq).unsqueeze(1)
    kinds = torch.where(node < 0, 1, torch.where(own, 3, 2))
    kinds = torch.where(mask.to_bool()[batch, 0].cpu()[:, keys], kinds, 0)
    nodes = [Segment(i, i + 1, "node", str(i)) for i in range(mask.nq)]
    after = [Segment(prefix + i, prefix + i + 1, "node", str(i)) for i in range(mask.nq)]
    labels = Labels(tuple(nodes), (Segment(0, prefix, "prefix", "prefix"), *after))
    groups = ["prefix", "ancestors", "the node itself"]
    return _draw(kinds, groups, labels, (mask.nq, mask.nk), ax, repr(mask) if title is None else title, path)


def _draw(
    kinds: Tensor,
    groups: list[str],
    labels: Labels,
    size: tuple[int, int],
    ax: Axes | None,
    title: str,
    path: str | Path | None,
) -> Axes:
    """`kinds` is ``[rows, columns]``, sampled from a mask of `size`: 0 for forbidden, 1 + group for allowed."""
    from arcore._optional import require

    require("matplotlib", "plot")
    from matplotlib.colors import to_rgb

    ax = ax if ax is not None else _new_axes(size, shown=path is None)
    colours = _colours(groups, labels.ordered)
    rows, columns = max(size[0], 1), max(size[1], 1)
    if kinds.numel():
        palette = torch.tensor([to_rgb(colour) for colour in (_FORBIDDEN, *colours)])
        ax.imshow(palette[kinds].numpy(), extent=(0, columns, rows, 0), interpolation="nearest")
    ax.set(
        xlim=(0, columns), ylim=(rows, 0), aspect="equal" if columns <= 4 * rows <= 16 * columns else "auto"
    )
    ax.spines[:].set_visible(False)
    ax.xaxis.tick_top()
    ax.xaxis.set_label_position("top")
    ax.tick_params(length=0, labelsize=7)
    ax.set_xlabel("keys", fontsize=8)
    ax.set_ylabel("queries", fontsize=8)
    _mark(ax, "x", labels.keys, size[1])
    _mark(ax, "y", labels.queries, size[0])
    _add_legend(ax, groups, colours)
    ax.set_title(title, fontsize=8, loc="left", pad=8)
    if path is not None:
        _save(ax, Path(path))
    return ax


def _new_axes(size: tuple[int, int], shown: bool) -> Axes:
    """New axes of the mask's proportions; a figure that is only saved stays unknown to pyplot."""
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    width = 4.0
    shape = (width, min(max(width * size[0] / max(size[1], 1), 1.2), 2 * width))
    axes: Axes = (pyplot.figure(figsize=shape) if shown else Figure(figsize=shape)).add_subplot()
    return axes


def _colours(groups: list[str], ordered: bool) -> list[str]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if not ordered:
        others = cycle(_OTHERS)
        return [_KNOWN.get(group) or next(others) for group in groups]
    ramp = colormaps["viridis"]
    return [to_hex(ramp(0.05 + 0.83 * i / max(len(groups) - 1, 1))) for i in range(len(groups))]


def _mark(ax: Axes, side: str, segments: tuple[Segment, ...], size: int) -> None:
    """Lines between tokens and segments, and the segments' titles."""
    from matplotlib.ticker import MaxNLocator

    draw_line = ax.axvline if side == "x" else ax.axhline
    if size <= _MAX_TOKEN_LINES:
        for position in range(1, size):
            draw_line(position, color="white", linewidth=0.4)
    if 1 < len(segments) <= _MAX_SEGMENT_LINES:
        for segment in segments:
            draw_line(segment.start, color="white", linewidth=1.4 if size <= _MAX_TOKEN_LINES else 0.7)
    axis = ax.xaxis if side == "x" else ax.yaxis
    if len(segments) < 2:
        axis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        return
    frame = ax.get_window_extent()
    per_token = (frame.width if side == "x" else frame.height) / ax.figure.dpi / size
    across = [s for s in segments if len(s.title) <= _LETTERS * per_token * (s.stop - s.start)]
    upright = [s for s in segments if _LINES * per_token * (s.stop - s.start) >= 1]
    # Keys' titles stand upright only where too many would not fit otherwise.
    turned = side == "x" and sum(s.stop - s.start for s in across) < 0.8 * size
    titled = across if side == "x" and not turned else upright
    axis.set_ticks(
        [(s.start + s.stop) / 2 for s in titled], [s.title for s in titled], rotation=90 if turned else 0
    )


def _add_legend(ax: Axes, groups: list[str], colours: list[str]) -> None:
    from matplotlib.patches import Patch

    if len(groups) < 2:
        return
    entries = list(zip(groups, colours, strict=True))
    if len(entries) > _MAX_LEGEND:
        picked = torch.linspace(0, len(entries) - 1, _MAX_LEGEND).round().int().tolist()
        entries = [entries[i] for i in picked]
    entries.append(("not allowed", _FORBIDDEN))
    handles = [Patch(facecolor=colour, label=group) for group, colour in entries]
    ax.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.02),
        ncols=4 if len(entries) <= 4 else 3,
        fontsize=7,
        frameon=False,
        handlelength=1,
        handleheight=1,
    )


def _save(ax: Axes, path: Path) -> None:
    from arcore._files import atomic_path

    kind = path.suffix.lstrip(".") or "png"
    figure = ax.get_figure(root=True)
    assert figure is not None
    supported = figure.canvas.get_supported_filetypes()
    if kind not in supported:
        raise ValueError(
            f"arcore.masks: expected path to end in one of {sorted(supported)} but got {str(path)!r}"
        )
    with atomic_path(path) as temporary:
        # No time and no version in the file: the same mask gives the same bytes.
        metadata = {"Software": None} if kind == "png" else None
        figure.savefig(temporary, dpi=110, bbox_inches="tight", format=kind, metadata=metadata)


def _sample(n: int) -> Tensor:
    """Positions ``[min(n, _MAX_PIXELS)]``, evenly spread over n."""
    count = min(n, _MAX_PIXELS)
    return (torch.arange(count, device="cpu") * 2 + 1) * n // (2 * max(count, 1))


def _check_index(name: str, value: int, size: int) -> None:
    if not 0 <= value < size:
        raise ValueError(f"arcore.masks: expected {name} to be from 0 to {size - 1} but got {value}")
