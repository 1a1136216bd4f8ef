"""Distilled Decoding 2: scores against autograd, the flow, causality, gradients that do not mix, the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import arcore
from arcore.catalog.claims import shaken
from arcore.cli import main
from arcore.zoo.raster.dd2.claim import distil_pairs, score_error
from arcore.zoo.raster.dd2.model import (
    OneStepCodes,
    distil_losses,
    flow_codes,
    flow_pairs,
    mean_code,
    nearest,
    raster_teacher,
    teacher_score,
)


class Protocol:
    """Noise to code vectors, given a class."""

    def __init__(self, preset: str) -> None:
        self.config = arcore.models.get_config(preset)
        self.noise = torch.randn(3, self.config.side**2, self.config.code_channels)
        self.labels = torch.tensor([0, 9, 10])

    def forward(self, model: Any) -> Tensor:
        return model(self.noise, self.labels)

    def expected_shape(self) -> tuple[int, ...]:
        return tuple(self.noise.shape)

    def loss(self, model: Any) -> Tensor:
        return (self.forward(model) - self.noise.roll(1, 1)).square().mean()

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        """Each place from the noise up to it alone."""
        parts = [model(self.noise[:, : i + 1], self.labels)[:, -1] for i in range(self.noise.shape[1])]
        return self.forward(model), torch.stack(parts, 1)

    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        made = model.generate(self.labels[rows], seed=[7 + r for r in rows])
        return [nearest(made, torch.eye(8))], made.clamp(-1, 1)


def test_score_and_mean_code_in_float64() -> None:
    assert score_error(100) <= 1e-5
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    log_probs = torch.randn(4, 7, generator=generator, dtype=torch.float64).log_softmax(-1)
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    t = torch.rand(4, 1, generator=generator, dtype=torch.float64) + 0.1
    weights = log_probs.exp() * torch.exp(
        -(x[:, None] - (1 - t)[:, None] * codebook).square().sum(-1) / (2 * t**2)
    )
    mean = (weights / weights.sum(-1, keepdim=True)) @ codebook
    torch.testing.assert_close(mean_code(x, t, log_probs, codebook), mean)
    torch.testing.assert_close(teacher_score(x, t, log_probs, codebook), -(x - (1 - t) * mean) / t**2)


def test_the_flow_draws_the_teachers_law() -> None:
    torch.manual_seed(0)
    codebook = torch.nn.functional.normalize(torch.randn(5, 4), dim=-1)
    law = torch.tensor([0.4, 0.3, 0.2, 0.07, 0.03])
    found = flow_codes(torch.randn(20_000, 4), law.log().expand(20_000, -1), codebook, steps=64)
    assert (torch.bincount(found, minlength=5) / 20_000 - law).abs().max() < 0.03


def test_gradients_do_not_mix_and_prefixes_are_fixed() -> None:
    make = {"side": 2, "dim": 32, "num_layers": 1, "code_channels": 3}
    generator, guidance = (shaken(arcore.create_model("dd2_tiny", **make), seed=s) for s in (1, 2))
    codebook, labels = torch.randn(6, 3), torch.tensor([1, 2])
    losses = distil_losses(
        generator, guidance, lambda x, y: torch.zeros(2, 4, 6).log_softmax(-1), codebook, labels
    )
    losses.generator.backward(retain_graph=True)
    assert all(p.grad is None for p in guidance.parameters())
    before = {name: p.grad.clone() for name, p in generator.named_parameters() if p.grad is not None}
    losses.guidance.backward()
    assert any(p.grad is not None for p in guidance.parameters())
    assert all(
        torch.equal(p.grad, before[name]) for name, p in generator.named_parameters() if name in before
    )


def test_teacher_pairs_follow_the_teacher() -> None:
    teacher: Any = shaken(arcore.create_model("llamagen_tiny", side=2, vocab_size=6, dim=32)).eval()
    codebook, labels = torch.nn.functional.normalize(torch.randn(6, 3), dim=-1), torch.arange(3)
    noise, codes = flow_pairs(teacher, codebook, labels, cfg=1.5, seed=4)
    again, same = flow_pairs(teacher, codebook, labels, cfg=1.5, seed=4)
    assert torch.equal(noise, again) and torch.equal(codes, same)
    log_probs = raster_teacher(teacher, codebook, 1.5)(codes, labels)
    expected = flow_codes(noise, log_probs, codebook)
    assert (nearest(codes, codebook) == expected).float().mean() > 0.9
    model: Any = arcore.create_model("dd2_tiny", side=2, dim=32, code_channels=3)
    model.start_from(teacher)
    fresh = torch.randn(3, 4, 3)
    assert torch.equal(model(fresh, labels), fresh)
    with pytest.raises(ValueError, match="the teacher has other layers"):
        arcore.create_model("dd2_tiny", side=2, dim=64).start_from(teacher)


@pytest.mark.slow
def test_tied_pairs_are_learned() -> None:
    torch.manual_seed(0)
    before, after, both = distil_pairs(500)
    assert before > 0.4
    assert after <= 0.05
    assert 0.4 <= both <= 0.6


def test_refuses_what_does_not_fit() -> None:
    model: Any = arcore.create_model("dd2_tiny", side=2)
    assert isinstance(model, OneStepCodes)
    with pytest.raises(ValueError, match=r"vectors of shape \[B, 1 to 4, 8\] but got \(1, 5, 8\)"):
        model(torch.zeros(1, 5, 8), torch.tensor([0]))
    with pytest.raises(ValueError, match="labels from 0 to 10"):
        model(torch.zeros(1, 4, 8), torch.tensor([11]))
    with pytest.raises(ValueError, match="a seed for each of 2 rows but got 1"):
        model.generate(torch.tensor([0, 1]), seed=[3])
    assert model.generate(torch.zeros(0, dtype=torch.int64)).shape == (0, 4, 8)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ("--steps", "2", "--batch-size", "32")
    base, run = str(tmp_path / "base"), str(tmp_path / "run")
    words = ["train", "llamagen_tiny", "--out", base, *quick, "--data", "digits", "--tokenizer-steps", "2"]
    assert main(words) == 0
    distil = ["train", "dd2_tiny", "--out", run, *quick, "--pairs", "8", "--start-steps", "1"]
    assert main([*distil, "--teacher", base]) == 0
    draw = ["sample", run, "--class", "3", "-n", "2", "--out", str(tmp_path / "a.png")]
    assert main(draw) == 0
    assert (tmp_path / "a.png").is_file()
    capsys.readouterr()
    other = ["train", "dd2_tiny", "--out", str(tmp_path / "x"), *quick]
    assert main(other) == 2
    assert "say what is distilled with --teacher FOLDER" in capsys.readouterr().err
    assert main([*other, "--teacher", str(tmp_path / "base" / "tokenizer")]) == 2
    assert "holds no raster image model" in capsys.readouterr().err
