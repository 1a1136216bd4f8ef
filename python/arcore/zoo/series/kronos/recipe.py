"""Training Kronos on candles, and drawing paths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from arcore.catalog import create_model, get_config, load_checkpoint
from arcore.catalog.hub import HUB, fetch
from arcore.catalog.lookup import find, load
from arcore.data.series import SeriesWindows
from arcore.decoding.sampling import Sampling
from arcore.nn.kinds import check_kinds
from arcore.recipes._recipe import PACKAGE, Start, ZooTask
from arcore.recipes.forecasting import ForecastSampling
from arcore.training import checkpoint
from arcore.training.config import TrainConfig
from arcore.zoo.series._ohlcv import CLIP, EPS, rescaled
from arcore.zoo.series.kronos.generating import generate_paths
from arcore.zoo.series.kronos_tokenizer.recipe import CandleOptions, Candles

TOKENIZER_FOLDER = "tokenizer"


@check_kinds
@dataclass(frozen=True, kw_only=True)
class KronosOptions(CandleOptions):
    """Candles, and the tokenizer.

    Attributes:
        tokenizer: run folder or checkpoint of a trained tokenizer, or published weights of the preset's. Default: the
            preset's is trained first, into OUT/tokenizer.
        tokenizer_steps: steps of a tokenizer that is trained first. Default: its recipe's.
    """

    tokenizer: Path | None = None
    tokenizer_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer_steps is not None and (self.tokenizer is not None or self.tokenizer_steps < 1):
            raise ValueError("tokenizer_steps must be at least 1 and means nothing with a trained tokenizer")


@check_kinds
@dataclass(frozen=True, kw_only=True)
class KronosSampling(ForecastSampling):
    """Paths of candles.

    Attributes:
        tokenizer: weights of the tokenizer, for a model with published weights: a file or folder, or hub. Default: the
            folder `tokenizer` in the folder of the weights.
        lookback: rows that are read. Default: as many as it was trained on; of published weights as many as the model
            is made for, less the horizon.
        temperature: above 1 draws more varied tokens, below 1 likelier ones; 0 takes the likeliest.
        top_k: keep the K likeliest tokens of each draw. Default: all.
        top_p: keep the smallest set of tokens with this much probability, 0 to 1.
    """

    tokenizer: Path | None = None
    lookback: int | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        if self.lookback is not None and self.lookback < 2:
            raise ValueError(f"--lookback must be at least 2 but got {self.lookback}")


class KronosTask(ZooTask):
    """Cross entropies of both tokens; the tokenizer stays as it is."""

    model: Any
    tokenizer: Any

    def __init__(
        self, config: TrainConfig, networks: Mapping[str, nn.Module], facts: Mapping[str, Any]
    ) -> None:
        super().__init__(config, networks, facts)
        self.tokenizer.requires_grad_(False)

    def train(self, mode: bool = True) -> KronosTask:
        super().train(mode)
        self.tokenizer.eval()
        return self

    def loss(self, images: Tensor, labels: Tensor, *rest: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        del labels
        s1, s2 = self.tokenizer.encode(rescaled(images, rest[1]))
        found: tuple[Tensor, dict[str, Tensor]] = self.model.objective(s1, s2, rest[-2])
        return found


class KronosRecipe(Candles):
    """Candles token by token."""

    defaults: ClassVar[TrainConfig] = TrainConfig(
        steps=500, batch_size=32, lr=1e-3, weight_decay=0.1, clip=3.0, checkpoint_every=100
    )
    options: ClassVar[type] = KronosOptions
    sampling: ClassVar[type | None] = KronosSampling
    task: ClassVar[type[ZooTask]] = KronosTask
    movable: ClassVar[tuple[str, ...]] = ("data", "tokenizer")
    scored_paths: ClassVar[int] = 8

    def networks(self, start: Start, options: Any, train: SeriesWindows, shape: Any) -> dict[str, Any]:
        tokenizer = _tokenizer(start, options)
        bits = {"s1_bits": tokenizer.config.s1_bits, "s2_bits": tokenizer.config.s2_bits}
        return {"model": start.fresh(**bits), "tokenizer": tokenizer}

    def published(self, preset: str, weights: Path, options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        if str(weights) == PACKAGE:
            return super().published(preset, weights, options)
        name = tokenizer_preset(preset)
        where = options.tokenizer
        if where is None:
            where = (weights if weights.is_dir() else weights.parent) / TOKENIZER_FOLDER
            if not where.exists():
                raise FileNotFoundError(
                    f"{preset} draws tokens: put the weights of {name} into {where}, or give them with --tokenizer "
                    "FOLDER (or --tokenizer hub)"
                )
        where = fetch(name) if str(where) == HUB else where
        networks = {
            "model": create_model(preset, weights=weights),
            "tokenizer": create_model(name, weights=where),
        }
        # Published models were trained on candles with dates.
        return networks, {"preset": preset, "published": True, "dates": True}

    def default_sampling(self) -> Any:
        return KronosSampling(num=self.scored_paths)

    def reads(self, model: Any, facts: Mapping[str, Any], horizon: int, options: Any, rows: int) -> int:
        if options.lookback is not None:
            return int(options.lookback)
        # Published models were trained on windows up to the longest; ours on windows of the context.
        longest = model.max_length - horizon if model.max_length > horizon else model.max_length
        return max(2, min(rows, longest if facts.get("published") else model.context))

    def moments(self, model: Any, facts: Mapping[str, Any], tail: Tensor) -> tuple[Tensor, Tensor]:
        return tail.mean(0), tail.std(0, correction=0) + EPS

    def paths(
        self, networks: Mapping[str, Any], values: Tensor, dates: Tensor, horizon: int, options: Any
    ) -> Tensor:
        return generate_paths(
            networks["model"],
            networks["tokenizer"],
            values.clamp(-CLIP, CLIP),
            dates,
            horizon,
            paths=options.num or 1,
            seed=[options.seed] * len(values),
            sampling=Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p),
        ).values


def tokenizer_preset(preset: str) -> str:
    """The preset of the tokenizer that a preset of Kronos was made for."""
    return str(load(find(preset).entry.presets[preset], preset).preset.tokenizer)


def _tokenizer(start: Start, options: KronosOptions) -> Any:
    """The tokenizer that is given, or one that is trained now."""
    from arcore.recipes._run import train

    name = tokenizer_preset(start.preset)
    given = options.tokenizer
    if given is not None:
        is_run = given.is_dir() and (
            checkpoint.newest(given) is not None or (given / "tokenizer.safetensors").exists()
        )
        if not is_run:
            return create_model(name, weights=given)
        networks, _ = load_checkpoint(checkpoint.find(given))
        if type(networks.get("tokenizer")) is not type(create_model("kronos_tokenizer_tiny")):
            raise ValueError(f"{given} holds no tokenizer of candles but {', '.join(networks)}")
        return networks["tokenizer"]
    out = start.out / TOKENIZER_FOLDER
    begun = checkpoint.begun(out)
    steps = {} if options.tokenizer_steps is None else {"steps": options.tokenizer_steps}
    shape = get_config(start.preset, **start.changes)
    start.say(f"{start.preset} reads candles as tokens: the tokenizer {name} is trained first, into {out}")
    fields = (
        "data",
        "time",
        "group",
        "columns",
        "unsorted",
        "gaps",
        "missing",
        "held_out_share",
        "validation_share",
    )
    result = train(
        name,
        out=out,
        resume=out if begun else None,
        settings={
            **steps,
            **({} if begun else {"seed": start.config.seed, "accelerator": start.config.accelerator}),
        },
        model_settings={} if begun else {"context": shape.context, "horizon": shape.horizon},
        show_progress=start.show_progress,
        **({} if begun else {field: getattr(options, field) for field in fields}),
    )
    return load_checkpoint(result.checkpoint)[0]["tokenizer"]


RECIPE = KronosRecipe()
