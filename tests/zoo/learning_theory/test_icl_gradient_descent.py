"""Linear attention against gradient descent, written twice, and what `arcore run` shows of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from arcore.cli import main
from arcore.zoo.learning_theory.icl_gradient_descent import (
    FullLayer,
    LinearAttention,
    Options,
    draw_tasks,
    gradient_descent,
    sensitivity_cosine,
    tuned,
)


def some_tasks(count: int = 32):
    return draw_tasks(count, dim=6, context=9, generator=torch.Generator().manual_seed(0))


def test_gradient_descent_is_autograds():
    x, y = some_tasks(4)
    w = torch.zeros(4, 6, dtype=torch.float64, requires_grad=True)
    for eta in (0.5, 1.0):
        errors = (x[:, :-1] @ w[..., None]).squeeze(-1) - y[:, :-1]
        [grad] = torch.autograd.grad(errors.square().mean(1).sum() / 2, w)
        w = (w - eta * grad).detach().requires_grad_()
    expected = (w * x[:, -1]).sum(-1)
    assert (gradient_descent(x, y[:, :-1], (0.5, 1.0)) - expected).abs().max() < 1e-14


@torch.no_grad()
def test_the_full_layer_with_the_papers_matrices_is_one_step():
    tasks = some_tasks()
    layer = FullLayer(6, torch.Generator().manual_seed(0)).double()
    layer.keys_queries.copy_(torch.diag(torch.tensor([1.0] * 6 + [0.0])))
    layer.values.zero_()
    layer.values[-1, -1] = -0.7
    expected = gradient_descent(tasks.x, tasks.y[:, :-1], [0.7])
    assert (layer(tasks.x, tasks.y[:, :-1]) - expected).abs().max() < 1e-14


@torch.no_grad()
def test_moving_x_changes_the_second_layer_only():
    tasks = some_tasks()
    inputs = (tasks.x, tasks.y[:, :-1])
    assert torch.equal(LinearAttention([0.5], [0.3])(*inputs), LinearAttention([0.5])(*inputs))
    moved = LinearAttention([0.5, 0.5], [0.3, 0.0])(*inputs)
    assert (moved - LinearAttention([0.5, 0.5])(*inputs)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="expected a step size per layer"):
        LinearAttention([0.5, 0.5], [0.3])


def test_tuning_gets_better_with_depth():
    tasks = some_tasks(512)
    for moving in (False, True):
        losses = []
        for model in tuned(3, tasks, moving=moving, count=20):
            with torch.no_grad():
                losses.append((model(tasks.x, tasks.y[:, :-1]) - tasks.y[:, -1]).square().mean().item())
        assert losses[0] > losses[1] > losses[2]


def test_a_predictor_is_as_sensitive_as_itself():
    tasks = some_tasks()
    one, other = LinearAttention([0.5]), LinearAttention([0.5] * 4)
    assert sensitivity_cosine(one, one, tasks) == pytest.approx(1.0)
    assert sensitivity_cosine(one, other, tasks) < 0.999


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    where = ["--json", str(tmp_path / "found.json"), "--figure", str(tmp_path / "figure.png")]
    small = ["--dim", "4", "--context", "6", "--layers", "2", "--steps", "30", "--tasks", "500"]
    assert main(["run", "icl_gradient_descent", *small, *where]) == 0
    assert "trained layer" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "found.json").read_text())["moving"]) == 2
    assert (tmp_path / "figure.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="--layers must be at least 1 but got 0"):
        Options(layers=0)
