"""SJD: the contract of a lossless decoder, and images."""

from __future__ import annotations

import torch
from torch import Tensor

import arcore
from arcore.catalog.claims import shaken
from arcore.decoding import Sampling, generate, jacobi, random_tokens
from arcore.decoding.laws import outcomes, small_model, text_law
from arcore.zoo.acceleration.sjd import decode_image


class Contract:
    """Texts of two tokens out of three."""

    bound = 0.0

    def __init__(self) -> None:
        self.model = small_model(3)
        self.law = text_law(self.model, [1, 2], 2, Sampling())

    def draw(self, count: int, seed: int) -> tuple[Tensor, int]:
        fill = random_tokens(3)
        out = jacobi(self.model, [[1, 2]] * count, max_new_tokens=2, window=2, initialiser=fill, seed=seed)
        return outcomes(out.ids, 3), int(out.rounds.sum())

    def plain_calls(self, count: int) -> int:
        return 2 * count


def test_an_image_has_all_codes_and_is_that_of_plain_decoding_with_common_numbers() -> None:
    model = shaken(arcore.create_model("llamagen_tiny")).eval()
    prompt = model.prompt(torch.tensor([3, 10]))
    out = decode_image(model, prompt, side=8, coupling="common", seed=2)
    assert torch.equal(out.ids, generate(model, prompt, max_new_tokens=64, seed=2).ids)
    assert out.calls < 64
    assert decode_image(model.guided(1.5), prompt, side=8).ids.shape == (2, 64)
