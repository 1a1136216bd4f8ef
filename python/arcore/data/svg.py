"""Vector icons: paths of SVG files as straight lines and cubic curves."""

from __future__ import annotations

import re
import warnings
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arcore._optional import require
from arcore.data._walk import is_name, some, walk
from arcore.data.real.files import package_file
from arcore.nn.kinds import check_kinds

Point = tuple[float, float]
# One command: M, L or C, and its points: one, one or three.
Command = tuple[str, tuple[Point, ...]]
# Elements that are drawn otherwise than by a path, and those whose content is not drawn where it stands.
SHAPES = frozenset(
    ("rect", "circle", "ellipse", "line", "polyline", "polygon", "text", "image", "use", "foreignObject")
)
UNDRAWN = frozenset(
    (
        *("defs", "clipPath", "mask", "pattern", "symbol", "marker", "linearGradient", "radialGradient"),
        *("filter", "metadata", "title", "desc", "style"),
    )
)
# Coordinates beyond this, in units of the file, are taken for damage.
LARGEST = 1e6
# Points of each command.
POINTS = {"M": 1, "L": 1, "C": 3}


@check_kinds
@dataclass(frozen=True)
class Icon:
    """A filled drawing.

    Attributes:
        commands: absolute; each subpath begins with M and is closed.
        box: left, top, width and height of the drawing's frame.
        name: of the file, without its ending.
    """

    commands: tuple[Command, ...]
    box: tuple[float, float, float, float]
    name: str = ""

    def path(self) -> str:
        """The `d` of a path element."""
        words: list[str] = []
        for kind, points in self.commands:
            if kind == "M" and words:
                words.append("Z")
            words.append(kind + " ".join(f"{x:g} {y:g}" for x, y in points))
        return " ".join([*words, "Z"]) if words else ""

    def svg(self) -> str:
        """The icon as an SVG file."""
        box = " ".join(f"{number:g}" for number in self.box)
        return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}"><path d="{self.path()}"/></svg>\n'


@check_kinds
def parse_path(text: str) -> tuple[Command, ...]:
    """The `d` of a path element as absolute lines and cubic curves; arcs and quadratic curves become cubic ones.

    Raises:
        ValueError: the text breaks the grammar of paths.
        ImportError: fontTools is missing.
    """
    pens = require("fontTools.pens.recordingPen", extra="plot")
    paths = require("fontTools.svgLib.path", extra="plot")
    pen: Any = pens.RecordingPen()
    if re.sub(r"[\s,]", "", text)[:1] not in ("M", "m"):
        raise ValueError(f"expected a path that begins with M but got {text[:20]!r}")
    if strange := re.search(r"[^MLHVCSQTAZmlhvcsqtaz0-9eE+\-.,\s]", text):
        raise ValueError(f"the path {text[:20]!r}... has {strange[0]!r} at character {strange.start() + 1}")
    # The parser drops such an arc; by the standard it is a straight line.
    if re.search(r"[Aa][\s,]*(?:[+-]?\d*\.?\d+[\s,]+)?[+-]?0+(?:\.0*)?[\s,]", text):
        raise ValueError(f"the path {text[:20]!r}... has an arc of radius 0: write it as a line")
    try:
        paths.parse_path(text, pen)
    except Exception as error:
        raise ValueError(f"the path {text[:20]!r}... breaks the grammar of SVG: {error}") from error
    found: list[Command] = []
    at: Point = (0.0, 0.0)
    for what, points in pen.value:
        if what == "moveTo":
            found.append(("M", (points[0],)))
        elif what == "lineTo":
            found.append(("L", (points[0],)))
        elif what == "curveTo" and len(points) == 3:
            found.append(("C", tuple(points)))
        elif what == "qCurveTo" and len(points) == 2:
            (cx, cy), (x, y) = points
            first = (at[0] + 2 / 3 * (cx - at[0]), at[1] + 2 / 3 * (cy - at[1]))
            found.append(("C", (first, (x + 2 / 3 * (cx - x), y + 2 / 3 * (cy - y)), (x, y))))
        elif what not in ("closePath", "endPath"):
            raise ValueError(
                f"the path {text[:20]!r}... has a {what} of {len(points)} points, which is not known"
            )
        if points:
            at = points[-1]
    if not all(abs(number) < LARGEST for _, points in found for point in points for number in point):
        raise ValueError(
            f"the path {text[:20]!r}... has coordinates that are no numbers or beyond {LARGEST:g}"
        )
    return tuple(found)


