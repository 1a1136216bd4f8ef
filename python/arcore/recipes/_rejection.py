"""Rejection sampling by a classifier: of several pictures of a class, those stay that it is surest of."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import load_checkpoint
from arcore.training import checkpoint

# The mean and deviation of ImageNet's colours, on a scale from 0 to 1.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Pixels per side that torchvision's classifiers were trained with.
SIDE = 224


class Judge(nn.Module):
    """A classifier of pictures as they are drawn.

    Args:
        classifier: gives logits `[B, K]` of pictures.
        size: pixels per side that it takes.
        channels: that it takes.
        imagenet: it takes ImageNet's normalisation, else [-1, 1].
        class_names: what its classes are called, or None.
        logits: classes K that it tells apart.
    """

    def __init__(
        self,
        classifier: nn.Module,
        *,
        size: int,
        channels: int,
        imagenet: bool,
        class_names: Sequence[str] | None,
        logits: int,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.size, self.channels, self.imagenet = size, channels, imagenet
        self.class_names, self.logits = class_names, logits

    def check(self, names: Sequence[str] | None, label: int, source: Path) -> None:
        """Refuse a classifier of other classes than the model's, whose names may be unknown.

        Raises:
            ValueError: it has other names, or too few classes.
        """
        if None not in (names, self.class_names) and list(self.class_names or ()) != list(names or ()):
            raise ValueError(
                f"--reject-by {source}: it tells {', '.join((self.class_names or ())[:10])} apart and the model draws "
                f"{', '.join((names or ())[:10])}"
            )
        if label >= self.logits:
            raise ValueError(
                f"--reject-by {source}: it knows {self.logits} classes and class {label} (from 0) is drawn"
            )

    def forward(self, images: Tensor, label: int) -> Tensor:
        """Probability of a class, `[B]`, of pictures `[B, C, H, W]` in [-1, 1]."""
        return self.chances(images)[:, label]

    @torch.no_grad()
    def chances(self, images: Tensor) -> Tensor:
        """Probabilities of all classes, `[B, K]`."""
        if images.shape[1] != self.channels:
            images = images.mean(1, keepdim=True).expand(-1, self.channels, -1, -1)
        if images.shape[-1] != self.size:
            size = (self.size, self.size)
            # Pictures of bfloat16 sampling may come as they were computed, and have no such filter.
            images = F.interpolate(images.float(), size=size, mode="bilinear", antialias=True)
        if self.imagenet:
            mean, deviation = (images.new_tensor(part).view(1, -1, 1, 1) for part in (MEAN, DEVIATION))
            images = ((images + 1) / 2 - mean[:, : self.channels]) / deviation[:, : self.channels]
        chances: Tensor = self.classifier(images.float()).softmax(-1)
        return chances


def open_judge(path: Path) -> Judge:
    """A classifier from a run of the zoo, or from a file of torchvision's weights, named as they are published.

    Args:
        path: run folder or checkpoint of a classifier such as roma_classifier; or `resnet50-0676ba61.pth` and the like,
            whose first part is the name of a model of torchvision.

    Raises:
        FileNotFoundError: there is neither.
        ImportError: torchvision is missing.
        ValueError: it is no classifier.
    """
    if path.is_dir():
        networks, facts = load_checkpoint(checkpoint.find(path))
        model: Any = networks.get("model")
        config = getattr(model, "config", None)
        classes = getattr(config, "num_classes", None)
        if classes is None or getattr(model, "null_class", None) is not None:
            raise ValueError(
                f"--reject-by {path}: expected a classifier, such as a run of roma_classifier_tiny, but it holds "
                f"{', '.join(type(network).__name__ for network in networks.values())}"
            )
        return Judge(
            model,
            size=model.config.image_size,
            channels=model.config.in_channels,
            imagenet=facts.get("options", {}).get("normalize") == "imagenet",
            class_names=facts.get("class_names"),
            logits=classes,
        )
    if not path.is_file():
        raise FileNotFoundError(f"--reject-by {path}: there is neither a run folder nor a file")
    try:
        models: Any = importlib.import_module("torchvision.models")
    except ImportError as error:
        # No extra names it: each of its versions asks for one version of torch alone.
        raise ImportError(
            f"--reject-by {path}: weights of torchvision need the package torchvision, in the version that fits torch "
            f"{torch.__version__}: install it, or give a run of the zoo's own classifier"
        ) from error
    name = path.stem.partition("-")[0]
    if name not in models.list_models():
        raise ValueError(
            f"--reject-by {path}: expected weights named as torchvision publishes them, such as resnet50-0676ba61.pth, "
            f"but there is no model {name!r}"
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
    classes = next(reversed(state.values())).shape[0]
    network = models.get_model(name, weights=None, num_classes=classes)
    network.load_state_dict(state)
    return Judge(network, size=SIDE, channels=3, imagenet=True, class_names=None, logits=classes)
