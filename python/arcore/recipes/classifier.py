"""Classifying images, from nothing or from a pretrained encoder."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from arcore.nn.kinds import check_kinds
from arcore.recipes._encoders import PretrainedOptions, from_encoder
from arcore.recipes._images import EncoderOptions, ImageRecipe
from arcore.recipes._predictions import PredictionOptions, Predictions, predict
from arcore.recipes._recipe import Start, ZooTask
from arcore.training.config import TrainConfig


@check_kinds
@dataclass(frozen=True, kw_only=True)
class ClassifierOptions(EncoderOptions, PretrainedOptions):
    """Data and start of a classifier."""

    def __post_init__(self) -> None:
        EncoderOptions.__post_init__(self)
        PretrainedOptions.__post_init__(self)


class ClassifierTask(ZooTask):
    """Cross entropy of the classes."""

    model: Any

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.model(images)
        return cross_entropy(logits, labels), {"accuracy": (logits.argmax(-1) == labels).float().mean()}


class Classifier(ImageRecipe):
    """Images to classes. A model that can start from an encoder has `start_from(encoder)`."""

    defaults: ClassVar[TrainConfig] = TrainConfig(steps=500, batch_size=32, lr=1e-3)
    options: ClassVar[type] = ClassifierOptions
    sampling: ClassVar[type | None] = PredictionOptions
    task: ClassVar[type[ZooTask]] = ClassifierTask

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        words = ["arcore", "sample", str(out), "--images"]
        return [f"classify pictures: {shlex.join(words)} FILE|FOLDER"]

    def check_sampling(self, options: Any) -> None:
        if options.images is None:
            raise ValueError("this is a classifier of images: say what to classify with --images FILE|FOLDER")

    def sample(
        self,
        networks: Mapping[str, Any],
        facts: Mapping[str, Any],
        options: Any,
        show: Callable[[str], None],
    ) -> Predictions:
        model = networks[self.trained]
        classes = model.config.num_classes
        names = [str(name) for name in facts.get("class_names") or range(classes)]
        if len(names) != classes:
            raise ValueError(f"the model has {classes} classes, but its checkpoint names {len(names)}")
        trained = (facts.get("options") or {}).get("normalize", "half")
        return predict(model, names, options, options.normalize or trained, show)

    def build(
        self, start: Start, options: Any, networks: Mapping[str, nn.Module], overrides: Mapping[str, Any]
    ) -> nn.Module:
        return from_encoder(start, options, overrides)


RECIPE = Classifier()
