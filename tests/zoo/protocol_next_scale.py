"""How the model contract drives systems of the recipe `next_scale`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import arcore
from arcore.catalog.claims import shaken
from arcore.decoding import generate_next_scale
from arcore.objectives import next_scale_loss


class Protocol:
    """Models that predict token maps scale by scale."""

    batch_size = 3

    def __init__(self, preset: str) -> None:
        [info] = [info for info in arcore.model_info(preset).presets if info.name == preset]
        self.tokenizer: Any = shaken(arcore.create_model(info.tokenizer)).eval()
        self.config = info.config
        self.indices = [torch.randint(self.config.vocab_size, (3, p * p)) for p in self.config.patch_nums]
        with torch.no_grad():
            self.inputs = self.tokenizer.scale_inputs(self.indices)
        self.labels = torch.tensor([0, self.config.num_classes - 1, self.config.num_classes])

    def forward(self, model: Any) -> Tensor:
        return model(self.inputs, self.labels)

    def expected_shape(self) -> tuple[int, ...]:
        return (3, sum(p * p for p in self.config.patch_nums), self.config.vocab_size)

    def loss(self, model: Any) -> Tensor:
        return next_scale_loss(self.forward(model), self.indices)

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        """The result of one pass and the same from steps."""
        cache, latent, parts = model.make_cache(3), self.tokenizer.empty_latent(3), []
        for k, codes in enumerate(self.indices):
            inputs = None if k == 0 else self.tokenizer.next_input(k - 1, latent)
            parts.append(model.scale_logits(k, inputs, self.labels, cache))
            latent = self.tokenizer.add_scale(k, codes, latent)
        return self.forward(model), torch.cat(parts, dim=1)

    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        """Codes and images of some rows; row i always has the same label and seed."""
        out = generate_next_scale(
            model,
            self.tokenizer,
            self.labels[rows],
            cfg_scale=1.0,
            top_k=50,
            top_p=0.95,
            seed=[7 + r for r in rows],
        )
        return out.indices, out.images