@check_kinds
def read_icon(path: str | Path) -> Icon:
    """An icon of an SVG file: its path elements, as they are filled.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no SVG file, has no path or no frame, a path breaks the grammar or leaves it by far, or what
            is drawn is no path (shapes, text) or is moved by `transform`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        root = ElementTree.fromstring(path.read_bytes())
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise ValueError(f"{path} is no SVG file: {error}") from error
    frame = root.get("viewBox", f"0 0 {root.get('width', '')} {root.get('height', '')}")
    try:
        left, top, width, height = (
            float(word.removesuffix("px")) for word in re.split(r"[\s,]+", frame.strip())
        )
    except ValueError:
        raise ValueError(
            f"{path} has no frame: expected a viewBox of four numbers but got {frame!r}"
        ) from None
    if not all(abs(number) < LARGEST for number in (left, top, width, height)):
        raise ValueError(f"{path} has a frame beyond {LARGEST:g}: {frame!r}")
    if not (width > 0 and height > 0):
        raise ValueError(f"{path} has an empty frame of {width} x {height}")
    texts = _paths(path, root)
    if not texts:
        raise ValueError(f"{path} has no path: icons are made of path elements")
    try:
        commands = [command for text in texts for command in parse_path(text)]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Icon(tuple(commands), (left, top, width, height), path.stem)


def _paths(file: Path, root: ElementTree.Element) -> list[str]:
    """The `d` of what is drawn, in order.

    Raises:
        ValueError: an element is not drawn as its own path says.
    """
    texts: list[str] = []
    waiting = [root]
    while waiting:
        one = waiting.pop()
        # Remarks and processing instructions have a function for a name.
        name = one.tag.rpartition("}")[2] if isinstance(one.tag, str) else ""
        if name in UNDRAWN:
            continue
        if name in SHAPES:
            raise ValueError(
                f"{file} has an element {name!r}: convert it to a path, icons are made of path elements"
            )
        moved = one.get("transform") or re.search(r"(?<![\w-])transform\s*:", one.get("style", ""))
        if moved:
            raise ValueError(
                f"{file} moves an element {name!r} by transform: apply it to the path's coordinates"
            )
        if name == "path" and one.get("d", "").strip():
            texts.append(one.get("d", ""))
        waiting += reversed(one)
    return texts


@check_kinds
def load_icons(source: str | Path = "icons", *, skip_bad: bool = False) -> list[Icon]:
    """Icons in the order of their names.

    Args:
        source: a folder of *.svg files, or `"icons"`: those of the package fontawesomefree (the package has each twice,
            and sprites; here each is once).
        skip_bad: leave out files that cannot be read, with a warning that counts and names them.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no icon, or a file is broken.
        ImportError: fontawesomefree is missing.
    """
    if is_name(source, ("icons",)):
        first = package_file("fontawesomefree", "static/fontawesomefree/svgs/solid/house.svg", extra="data")
        folder = Path(first).parent.parent
    else:
        folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is neither a data set nor a folder {str(source)!r}")
    found = walk(folder)
    icons, skipped = [], []
    for file in [*found.files, *found.dangling]:
        if file.suffix.lower() != ".svg":
            continue
        try:
            icons.append(read_icon(file))
        except (ValueError, OSError):
            if not skip_bad:
                raise
            skipped.append(file.name)
    if not icons:
        raise ValueError(f"{source} holds no usable *.svg file")
    if skipped:
        warnings.warn(f"{len(skipped)} bad icons are left out: {some(skipped)}", stacklevel=2)
    return icons


@check_kinds
def draw_icons(icons: list[Icon], path: Path, columns: int = 8) -> None:
    """A sheet of filled icons as a picture file (PNG).

    Raises:
        ImportError: matplotlib is missing.
    """
    from arcore._files import atomic_path

    agg = require("matplotlib.backends.backend_agg", extra="plot")
    shapes, patches = (require(f"matplotlib.{name}", extra="plot") for name in ("path", "patches"))
    columns = min(columns, max(len(icons), 1))
    rows = max(-(-len(icons) // columns), 1)
    figure = require("matplotlib.figure", extra="plot").Figure(figsize=(columns, rows))
    agg.FigureCanvasAgg(figure)
    codes = {"M": [1], "L": [2], "C": [4, 4, 4]}
    for number in range(rows * columns):
        axes = figure.add_axes(
            (number % columns / columns, 1 - (number // columns + 1) / rows, 1 / columns, 1 / rows)
        )
        axes.set_axis_off()
        if number >= len(icons):
            continue
        icon = icons[number]
        left, top, width, height = icon.box
        points = [point for _, some in icon.commands for point in some]
        if points:
            kinds = [code for kind, _ in icon.commands for code in codes[kind]]
            axes.add_patch(patches.PathPatch(shapes.Path(points, kinds), facecolor="black", linewidth=0))
        side = 1.15 * max(width, height)
        axes.set(
            xlim=(left + (width - side) / 2, left + (width + side) / 2),
            ylim=(top + (height + side) / 2, top + (height - side) / 2),
            aspect="equal",
        )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
