"""Surplus, entropies and eigenspaces beside sums written out, and what `arcore run` shows of a model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from arcore.catalog import save_checkpoint
from arcore.cli import main
from arcore.decoding.laws import small_model
from arcore.zoo.learning_theory.markov_categories.geometry import (
    categorical_entropy,
    head_metric,
    law_kernel,
    polar_states,
    spectral_alignment,
    spectrum,
    train_states,
)
from arcore.zoo.learning_theory.markov_categories.study import Options
from arcore.zoo.learning_theory.markov_categories.surplus import (
    chain_of_three,
    chain_surplus,
    draw_chain,
    layer_states,
    surplus,
)


def test_entropies_of_laws_with_impossible_tokens():
    law = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64)
    logits = law.log()
    assert categorical_entropy(logits).item() == pytest.approx(1.5 * math.log(2))
    assert categorical_entropy(logits, "tv").item() == pytest.approx(1 - 0.375)
    assert categorical_entropy(logits, "chi2").item() == 2
    assert categorical_entropy(logits, "renyi", alpha=0.5).item() == pytest.approx(
        -2 * math.log(0.5**1.5 + 2 * 0.25**1.5)
    )
    # Order 1 is the limit on both sides.
    for alpha in (0.9999, 1.0001):
        near = categorical_entropy(logits, "renyi", alpha=alpha).item()
        assert near == pytest.approx(1.5 * math.log(2), abs=1e-3)
    with pytest.raises(ValueError, match="not 1 but got 1"):
        categorical_entropy(logits, "renyi", alpha=1)
    with pytest.raises(ValueError, match=r"divergence .* but got 'js'"):
        categorical_entropy(logits, "js")  # type: ignore[arg-type]


def test_the_metric_is_the_covariance_of_the_output_vectors():
    weight = torch.randn(7, 3, dtype=torch.float64)
    probs = torch.randn(5, 7, dtype=torch.float64).softmax(-1)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for p in probs:
        expected += weight.T @ (p.diag() - p.outer(p)) @ weight / 5
    metric = head_metric(weight, probs)
    assert (metric - expected).abs().max() < 1e-12
    found = spectrum(metric)
    assert (found.directions @ found.values.diag() @ found.directions.T - metric).abs().max() < 1e-12
    assert 1 <= found.effective_rank <= 3
    # A law of three tokens has rank two.
    assert (
        spectrum(head_metric(torch.randn(3, 5, dtype=torch.float64), probs[:1, :3].softmax(-1))).values[2]
        < 1e-12
    )


def test_kernels_and_overlaps():
    logs = torch.randn(12, 6, dtype=torch.float64).log_softmax(-1)
    for name in ("log", "bc", "linear"):
        kernel = law_kernel(logs, name)
        assert kernel.sum(0).abs().max() < 1e-12
    # Logits that are linear in the states span the log kernel's eigenspace.
    states = torch.randn(30, 3, dtype=torch.float64)
    laws = (states @ torch.randn(3, 9, dtype=torch.float64)).log_softmax(-1)
    assert spectral_alignment(states, laws) == pytest.approx(1.0)
    chance = sum(spectral_alignment(torch.randn(30, 3, dtype=torch.float64), laws) for _ in range(200)) / 200
    assert chance == pytest.approx(3 / 29, abs=0.03)
    with pytest.raises(ValueError, match="a law for each of 30 states but got 12"):
        spectral_alignment(states, logs)
    with pytest.raises(ValueError, match="below the number of contexts 30, but got 30"):
        spectral_alignment(states, laws, rank=30)
    with pytest.raises(ValueError, match="kernel"):
        law_kernel(logs, "rbf")  # type: ignore[arg-type]


def test_the_polar_factor_agrees_more_than_other_whitened_states():
    prototypes = torch.randn(20, 3, dtype=torch.float64)
    best = polar_states(prototypes)
    assert (best.T @ best - 20 * torch.eye(3)).abs().max() < 1e-10
    centred = prototypes - prototypes.mean(0)
    for _ in range(50):
        other = polar_states(torch.randn(20, 3, dtype=torch.float64))
        assert (best * centred).sum() >= (other * centred).sum()


def test_training_aligns_states_only_as_it_goes_on():
    course = train_states(30, 12, 2, count=300).course
    assert course[0][0] == 0
    assert course[-1][0] == 300
    assert course[-1][1]["log"] > 0.9 > course[0][1]["log"]


def test_the_surplus_of_a_chain_and_of_states_that_know_nothing():
    chain = chain_of_three(3, seed=5)
    exact = chain_surplus(chain)
    # The same from counts of a long text.
    text = draw_chain(chain, 400, 300, seed=1)
    places = (text[:, :-3] * 3 + text[:, 1:-2]) * 9 + text[:, 2:-1] * 3 + text[:, 3:]
    joint = torch.bincount(places.flatten(), minlength=81).view(9, 3, 3).double()
    joint /= joint.sum()
    wide = -(joint * (joint / joint.sum(2, keepdim=True)).log()).nansum()
    narrow = joint.sum(0)
    counted = -(narrow * (narrow / narrow.sum(1, keepdim=True)).log()).sum() - wide
    assert exact == pytest.approx(float(counted), abs=0.01)
    ids = draw_chain(chain, 60, 40, seed=2)
    nothing = surplus(torch.randn(60, 40, 8), ids, torch.eye(3), horizon=3, count=100)
    assert abs(nothing.total) < 4 * nothing.error + 0.02
    assert len(nothing.by_offset) == 2
    again = surplus(torch.zeros(60, 40, 8), ids, torch.eye(3), horizon=2, count=60)
    assert again.total == pytest.approx(0.0, abs=1e-5)


def test_what_the_surplus_refuses():
    ids, words = torch.zeros(8, 10, dtype=torch.int64), torch.eye(3)
    with pytest.raises(ValueError, match=r"a state for every token, \[P, L, C\] for ids \[8, 10\]"):
        surplus(torch.zeros(8, 9, 2), ids, words)
    with pytest.raises(ValueError, match="at least 6 pieces of more than 3 tokens but got 5 of 10"):
        surplus(torch.zeros(5, 10, 2), ids[:5], words)
    with pytest.raises(ValueError, match="horizon"):
        surplus(torch.zeros(8, 10, 2), ids, words, horizon=1)
    with pytest.raises(ValueError, match="NaN or infinite"):
        surplus(torch.full((8, 10, 2), math.nan), ids, words)
    with pytest.raises(TypeError, match="`embedding`, `layers` and `hidden` but got Linear"):
        layer_states(torch.nn.Linear(2, 2), ids)


def test_states_of_layers_are_those_that_the_next_layer_reads():
    model = small_model(7, layers=3)
    ids = torch.randint(7, (5, 6))
    states = layer_states(model, ids, batch=2)
    assert len(states) == 4
    assert torch.equal(states[0], model.embedding(ids))
    visible, angles = model.behind((0,), 6, ids.device)
    x = model.embed(ids)
    for layer, state in zip(model.layers[:2], states[1:], strict=False):
        x = layer(x, angles, visible)
        torch.testing.assert_close(x, state)
    torch.testing.assert_close(model.hidden(ids), states[3])
    assert not any(layer._forward_hooks for layer in model.layers)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model: Any = small_model(256)
    save_checkpoint(tmp_path / "model", {"model": model}, {"text_tokenizer": "bytes"})
    (tmp_path / "text.txt").write_text("In the beginning God created the heaven and the earth. " * 200)
    small = ["--length", "20", "--layers", "2", "--rank", "4", "--probe-steps", "5"]
    asked = [
        "run",
        "markov_categories",
        "--checkpoint",
        str(tmp_path / "model"),
        "--data",
        str(tmp_path / "text.txt"),
    ]
    where = ["--json", str(tmp_path / "found.json"), "--figure", str(tmp_path / "figure.png")]
    assert main([*asked, *small, "--pieces", "12", *where]) == 0
    assert "after layer 2" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["depths"] == [0, 2]
    assert len(found["surplus"]) == 2
    assert (tmp_path / "figure.png").stat().st_size > 5000
    assert main([*asked, *small, "--pieces", "5000"]) == 2
    assert "--pieces asks for 5000" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--length must be above --horizon 5 but got 4"):
        Options(checkpoint="x", length=4, horizon=5)
