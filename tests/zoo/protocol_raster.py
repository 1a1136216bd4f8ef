"""How the model contract drives systems of the recipe `raster`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.decoding import generate


class Protocol:
    """Codes in raster order, given a class."""

    def __init__(self, preset: str) -> None:
        self.config = arcore.models.get_config(preset)
        self.length = self.config.side**2
        self.codes = torch.randint(self.config.vocab_size, (3, self.length))
        self.labels = torch.tensor([0, self.config.num_classes - 1, self.config.num_classes])

    def forward(self, model: Any) -> Tensor:
        return model(self.codes, self.labels)

    def expected_shape(self) -> tuple[int, ...]:
        return (3, self.length, self.config.vocab_size)

    def loss(self, model: Any) -> Tensor:
        return F.cross_entropy(self.forward(model).flatten(0, 1), self.codes.flatten())

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        prompt = model.prompt(self.labels)
        cache = model.make_cache(3, prompt.shape[1] + self.length)
        parts = [model.prefill(prompt, cache)]
        parts += [model.step(self.codes[:, i], cache) for i in range(self.length - 1)]
        return self.forward(model), torch.stack(parts, dim=1)

    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        prompt = model.prompt(self.labels[rows])
        seeds = [7 + r for r in rows]
        out = generate(model.guided(1.5), prompt, max_new_tokens=self.length, top_k=3, seed=seeds)
        return [out.ids], model(out.ids, self.labels[rows]).softmax(-1)
