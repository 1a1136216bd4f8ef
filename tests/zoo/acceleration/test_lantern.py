"""LANTERN: the contract of a lossy decoder, whose distance from plain sampling is bounded for one chosen draft."""

from __future__ import annotations

import torch
from torch import Tensor

import arcore
from arcore.catalog.claims import shaken
from arcore.decoding import ModelDrafter, Sampling, generate
from arcore.decoding.laws import small_model, text_law
from arcore.ops import verify_relaxed
from arcore.ops.speculative import codebook_neighbours
from arcore.zoo.acceleration.lantern import decode_image, relaxed_target


class Contract:
    """The next token when one token is proposed."""

    bound = 0.2

    def __init__(self) -> None:
        self.law = text_law(small_model(5), [1, 2], 1, Sampling())
        self.near = codebook_neighbours(torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), 4)

    def draw(self, count: int, seed: int) -> tuple[Tensor, int]:
        p = self.law.float().expand(count, 2, 5).contiguous()
        drafts = torch.full((count, 1), int(self.law.argmax()))
        seeds = torch.arange(count) + seed * 1_000_003
        out = verify_relaxed(p, drafts, self.near, seed=seeds, offset=0, delta=self.bound)
        return out.tokens[:, 0], count

    def plain_calls(self, count: int) -> int:
        return count


def test_the_relaxed_target_is_what_the_op_verifies_with() -> None:
    torch.manual_seed(0)
    p = torch.randn(6).softmax(-1)
    near = codebook_neighbours(torch.randn(6, 2), 3)
    target = relaxed_target(p, near, 0.3)
    torch.testing.assert_close(target.sum(-1), torch.ones(6))
    count = 40_000
    for draft in range(6):
        out = verify_relaxed(
            p.expand(count, 2, 6).contiguous(),
            torch.full((count, 1), draft),
            near,
            seed=torch.arange(count),
            offset=0,
            delta=0.3,
        )
        found = torch.bincount(out.tokens[:, 0], minlength=6) / count
        assert (found - target[draft]).abs().max() < 0.015


def test_images_with_delta_zero_are_those_of_plain_decoding() -> None:
    model = shaken(arcore.create_model("llamagen_tiny")).eval()
    drafter = ModelDrafter(shaken(arcore.create_model("llamagen_tiny"), seed=5).eval(), count=3)
    drafter.sampling = Sampling(temperature=0.0)
    prompt, codebook = model.prompt(torch.tensor([3, 10])), torch.randn(4, 2)
    out = decode_image(model, drafter, codebook, prompt, side=8, delta=0.0, seed=2)
    assert torch.equal(out.ids, generate(model, prompt, max_new_tokens=64, seed=2).ids)
    loose = decode_image(model, drafter, codebook, prompt, side=8, delta=0.5, seed=2)
    assert loose.tokens_per_round >= out.tokens_per_round
    pp = decode_image(model, drafter, codebook, prompt, side=8, delta=3.0, multiplicative=True, seed=2)
    assert pp.ids.shape == (2, 64)
