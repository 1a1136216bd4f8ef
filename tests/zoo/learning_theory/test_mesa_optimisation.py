"""The layer against loops over its definition, moments in closed form, and `arcore run`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from arcore.cli import main
from arcore.zoo.learning_theory.mesa_optimisation import (
    Contexts,
    LinearLayer,
    Options,
    best_product,
    draw_sequences,
    least_squares_product,
    loss,
    train,
)


def sequences(start: str = "gaussian", count: int = 5, length: int = 7, dim: int = 2, scale: float = 1.0):
    generator = torch.Generator().manual_seed(0)
    return draw_sequences(count, dim=dim, length=length, start=start, scale=scale, generator=generator)


@pytest.mark.parametrize("start", ["ones", "gaussian", "sparse"])
def test_states_follow_a_unitary_diagonal_map(start: str):
    x = sequences(start, scale=1.5)
    assert x.shape == (5, 7, 2)
    assert x.dtype == torch.complex128
    moved = x[:, 0].abs() > 0
    turn = (x[:, 1:] / x[:, :-1]).transpose(1, 2)[moved]
    assert (turn.abs() - 1).abs().max() < 1e-12
    assert (turn - turn[:, :1]).abs().max() < 1e-12
    assert x[:, 0].imag.abs().max() == 0
    if start == "sparse":
        assert moved.sum(1).tolist() == [1] * 5


def test_predictions_are_those_of_the_definition():
    x, dim = sequences(), 2
    layer = LinearLayer(dim, free=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.complex128))
    keys, values = layer.matrices()
    out = layer(Contexts(x))
    for row in range(len(x)):
        tokens = [torch.cat([x[row, 0], torch.zeros(dim)])]
        tokens += [torch.cat([x[row, t], x[row, t - 1]]) for t in range(1, 7)]
        for t in range(2, 7):
            context = torch.stack(tokens[:t], 1)
            expected = values @ context @ context.conj().T @ keys @ tokens[t - 1] / (t - 1)
            assert (out[row, t - 2] - expected).abs().max() < 1e-12


def test_least_squares_is_where_the_gradient_vanishes():
    contexts = Contexts(sequences(count=40))
    best = least_squares_product(contexts, 2)
    layer = LinearLayer(2, best / 0.5, 0.5)
    loss(layer, contexts).backward()
    assert layer.a.grad.abs() < 1e-10
    assert layer.b.grad.abs() < 1e-10
    assert layer.product() == pytest.approx(best)


@pytest.mark.parametrize(("start", "limit"), [("ones", 0.01), ("sparse", 1e-6), ("gaussian", 0.06)])
def test_the_closed_form_is_the_limit_of_much_data(start: str, limit: float):
    generator = torch.Generator().manual_seed(1)
    x = draw_sequences(20_000, dim=2, length=9, start=start, scale=0.7, generator=generator)
    assert least_squares_product(Contexts(x), 2) == pytest.approx(best_product(2, 9, start, 0.7), rel=limit)


def test_one_coordinate_is_learned_exactly():
    found = train(Options(dim=1, length=5, sequences=20, steps=400, lr=0.05))
    assert found.products[-1] == pytest.approx(1.0, abs=1e-6)
    assert found.error < 1e-10


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="--length must be at least 3 but got 2"):
        Options(length=2)
    with pytest.raises(ValueError, match="--scale must be a number above 0 but got 0"):
        Options(scale=0.0)
    with pytest.raises(
        ValueError, match="expected start to be one of 'ones', 'gaussian', 'sparse' but got 'zeros'"
    ):
        sequences("zeros")
    with pytest.raises(ValueError, match="at least 3 states"):
        Contexts(torch.ones(1, 2, 2, dtype=torch.complex128))
    with pytest.raises(ValueError, match="training diverged at --lr 100"):
        train(Options(sequences=10, steps=30, lr=100.0))


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    where = ["--json", str(tmp_path / "found.json"), "--figure", str(tmp_path / "figure.png")]
    assert (
        main(["run", "mesa_optimisation", "--sequences", "50", "--steps", "100", "--lr", "2e-3", *where]) == 0
    )
    assert "least squares on the data" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["product"] == pytest.approx(found["least_squares"], abs=1e-2)
    assert (tmp_path / "figure.png").stat().st_size > 5000
