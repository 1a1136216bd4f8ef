"""ST-SSDL: forecasts on a graph that know how far the present is from the past (Gao et al., arXiv:2510.04908).

Each node has a series. A recurrent graph network reads a window, and the average of what each node had at that time of
the week; queries of both states ask a set of prototypes. One auxiliary loss pulls each query's nearest prototype
closer than the second; the other lets distances of prototypes follow distances of queries, the deviation. Values of the
prototypes and the states of present and past give the decoder its start and its graph.

As in the released code, the update gate is the one called reset: `h = r * state + (1 - r) * candidate`.

Left out: the embedding per place in the window, which the released settings switch off, and inputs without embeddings.

Legend: B windows, T rows, N nodes, U units, M prototypes, P their width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import System, preset
from arcore.nn.kinds import check_kinds

SYSTEM = System(
    name="st_ssdl",
    title="ST-SSDL",
    paper="arXiv:2510.04908",
    paper_title="How Different from the Past? Spatio-Temporal Time Series Forecasting with Self-Supervised "
    "Deviation Learning",
    topic="series",
    kind="model",
    model="STSSDL",
    recipe="own",
    summary="Recurrent graph forecaster with prototypes of how far the present deviates from the usual week.",
    claim="The deviation follows shifts that are put into flights, and the auxiliary losses do not cost accuracy.",
    checked_on="real data",
)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class STSSDLConfig:
    """Settings of `STSSDL`.

    Attributes:
        channels: nodes N; each is a column of the table.
        context: rows T that are read.
        horizon: rows that are predicted.
        units: width U of the encoder's state.
        prototypes: how many, M, at least 2.
        prototype_dim: width P.
        input_dim: width of a value's embedding.
        node_dim: width of a node's embedding.
        time_dim: width of the embeddings of the time of day and of nodes in the decoder's graph.
        slots: times of a day that are told apart, a divisor of 1,440 minutes.
        order: order of the Chebyshev polynomials of the graph.
        contrast: weight of the loss between prototypes.
        deviation: weight of the loss between distances.
        margin: of the first one.
        decay: steps after which the decoder's training inputs turn from what came to its own predictions.
        masked: zeros in the table are missing values, which no error is counted for.

    Raises:
        ValueError: a size is out of range.
    """

    channels: int
    context: int = 12
    horizon: int = 12
    units: int = 128
    prototypes: int = 20
    prototype_dim: int = 64
    input_dim: int = 3
    node_dim: int = 25
    time_dim: int = 20
    slots: int = 288
    order: int = 3
    contrast: float = 0.01
    deviation: float = 1.0
    margin: float = 0.5
    decay: int = 2000
    masked: bool = True

    def __post_init__(self) -> None:
        if self.prototypes < 2 or self.order < 2 or self.decay < 1:
            raise ValueError(
                "expected at least 2 prototypes, an order of at least 2 and a decay of at least 1"
            )
        if self.slots < 1 or 1440 % self.slots:
            raise ValueError(f"expected slots to divide the 1440 minutes of a day but got {self.slots}")
        if min(self.channels, self.context, self.horizon, self.units) < 1:
            raise ValueError("expected channels, context, horizon and units to be at least 1")

    @property
    def normalise(self) -> str:
        """By the training rows."""
        return "train"


class GraphConv(nn.Module):
    """Chebyshev polynomials of a graph, then one linear layer.

    Args:
        inputs, outputs: widths.
        order: polynomials.
    """

    def __init__(self, inputs: int, outputs: int, order: int) -> None:
        super().__init__()
        self.order = order
        self.linear = nn.Linear(order * inputs, outputs)
        if not self.linear.weight.is_meta:
            nn.init.xavier_normal_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        """`[B, N, inputs]` on a graph `[N, N]` or `[B, N, N]` to `[B, N, outputs]`."""
        terms = [x, graph @ x]
        for _ in range(2, self.order):
            terms.append(2 * graph @ terms[-1] - terms[-2])
        out: Tensor = self.linear(torch.cat(terms, -1))
        return out


class GraphGRU(nn.Module):
    """A gated recurrent cell whose products are graph convolutions.

    Args:
        inputs: width of the input.
        units: width of the state.
        order: of the convolutions.
    """

    def __init__(self, inputs: int, units: int, order: int) -> None:
        super().__init__()
        self.gate = GraphConv(inputs + units, 2 * units, order)
        self.update = GraphConv(inputs + units, units, order)

    def forward(self, x: Tensor, state: Tensor, graph: Tensor) -> Tensor:
        """`[B, N, inputs]` and `[B, N, units]` to the next state."""
        z, r = self.gate(torch.cat([x, state], -1), graph).sigmoid().chunk(2, -1)
        candidate = self.update(torch.cat([x, z * state], -1), graph).tanh()
        return r * state + (1 - r) * candidate


class Deviation(NamedTuple):
    """How present and past ask the prototypes.

    Attributes:
        queries: of the present and the past, `[2, B, N, P]`.
        nearest: the prototypes with most attention, `[2, B, N, P]`.
        second: those with the second most.
        values: `[2, B, N, P]`.
    """

    queries: Tensor
    nearest: Tensor
    second: Tensor
    values: Tensor

    @property
    def distance(self) -> Tensor:
        """Between the queries of present and past, `[B, N]`."""
        return (self.queries[0] - self.queries[1]).abs().sum(-1)

    @property
    def prototype_distance(self) -> Tensor:
        """Between their nearest prototypes, `[B, N]`."""
        return (self.nearest[0] - self.nearest[1]).abs().sum(-1)

    def losses(self, margin: float) -> tuple[Tensor, Tensor]:
        """The contrast between prototypes and the consistency of distances; neither moves the queries."""
        contrast = F.triplet_margin_loss(
            self.queries[0].detach(), self.nearest[0], self.second[0], margin=margin
        )
        return contrast, F.l1_loss(self.prototype_distance, self.distance.detach())


@check_kinds
class STSSDL(nn.Module):
    """The forecaster. A `ForecastModel` (`arcore.recipes.forecasting`).

    Args:
        config: settings.
    """

    # Its prototypes are read outside of the calls that gather weights.
    shardable = False

    graph: Tensor
    usual: Tensor
    zero: Tensor
    scale: Tensor
    seen: Tensor

    def __init__(self, config: STSSDLConfig) -> None:
        super().__init__()
        self.config = config
        self.context, self.horizon, self.normalise = config.context, config.horizon, config.normalise
        nodes, units = config.channels, config.units
        self.embed_value = nn.Linear(1, config.input_dim)
        self.embed_node = nn.Parameter(torch.empty(nodes, config.node_dim))
        self.embed_time = nn.Parameter(torch.empty(config.slots, config.time_dim))
        inputs = config.input_dim + config.time_dim + config.node_dim
        self.encoder = GraphGRU(inputs, units, config.order)
        self.to_query = nn.Parameter(torch.empty(units, config.prototype_dim))
        self.prototypes = nn.Parameter(torch.empty(config.prototypes, config.prototype_dim))
        both = units + config.prototype_dim
        self.to_graph = nn.Linear(2 * both, config.time_dim)
        self.decoder = GraphGRU(inputs, both, config.order)
        self.head = nn.Linear(both, 1)
        # What the data decide: the nodes' graph, the usual week, where a zero lies among normalised values, and how
        # much of the table's unit one of them is.
        self.register_buffer("graph", torch.eye(nodes))
        self.register_buffer("usual", torch.zeros(7 * config.slots, nodes))
        self.register_buffer("zero", torch.full((nodes,), -math.inf))
        self.register_buffer("scale", torch.ones(nodes))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        if not self.prototypes.is_meta:
            for parameter in (self.embed_node, self.embed_time):
                nn.init.xavier_uniform_(parameter)
            for parameter in (self.to_query, self.prototypes):
                nn.init.xavier_normal_(parameter)

    @torch.no_grad()
    def know(
        self, graph: Tensor, values: Tensor, calendar: Tensor, zero: Tensor, scale: Tensor | None = None
    ) -> None:
        """Take over what the data decide.

        Args:
            graph: adjacency `[N, N]` without negative entries; normalised symmetrically here.
            values: normalised training rows `[T, N]`.
            calendar: int64 `[T, 5]` of them.
            zero: normalised value of a zero, `[N]`.
            scale: what values were divided by, `[N]`, so that errors count in the table's unit, as the weights of the
                auxiliary losses assume; ones when None.

        Raises:
            ValueError: the graph has another shape, or an entry that is negative or not finite.
        """
        nodes = self.config.channels
        sound = bool(((graph >= 0) & graph.isfinite()).all())
        if graph.shape != (nodes, nodes) or not sound:
            raise ValueError(
                f"expected an adjacency of {nodes} x {nodes} finite numbers >= 0, one row per column of the table, but "
                f"got {tuple(graph.shape)}{'' if sound else ' with negative, infinite or missing ones'}"
            )
        degree = graph.sum(1).clamp(min=1e-12).rsqrt() * (graph.sum(1) > 0)
        self.graph.copy_(degree[:, None] * graph * degree)
        slot = self.week_slot(calendar)
        known = (
            (values - zero).abs() > 1e-6 if self.config.masked else torch.ones_like(values, dtype=torch.bool)
        )
        sums = torch.zeros_like(self.usual).index_add_(0, slot, torch.where(known, values, 0.0))
        counts = torch.zeros_like(self.usual).index_add_(0, slot, known.to(values.dtype))
        self.usual.copy_(sums / counts.clamp(min=1))
        self.zero.copy_(zero)
        self.scale.copy_(torch.ones_like(zero) if scale is None else scale)

    def day_slot(self, calendar: Tensor) -> Tensor:
        """The time of day of calendars `[..., 5]`, from 0 to slots - 1."""
        return (calendar[..., 1] * 60 + calendar[..., 0]) * self.config.slots // 1440

    def week_slot(self, calendar: Tensor) -> Tensor:
        """The time of the week of calendars `[..., 5]`, from 0 to 7 * slots - 1."""
        return calendar[..., 2] * self.config.slots + self.day_slot(calendar)

    @check_kinds
    def forward(
        self, values: Tensor, calendar: Tensor, actual: Tensor | None = None
    ) -> tuple[Tensor, Deviation]:
        """The next rows.

        Args:
            values: `[B, context, N]`.
            calendar: int64 `[B, context + horizon, 5]`.
            actual: what came, `[B, horizon, N]`: the decoder sees some of it in training.

        Returns:
            `[B, horizon, N]` and how it came about.

        Raises:
            ValueError: a shape is wrong.
        """
        config = self.config
        rows = config.context + config.horizon
        if values.shape[1:] != (config.context, config.channels) or calendar.shape != (len(values), rows, 5):
            raise ValueError(
                f"expected values [B, {config.context}, {config.channels}] and a calendar [B, {rows}, 5] but got "
                f"{tuple(values.shape)} and {tuple(calendar.shape)}"
            )
        found, states = self.deviate(values, calendar[:, : config.context])
        state = torch.cat([states[0], found.values[0]], -1)
        nodes = self.to_graph(torch.cat([state, states[1], found.values[1]], -1))
        graph = torch.relu(nodes @ nodes.transpose(1, 2)).softmax(-1)
        share = config.decay / (config.decay + torch.exp(self.seen / config.decay))
        taught = torch.rand(config.horizon, device=values.device) < share
        last, out = torch.zeros_like(values[:, 0]), []
        for t in range(config.horizon):
            x = self._embed(last.unsqueeze(1), calendar[:, config.context + t].unsqueeze(1))[:, 0]
            state = self.decoder(x, state, graph)
            last = self.head(state).squeeze(-1)
            out.append(last)
            if actual is not None:
                last = torch.where(taught[t], actual[:, t], last)
        return torch.stack(out, 1), found

    def deviate(self, values: Tensor, calendar: Tensor) -> tuple[Deviation, Tensor]:
        """How windows `[B, context, N]` ask the prototypes beside the usual week, and both states `[2, B, N, U]`."""
        usual = self.usual[self.week_slot(calendar)]
        both = self._embed(torch.cat([values, usual]), torch.cat([calendar, calendar]))
        state = values.new_zeros(len(both), self.config.channels, self.config.units)
        for t in range(both.shape[1]):
            state = self.encoder(both[:, t], state, self.graph)
        states = state.unflatten(0, (2, -1))
        queries = states @ self.to_query
        attention = (queries @ self.prototypes.T).softmax(-1)
        best = attention.topk(2, dim=-1).indices
        nearest, second = (self.prototypes[best[..., i]] for i in (0, 1))
        return Deviation(queries, nearest, second, attention @ self.prototypes), states

    def _embed(self, values: Tensor, calendar: Tensor) -> Tensor:
        """`[B, T, N]` and `[B, T, 5]` to `[B, T, N, inputs]`."""
        shape = (*values.shape, -1)
        time = self.embed_time[self.day_slot(calendar)].unsqueeze(2).expand(shape)
        return torch.cat([self.embed_value(values.unsqueeze(-1)), time, self.embed_node.expand(shape)], -1)

    def objective(self, values: Tensor, calendar: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Absolute error of the next rows and both auxiliary losses, of windows `[B, context + horizon, N]`.

        As in the released code the error is in the table's unit, where `know` was told the scale.
        """
        past, actual = values[:, : self.context], values[:, self.context :]
        out, found = self(past, calendar, actual if self.training else None)
        if self.training:
            self.seen.add_(1)
        error = (out - actual).abs() * self.scale
        if self.config.masked:
            known = (actual - self.zero).abs() > 1e-6
            error = torch.where(known, error, 0.0) / known.float().mean().clamp(min=1e-6)
        contrast, consistency = found.losses(self.config.margin)
        loss = error.mean() + self.config.contrast * contrast + self.config.deviation * consistency
        figures = {
            "mae": error.detach().mean(),
            "contrast": contrast.detach(),
            "deviation": consistency.detach(),
        }
        return loss, figures

    @check_kinds
    def forecast(self, values: Tensor, calendar: Tensor, horizon: int) -> Tensor:
        """The next rows, `[B, context, N]` to `[B, horizon, N]`; beyond the config's horizon the forecast goes on."""
        made: list[Tensor] = []
        while len(made) * self.horizon < horizon:
            begin = len(made) * self.horizon
            dates = calendar[:, begin : begin + self.context + self.horizon]
            dates = torch.cat(
                [dates, dates[:, -1:].expand(-1, self.context + self.horizon - dates.shape[1], -1)], 1
            )
            made.append(self(torch.cat([values, *made], 1)[:, -self.context :], dates)[0])
        return torch.cat(made, 1)[:, :horizon] if made else values[:, :0]

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the released code under our names; graph, usual week and zero stay to be known (`know`)."""
        names = {
            "prototypes.prototypes": "prototypes",
            "prototypes.Wq": "to_query",
            "node_embedding": "embed_node",
            "time_embedding": "embed_time",
        }
        stems = {"input_proj": "embed_value", "proj.0": "head", "hypernet.0": "to_graph"}
        names |= {f"{a}.{part}": f"{b}.{part}" for a, b in stems.items() for part in ("weight", "bias")}
        made = {
            name: value for name, value in self.state_dict().items() if name in dict(self.named_buffers())
        }
        made = {n: v if not v.is_meta else _initial(n, v) for n, v in made.items()}
        for key, value in state.items():
            stem = key.replace(".dcrnn_cells.0.", ".")
            if stem.endswith(".weights"):
                made[stem.replace(".weights", ".linear.weight")] = value.T.contiguous()
            elif stem.startswith(("encoder.", "decoder.")) and stem.endswith(".bias"):
                made[stem.replace(".bias", ".linear.bias")] = value
            else:
                made[names.get(key, key)] = value
        return made


def _initial(name: str, like: Tensor) -> Tensor:
    if name == "graph":
        return torch.eye(len(like), device="cpu")
    fill = {"zero": -math.inf, "scale": 1}.get(name, 0)
    return torch.full(like.shape, fill, dtype=like.dtype, device="cpu")


@preset
def st_ssdl_metr_la() -> STSSDLConfig:
    """The released settings for METR-LA: 207 sensors every five minutes."""
    return STSSDLConfig(channels=207)


@preset
def st_ssdl_tiny() -> STSSDLConfig:
    """Small, for hourly tables such as the departures from New York; trains on a CPU in minutes."""
    return STSSDLConfig(
        channels=15,
        units=24,
        prototypes=10,
        prototype_dim=16,
        input_dim=4,
        node_dim=8,
        time_dim=8,
        slots=24,
        deviation=0.1,
        masked=False,
    )


def __getattr__(name: str) -> Any:
    if name == "RECIPE":
        from arcore.zoo.series.st_ssdl.recipe import RECIPE

        return RECIPE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
