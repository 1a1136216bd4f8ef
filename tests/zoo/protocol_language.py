"""How the model contract drives systems of the recipe `language`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.decoding import generate


class Protocol:
    """Models that predict one token after the other."""

    def __init__(self, preset: str) -> None:
        self.config = arcore.models.get_config(preset)
        self.ids = torch.randint(self.config.vocab_size, (3, 24))

    def forward(self, model: Any) -> Tensor:
        return model(self.ids)

    def expected_shape(self) -> tuple[int, ...]:
        return (3, 24, self.config.vocab_size)

    def loss(self, model: Any) -> Tensor:
        return F.cross_entropy(self.forward(model)[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten())

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        cache = model.make_cache(3, 24)
        steps = [model.prefill(self.ids[:, :6], cache)]
        steps += [model.step(self.ids[:, i], cache) for i in range(6, 24)]
        return self.forward(model)[:, 5:], torch.stack(steps, dim=1)

    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        """New tokens of prompts of different lengths, and what the model expects after each row."""
        prompts = [self.ids[r, : 3 + 4 * r].tolist() for r in rows]
        out = generate(model, prompts, max_new_tokens=9, top_k=50, top_p=0.95, seed=[7 + r for r in rows])
        whole = [model(torch.tensor([[*p, *new]])) for p, new in zip(prompts, out.rows(), strict=True)]
        return [out.ids], torch.stack([logits[0, -1].softmax(-1) for logits in whole])
