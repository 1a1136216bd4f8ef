"""Autoformer against a transcription of the released network in float64, with rolls one by one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.zoo.series.autoformer.model import AutoformerConfig, correlation, decompose, top_delays

SIZES: dict[str, Any] = {
    "channels": 3,
    "context": 16,
    "horizon": 6,
    "label": 7,
    "dim": 8,
    "num_heads": 2,
    "hidden_dim": 12,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "factor": 2,
    "moving_average": 5,
    "dropout": 0.0,
}


def published() -> dict[str, Tensor]:
    """Random weights under the released names."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {}
    for part in ("enc", "dec"):
        shapes[f"{part}_embedding.value_embedding.tokenConv.weight"] = (8, 3, 3)
        shapes[f"{part}_embedding.temporal_embedding.embed.weight"] = (8, 5)
        shapes[f"{part}_embedding.position_embedding.pe"] = (1, 50, 8)
    mixers = {f"encoder.attn_layers.{i}.attention": 8 for i in range(2)}
    mixers |= {f"decoder.layers.0.{name}_attention": 8 for name in ("self", "cross")}
    for name in mixers:
        for part in ("query", "key", "value", "out"):
            shapes |= {f"{name}.{part}_projection.weight": (8, 8), f"{name}.{part}_projection.bias": (8,)}
    for name in ("encoder.attn_layers.0", "encoder.attn_layers.1", "decoder.layers.0"):
        shapes |= {f"{name}.conv1.weight": (12, 8, 1), f"{name}.conv2.weight": (8, 12, 1)}
    shapes["decoder.layers.0.projection.weight"] = (3, 8, 3)
    for name in ("encoder", "decoder"):
        shapes |= {f"{name}.norm.layernorm.weight": (8,), f"{name}.norm.layernorm.bias": (8,)}
    shapes |= {"decoder.projection.weight": (3, 8), "decoder.projection.bias": (3,)}
    return {name: 0.4 * torch.randn(shape) for name, shape in shapes.items()}


def mix(w: dict[str, Tensor], name: str, x: Tensor, context: Tensor, *, shared: bool) -> Tensor:
    def linear(x: Tensor, part: str) -> Tensor:
        return x @ w[f"{name}.{part}_projection.weight"].T + w[f"{name}.{part}_projection.bias"]

    length = x.shape[1]
    q, k, v = linear(x, "query"), linear(context, "key"), linear(context, "value")
    if k.shape[1] < length:
        zeros = torch.zeros(len(x), length - k.shape[1], 8).double()
        k, v = torch.cat([k, zeros], 1), torch.cat([v, zeros], 1)
    k, v = k[:, :length], v[:, :length]
    scores = torch.stack([(q.roll(-d, 1) * k).sum(1).mean(1) for d in range(length)], 1)
    count = int(2 * math.log(length))
    out = torch.zeros_like(v)
    for row in range(len(x)):
        best = (scores.mean(0) if shared else scores[row]).topk(count).indices
        weights = scores[row, best].softmax(0)
        for delay, weight in zip(best.tolist(), weights, strict=True):
            out[row] += weight * v[row].roll(-delay, 0)
    return linear(out, "out")


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    ends = torch.cat([x[:, :1], x[:, :1], x, x[:, -1:], x[:, -1:]], 1)
    trend = torch.stack([ends[:, t : t + 5].mean(1) for t in range(x.shape[1])], 1)
    return x - trend, trend


def around(weight: Tensor, x: Tensor) -> Tensor:
    return F.conv1d(F.pad(x.transpose(1, 2), (1, 1), mode="circular"), weight).transpose(1, 2)


