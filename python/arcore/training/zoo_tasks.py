"""Training tasks of the zoo, one per family."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from arcore._files import atomic_path
from arcore.data import ImageDataset, adaptive_rotation
from arcore.data.text_tokenizers import FILE, ByteTokenizer, TextTokenizer
from arcore.decoding import generate
from arcore.models import describe, model_info
from arcore.objectives import (
    diffusion_head_loss,
    diffusion_loss,
    draw_visible,
    fused_snr_weights,
    min_snr_weights,
    next_cluster_loss,
    next_scale_loss,
    variance_bound,
)
from arcore.schedules import add_noise
from arcore.training.config import TrainConfig
from arcore.training.stream import RandomStream, StreamSampler
from arcore.training.task import Task


class ZooTask(Task):
    """A task whose networks come from the zoo.

    Args:
        config: settings of the run.
        networks: the networks by name.
        facts: further entries of config.json, for example the class names.

    Attributes:
        family: of the presets that it trains.
        needs_tokenizer: the model reads a tokenizer's codes instead of pixels.
        reads_text: the data are text and not images.
    """

    family: ClassVar[str]
    needs_tokenizer: ClassVar[bool] = False
    reads_text: ClassVar[bool] = False

    def __init__(
        self, config: TrainConfig, networks: Mapping[str, nn.Module], facts: Mapping[str, Any]
    ) -> None:
        super().__init__(config)
        self.facts = dict(facts)
        self.saved = tuple(networks)
        for name, network in networks.items():
            self.add_module(name, network)

    @classmethod
    def overrides(cls, data: ImageDataset) -> dict[str, Any]:
        """Fields of the model's config that the data decide."""
        return {}

    def meta(self) -> dict[str, Any]:
        return {
            "modules": {name: describe(network) for name, network in self.modules_to_save().items()},
            **self.facts,
            "training": dataclasses.asdict(self.config),
        }


class TokenizerTask(ZooTask):
    """Autoencoder with a quantiser: mean squared error of the pixels plus the quantiser's own loss."""

    family = "tokenizer"
    tokenizer: Any

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = self.tokenizer(images)
        pixels = mse_loss(out.reconstruction.float(), images)
        return pixels + out.vq_loss, {"mse": pixels.detach(), "vq": out.vq_loss.detach()}


class NextScaleTask(ZooTask):
    """A next-scale model on the codes of a frozen tokenizer."""

    family = "next-scale"
    needs_tokenizer = True
    model: Any
    tokenizer: Any

    def __init__(
        self, config: TrainConfig, networks: Mapping[str, nn.Module], facts: Mapping[str, Any]
    ) -> None:
        super().__init__(config, networks, facts)
        self.tokenizer.requires_grad_(False)

    @classmethod
    def overrides(cls, data: ImageDataset) -> dict[str, Any]:
        return {"num_classes": len(data.class_names)}

    def train(self, mode: bool = True) -> NextScaleTask:
        super().train(mode)
        self.tokenizer.eval()
        return self

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # Codes are the same whatever the precision of the model's own arithmetic.
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            indices = self.tokenizer.encode(images)
            inputs = self.tokenizer.scale_inputs(indices)
        logits = self.model(inputs, labels)
        loss = next_scale_loss(logits, indices)
        hits = logits.argmax(-1) == torch.cat(list(indices), dim=1)
        return loss, {"accuracy": hits.float().mean()}


