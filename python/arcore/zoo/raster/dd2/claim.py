"""Distilled Decoding 2's claim: the score in closed form, and two tokens that must be equal."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore.catalog.claims import Claim, Row, at_least, at_most, steps
from arcore.decoding import generate
from arcore.zoo.raster._digits import accuracy, digit_codes, level_images, train_classifier, train_raster
from arcore.zoo.raster.dd2.model import (
    OneStepCodes,
    OneStepConfig,
    distil_losses,
    flow_pairs,
    mean_code,
    nearest,
    raster_teacher,
    teacher_score,
)
from arcore.zoo.raster.llamagen import LlamaGenConfig


def score_error(places: int) -> float:
    """Largest difference of the closed form, in float32, from the log-density's gradient, relative to its size."""
    codebook = torch.randn(32, 8)
    log_probs = torch.randn(places, 32).log_softmax(-1)
    t = 0.05 + 0.95 * torch.rand(places, 1)
    x = (1 - t) * codebook[torch.randint(32, (places,))] + t * torch.randn(places, 8)
    ours = teacher_score(x, t, log_probs, codebook)
    leaf, time = x.double().requires_grad_(), t.double()
    apart = (leaf.unsqueeze(1) - (1 - time).unsqueeze(1) * codebook.double()).square().sum(-1)
    density = (log_probs.double() - apart / (2 * time**2)).logsumexp(-1)
    (theirs,) = torch.autograd.grad(density.sum(), leaf)
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=1)).max())


def tied_pairs(vectors: Tensor, labels: Tensor) -> Tensor:
    """A teacher of two tokens that are equal, each pair as likely: log-probabilities `[B, 2, 2]`."""
    codes = nearest(vectors, torch.tensor([[-1.0], [1.0]]))
    first = torch.full((len(vectors), 1, 2), 0.5)
    second = torch.nn.functional.one_hot(codes[:, :1], 2).float()
    return torch.cat([first, second], 1).clamp(min=1e-6).log()


class Pairs(OneStepCodes):
    """The network on sequences of two."""

    def __init__(self) -> None:
        super().__init__(
            OneStepConfig(
                dim=32,
                num_layers=1,
                num_heads=2,
                vocab_size=2,
                side=2,
                num_classes=1,
                multiple_of=32,
                code_channels=1,
                head_dim=64,
            )
        )
        self.max_length = 2


def distil_pairs(count: int, batch: int = 128) -> tuple[float, float, float]:
    """Share of pairs that the teacher never gives, before and after distilling, and the share of the pair (1, 1)."""
    generator, guidance = Pairs(), Pairs()  # type: ignore[abstract]
    codebook, labels = torch.tensor([[-1.0], [1.0]]), torch.zeros(batch, dtype=torch.int64)
    optimizers = [
        torch.optim.Adam(net.parameters(), lr=2e-3, betas=(0.5, 0.9)) for net in (generator, guidance)
    ]

    @torch.no_grad()
    def drawn() -> Tensor:
        made = generator(torch.randn(4000, 2, 1), torch.zeros(4000, dtype=torch.int64))
        return nearest(made, codebook)

    before = drawn()
    for step in steps(count, "distilling two tokens"):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / count)
        losses = distil_losses(generator, guidance, tied_pairs, codebook, labels)
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    after = drawn()
    both = float((after == 1).all(1).float().mean())
    return *(float((x[:, 0] != x[:, 1]).float().mean()) for x in (before, after)), both  # type: ignore[return-value]


def distil_digits(count: int) -> tuple[float, float]:
    """Share of digits of four grey levels that an independent classifier takes for their class, drawn by a raster
    model code by code, and by a generator distilled from it in one call."""
    teacher = train_raster(2 * count)
    codebook = torch.tensor([[-1.0], [-1 / 3], [1 / 3], [1.0]])
    fields = {name: getattr(teacher.config, name) for name in LlamaGenConfig.__dataclass_fields__}
    config = OneStepConfig(**fields, code_channels=1, head_dim=64)
    nets: list[Any] = [OneStepCodes(config) for _ in range(2)]  # type: ignore[abstract]
    generator, guidance = nets
    for net in nets:
        net.start_from(teacher)
    optimizers = [torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.5, 0.95)) for net in nets]
    labels = torch.arange(10).repeat(100)
    noise, codes = flow_pairs(teacher, codebook, labels, cfg=1.5, seed=0)
    ask = raster_teacher(teacher, codebook, cfg=1.5)
    for step in steps(count, "distilling digits"):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / count)
            optimizer.zero_grad()
        rows = torch.randint(len(labels), (32,))
        if step < count // 2:
            # The start: the flow's own pairs, and the teacher's mean codes for the guidance network.
            made = generator(noise[rows], labels[rows])
            t = 0.02 + 0.98 * torch.rand(32, codes.shape[1], 1)
            noisy = (1 - t) * codes[rows] + t * torch.randn_like(codes[rows])
            wanted = mean_code(noisy, t, ask(codes[rows], labels[rows]), codebook)
            seen = guidance.denoise(codes[rows], noisy, t, labels[rows])
            loss = F.mse_loss(made, codes[rows]) + F.mse_loss(seen, wanted)
        else:
            losses = distil_losses(generator, guidance, ask, codebook, labels[rows])
            loss = losses.generator + losses.guidance
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    train, classes = digit_codes("train")
    judge = train_classifier(level_images(train), classes, classes=10)
    asked = torch.arange(10).repeat(20)
    drawn = generate(teacher.guided(1.5), teacher.prompt(asked), max_new_tokens=64, seed=5).ids
    with torch.no_grad():
        made = nearest(generator.generate(asked, seed=5), codebook)
    return accuracy(judge, level_images(drawn), asked), accuracy(judge, level_images(made), asked)


def claim(*, quick: bool) -> Claim:
    """The score in closed form; in full also two tied tokens, and digits in one call beside the teacher's."""
    rows: tuple[Row, ...] = (
        at_most("error of the teacher's score in closed form, relative", score_error(200), 1e-5),
    )
    if quick:
        return Claim(rows)
    before, after, both = distil_pairs(800)
    teacher, student = distil_digits(600)
    return Claim(
        (
            *rows,
            at_least("pairs that the teacher never gives, before", before, 0.45),
            at_most("the same after distilling", after, 0.05),
            at_least("share of the pair (1, 1), at least", both, 0.4),
            at_most("share of the pair (1, 1), at most", both, 0.6),
            at_least("class accuracy of the teacher's digits", teacher, 0.8),
            at_least("class accuracy of digits in one call over the teacher's", student / teacher, 0.8),
        )
    )
