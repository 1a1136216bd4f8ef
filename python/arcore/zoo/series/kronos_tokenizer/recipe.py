"""Training Kronos's tokenizer on candles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from arcore.catalog import load_checkpoint
from arcore.data.calendar import Gaps
from arcore.data.forecasts import save_figure
from arcore.data.load_series import load_series
from arcore.data.series import Series, SeriesWindows
from arcore.nn.kinds import check_kinds
from arcore.recipes._recipe import ZooTask
from arcore.recipes.forecasting import Forecasting, TableOptions
from arcore.training.config import TrainConfig
from arcore.zoo.series._fitting import fit
from arcore.zoo.series._ohlcv import CANDLE, PRICES, candles, rescaled

PICTURE = "reconstruction.png"


@check_kinds
@dataclass(frozen=True, kw_only=True)
class CandleOptions(TableOptions):
    """A table of candles: open, high, low, close, and volume and amount if there are any.

    Attributes:
        data: a .csv, .tsv or .parquet file, or a folder of them; or stock_prices (in bokeh-sampledata).
        gaps: missing times: keep (rows are taken as equally spaced), refuse or fill (rows without values are put in).
    """

    data: str = "stock_prices"
    gaps: Gaps = "keep"


class TokenizerTask(ZooTask):
    """The tokenizer's loss on windows."""

    tokenizer: Any

    def loss(self, images: Tensor, labels: Tensor, *rest: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        del labels
        found: tuple[Tensor, dict[str, Tensor]] = self.tokenizer.objective(
            rescaled(images, rest[1]), rest[-2]
        )
        return found


class Candles(Forecasting):
    """Tables of candles."""

    options: ClassVar[type] = CandleOptions
    # Without volumes two columns are zeros.
    must_vary: ClassVar[tuple[str, ...] | None] = PRICES

    def read(self, options: Any, **more: Any) -> list[Series]:
        return [candles(one) for one in super().read(options, **more)]

    def overrides(self, windows: SeriesWindows, config: Any) -> dict[str, Any]:
        return {}


class TokenizerRecipe(Candles):
    """Candles to tokens and back."""

    defaults: ClassVar[TrainConfig] = TrainConfig(steps=500, batch_size=32, lr=2e-3, weight_decay=0.1)
    sampling: ClassVar[type | None] = None
    task: ClassVar[type[ZooTask]] = TokenizerTask
    trained: ClassVar[str] = "tokenizer"

    def networks(self, start: Any, options: Any, train: SeriesWindows, shape: Any) -> dict[str, Any]:
        return {"tokenizer": start.fresh()}

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        networks, facts = load_checkpoint(checkpoint)
        model = networks["tokenizer"].eval()
        options = self.options(**facts["options"])
        windows = self.windows(self.read(options), model, options, "test")
        window = windows[len(windows) - 1]
        values = rescaled(window.values[None], window.std[None])
        with torch.no_grad():
            found = model(values)

        def draw(figure: Any) -> None:
            axes = figure.subplots(2, 3).flatten()
            for c, axis in enumerate(axes):
                axis.plot(values[0, :, c], color="black", linewidth=1, label="candles")
                axis.plot(found.coarse[0, :, c], color="C1", linewidth=1, label="coarse token")
                axis.plot(found.full[0, :, c], color="C0", linewidth=1, label="both tokens")
                axis.set_title(CANDLE[c], fontsize=9)
                axis.tick_params(labelsize=7)
            axes[0].legend(fontsize=7)

        save_figure(draw, out / PICTURE, (10.0, 5.0))
        return [f"picture: {out / PICTURE}", f"next: arcore train kronos_tiny --tokenizer {out}"]


def stock_windows(context: int, horizon: int, split: Any) -> SeriesWindows:
    """Windows of the stock prices of bokeh-sampledata."""
    series = [candles(one) for one in load_series("stock_prices", gaps="keep")]
    return SeriesWindows(
        series, length=context + horizon, horizon=horizon, split=split, held_out=0.2, normalise="window"
    )


def stock_batch(windows: SeriesWindows, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Some windows as the tokenizer reads them, `[count, L, 6]`, and their calendars."""
    chosen = torch.randint(len(windows), (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    picked = [windows[i] for i in chosen]
    values = rescaled(torch.stack([w.values for w in picked]), torch.stack([w.std for w in picked]))
    return values, torch.stack([w.calendar for w in picked])


def trained_on_stocks(steps: int = 150) -> tuple[Any, Tensor]:
    """A tiny tokenizer trained on the first part of the stock prices, and held-out windows."""
    from arcore.zoo.series.kronos_tokenizer import KronosTokenizer, kronos_tokenizer_tiny

    config = kronos_tokenizer_tiny()
    windows = stock_windows(config.context, config.horizon, "train")
    torch.manual_seed(0)
    model = KronosTokenizer(config)

    def objective(values: Tensor, dates: Tensor) -> tuple[Tensor, Any]:
        return model.objective(values.clamp(-5, 5), dates)

    fit(model, windows, count=steps, batch=16, lr=2e-3, what="training the tokenizer", objective=objective)
    held_out, _ = stock_batch(stock_windows(config.context, config.horizon, "test"), 128)
    return model, held_out


RECIPE = TokenizerRecipe()
