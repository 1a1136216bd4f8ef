"""How models are trained with aligned hidden states from the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from arcore.catalog import load_checkpoint
from arcore.nn.kinds import check_kinds
from arcore.recipes import Start, Work, ZooTask
from arcore.recipes._tokenizers import CodesOptions, CodesTask
from arcore.recipes.raster import DROP, Raster
from arcore.training import checkpoint
from arcore.training.checks import number
from arcore.training.stream import derive_seed
from arcore.zoo.raster.arra.model import Adaptor, Components, alignment_loss

ADAPTOR = "adaptor"
PCA = "pca"
# Images from which principal components are found.
LOOKED_AT = 2000


@check_kinds
@dataclass(frozen=True, kw_only=True)
class ARRAOptions(CodesOptions):
    """Data, tokenizer and encoder of an aligned model.

    Attributes:
        align: run folder of a trained network with features (of roma_classifier, for example), or pca: the principal
            components of the training images.
        components: of pca.
        align_weight: weight of the alignment beside the cross entropy; 0 trains the base alone.
        align_layer: layer behind which hidden states are aligned, from 1.
        z_loss: weight of the squared log of the softmax's denominator.
    """

    align: str = PCA
    components: int = 16
    align_weight: float = 1.0
    align_layer: int = 1
    z_loss: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        number("components", self.components, whole=True, least=1)
        number("align_layer", self.align_layer, whole=True, least=1)
        for name in ("align_weight", "z_loss"):
            number(name, getattr(self, name), whole=False, least=0)


class ARRATask(CodesTask):
    """Cross entropy of the codes and the alignment of hidden states.

    Attributes:
        encoder: gives the vector of a picture, `features(images)`; frozen and not saved.
    """

    options: ARRAOptions

    def align(self, encoder: nn.Module, width: int, options: ARRAOptions, source: Path | None) -> None:
        """Add the adaptor.

        Args:
            encoder: with a method `features`.
            width: F of its vectors.
            options: of the run.
            source: folder of the checkpoint from which the run goes on.
        """
        self.options = options
        self._encoder = [encoder.eval().requires_grad_(False)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.config.seed, "weights", ADAPTOR))
            adaptor = Adaptor(self.model.config.dim, width)
        if source is not None:
            from safetensors.torch import load_file

            adaptor.load_state_dict(load_file(source / f"{ADAPTOR}.safetensors"))
        self.add_module(ADAPTOR, adaptor)
        self.meta()  # describes the networks of the zoo alone
        self.saved = (*self.saved, ADAPTOR)

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # Codes are the same whatever the precision of the model's own arithmetic.
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            codes = self.tokenizer.encode(images)
            encoder: Any = self._encoder[0].to(images.device)
            features = encoder.features(images)
        if self.training:
            dropped = torch.rand(len(labels), device=labels.device) < DROP
            labels = torch.where(dropped, self.model.null_class, labels)
        logits, tap = self.model.tapped(codes, labels, self.options.align_layer)
        entropy = cross_entropy(logits.flatten(0, 1), codes.flatten())
        apart = alignment_loss(getattr(self, ADAPTOR)(tap), features)
        total = entropy + self.options.align_weight * apart
        if self.options.z_loss:
            total = total + self.options.z_loss * logits.logsumexp(-1).square().mean()
        hits = (logits.argmax(-1) == codes).float().mean()
        return total, {"nll": entropy.detach(), "cosine": 1 - apart.detach(), "accuracy": hits}


class ARRARecipe(Raster):
    """Codes row by row, hidden states aligned."""

    options: ClassVar[type] = ARRAOptions
    task: ClassVar[type[ZooTask]] = ARRATask

    def prepare(self, start: Start, options: Any) -> Work:
        work = super().prepare(start, options)
        task = work.task
        assert isinstance(task, ARRATask)
        if not 1 <= options.align_layer <= task.model.config.num_layers:
            raise ValueError(
                f"--align-layer must be from 1 to {task.model.config.num_layers}, the layers of {start.preset}, but is "
                f"{options.align_layer}"
            )
        encoder, width = _encoder(options, work.train)
        task.align(encoder, width, options, start.source)
        return work


def _encoder(options: ARRAOptions, data: Any) -> tuple[nn.Module, int]:
    """The encoder of an option and the width of its vectors.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: it has no features, or images of another shape.
    """
    some = torch.stack([data[index][0] for index in range(min(len(data), LOOKED_AT))])
    encoder: Any
    if options.align == PCA:
        encoder = Components(some, options.components)
    else:
        networks: Mapping[str, Any] = load_checkpoint(checkpoint.find(options.align))[0]
        able = [network for network in networks.values() if hasattr(network, "features")]
        if not able:
            raise ValueError(
                f"{options.align} holds no network with features but {', '.join(networks)}; give a run of one such as "
                "roma_classifier_tiny, or pca"
            )
        encoder = able[0].eval()
    with torch.no_grad():
        try:
            return encoder, encoder.features(some[:1]).shape[1]
        except ValueError as error:
            raise ValueError(f"the encoder in {options.align} does not take these images: {error}") from error


RECIPE = ARRARecipe()
