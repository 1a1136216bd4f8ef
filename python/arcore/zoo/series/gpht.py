"""GPHT: forecasts of any horizon by a generatively pre-trained hierarchical transformer (Liu et al., arXiv:2402.16516).

Every channel is a series of its own. A window, normalised by its own moments, is cut into patches. Stage by stage, the
values are max-pooled less and less, a causal transformer reads the patches, and a head predicts at each patch the next
one; what a stage predicts of a patch is taken from it before the next stage reads it, and the predictions add up. The
loss asks for the next patch at every patch, and longer forecasts append what was predicted and go on.

Left out: the pretraining on the mixture of data sets that the paper collects; several tables in one folder are a
mixture here.

Legend: B windows, L rows, C channels, P patches, S rows of a patch, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import System, preset
from arcore.catalog.claims import Claim, Row, at_most, shaken
from arcore.data.load_series import load_series
from arcore.data.series import SeriesWindows
from arcore.nn.kinds import check_kinds
from arcore.zoo.series._fitting import fit, held_out_errors

SYSTEM = System(
    name="gpht",
    title="GPHT",
    paper="arXiv:2402.16516",
    paper_title="Generative Pretrained Hierarchical Transformer for Time Series Forecasting",
    topic="series",
    kind="model",
    model="GPHT",
    recipe="forecasting",
    summary="Causal transformer over patches at several resolutions; one model forecasts any horizon.",
    claim="On sunspots, El Nino and CO2 its error is at most 0.8 of that of the last value; patches are causal.",
    checked_on="real data",
)

# Added to the variance of a window.
EPS = 1e-5


@check_kinds
@dataclass(frozen=True, kw_only=True)
class GPHTConfig:
    """Settings of `GPHT`.

    Attributes:
        context: rows L that are read, a multiple of `patch`.
        patch: rows S of a patch, a multiple of each of `pools`.
        pools: of each stage, rows that are pooled into one.
        dim: width D.
        num_layers: layers of a stage.
        num_heads: heads.
        hidden_dim: width of the feed-forward networks.
        dropout: of embeddings, attention and feed-forward networks.

    Raises:
        ValueError: sizes do not divide each other.
    """

    context: int = 336
    patch: int = 48
    pools: tuple[int, ...] = (8, 4, 2, 1)
    dim: int = 512
    num_layers: int = 3
    num_heads: int = 8
    hidden_dim: int = 2048
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.patch < 1 or self.context < self.patch or self.context % self.patch:
            raise ValueError(
                f"expected context to be a multiple of patch={self.patch} but got {self.context}"
            )
        if not self.pools or any(pool < 1 or self.patch % pool for pool in self.pools):
            raise ValueError(f"expected pools to divide patch={self.patch} but got {self.pools}")
        if self.num_heads < 1 or self.dim % self.num_heads or self.dim % 2:
            raise ValueError(
                f"expected an even dim that num_heads divides but got {self.dim} and {self.num_heads}"
            )

    @property
    def horizon(self) -> int:
        """Rows that one pass predicts."""
        return self.patch

    @property
    def normalise(self) -> str:
        """Every window by its own moments, so that tables of any columns and scale can be read."""
        return "window"


class CausalLayer(nn.Module):
    """Post-norm transformer layer with causal attention.

    Args:
        config: settings.
    """

    def __init__(self, config: GPHTConfig) -> None:
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)
        self.norm1 = nn.LayerNorm(config.dim)
        self.up = nn.Linear(config.dim, config.hidden_dim)
        self.down = nn.Linear(config.hidden_dim, config.dim)
        self.norm2 = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, P, D]` to `[N, P, D]`."""
        rate = self.dropout if self.training else 0.0
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=rate)
        x = self.norm1(x + F.dropout(self.out(mixed.transpose(1, 2).flatten(2)), rate, self.training))
        hidden = F.dropout(F.gelu(self.up(x)), rate, self.training)
        out: Tensor = self.norm2(x + F.dropout(self.down(hidden), rate, self.training))
        return out


