"""Forecasting models in training beside plain transcriptions: `pytest bench/models/bench_forecasting.py`.

A step is forward and backward of the model's own loss. The plain forms have the same weights and are written as the
released codes have them, in PyTorch alone:

- GPHT: three projections, scores as an einsum, a triangle of minus infinity, softmax.
- Autoformer: correlations of every channel by Fourier transforms, their mean, and a roll of the values per delay.
- ST-SSDL: Chebyshev polynomials of the graph as matrices made in every call, an einsum per polynomial.
- DP mobility: a gated cell with a product per gate.
- Kronos: PyTorch's attention with a causal flag in place of the block-sparse op.

Losses and gradients are compared before the time is taken. One thread, process CPU time, the two take turns. No model
may take more than 1.2 times its plain form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from measure import interleaved_seconds
from torch import Tensor, nn

from arcore.zoo.series import dp_mobility as mobility
from arcore.zoo.series import gpht, kronos, st_ssdl
from arcore.zoo.series.autoformer import model as autoformer

LIMIT = 1.2
BATCH = 32


class PlainCausalLayer(nn.Module):
    """GPHT's layer from an einsum of scores."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        own = self.layer
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (own.num_heads, -1))
            for weight, bias in zip(own.qkv.weight.chunk(3), own.qkv.bias.chunk(3), strict=True)
        )
        scores = torch.einsum("nlhd,nshd->nhls", q, k) / math.sqrt(q.shape[-1])
        future = torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), 1)
        law = scores.masked_fill(future, -math.inf).softmax(-1)
        mixed = torch.einsum("nhls,nshd->nlhd", law, v).flatten(2)
        x = own.norm1(x + own.out(mixed))
        out: Tensor = own.norm2(x + own.down(F.gelu(own.up(x))))
        return out


class PlainCorrelation(nn.Module):
    """Autoformer's auto-correlation with a roll per delay."""

    def __init__(self, mixer: Any, heads: int) -> None:
        super().__init__()
        self.mixer, self.heads = mixer, heads

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        own, length = self.mixer, x.shape[1]
        q, k, v = own.query(x), own.key(context), own.value(context)
        if context.shape[1] < length:
            rest = torch.zeros_like(q[:, : length - context.shape[1]])
            k, v = torch.cat([k, rest], 1), torch.cat([v, rest], 1)
        else:
            k, v = k[:, :length], v[:, :length]
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).permute(0, 2, 3, 1).contiguous() for part in (q, k, v)
        )
        spectrum = torch.fft.rfft(q, dim=-1) * torch.conj(torch.fft.rfft(k, dim=-1))
        scores = torch.fft.irfft(spectrum, dim=-1, n=length).mean(1).mean(1)
        count = max(1, min(length, int(own.factor * math.log(length))))
        index = scores.mean(0).topk(count).indices
        weights = torch.stack([scores[:, i] for i in index.tolist()], -1).softmax(-1)
        mixed = torch.zeros_like(v)
        for place, delay in enumerate(index.tolist()):
            mixed = mixed + torch.roll(v, -delay, -1) * weights[:, place, None, None, None]
        out: Tensor = own.out(mixed.permute(0, 3, 1, 2).flatten(2))
        return out


class PlainGraphConv(nn.Module):
    """ST-SSDL's graph convolution from powers of the graph."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        whole = graph.dim() == 2
        supports = [torch.eye(graph.shape[-1]).expand_as(graph), graph]
        for _ in range(2, self.conv.order):
            supports.append(torch.matmul(2 * graph, supports[-1]) - supports[-2])
        rule = "nm,bmc->bnc" if whole else "bnm,bmc->bnc"
        terms = torch.cat([torch.einsum(rule, support, x) for support in supports], -1)
        out: Tensor = torch.einsum("bni,io->bno", terms, self.conv.linear.weight.T) + self.conv.linear.bias
        return out


class PlainRecurrence(nn.Module):
    """A gated cell with ReLU, a product per gate and row."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, rows: Tensor) -> Tensor:
        own = self.cell
        inner, outer = (
            list(zip(part.weight.chunk(3), part.bias.chunk(3), strict=True))
            for part in (own.input, own.state)
        )
        state = rows.new_zeros(len(rows), own.units)
        for t in range(rows.shape[1]):
            row = rows[:, t]
            z = torch.sigmoid(F.linear(row, *inner[0]) + F.linear(state, *outer[0]))
            r = torch.sigmoid(F.linear(row, *inner[1]) + F.linear(state, *outer[1]))
            new = torch.relu(F.linear(row, *inner[2]) + r * F.linear(state, *outer[2]))
            state = z * state + (1 - z) * new
        return state


def with_parts(model: nn.Module, kind: type, made: Callable[[Any], nn.Module]) -> Callable[[bool], None]:
    """A switch between a model's own parts of a kind and plain ones around the same weights."""
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, kind)
    ]
    plain = [made(child) for _, _, child in places]

    def switch(to_plain: bool) -> None:
        for (parent, name, child), other in zip(places, plain, strict=True):
            if isinstance(parent, nn.ModuleList | nn.Sequential):
                parent[int(name)] = other if to_plain else child
            else:
                setattr(parent, name, other if to_plain else child)

    return switch


