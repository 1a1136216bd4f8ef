"""ST-SSDL against a transcription of the released network in float64, node by node where that is possible."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.zoo.series.st_ssdl import STSSDL, STSSDLConfig, st_ssdl_tiny
from arcore.zoo.series.st_ssdl.recipe import GraphOptions, graph_of
from tests.zoo.protocol_forecasting import Protocol as Forecasts

SIZES: dict[str, Any] = {
    "channels": 4,
    "context": 5,
    "horizon": 3,
    "units": 6,
    "prototypes": 3,
    "prototype_dim": 5,
    "input_dim": 2,
    "node_dim": 3,
    "time_dim": 4,
    "slots": 24,
    "masked": False,
}


class Protocol(Forecasts):
    """Windows of nodes."""

    def loss(self, model: Any) -> Tensor:
        # Times of day that the batch does not name have no gradient.
        return super().loss(model) + 1e-6 * model.embed_time.square().sum()


def published() -> dict[str, Tensor]:
    """Random weights under the released names."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"prototypes.prototypes": (3, 5), "prototypes.Wq": (6, 5)}
    shapes |= {
        "node_embedding": (4, 3),
        "time_embedding": (24, 4),
        "input_proj.weight": (2, 1),
        "input_proj.bias": (2,),
    }
    shapes |= {
        "proj.0.weight": (1, 11),
        "proj.0.bias": (1,),
        "hypernet.0.weight": (4, 22),
        "hypernet.0.bias": (4,),
    }
    for part, units in (("encoder", 6), ("decoder", 11)):
        cell = f"{part}.dcrnn_cells.0."
        for name, width in (("gate", 2 * units), ("update", units)):
            shapes |= {f"{cell}{name}.weights": (3 * (9 + units), width), f"{cell}{name}.bias": (width,)}
    return {name: 0.5 * torch.randn(shape) for name, shape in shapes.items()}