class Stage(nn.Module):
    """Patches at one resolution, read by causal layers; each predicts the patch after it.

    Args:
        config: settings.
        pool: rows that are pooled into one.
    """

    positions: Tensor

    def __init__(self, config: GPHTConfig, pool: int) -> None:
        super().__init__()
        self.pool, self.patch, self.dropout = pool, config.patch, config.dropout
        self.embed = nn.Linear(config.patch // pool, config.dim, bias=False)
        self.layers = nn.ModuleList(CausalLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.patch)
        table = sinusoids(config.context // config.patch, config.dim)
        self.register_buffer("positions", table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """What each patch expects next: `[N, L]` to `[N, L]`."""
        if self.pool > 1:
            x = F.max_pool1d(x.unsqueeze(1), self.pool).squeeze(1)
        hidden = self.embed(x.unflatten(1, (-1, self.patch // self.pool)))
        hidden = F.dropout(hidden + self.positions[: hidden.shape[1]], self.dropout, self.training)
        for layer in self.layers:
            hidden = layer(hidden)
        out: Tensor = self.head(self.norm(hidden)).flatten(1)
        return out


@check_kinds
class GPHT(nn.Module):
    """The forecaster. A `ForecastModel` (`arcore.recipes.forecasting`).

    Args:
        config: settings.
    """

    reads_calendar = False

    def __init__(self, config: GPHTConfig) -> None:
        super().__init__()
        self.config = config
        self.context, self.horizon, self.normalise = config.context, config.horizon, config.normalise
        self.stages = nn.ModuleList(Stage(config, pool) for pool in config.pools)

    @check_kinds
    def forward(self, values: Tensor, moments: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """What each patch of a window expects next.

        Args:
            values: `[B, L, C]`, L a multiple of the patch, at most the context.
            moments: mean and deviation `[B, 1, C]` that the window is normalised with; None takes its own. Only with
                given ones does no patch depend on later ones.

        Returns:
            `[B, L, C]`; the rows of patch p are the forecast of patch p + 1.

        Raises:
            ValueError: the shape is wrong.
        """
        patch = self.config.patch
        if values.dim() != 3 or not patch <= values.shape[1] <= self.context or values.shape[1] % patch:
            raise ValueError(
                f"expected values of shape [B, L, C] with L a multiple of {patch} up to {self.context} but got "
                f"{tuple(values.shape)}"
            )
        if moments is None:
            mean = values.mean(1, keepdim=True)
            moments = mean, ((values - mean).square().mean(1, keepdim=True) + EPS).sqrt()
        mean, std = moments
        batch, _, channels = values.shape
        rest = ((values - mean) / std).transpose(1, 2).flatten(0, 1)
        total = torch.zeros_like(rest)
        for number, stage in enumerate(self.stages):
            out = stage(rest)
            total = total + out
            if number + 1 < len(self.stages):
                rest = rest - F.pad(out[:, :-patch], (patch, 0))
        return total.unflatten(0, (batch, channels)).transpose(1, 2) * std + mean

    def objective(self, values: Tensor, calendar: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of the next patch at every patch.

        Args:
            values: `[B, context + patch, C]`.
            calendar: not read.
        """
        patch = self.config.patch
        error = (self(values[:, :-patch]) - values[:, patch:]).square()
        return error.mean(), {"mse_last": error[:, -patch:].detach().mean()}

    @check_kinds
    def forecast(self, values: Tensor, calendar: Tensor, horizon: int) -> Tensor:
        """The next rows, patch after patch: `[B, context, C]` to `[B, horizon, C]`; the calendar is not read."""
        made: list[Tensor] = []
        while len(made) * self.config.patch < horizon:
            window = torch.cat([values, *made], dim=1)[:, -self.context :]
            made.append(self(window)[:, -self.config.patch :])
        return torch.cat(made, dim=1)[:, :horizon] if made else values[:, :0]

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the released code (`checkpoint.pth`) under our names."""
        ours: dict[str, Tensor] = {}
        left = {key: value for key, value in state.items() if not key.endswith("position_embedding.pe")}
        for s in range(len(self.stages)):
            first = f"encoders.{s}."
            names = {
                "patch_embedding.value_embedding": "embed",
                "encoder.norm": "norm",
                "forecast_head": "head",
            }
            for i in range(self.config.num_layers):
                layer = f"encoder.attn_layers.{i}."
                names |= {f"{layer}norm{n}": f"layers.{i}.norm{n}" for n in (1, 2)}
                names |= {f"{layer}conv1": f"layers.{i}.up", f"{layer}conv2": f"layers.{i}.down"}
                names[f"{layer}attention.out_projection"] = f"layers.{i}.out"
                for part in ("weight", "bias"):
                    keys = [
                        f"{first}{layer}attention.{n}_projection.{part}" for n in ("query", "key", "value")
                    ]
                    if all(key in left for key in keys):
                        ours[f"stages.{s}.layers.{i}.qkv.{part}"] = torch.cat([left.pop(key) for key in keys])
            for theirs, name in names.items():
                for part in ("weight", "bias"):
                    if (found := left.pop(f"{first}{theirs}.{part}", None)) is not None:
                        # Convolutions of width one are linear layers.
                        found = found.squeeze(-1) if ".conv" in theirs and found.dim() == 3 else found
                        ours[f"stages.{s}.{name}.{part}"] = found
        return ours | left


def sinusoids(length: int, dim: int) -> Tensor:
    """Fixed positions `[length, dim]`: sines in even channels, cosines in odd ones."""
    rates = torch.exp(torch.arange(0, dim, 2, device="cpu") * (-math.log(10000.0) / dim))
    angles = torch.arange(length, device="cpu").unsqueeze(1) * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


@preset
def gpht_base() -> GPHTConfig:
    """The paper's: four stages, windows of 336 rows, patches of 48; weights are on the authors' drive."""
    return GPHTConfig()


@preset
def gpht_tiny() -> GPHTConfig:
    """Three small stages over 84 rows in patches of 12, such as a year of months; trains on a CPU in a minute."""
    return GPHTConfig(
        context=84, patch=12, pools=(4, 2, 1), dim=64, num_layers=2, num_heads=4, hidden_dim=128, dropout=0.1
    )


def claim(*, quick: bool) -> Claim:
    """Causal patches, two patches as two steps, and with training the error beside that of the last value."""
    model = shaken(GPHT(GPHTConfig(dim=32, num_layers=1, num_heads=2, hidden_dim=48)), scale=0.05).eval()
    rows = _identities(model)
    if quick:
        return Claim(tuple(rows))
    ratios = []
    for name in ("sunspots", "elnino", "co2"):
        series = load_series(name, missing="linear")
        torch.manual_seed(0)
        trained = GPHT(gpht_tiny())
        windows = SeriesWindows(
            series,
            length=96,
            horizon=12,
            split="train",
            held_out=0.2,
            normalise=trained.normalise,  # type: ignore[arg-type]
        )
        fit(trained, windows, count=300, what=f"training on {name}")
        error, naive = held_out_errors(trained, series, 24)
        ratios.append((name, error / naive))
        rows.append(
            at_most(f"{name}: squared error of 24 rows over that of the last value", error / naive, 0.8)
        )

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        axis.bar([name for name, _ in ratios], [value for _, value in ratios])
        axis.axhline(1, color="black", linewidth=1)
        axis.set_ylabel("squared error / that of the last value")

    return Claim(tuple(rows), draw)


@torch.no_grad()
def _identities(model: GPHT) -> list[Row]:
    values = torch.randn(2, 336, 2).cumsum(1) / 10
    moments = values.mean(1, keepdim=True), values.std(1, keepdim=True)
    before = model(values, moments)
    leak = 0.0
    for p in range(1, 7):
        changed = values.clone()
        changed[:, 48 * p :] += torch.randn(2, 336 - 48 * p, 2)
        leak = max(leak, float((model(changed, moments) - before)[:, : 48 * p].abs().max()))
    dates = torch.zeros(2, 432, 5, dtype=torch.int64)
    whole = model.forecast(values, dates, 96)
    first = model.forecast(values, dates, 48)
    second = model.forecast(torch.cat([values, first], 1)[:, -336:], dates, 48)
    steps = (whole - torch.cat([first, second], 1)).abs().max()
    return [
        at_most("change of earlier patches' outputs, moments given", leak, 1e-6),
        at_most("horizon 96 less two steps of 48", steps, 1e-6),
    ]
