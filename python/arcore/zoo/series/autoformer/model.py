"""Autoformer: settings, network, presets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import preset
from arcore.nn.kinds import check_kinds

# Largest values of minute, hour, weekday, day and month, and their smallest.
_MOST = (59.0, 23.0, 6.0, 31.0, 12.0)
_LEAST = (0.0, 0.0, 0.0, 1.0, 1.0)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class AutoformerConfig:
    """Settings of `Autoformer`.

    Attributes:
        channels: columns C.
        context: rows L that are read.
        horizon: rows that one pass predicts.
        label: rows before the forecast that the decoder starts with, at most `context`.
        dim: width D.
        num_heads: heads H.
        hidden_dim: width of the feed-forward networks.
        encoder_layers: layers of the encoder.
        decoder_layers: layers of the decoder.
        factor: the best `factor * ln(L)` delays are taken.
        moving_average: rows of the moving average, odd.
        dropout: of embeddings and of what layers add.

    Raises:
        ValueError: a size is out of range.
    """

    channels: int = 7
    context: int = 96
    horizon: int = 96
    label: int = 48
    dim: int = 512
    num_heads: int = 8
    hidden_dim: int = 2048
    encoder_layers: int = 2
    decoder_layers: int = 1
    factor: int = 3
    moving_average: int = 25
    dropout: float = 0.05

    def __post_init__(self) -> None:
        if (
            min(
                self.channels,
                self.context,
                self.horizon,
                self.encoder_layers,
                self.decoder_layers,
                self.factor,
            )
            < 1
        ):
            raise ValueError("expected channels, context, horizon, layers and factor to be at least 1")
        if not 0 <= self.label <= self.context:
            raise ValueError(f"expected label from 0 to context={self.context} but got {self.label}")
        if self.moving_average < 1 or self.moving_average % 2 == 0:
            raise ValueError(f"expected an odd moving_average but got {self.moving_average}")
        if self.num_heads < 1 or self.dim % self.num_heads:
            raise ValueError(f"expected num_heads to divide dim={self.dim} but got {self.num_heads}")

    @property
    def normalise(self) -> str:
        """By the training rows, as channels are mixed."""
        return "train"


class Parts(NamedTuple):
    """A series `[B, L, D]` as the sum of two."""

    season: Tensor
    trend: Tensor


def decompose(x: Tensor, width: int) -> Parts:
    """Split `[B, L, D]` into its moving average over `width` rows, ends repeated, and the rest; their sum is `x`."""
    side = (width - 1) // 2
    padded = F.pad(x.transpose(1, 2), (side, side), mode="replicate")
    trend = F.avg_pool1d(padded, width, stride=1).transpose(1, 2)
    return Parts(x - trend, trend)


def correlation(q: Tensor, k: Tensor) -> Tensor:
    """Circular correlation over time, `sum_t q[t + delay] k[t]`, of `[..., L]` each, by Fourier transforms."""
    spectrum = torch.fft.rfft(q, dim=-1) * torch.fft.rfft(k, dim=-1).conj()
    return torch.fft.irfft(spectrum, n=q.shape[-1], dim=-1)


def top_delays(scores: Tensor, factor: int, *, shared: bool) -> tuple[Tensor, Tensor]:
    """The best delays.

    Args:
        scores: correlations `[B, L]`.
        factor: `factor * ln(L)` delays K are taken, at least one.
        shared: the batch shares them.

    Returns:
        Delays int64 `[B, K]` and weights `[B, K]` that sum to one.
    """
    count = max(1, min(scores.shape[-1], int(factor * math.log(scores.shape[-1]))))
    if shared:
        delays = scores.mean(0).topk(count).indices.expand(len(scores), -1)
        return delays, scores.gather(1, delays).softmax(-1)
    best = scores.topk(count, dim=-1)
    return best.indices, best.values.softmax(-1)


class AutoCorrelation(nn.Module):
    """Mixes rows by the delays at which queries and keys correlate most.

    Args:
        config: settings.
    """

    def __init__(self, config: AutoformerConfig) -> None:
        super().__init__()
        self.factor = config.factor
        self.query, self.key, self.value, self.out = (nn.Linear(config.dim, config.dim) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Rows `[B, L, D]` that look at `[B, S, D]`, cut or filled up with zeros to L, to `[B, L, D]`."""
        length = x.shape[1]
        delays, weights = top_delays(self.scores(x, context), self.factor, shared=self.training)
        # One circular convolution does all rolls and their weighted sum: row t gets values at t + delay.
        kernel = torch.zeros(len(x), length, device=x.device, dtype=weights.dtype).scatter_add(
            1, delays, weights
        )
        values = _fitted(self.value(context), length).transpose(1, 2)
        mixed = correlation(values, kernel.unsqueeze(1)).transpose(1, 2)
        out: Tensor = self.out(mixed.to(x.dtype))
        return out

    def scores(self, x: Tensor, context: Tensor) -> Tensor:
        """Correlations `[B, L]` by delay, mean over heads and channels."""
        q, k = self.query(x), _fitted(self.key(context), x.shape[1])
        # The mean over channels is taken in the frequency domain: one transform back instead of D.
        spectrum = (torch.fft.rfft(q, dim=1) * torch.fft.rfft(k, dim=1).conj()).mean(-1)
        return torch.fft.irfft(spectrum, n=x.shape[1], dim=-1)


