"""Classes of the pixels of the user's pictures: what is read, how pictures of any size are cut, what is written."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from arcore._files import atomic_path
from arcore._optional import require
from arcore.data._pictures import Pictures
from arcore.data._walk import some, walk
from arcore.data.image_folder import IMAGE_SUFFIXES
from arcore.data.pixels import UNLABELLED, MaskFile, as_tensor, white_is_one
from arcore.nn.kinds import check_kinds
from arcore.recipes._predictions import listed
from arcore.training.augment import Scale, scaled
from arcore.training.windows import padded, starts

# Windows that go through the network at once.
AT_ONCE = 8
# Colours of the first classes of a mask file: black, and then ones that are told apart.
PALETTE = (
    *(
        (0, 0, 0),
        (230, 60, 60),
        (60, 140, 230),
        (80, 190, 90),
        (240, 200, 60),
        (160, 90, 200),
        (240, 140, 50),
    ),
    *((90, 210, 210), (230, 120, 190), (150, 110, 70), (170, 170, 170)),
)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class PixelOptions:
    """Pictures whose pixels are classified.

    Attributes:
        images: a picture, or a folder in which all pictures are taken, those in folders below it too; of pairs the
            pictures before.
        after: for models of pairs: the pictures after, under the same names.
        masks: true masks under the same names: what is written is compared with them.
        out: folder that receives a mask of each picture, a PNG with a palette whose values are the class numbers.
        stride: pixels between the windows that large pictures are cut into; where windows overlap, the mean of their
            logits counts. Default: two thirds of a window.
        enlarge: factor by which pictures are enlarged first. Default: as for training.
        normalize: scale of the values, as for training. Default: as the model was trained; half for published weights.
        skip_bad: leave out files that cannot be read, with a warning that names them.
    """

    images: Path | None = field(default=None, metadata={"metavar": "FILE|FOLDER"})
    after: Path | None = field(default=None, metadata={"metavar": "FILE|FOLDER"})
    masks: Path | None = field(default=None, metadata={"metavar": "FILE|FOLDER"})
    out: Path = Path("masks")
    stride: int | None = None
    enlarge: float | None = None
    normalize: Scale | None = None
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if self.stride is not None and self.stride < 1:
            raise ValueError(f"--stride must be at least 1 but got {self.stride}")
        if self.enlarge is not None and not 0 < self.enlarge < float("inf"):
            raise ValueError(f"--enlarge must be a positive number but got {self.enlarge}")


class PixelScores:
    """Counts how often a pixel of each class is taken for each class, with torchmetrics.

    Args:
        class_names: of the classes.
        device: of the counts.
    """

    def __init__(self, class_names: Sequence[str], device: torch.device | None = None) -> None:
        metrics = require("torchmetrics.classification", extra="train")
        self.class_names = list(class_names)
        self._counts = metrics.MulticlassConfusionMatrix(
            len(self.class_names), ignore_index=UNLABELLED, validate_args=False
        ).to(device or torch.device("cpu"))

    def add(self, classes: Tensor, masks: Tensor) -> None:
        """Count predicted classes beside true ones, int64 of one shape; `UNLABELLED` does not count."""
        self._counts.update(classes, masks)

    def per_class(self) -> tuple[Tensor, Tensor, Tensor]:
        """Intersection over union and F1 of each class, float64 `[K]`, and whether it was there or was predicted."""
        counts = self._counts.compute().double().cpu()
        hits = counts.diag()
        either = counts.sum(0) + counts.sum(1) - hits
        there = either > 0
        return hits / either.clamp(min=1), 2 * hits / (either + hits).clamp(min=1), there

    def figures(self) -> dict[str, float]:
        """Means over the classes that occur: mIoU and mF1; and of two classes the F1 of the second."""
        union, f1, there = self.per_class()
        found = {"mIoU": float(union[there].mean()), "mF1": float(f1[there].mean())}
        return found | ({"F1": float(f1[1])} if len(f1) == 2 else {})

    def table(self) -> list[str]:
        """Lines for people."""
        union, f1, there = self.per_class()
        wide = max(len(name) for name in (*self.class_names, "class"))
        lines = [f"{'class':{wide}}    IoU     F1"]
        for name, one, other, seen in zip(self.class_names, union, f1, there, strict=True):
            lines.append(
                f"{name:{wide}}  {one:5.3f}  {other:5.3f}" if seen else f"{name:{wide}}  does not occur"
            )
        return [*lines, ", ".join(f"{name} {value:.4f}" for name, value in self.figures().items())]


@dataclass(frozen=True)
class Masks:
    """Classes of the pixels of some pictures.

    Attributes:
        names: of the pictures, without folder and ending.
        masks: uint8 `[H, W]` of each.
        class_names: of the classes.
        scores: beside the true masks, or None.
    """

    names: Sequence[str]
    masks: Sequence[Tensor]
    class_names: Sequence[str]
    scores: PixelScores | None

    def save(self, path: Path) -> list[str]:
        """Write a PNG for each picture into a folder; returns lines for people."""
        pil = require("PIL.Image", extra="zoo")
        palette = [value for colour in _palette(len(self.class_names)) for value in colour]
        for name, mask in zip(self.names, self.masks, strict=True):
            target = path / f"{name}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            image = pil.frombytes("P", (mask.shape[1], mask.shape[0]), mask.contiguous().numpy().tobytes())
            image.putpalette(palette)
            with atomic_path(target) as temporary:
                image.save(temporary, format="PNG")
        lines = self.scores.table() if self.scores is not None else []
        return [*lines, f"wrote {len(self.masks)} mask{'s' if len(self.masks) > 1 else ''} into {path}"]


def _palette(count: int) -> list[tuple[int, int, int]]:
    if count == 2:
        return [(0, 0, 0), (255, 255, 255)]
    # Beyond the chosen colours some numbers' digits make more.
    more = [
        ((97 * i) % 206 + 50, (61 * i) % 206 + 50, (29 * i) % 206 + 50) for i in range(len(PALETTE), count)
    ]
    return [*PALETTE[:count], *more]


@torch.no_grad()
def pixel_logits(model: Any, images: Tensor, stride: int | None = None) -> Tensor:
    """Logits of pictures of any size, from windows of the model's size.

    Args:
        model: windows `[B, C, S, S]`, or `[B, 2, C, S, S]` of pairs, to logits `[B, K, S, S]`.
        images: float `[P, C, H, W]`.
        stride: pixels between windows. Default: two thirds of S.

    Returns:
        float32 `[K, H, W]`: where windows overlap, the mean.
    """
    size, height, width = model.config.image_size, *images.shape[-2:]
    stride = min(stride or max(1, 2 * size // 3), size)
    whole, _ = padded(images, images.new_zeros(height, width), size)
    total = images.new_zeros(model.config.num_classes, *whole.shape[-2:])
    seen = images.new_zeros(whole.shape[-2:])
    places = [(top, left) for top in starts(height, size, stride) for left in starts(width, size, stride)]
    for first in range(0, len(places), AT_ONCE):
        part = places[first : first + AT_ONCE]
        windows = torch.stack([whole[..., top : top + size, left : left + size] for top, left in part])
        logits = model(windows if model.pictures > 1 else windows[:, 0]).float()
        for (top, left), one in zip(part, logits, strict=True):
            total[:, top : top + size, left : left + size] += one
            seen[top : top + size, left : left + size] += 1
    return (total / seen.clamp(min=1))[:, :height, :width]


def partners(folder: Path, names: Sequence[str], what: str) -> list[Path]:
    """The files of those names, whatever their endings; or the one file where there is one name.

    Raises:
        FileNotFoundError: there is no such place.
        ValueError: one is missing.
    """
    if not folder.exists():
        raise FileNotFoundError(f"there is no file or folder {folder}")
    if not folder.is_dir():
        if len(names) > 1:
            raise ValueError(
                f"{folder} is one file and there are {len(names)} pictures: give the folder of {what}"
            )
        return [folder]
    found = {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in walk(folder).files
        if path.suffix.lower() in IMAGE_SUFFIXES
    }
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{folder} lacks {what} of {some(missing)}: expected files of the same names")
    return [found[name] for name in names]


def _white(truths: Sequence[Path], classes: int, pictures: int) -> bool:
    """Whether 255 is class 1 in these masks; refuses classes that the model has not."""
    reader = MaskFile()
    values = {value for path in truths for value in reader.read(path).unique().tolist()}
    if pictures > 1 or white_is_one(values):
        return True
    if strange := sorted(value for value in values if classes <= value != UNLABELLED):
        raise ValueError(f"the masks hold the classes {some(strange)} and the model has {classes}, from 0 on")
    return False


def classify_pixels(
    model: Any,
    class_names: Sequence[str],
    options: PixelOptions,
    *,
    normalize: Scale,
    enlarge: float,
    show: Callable[[str], None],
) -> Masks:
    """Masks of pictures, a line for each as it is done.

    Args:
        model: see `pixel_logits`.
        class_names: of the classes.
        options: which pictures.
        normalize: scale of the values.
        enlarge: factor by which pictures are enlarged first.
        show: receives the lines.

    Raises:
        FileNotFoundError: there is no such picture.
        ValueError: a picture cannot be read, has no partner or another size than it, or the model's logits are not
            finite.
    """
    assert options.images is not None
    files = listed(options.images)
    root = options.images if options.images.is_dir() else options.images.parent
    names = [path.relative_to(root).with_suffix("").as_posix() for path in files]
    doubled = {name for name in names if names.count(name) > 1}
    if doubled:
        raise ValueError(
            f"{options.images} holds pictures that differ in nothing but their endings ({some(sorted(doubled))}): "
            "their masks would have one name: keep one of each"
        )
    sources = [files]
    if model.pictures > 1:
        assert options.after is not None
        sources.append(partners(options.after, names, "pictures after"))
    truths = None if options.masks is None else partners(options.masks, names, "masks")
    white = truths is not None and _white(truths, len(class_names), model.pictures)
    device = next(model.parameters()).device
    reader, reads_masks = Pictures(model.config.in_channels), MaskFile()
    scores = None if truths is None else PixelScores(class_names)
    done: list[str] = []
    masks: list[Tensor] = []
    for index, name in enumerate(names):
        paths = [source[index] for source in sources]
        try:
            pictures = [as_tensor(reader.read(path)) for path in paths]
            sizes = {tuple(picture.shape[1:]) for picture in pictures}
            truth = None if truths is None else reads_masks.read(truths[index])
            if truth is not None:
                sizes.add(tuple(truth.shape))
            if len(sizes) > 1:
                raise ValueError(f"the pictures and the mask of {name} differ in height and width")
        except ValueError as error:
            if not options.skip_bad:
                raise
            warnings.warn(f"left out: {error}", stacklevel=2)
            continue
        values = scaled(torch.stack(pictures), normalize).to(device)
        height, width = values.shape[-2:]
        if enlarge != 1:
            larger = [max(1, round(side * enlarge)) for side in (height, width)]
            values = F.interpolate(values, size=larger, mode="bilinear", align_corners=False)
        logits = pixel_logits(model, values, options.stride)
        if not logits.isfinite().all():
            raise ValueError(f"the model gives no finite numbers for {paths[0]}; its weights may be damaged")
        if enlarge != 1:
            logits = F.interpolate(logits[None], size=(height, width), mode="bilinear", align_corners=False)[
                0
            ]
        classes = logits.argmax(0).cpu()
        share = torch.bincount(classes.flatten(), minlength=len(class_names)).double() / classes.numel()
        told = ", ".join(
            f"{class_names[i]} {100 * share[i]:.1f}%"
            for i in share.argsort(descending=True)[:3]
            if share[i] > 0
        )
        show(f"{paths[0]}: {told}\n")
        if scores is not None and truth is not None:
            scores.add(classes.flatten(), (truth.clamp(max=1) if white else truth).flatten().to(torch.int64))
        done.append(name)
        masks.append(classes.to(torch.uint8))
    if not done:
        raise ValueError(f"no picture of {options.images} could be read")
    return Masks(done, masks, class_names, scores)