def transcription(
    w: dict[str, Tensor], values: Tensor, usual: Tensor, hours: Tensor, graph: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The released forward of one window by weights in float64, and the queries of present and past."""
    prototypes = w["prototypes.prototypes"]

    def convolve(x: Tensor, graph: Tensor, name: str) -> Tensor:
        powers = [torch.eye(4).double(), graph]
        powers.append(2 * graph @ powers[-1] - powers[-2])
        return torch.cat([power @ x for power in powers], -1) @ w[f"{name}.weights"] + w[f"{name}.bias"]

    def cell(x: Tensor, h: Tensor, graph: Tensor, part: str) -> Tensor:
        first = f"{part}.dcrnn_cells.0."
        z, r = convolve(torch.cat([x, h], -1), graph, f"{first}gate").sigmoid().split(h.shape[1], -1)
        candidate = convolve(torch.cat([x, z * h], -1), graph, f"{first}update").tanh()
        return r * h + (1 - r) * candidate

    def embed(row: Tensor, hour: Tensor) -> Tensor:
        value = row[:, None] @ w["input_proj.weight"].T + w["input_proj.bias"]
        return torch.cat([value, w["time_embedding"][hour].expand(4, -1), w["node_embedding"]], -1)

    states, asked, queries = [], [], []
    for rows in (values.double(), usual.double()):
        h = torch.zeros(4, 6).double()
        for t in range(5):
            h = cell(embed(rows[t], hours[t]), h, graph, "encoder")
        query = h @ w["prototypes.Wq"]
        states.append(h)
        queries.append(query)
        asked.append((query @ prototypes.T).softmax(-1) @ prototypes)
    h = torch.cat([states[0], asked[0]], -1)
    nodes = torch.cat([h, states[1], asked[1]], -1) @ w["hypernet.0.weight"].T + w["hypernet.0.bias"]
    learned = F.relu(nodes @ nodes.T).softmax(-1)
    row, out = torch.zeros(4).double(), []
    for t in range(3):
        h = cell(embed(row, hours[5 + t]), h, learned, "decoder")
        row = (h @ w["proj.0.weight"].T + w["proj.0.bias"])[:, 0]
        out.append(row)
    return torch.stack(out), queries


def test_released_weights_give_the_numbers_loss_and_gradients_of_a_transcription(tmp_path: Path):
    state = published()
    torch.save(state, tmp_path / "STSSDL.pt")
    sizes = {**SIZES, "masked": True, "contrast": 0.3, "deviation": 0.7}
    model: Any = arcore.create_model("st_ssdl_tiny", weights=tmp_path / "STSSDL.pt", **sizes).eval()
    w = {name: value.double().requires_grad_() for name, value in state.items()}
    dates = torch.zeros(2, 8, 5, dtype=torch.int64)
    dates[..., 1] = (torch.arange(8) + torch.tensor([[3], [20]])) % 24
    dates[..., 2] = 2
    rows, times = torch.randn(400, 4), torch.zeros(400, 5, dtype=torch.int64)
    times[:, 1], times[:, 2] = torch.arange(400) % 24, torch.arange(400) // 24 % 7
    near = torch.rand(4, 4)
    near = near + near.T
    zero, scale = torch.full((4,), -1.5), torch.tensor([20.0, 10.0, 5.0, 1.0])
    model.know(near, rows, times, zero, scale)
    degree = near.double().sum(1) ** -0.5
    graph = degree[:, None] * near.double() * degree
    values = torch.randn(2, 8, 4)
    values[0, 6, 1:3] = zero[1:3]
    out, found = model(values[:, :5], dates)
    errors, contrasts, distances = [], [], []
    for b in range(2):
        hours = dates[b, :, 1]
        usual = torch.stack([rows[(times[:, 1] == hour) & (times[:, 2] == 2)].mean(0) for hour in hours[:5]])
        expected, queries = transcription(w, values[b, :5], usual, hours, graph)
        torch.testing.assert_close(out[b].double(), expected, rtol=1e-4, atol=1e-4)
        distance = (queries[0] - queries[1]).abs().sum(-1)
        torch.testing.assert_close(found.distance[b].double(), distance, rtol=1e-4, atol=1e-4)
        errors.append((expected - values[b, 5:].double()).abs() * scale)
        # Stopped gradients: neither auxiliary loss moves a query; node by node, by their definitions.
        for n in range(4):
            asked = [query[n].detach() for query in queries]
            best = [torch.mv(w["prototypes.prototypes"], one).argsort(descending=True) for one in asked]
            near, far = (w["prototypes.prototypes"][best[0][i]] for i in (0, 1))
            gap = [(asked[0] - one + 1e-6).square().sum().sqrt() for one in (near, far)]
            contrasts.append((gap[0] - gap[1] + model.config.margin).clamp(min=0))
            apart = (near - w["prototypes.prototypes"][best[1][0]]).abs().sum()
            distances.append((apart - distance[n].detach()).abs())
    # Two values of 24 are missing; the error is in the table's unit.
    error = torch.stack(errors)
    error = torch.where(values[:, 5:] == zero, 0.0, error).sum() / 22
    wanted = error + 0.3 * torch.stack(contrasts).mean() + 0.7 * torch.stack(distances).mean()
    loss, figures = model.objective(values, dates)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-4, atol=1e-4)
    assert figures["contrast"] > 0
    loss.backward()
    wanted.backward()
    for name, key in (
        ("prototypes", "prototypes.prototypes"),
        ("to_query", "prototypes.Wq"),
        ("head.weight", "proj.0.weight"),
    ):
        got = model.get_parameter(name).grad.double()
        torch.testing.assert_close(got, w[key].grad, rtol=2e-3, atol=2e-4 * float(w[key].grad.abs().max()))


def test_auxiliary_losses_are_their_formulas_and_leave_queries_alone():
    torch.manual_seed(0)
    model = STSSDL(STSSDLConfig(**SIZES))
    model.usual.normal_()
    found, _ = model.deviate(torch.randn(2, 5, 4), torch.ones(2, 5, 5, dtype=torch.int64))
    contrast, consistency = found.losses(0.5)
    near, far = ((found.queries[0] - one[0] + 1e-6).norm(dim=-1) for one in (found.nearest, found.second))
    torch.testing.assert_close(contrast, (near - far + 0.5).clamp(min=0).mean())
    torch.testing.assert_close(consistency, (found.distance - found.prototype_distance).abs().mean())
    assert torch.autograd.grad(contrast + consistency, model.to_query, allow_unused=True)[0] is None


def test_zeros_are_no_errors_where_they_are_missing_values():
    model = STSSDL(STSSDLConfig(**{**SIZES, "masked": True})).eval()
    model.zero.fill_(-1.5)
    values, dates = torch.randn(2, 8, 4), torch.ones(2, 8, 5, dtype=torch.int64)
    values[:, 6] = -1.5
    out = model.forecast(values[:, :5], dates, 3)
    error = (out - values[:, 5:]).abs()
    expected = (error[:, 0].mean() + error[:, 2].mean()) / 2
    torch.testing.assert_close(model.objective(values, dates)[1]["mae"], expected)
    assert model.forecast(values[:0, :5], dates[:0], 7).shape == (0, 7, 4)


def test_an_adjacency_of_ones_own(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text("y,x\n1,0.5\n0.25,1\n")
    options = GraphOptions(data="t.csv", adjacency=path)
    assert graph_of(["x", "y"], options).tolist() == [[1, 0.25], [0.5, 1]]
    assert torch.equal(graph_of(["x", "y"], GraphOptions(data="t.csv")), torch.eye(2))
    for text, says in (
        ("y,x\n1,0.5\n", "has 1 rows of y, x"),
        ("y,z\n1,0\n0,1\n", r"named like those of the table \(x, y\)"),
        ("y,x\n1,0\n-1,1\n", r"a\.csv, line 3, has -1\.0 for 'y'"),
        ("y,x\n1,\n1,1\n", r"a\.csv, line 2, has nan for 'x'"),
        ("y,x\n1,far\n1,1\n", "no table of numbers"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=says):
            graph_of(["x", "y"], options)
    with pytest.raises(FileNotFoundError, match=r"the adjacency .* does not exist"):
        graph_of(["x"], GraphOptions(adjacency=tmp_path / "gone.csv"))


def test_what_does_not_fit_is_refused():
    model = STSSDL(STSSDLConfig(**SIZES))
    with pytest.raises(ValueError, match=r"expected values \[B, 5, 4\] and a calendar \[B, 8, 5\]"):
        model(torch.zeros(1, 5, 3), torch.zeros(1, 8, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="an adjacency of 4 x 4 finite numbers >= 0"):
        model.know(torch.eye(3), torch.zeros(1, 4), torch.zeros(1, 5, dtype=torch.int64), torch.zeros(4))
    for fields, says in (({"prototypes": 1}, "at least 2 prototypes"), ({"slots": 7}, "slots to divide")):
        with pytest.raises(ValueError, match=says):
            replace(st_ssdl_tiny(), **fields)