def _fitted(x: Tensor, length: int) -> Tensor:
    return F.pad(x, (0, 0, 0, length - x.shape[1])) if x.shape[1] < length else x[:, :length]


class SeasonNorm(nn.Module):
    """A layer norm that leaves no mean over time.

    Args:
        dim: width.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, L, D]` to `[B, L, D]`."""
        x = self.norm(x)
        return x - x.mean(1, keepdim=True)


class Layer(nn.Module):
    """Auto-correlation and a feed-forward network, behind each of which the trend is split off.

    Args:
        config: settings.
        cross: with a second auto-correlation to the encoder's rows, and the trends handed out, as in the decoder.
    """

    def __init__(self, config: AutoformerConfig, *, cross: bool) -> None:
        super().__init__()
        self.width, self.dropout = config.moving_average, config.dropout
        self.own = AutoCorrelation(config)
        self.cross = AutoCorrelation(config) if cross else None
        self.up = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.down = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.to_trend = circular(config.dim, config.channels) if cross else None

    def forward(self, x: Tensor, encoded: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """`[B, L, D]` to `[B, L, D]`, and in the decoder the trends `[B, L, C]`."""

        def drop(y: Tensor) -> Tensor:
            return F.dropout(y, self.dropout, self.training)

        x, total = decompose(x + drop(self.own(x, x)), self.width)
        if self.cross is not None and encoded is not None:
            x, trend = decompose(x + drop(self.cross(x, encoded)), self.width)
            total = total + trend
        x, trend = decompose(x + drop(self.down(drop(F.gelu(self.up(x))))), self.width)
        if self.to_trend is None:
            return x, None
        return x, self.to_trend((total + trend).transpose(1, 2)).transpose(1, 2)


def circular(inputs: int, outputs: int) -> nn.Conv1d:
    """A convolution over three rows of a circle, without bias."""
    return nn.Conv1d(inputs, outputs, 3, padding=1, padding_mode="circular", bias=False)


class Embedding(nn.Module):
    """Rows and their calendar, without positions.

    Args:
        config: settings.
    """

    def __init__(self, config: AutoformerConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.value = circular(config.channels, config.dim)
        self.calendar = nn.Linear(len(_MOST), config.dim, bias=False)
        if not self.value.weight.is_meta:
            nn.init.kaiming_normal_(self.value.weight, mode="fan_in", nonlinearity="leaky_relu")

    def forward(self, values: Tensor, calendar: Tensor) -> Tensor:
        """`[B, L, C]` and int64 `[B, L, 5]` to `[B, L, D]`."""
        least, most = values.new_tensor(_LEAST), values.new_tensor(_MOST)
        features = (calendar - least) / (most - least) - 0.5
        x = self.value(values.transpose(1, 2)).transpose(1, 2) + self.calendar(features)
        return F.dropout(x, self.dropout, self.training)


@check_kinds
class Autoformer(nn.Module):
    """The forecaster. A `ForecastModel` (`arcore.recipes.forecasting`).

    Args:
        config: settings.
    """

    def __init__(self, config: AutoformerConfig) -> None:
        super().__init__()
        self.config = config
        self.context, self.horizon, self.normalise = config.context, config.horizon, config.normalise
        self.embed_past, self.embed_start = Embedding(config), Embedding(config)
        self.encoder = nn.ModuleList(Layer(config, cross=False) for _ in range(config.encoder_layers))
        self.encoder_norm = SeasonNorm(config.dim)
        self.decoder = nn.ModuleList(Layer(config, cross=True) for _ in range(config.decoder_layers))
        self.decoder_norm = SeasonNorm(config.dim)
        self.head = nn.Linear(config.dim, config.channels)

    @check_kinds
    def forward(self, values: Tensor, calendar: Tensor) -> Parts:
        """Season and trend of the next rows, which add up to the forecast.

        Args:
            values: `[B, context, C]`.
            calendar: int64 `[B, context + horizon, 5]`.

        Returns:
            `[B, horizon, C]` each.

        Raises:
            ValueError: a shape is wrong.
        """
        config, length = self.config, values.shape[1]
        total = config.context + config.horizon
        if values.shape[1:] != (config.context, config.channels) or calendar.shape != (len(values), total, 5):
            raise ValueError(
                f"expected values [B, {config.context}, {config.channels}] and a calendar [B, {total}, 5] but got "
                f"{tuple(values.shape)} and {tuple(calendar.shape)}"
            )
        season, trend = decompose(values, config.moving_average)
        start = length - config.label
        future = values.mean(1, keepdim=True).expand(-1, config.horizon, -1)
        trend = torch.cat([trend[:, start:], future], dim=1)
        season = F.pad(season[:, start:], (0, 0, 0, config.horizon))
        encoded = self.encode(values, calendar[:, :length])
        x = self.embed_start(season, calendar[:, start:])
        for layer in self.decoder:
            x, more = layer(x, encoded)
            trend = trend + more
        x = self.head(self.decoder_norm(x))
        return Parts(x[:, -config.horizon :], trend[:, -config.horizon :])

    @check_kinds
    def encode(self, values: Tensor, calendar: Tensor) -> Tensor:
        """What the encoder makes of rows: `[B, L, C]` and `[B, L, 5]` to `[B, L, D]`."""
        x = self.embed_past(values, calendar)
        for layer in self.encoder:
            x, _ = layer(x)
        out: Tensor = self.encoder_norm(x)
        return out

    def delays(self, values: Tensor, calendar: Tensor) -> tuple[Tensor, Tensor]:
        """The best delays of the first layer and their weights, `[B, K]` each, for people to look at."""
        first: Any = self.encoder[0]
        x = self.embed_past(values, calendar)
        return top_delays(first.own.scores(x, x), self.config.factor, shared=False)

    def objective(self, values: Tensor, calendar: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of the next rows of windows `[B, context + horizon, C]`."""
        season, trend = self(values[:, : self.context], calendar)
        error = (season + trend - values[:, self.context :]).square().mean()
        return error, {}

    @check_kinds
    def forecast(self, values: Tensor, calendar: Tensor, horizon: int) -> Tensor:
        """The next rows, `[B, context, C]` to `[B, horizon, C]`; beyond the config's horizon the forecast goes on."""
        if not len(values):
            return values.new_zeros(0, horizon, self.config.channels)
        made: list[Tensor] = []
        while len(made) * self.horizon < horizon:
            begin = len(made) * self.horizon
            dates = calendar[:, begin : begin + self.context + self.horizon]
            # Rows behind the last one asked for have no calendar; they are cut off below.
            missing = self.context + self.horizon - dates.shape[1]
            dates = torch.cat([dates, dates[:, -1:].expand(-1, missing, -1)], dim=1)
            window = torch.cat([values, *made], dim=1)[:, -self.context :]
            season, trend = self(window, dates)
            made.append(season + trend)
        return torch.cat(made, dim=1)[:, :horizon] if made else values[:, :0]

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the released code, trained with `timeF` in minutes, under our names."""
        names: dict[str, str] = {}
        for theirs, ours in (("enc_embedding", "embed_past"), ("dec_embedding", "embed_start")):
            names[f"{theirs}.value_embedding.tokenConv"] = f"{ours}.value"
            names[f"{theirs}.temporal_embedding.embed"] = f"{ours}.calendar"
        names |= {f"{part}.norm.layernorm": f"{part}_norm.norm" for part in ("encoder", "decoder")}
        names["decoder.projection"] = "head"
        mixers = {"attention": "own", "self_attention": "own", "cross_attention": "cross"}
        layers: Sequence[tuple[str, str, int]] = (
            ("encoder.attn_layers", "encoder", len(self.encoder)),
            ("decoder.layers", "decoder", len(self.decoder)),
        )
        for theirs, ours, count in layers:
            for i in range(count):
                names |= {
                    f"{theirs}.{i}.conv{n}": f"{ours}.{i}.{name}" for n, name in ((1, "up"), (2, "down"))
                }
                names[f"{theirs}.{i}.projection"] = f"{ours}.{i}.to_trend"
                for mixer, name in mixers.items():
                    for part in ("query", "key", "value", "out"):
                        names[f"{theirs}.{i}.{mixer}.{part}_projection"] = f"{ours}.{i}.{name}.{part}"
        made = {}
        for key, value in state.items():
            stem, _, part = key.rpartition(".")
            if key.endswith("position_embedding.pe"):
                continue
            squeezed = value.squeeze(-1) if stem.endswith(("conv1", "conv2")) and value.dim() == 3 else value
            made[f"{names[stem]}.{part}" if stem in names else key] = squeezed
        return made


@preset
def autoformer_base() -> AutoformerConfig:
    """The released scripts' for seven channels: windows of 96 rows."""
    return AutoformerConfig()


@preset
def autoformer_tiny() -> AutoformerConfig:
    """Small, one channel unless the table has more: 48 rows to 12, such as months; trains on a CPU in a minute."""
    return AutoformerConfig(
        channels=1,
        context=48,
        horizon=12,
        label=24,
        dim=32,
        num_heads=4,
        hidden_dim=64,
        encoder_layers=1,
        factor=2,
        moving_average=13,
    )
