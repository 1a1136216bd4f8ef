"""Classes of the user's pictures: which files are read, and what is shown and written of each."""

from __future__ import annotations

import csv
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from arcore._files import atomic_path
from arcore.data._pictures import read_picture
from arcore.data._walk import counted, some, walk
from arcore.data.image_folder import IMAGE_SUFFIXES
from arcore.nn.kinds import check_kinds
from arcore.training.augment import normalized

AT_ONCE = 32


@check_kinds
@dataclass(frozen=True, kw_only=True)
class PredictionOptions:
    """Pictures to classify.

    Attributes:
        images: a picture, or a folder in which all pictures are classified, those in folders below it too.
        top: how many of the most likely classes are shown for each picture.
        out: .csv file that receives, for each picture, its class and the probability of every class.
        normalize: scale of the values, as for training. Default: as the model was trained; half for published weights.
        skip_bad: leave out files that cannot be read, with a warning that names them.
    """

    images: Path | None = field(default=None, metadata={"metavar": "FILE|FOLDER"})
    top: int = 3
    out: Path | None = None
    normalize: Literal["half", "imagenet"] | None = None
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ValueError(f"--top must be at least 1 but got {self.top}")
        if self.out is not None and self.out.suffix.lower() != ".csv":
            raise ValueError(f"--out must be a .csv file but got {self.out}")


@dataclass(frozen=True)
class Predictions:
    """Probabilities of the classes of some pictures.

    Attributes:
        files: the pictures.
        class_names: of the classes.
        probabilities: float32 `[N, classes]`.
    """

    files: Sequence[Path]
    class_names: Sequence[str]
    probabilities: Tensor

    def save(self, path: Path | None) -> list[str]:
        """Write a table; returns lines for people."""
        if path is None:
            return []
        with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["picture", "class", *(f"p({name})" for name in self.class_names)])
            for one, row in zip(self.files, self.probabilities, strict=True):
                best = self.class_names[int(row.argmax())]
                writer.writerow([str(one), best, *(f"{value:.6g}" for value in row.tolist())])
        return [f"wrote {path}: {len(self.files)} pictures"]


def listed(images: Path) -> list[Path]:
    """The pictures that are meant; what is left out of a folder is named in a warning.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: there is no picture among it, or a link leads nowhere.
    """
    if not images.exists():
        raise FileNotFoundError(f"there is no picture or folder {images}")
    if not images.is_dir():
        return [images]
    found = walk(images)
    if found.dangling:
        raise ValueError(f"{images} has links that lead nowhere: {some(found.dangling)}; mend or remove them")
    files = [path for path in found.files if path.suffix.lower() in IMAGE_SUFFIXES]
    others = [path for path in found.files if path.suffix.lower() not in IMAGE_SUFFIXES]
    if not files:
        raise ValueError(
            f"{images} holds no pictures: expected files that end in {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    notes = found.notes()
    if others:
        notes.append(counted(others, "{} skipped", "file that is no picture", "files that are no pictures"))
    for note in notes:
        print(f"{images}: {note}", file=sys.stderr)
    return files


@torch.no_grad()
def predict(
    model: Any,
    class_names: Sequence[str],
    options: PredictionOptions,
    normalize: str,
    show: Callable[[str], None],
) -> Predictions:
    """Classify pictures, a line for each as it is done.

    Args:
        model: images `[B, C, H, W]` to logits `[B, classes]`, with `config.image_size` and `config.in_channels`.
        class_names: of the classes.
        options: which pictures.
        normalize: scale of the values.
        show: receives the lines.

    Raises:
        FileNotFoundError: there is no such picture.
        ValueError: a picture cannot be read, or the model's logits are not finite.
    """
    assert options.images is not None
    config, device = model.config, next(model.parameters()).device
    if normalize == "imagenet" and config.in_channels != 3:
        raise ValueError(
            f"--normalize imagenet is for colour images, and the model takes {config.in_channels} channel"
        )
    done: list[Path] = []
    probabilities: list[Tensor] = []
    files = listed(options.images)
    for start in range(0, len(files), AT_ONCE):
        read: list[tuple[Path, Tensor]] = []
        for path in files[start : start + AT_ONCE]:
            try:
                read.append((path, read_picture(path, config.image_size, config.in_channels)))
            except ValueError as error:
                if not options.skip_bad:
                    raise
                warnings.warn(f"left out: {error}", stacklevel=2)
        if not read:
            continue
        batch = torch.stack([picture for _, picture in read])
        if normalize == "imagenet":
            batch = normalized(batch)
        logits = model(batch.to(device, next(model.parameters()).dtype)).float().cpu()
        for (path, _), row in zip(read, logits, strict=True):
            if not row.isfinite().all():
                raise ValueError(f"the model gives no finite numbers for {path}; its weights may be damaged")
            chances = row.softmax(-1)
            best = chances.topk(min(options.top, len(chances)))
            named = ", ".join(
                f"{class_names[i]} {100 * p:.1f}%"
                for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            )
            show(f"{path}: {named}\n")
            done.append(path)
            probabilities.append(chances)
    if not done:
        raise ValueError(f"no picture of {options.images} could be read")
    return Predictions(done, class_names, torch.stack(probabilities))
