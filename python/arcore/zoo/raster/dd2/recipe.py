"""How a one-step generator is distilled and drawn from."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import Dataset

from arcore.catalog import load_checkpoint
from arcore.data.identity import place
from arcore.nn.kinds import check_kinds
from arcore.recipes._images import PictureOptions, PictureRecipe
from arcore.recipes._recipe import Start, Work, ZooTask
from arcore.training import checkpoint
from arcore.training.checkpoint import read_meta
from arcore.training.checks import number
from arcore.training.config import TrainConfig
from arcore.zoo.raster.dd2.model import distil_losses, flow_pairs, mean_code, nearest, raster_teacher
from arcore.zoo.raster.llamagen import LlamaGen, LlamaGenConfig

# Pairs of noise and codes that are made at a time.
_AT_ONCE = 256


@check_kinds
@dataclass(frozen=True, kw_only=True)
class DistilOptions:
    """The teacher and the start.

    Attributes:
        teacher: run folder or checkpoint of a raster model, e.g. of `arcore train llamagen_tiny`.
        cfg: guidance of the teacher that is distilled; 1 is none.
        pairs: images of the teacher's flow that the generator learns first.
        start_steps: steps of that start; the scores are distilled in the steps behind it.
    """

    teacher: Path | None = None
    cfg: float = 2.0
    pairs: int = 2048
    start_steps: int = 300

    def __post_init__(self) -> None:
        if self.teacher is None:
            raise ValueError(
                "say what is distilled with --teacher FOLDER, a run of `arcore train llamagen_tiny`"
            )
        number("pairs", self.pairs, whole=True, least=1)
        number("start_steps", self.start_steps, whole=True, least=0)


class FlowPairs(Dataset[tuple[Tensor, int]]):
    """Noise and the code vectors that the teacher's flow makes of it, `[2, L, c]`, with classes."""

    def __init__(self, pairs: Tensor, labels: Tensor) -> None:
        self.pairs, self.labels = pairs, labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pairs[index], self.labels[index]


class DistilTask(ZooTask):
    """First the flow's own pairs and the teacher's mean codes; then the difference of the scores."""

    model: Any
    guidance: Any

    def __init__(
        self,
        config: TrainConfig,
        networks: Mapping[str, nn.Module],
        facts: Mapping[str, Any],
        teacher: LlamaGen,
        options: DistilOptions,
    ) -> None:
        super().__init__(config, networks, facts)
        networks["tokenizer"].requires_grad_(False)
        # In a list, so that the frozen teacher is neither trained nor saved.
        self._teacher = [teacher.eval().requires_grad_(False)]
        self._options = options
        self._codebook = networks["tokenizer"].codebook().detach()  # type: ignore[operator]

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        teacher, codebook = self._teacher[0].to(images.device), self._codebook.to(images.device)
        noise, codes = images.unbind(1)
        ask = raster_teacher(teacher, codebook, self._options.cfg)
        made = self.model(noise, labels)
        pairs = mse_loss(made, codes)
        hits = (nearest(made, codebook) == nearest(codes, codebook)).float().mean()
        figures = {"pairs": pairs.detach(), "same_codes": hits}
        if self.step < self._options.start_steps or not self.training:
            # The guidance network learns the teacher's mean codes, given codes of the teacher.
            t = 0.02 + 0.98 * torch.rand(*codes.shape[:2], 1, device=codes.device)
            noisy = (1 - t) * codes + t * torch.randn_like(codes)
            wanted = mean_code(noisy, t, ask(codes, labels), codebook)
            guide = mse_loss(self.guidance.denoise(codes, noisy, t, labels), wanted)
            return pairs + guide, figures | {"guide": guide.detach()}
        losses = distil_losses(self.model, self.guidance, ask, codebook, labels)
        return losses.generator + losses.guidance, figures | {"guide": losses.guidance.detach()}


class Distil(PictureRecipe):
    """A one-step generator from a raster model."""

    defaults: ClassVar[TrainConfig] = TrainConfig(
        steps=600, batch_size=32, lr=1e-3, clip=1.0, weight_decay=0.0, checkpoint_every=100
    )
    options: ClassVar[type] = DistilOptions
    sampling: ClassVar[type | None] = PictureOptions
    movable: ClassVar[tuple[str, ...]] = ("teacher",)

    def prepare(self, start: Start, options: Any) -> Work:
        networks, facts = load_checkpoint(checkpoint.find(options.teacher))
        teacher, tokenizer = networks.get("model"), networks.get("tokenizer")
        if not isinstance(teacher, LlamaGen) or tokenizer is None:
            raise ValueError(
                f"{options.teacher} holds no raster image model: train one with `arcore train llamagen_tiny`"
            )
        codebook = tokenizer.codebook().detach()  # type: ignore[operator]
        mine = dict(start.networks)
        if not mine:
            fields = {name: getattr(teacher.config, name) for name in LlamaGenConfig.__dataclass_fields__}
            for name in ("model", "guidance"):
                network: Any = start.fresh(**fields, code_channels=codebook.shape[1])
                if start.init_from is None:
                    network.start_from(teacher)
                mine[name] = network
            mine["tokenizer"] = tokenizer
        start.say(f"the teacher draws {options.pairs} images along its flow first")
        generator = torch.Generator().manual_seed(start.config.seed)
        labels = torch.randint(teacher.null_class, (options.pairs,), generator=generator)
        parts = [
            torch.stack(flow_pairs(teacher.eval(), codebook, part, cfg=options.cfg, seed=number), 1)
            for number, part in enumerate(labels.split(_AT_ONCE))
        ]
        about = {
            "preset": start.preset,
            "teacher": place(options.teacher),
            "data": facts.get("data"),
            "class_names": facts.get("class_names"),
        }
        task = DistilTask(start.config, mine, about, teacher, options)
        return Work(task, FlowPairs(torch.cat(parts), labels), None)

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        label = str((read_meta(checkpoint).get("class_names") or ["0"])[0])
        words = [
            "arcore",
            "sample",
            str(out),
            "--class",
            label,
            "-n",
            "16",
            "--out",
            str(out / "samples.png"),
        ]
        return [f"draw images, each in one call: {shlex.join(words)}"]

    def draw(self, networks: Mapping[str, Any], labels: Tensor, options: Any) -> Tensor:
        tokenizer = networks["tokenizer"]
        vectors = networks["model"].generate(labels, seed=options.seed)
        images: Tensor = tokenizer.decode(nearest(vectors, tokenizer.codebook()))
        return images


RECIPE = Distil()