class NextClusterTask(ZooTask):
    """Pretraining of an encoder by predicting the next cluster of patches; the training input is partly rotated."""

    family = "next-cluster"
    model: Any

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.model.config
        seen, windows = images, None
        if self.training:
            sizes = [max(1, config.side // part) for part in (2, 3, 6)]
            seen, windows = adaptive_rotation(images, config.patch_size, sizes=sizes)
        out = next_cluster_loss(
            self.model(seen, windows),
            images,
            patch_size=config.patch_size,
            cluster=config.cluster,
            block=config.block,
            official_quirks=config.official_quirks,
        )
        return out.loss, {"patches": out.patches.detach(), "blocks": out.blocks.detach()}


class ClassifierTask(ZooTask):
    """Cross entropy of the classes."""

    family = "classifier"
    model: Any

    @classmethod
    def overrides(cls, data: ImageDataset) -> dict[str, Any]:
        return {"num_classes": len(data.class_names)}

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.model(images)
        return cross_entropy(logits, labels), {"accuracy": (logits.argmax(-1) == labels).float().mean()}


class DiffusionTask(ZooTask):
    """Noise prediction at random times; with a learned variance also its bound.

    Evaluation draws the same times and noise for every batch and every model, so losses can be compared.
    """

    family = "diffusion"
    model: Any

    @classmethod
    def overrides(cls, data: ImageDataset) -> dict[str, Any]:
        return {"num_classes": len(data.class_names)}

    def times(
        self, shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None
    ) -> Tensor:
        """Times to train on."""
        drawn: Tensor = self.model.schedule.sample_times(*shape, device=device, generator=generator)
        return drawn

    def noisy(self, clean: Tensor, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
        """Times of that shape, noise, and the data with it."""
        generator = None
        if not self.training:
            generator = torch.Generator(clean.device).manual_seed(0)
        t = self.times(shape, clean.device, generator)
        eps = torch.randn(clean.shape, device=clean.device, generator=generator)
        return t, eps, add_noise(self.model.schedule, clean, eps, t)

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        t, eps, noisy = self.noisy(images, len(images))
        output = self.model(noisy, t, labels)
        if not self.model.config.learn_sigma:
            return diffusion_loss(output, images, eps, t, self.model.schedule), {}
        output, variance = output.chunk(2, dim=1)
        squares = diffusion_loss(output, images, eps, t, self.model.schedule)
        bound = variance_bound(output, variance, images, noisy, t, self.model.schedule).mean()
        return squares + bound, {"mse": squares.detach(), "bound": bound.detach()}


class BlockDiffusionTask(DiffusionTask):
    """Noise prediction of all blocks in one pass, each at a time of its own."""

    family = "block-diffusion"

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        clean = self.model.to_blocks(images)
        t, eps, noisy = self.noisy(clean, *clean.shape[:2])
        return diffusion_loss(self.model(clean, noisy, t, labels), clean, eps, t, self.model.schedule), {}


class FrameDiffusionTask(DiffusionTask):
    """What the model predicts of all frames of a video in one pass, at times that it draws for them together."""

    family = "frame-diffusion"

    def times(
        self, shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None
    ) -> Tensor:
        drawn: Tensor = self.model.training_times(shape[0], generator)
        return drawn

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        clean = self.model.to_frames(images)
        t, eps, noisy = self.noisy(clean, *clean.shape[:2])
        prediction = partial(diffusion_loss, prediction=self.model.prediction)
        inputs = (self.model(noisy, t, labels), clean, eps, t, self.model.schedule)
        weight = self.weights(t)
        if weight is None:
            return prediction(*inputs), {}
        return prediction(*inputs, weight=weight), {"mse": prediction(*inputs).detach()}

    def weights(self, t: Tensor) -> Tensor | None:
        """How much the error of each frame counts; None where all count alike."""
        config: Any = self.model.config
        kind = getattr(config, "loss_weight", "uniform")
        if kind == "uniform":
            return None
        options: dict[str, Any] = {"prediction": self.model.prediction, "snr_clip": config.snr_clip}
        if kind == "min_snr":
            return min_snr_weights(t, self.model.schedule, **options)
        # The decay is that of one frame of the data.
        decay = config.snr_decay**config.frame_stack
        return fused_snr_weights(t, self.model.schedule, decay=decay, **options)


class MaskedAutoregressiveTask(ZooTask):
    """A diffusion head on what a transformer makes of some of the tokens.

    Evaluation hides the same places and draws the same times and noise for every batch and every model.
    """

    family = "masked-autoregressive"
    model: Any

    @classmethod
    def overrides(cls, data: ImageDataset) -> dict[str, Any]:
        return {"num_classes": len(data.class_names)}

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = self.model.to_tokens(images)
        device = tokens.device
        generator = None if self.training else torch.Generator(device).manual_seed(0)
        visible, masked = draw_visible(*tokens.shape[:2], device=device, generator=generator)
        rows = torch.arange(len(tokens), device=device)[:, None]
        z = self.model(tokens, visible, labels)[rows, masked]
        squares, bound = diffusion_head_loss(
            self.model.head, tokens[rows, masked].flatten(0, 1), z.flatten(0, 1), generator=generator
        )
        if bound is None:
            return squares, {}
        return squares + bound, {"mse": squares.detach(), "bound": bound.detach()}


class LanguageTask(ZooTask):
    """Cross entropy of the next token of a text.

    Whenever the held-out text is evaluated, `sample.txt` in the run folder receives a few lines by the model.

    Attributes:
        text_tokenizer: of the tokens.
        bytes_per_token: of the held-out text in evaluation mode and of the training text in training mode.
    """

    family = "language"
    reads_text = True
    sampler_type: ClassVar[type[StreamSampler]] = RandomStream
    SAMPLE = "sample.txt"
    model: Any

    def __init__(
        self,
        config: TrainConfig,
        networks: Mapping[str, nn.Module],
        facts: Mapping[str, Any],
        text_tokenizer: TextTokenizer | None = None,
        bytes_per_token: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        super().__init__(config, networks, facts)
        self.text_tokenizer = text_tokenizer or ByteTokenizer()
        self._bytes_per_token = bytes_per_token

    @property
    def bytes_per_token(self) -> float:
        return self._bytes_per_token[0 if self.training else 1]

    def files(self) -> dict[str, str]:
        content = self.text_tokenizer.json()
        return {} if content is None else {FILE: content}

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.model(images)[..., : self.model.vocab_size]
        loss = cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return loss, {"bits_per_byte": loss.detach() / (math.log(2) * self.bytes_per_token)}

    def on_validation_epoch_end(self) -> None:
        if self.trainer.is_global_zero:
            ids, _ = self.test_data[0]
            prompt = ids[:32].to(self.device)
            new = generate(self.model, prompt.unsqueeze(0), max_new_tokens=400, temperature=0.8).ids[0]
            text = self.text_tokenizer.decode(prompt.tolist()) + self.text_tokenizer.decode(new.tolist())
            with atomic_path(Path(self.trainer.default_root_dir) / self.SAMPLE) as temporary:
                temporary.write_text(f"step {self.step}\n\n{text}\n", encoding="utf-8")


TASKS: dict[str, type[ZooTask]] = {
    task.family: task
    for task in (
        TokenizerTask,
        NextScaleTask,
        NextClusterTask,
        DiffusionTask,
        BlockDiffusionTask,
        FrameDiffusionTask,
        MaskedAutoregressiveTask,
        ClassifierTask,
        LanguageTask,
    )
}


def task_for(preset: str) -> type[ZooTask]:
    """The task that trains a preset.

    Raises:
        ValueError: unknown preset, or nothing trains its family.
    """
    family = (model_info(preset).recipe or "").replace("_", "-")
    if family not in TASKS:
        raise ValueError(
            f"{preset} cannot be trained here: there is no task for its family {family!r}, "
            f"only for {', '.join(TASKS)}"
        )
    return TASKS[family]
