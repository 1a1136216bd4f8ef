"""GPHT against a transcription of the released network in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.zoo.series.gpht import GPHT, GPHTConfig

SIZES: dict[str, Any] = {
    "context": 24,
    "patch": 8,
    "pools": (4, 1),
    "dim": 16,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 24,
}
CONFIG = GPHTConfig(**SIZES)


def published() -> dict[str, Tensor]:
    """Random weights under the released names."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {}
    for s, pool in enumerate(CONFIG.pools):
        first = f"encoders.{s}."
        shapes |= {
            f"{first}patch_embedding.value_embedding.weight": (16, 8 // pool),
            f"{first}patch_embedding.position_embedding.pe": (1, 5000, 16),
            f"{first}encoder.norm.weight": (16,),
            f"{first}encoder.norm.bias": (16,),
            f"{first}forecast_head.weight": (8, 16),
            f"{first}forecast_head.bias": (8,),
        }
        for i in range(2):
            layer = f"{first}encoder.attn_layers.{i}."
            for name in ("query", "key", "value", "out"):
                shapes[f"{layer}attention.{name}_projection.weight"] = (16, 16)
                shapes[f"{layer}attention.{name}_projection.bias"] = (16,)
            shapes |= {f"{layer}conv1.weight": (24, 16, 1), f"{layer}conv1.bias": (24,)}
            shapes |= {f"{layer}conv2.weight": (16, 24, 1), f"{layer}conv2.bias": (16,)}
            shapes |= {f"{layer}norm{n}.{part}": (16,) for n in (1, 2) for part in ("weight", "bias")}
    return {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}


def transcription(state: dict[str, Tensor], values: Tensor) -> Tensor:
    """The released network for one channel `[L]`, in float64."""
    w = {name: value.double() for name, value in state.items()}
    x = values.double()
    mean, std = x.mean(), (x.var(correction=0) + 1e-5).sqrt()
    x, total = (x - mean) / std, torch.zeros(len(x)).double()
    for s, pool in enumerate(CONFIG.pools):
        first = f"encoders.{s}."
        pooled = x.view(-1, pool).amax(1)
        h = pooled.view(-1, 8 // pool) @ w[f"{first}patch_embedding.value_embedding.weight"].T
        for p in range(len(h)):
            for c in range(0, 16, 2):
                angle = p * math.exp(-c * math.log(10000) / 16)
                h[p, c] += math.sin(angle)
                h[p, c + 1] += math.cos(angle)
        for i in range(2):
            layer = f"{first}encoder.attn_layers.{i}."

            def linear(x: Tensor, name: str, layer: str = layer) -> Tensor:
                weight = w[f"{layer}{name}.weight"]
                return x @ weight.view(weight.shape[:2]).T + w[f"{layer}{name}.bias"]

            q, k, v = (
                linear(h, f"attention.{n}_projection").view(-1, 2, 8) for n in ("query", "key", "value")
            )
            scores = torch.einsum("ihd,jhd->hij", q, k) / 8**0.5
            scores = scores.masked_fill(torch.ones(len(h), len(h)).triu(1).bool(), -math.inf)
            mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)
            norms = [(w[f"{layer}norm{n}.weight"], w[f"{layer}norm{n}.bias"]) for n in (1, 2)]
            h = F.layer_norm(h + linear(mixed, "attention.out_projection"), (16,), *norms[0])
            h = F.layer_norm(h + linear(F.gelu(linear(h, "conv1")), "conv2"), (16,), *norms[1])
        h = F.layer_norm(h, (16,), w[f"{first}encoder.norm.weight"], w[f"{first}encoder.norm.bias"])
        out = (h @ w[f"{first}forecast_head.weight"].T + w[f"{first}forecast_head.bias"]).flatten()
        total = total + out
        x = x - torch.cat([torch.zeros(8).double(), out[:-8]])
    return total * std + mean


@torch.no_grad()
def test_released_weights_give_the_numbers_of_a_transcription(tmp_path: Path):
    state = published()
    torch.save(state, tmp_path / "checkpoint.pth")
    model = arcore.create_model("gpht_tiny", weights=tmp_path / "checkpoint.pth", **SIZES).eval()
    values = torch.randn(2, 24, 3).cumsum(1)
    expected = torch.stack(
        [torch.stack([transcription(state, row[:, c]) for c in range(3)], 1) for row in values]
    )
    torch.testing.assert_close(model(values).double(), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_any_horizon_and_batches_of_none():
    model = GPHT(CONFIG).eval()
    values, dates = torch.randn(2, 24, 3), torch.zeros(2, 60, 5, dtype=torch.int64)
    whole = model.forecast(values, dates, 19)
    assert whole.shape == (2, 19, 3)
    torch.testing.assert_close(model.forecast(values, dates, 5), whole[:, :5])
    assert model.forecast(values, dates, 0).shape == (2, 0, 3)
    assert model.forecast(values[:0], dates[:0], 9).shape == (0, 9, 3)
    assert model.forecast(torch.full((1, 24, 1), 3.0), dates, 8).isfinite().all()


@pytest.mark.parametrize("shape", [(2, 24), (2, 23, 1), (2, 32, 1), (2, 0, 1)])
def test_windows_that_do_not_fit(shape: tuple[int, ...]):
    with pytest.raises(
        ValueError, match=r"expected values of shape \[B, L, C\] with L a multiple of 8 up to 24"
    ):
        GPHT(CONFIG)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"context": 25}, "context to be a multiple of patch=8"),
        ({"pools": (3,)}, "pools to divide patch=8"),
        ({"num_heads": 3}, "an even dim that num_heads divides"),
    ],
)
def test_bad_sizes(fields: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        GPHTConfig(**{**SIZES, **fields})