def transcription(state: dict[str, Tensor], values: Tensor, dates: Tensor, *, shared: bool) -> Tensor:
    w = {name: value.double() for name, value in state.items()}
    least, most = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([59, 23, 6, 31, 12])
    marks = ((dates - least) / (most - least).double()) - 0.5
    x = values.double()

    def feed(name: str, y: Tensor) -> Tensor:
        up, down = (w[f"{name}.conv{n}.weight"].squeeze(-1) for n in (1, 2))
        return F.gelu(y @ up.T) @ down.T

    def embed(part: str, y: Tensor, marks: Tensor) -> Tensor:
        calendar = marks @ w[f"{part}_embedding.temporal_embedding.embed.weight"].T
        return around(w[f"{part}_embedding.value_embedding.tokenConv.weight"], y) + calendar

    def norm(part: str, y: Tensor) -> Tensor:
        y = F.layer_norm(y, (8,), w[f"{part}.norm.layernorm.weight"], w[f"{part}.norm.layernorm.bias"])
        return y - y.mean(1, keepdim=True)

    season, trend = split(x)
    trend = torch.cat([trend[:, -7:], x.mean(1, keepdim=True).repeat(1, 6, 1)], 1)
    season = torch.cat([season[:, -7:], torch.zeros(len(x), 6, 3).double()], 1)
    encoded = embed("enc", x, marks[:, :16])
    for i in range(2):
        name = f"encoder.attn_layers.{i}"
        encoded = split(encoded + mix(w, f"{name}.attention", encoded, encoded, shared=shared))[0]
        encoded = split(encoded + feed(name, encoded))[0]
    encoded = norm("encoder", encoded)
    y, name = embed("dec", season, marks[:, 9:]), "decoder.layers.0"
    y, first = split(y + mix(w, f"{name}.self_attention", y, y, shared=shared))
    y, second = split(y + mix(w, f"{name}.cross_attention", y, encoded, shared=shared))
    y, third = split(y + feed(name, y))
    trend = trend + around(w[f"{name}.projection.weight"], first + second + third)
    out = norm("decoder", y) @ w["decoder.projection.weight"].T + w["decoder.projection.bias"]
    return (trend + out)[:, -6:]


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_released_weights_give_the_numbers_of_a_transcription(tmp_path: Path, training: bool):
    """Each series with delays of its own, and the delays of the batch as in training."""
    state = published()
    torch.save(state, tmp_path / "checkpoint.pth")
    model = arcore.create_model("autoformer_tiny", weights=tmp_path / "checkpoint.pth", **SIZES).train(
        training
    )
    values = torch.randn(4, 16, 3)
    dates = torch.stack([torch.randint(1, n, (4, 22)) for n in (60, 24, 7, 32, 13)], -1)
    season, trend = model(values, dates)
    expected = transcription(state, values, dates, shared=training)
    torch.testing.assert_close((season + trend).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 2, 7, 24])
def test_correlations_of_any_length(length: int):
    q, k = torch.randn(2, 3, length, dtype=torch.float64)
    direct = torch.stack([(q.roll(-d, -1) * k).sum(-1) for d in range(length)], -1)
    torch.testing.assert_close(correlation(q, k), direct)
    delays, weights = top_delays(direct, 3, shared=False)
    assert delays.shape == weights.shape == (3, max(1, min(length, int(3 * math.log(length)))))
    torch.testing.assert_close(weights.sum(1), torch.ones(3, dtype=torch.float64))


def test_a_series_shorter_than_the_average_and_a_constant_one():
    x = torch.randn(2, 3, 1, dtype=torch.float64)
    torch.testing.assert_close(sum(decompose(x, 25)), x)
    assert decompose(torch.ones(1, 9, 2), 5).season.abs().max() == 0


@torch.no_grad()
def test_any_horizon():
    model = arcore.create_model("autoformer_tiny", **SIZES).eval()
    values, dates = torch.randn(2, 16, 3), torch.ones(2, 16 + 14, 5, dtype=torch.int64)
    whole = model.forecast(values, dates, 14)
    first = model.forecast(values, dates[:, :22], 6)
    assert whole.shape == (2, 14, 3)
    torch.testing.assert_close(whole[:, :6], first)
    second = model.forecast(torch.cat([values, first], 1)[:, -16:], dates[:, :22], 6)
    torch.testing.assert_close(whole[:, 6:12], second)
    assert model.forecast(values[:0], dates[:0], 9).shape == (0, 9, 3)


def test_what_does_not_fit_is_refused():
    model = arcore.create_model("autoformer_tiny", **SIZES)
    with pytest.raises(ValueError, match=r"expected values \[B, 16, 3\] and a calendar \[B, 22, 5\]"):
        model(torch.zeros(2, 15, 3), torch.zeros(2, 22, 5, dtype=torch.int64))
    for fields, says in (
        ({"moving_average": 4}, "an odd moving_average"),
        ({"label": 17}, "label from 0 to context=16"),
        ({"num_heads": 3}, "num_heads to divide"),
        ({"horizon": 0}, "to be at least 1"),
    ):
        with pytest.raises(ValueError, match=says):
            AutoformerConfig(**{**SIZES, **fields})