def dates(rows: int) -> Tensor:
    minute = torch.arange(rows) * 60
    columns = (
        minute % 60,
        minute // 60 % 24,
        minute // 1440 % 7,
        minute // 1440 % 28 + 1,
        torch.ones(rows).long(),
    )
    return torch.stack(columns, -1).expand(BATCH, -1, -1)


def prepared(name: str) -> tuple[Any, Callable[[bool], None], Callable[[], Tensor]]:
    """A model, the switch to its plain form, and its loss on a fixed batch."""
    torch.manual_seed(0)
    if name == "gpht":
        model: Any = gpht.GPHT(gpht.GPHTConfig(dim=128, num_heads=4, hidden_dim=256, dropout=0.0))
        values = torch.randn(BATCH, model.context + model.horizon, 1).cumsum(1)
        return (
            model,
            with_parts(model, gpht.CausalLayer, PlainCausalLayer),
            lambda: model.objective(values, dates(values.shape[1]))[0],
        )
    if name == "autoformer":
        model = autoformer.Autoformer(
            autoformer.AutoformerConfig(dim=128, hidden_dim=256, horizon=48, dropout=0.0)
        )
        values = torch.randn(BATCH, model.context + model.horizon, 7).cumsum(1)
        switch = with_parts(model, autoformer.AutoCorrelation, lambda part: PlainCorrelation(part, 8))
        return model, switch, lambda: model.objective(values, dates(values.shape[1]))[0]
    if name == "st_ssdl":
        model = st_ssdl.STSSDL(st_ssdl.st_ssdl_tiny())
        graph = torch.rand(15, 15)
        model.know(graph + graph.T, torch.randn(336, 15), dates(336)[0], torch.zeros(15))
        values = torch.randn(BATCH, model.context + model.horizon, 15)

        def loss() -> Tensor:
            torch.manual_seed(1)  # which rows the decoder sees is drawn
            model.seen.zero_()
            return model.objective(values, dates(values.shape[1]))[0]

        return model, with_parts(model, st_ssdl.GraphConv, PlainGraphConv), loss
    if name == "dp_mobility":
        model = mobility.MobilityForecaster(mobility.dp_mobility_tiny())
        values = torch.randint(0, 50, (BATCH, model.context + 1, 6)).float()
        switch = with_parts(model, mobility.Recurrence, PlainRecurrence)
        return model, switch, lambda: model.objective(values, dates(values.shape[1]))[0]
    model = kronos.Kronos(kronos.kronos_tiny()).eval()
    rows = model.context + model.horizon
    s1, s2 = (torch.randint(size, (BATCH, rows)) for size in model.vocab_sizes)
    return model, attention_switch(), lambda: model.objective(s1, s2, dates(rows))[0]


def attention_switch() -> Callable[[bool], None]:
    """Kronos's attention by the op, or by PyTorch's with a causal flag."""
    from arcore.zoo.series import _kronos_layers as layers

    def plain(q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    places = [(module, name) for module in (layers, kronos) for name in ("block_sparse_attention", "attend")
              if hasattr(module, name)]  # fmt: skip
    own = [getattr(module, name) for module, name in places]

    def switch(to_plain: bool) -> None:
        for (module, name), ours in zip(places, own, strict=True):
            setattr(module, name, plain if to_plain else ours)

    return switch


@pytest.mark.parametrize("name", ["gpht", "autoformer", "st_ssdl", "dp_mobility", "kronos"])
def bench_forecasting(benchmark: Any, name: str) -> None:
    model, switch, loss = prepared(name)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step(to_plain: bool) -> tuple[Tensor, ...]:
        switch(to_plain)
        value = loss()
        found = torch.autograd.grad(value, parameters, allow_unused=True)
        switch(False)
        return (value.detach(), *(g for g in found if g is not None))

    for ours, theirs in zip(step(False), step(True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4 * float(theirs.abs().max()) + 1e-7)
    found = interleaved_seconds(
        {"arcore": lambda: step(False), "plain PyTorch": lambda: step(True)}, rounds=7
    )
    benchmark.extra_info.update(
        op="forecasting", case=name, impl="arcore", direction="forward+backward", seconds=found["arcore"],
        peers={"plain PyTorch": found["plain PyTorch"]},
    )  # fmt: skip
    benchmark.pedantic(lambda: step(False), rounds=1)


def floors_report(records: list[dict[str, Any]]) -> list[str]:
    """Milliseconds, and the share of the plain form's time."""
    lines = []
    for record in records:
        if record.get("op") != "forecasting":
            continue
        share = record["seconds"] / record["peers"]["plain PyTorch"]
        lines.append(
            f"{'ok' if share <= LIMIT else 'ABOVE':6}{record['case']:12} {record['seconds'] * 1e3:8.1f} ms, "
            f"{share:.2f} of plain PyTorch's time (<= {LIMIT})"
        )
    return lines
