"""How a run begins: with fresh weights, or with the settings of the run that it continues."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from arcore.models import create_model
from arcore.training.config import FREE_ON_RESUME, TrainConfig
from arcore.training.stream import derive_seed


def fresh(preset: str, config: TrainConfig, **overrides: Any) -> nn.Module:
    """A network with the initial weights that the run's seed gives."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "weights", preset))
        return create_model(preset, **overrides)


def resumed(
    source: Path,
    meta: Mapping[str, Any],
    preset: str,
    data: str | None,
    settings: Mapping[str, Any],
    names: Sequence[str],
) -> tuple[dict[str, Any], TrainConfig]:
    """Facts and settings of a run that goes on.

    Args:
        source: checkpoint folder.
        meta: its config.json.
        preset: what the caller wants to train.
        data: what the caller wants to train on; None leaves that to the checkpoint.
        settings: what the caller wants to be different.
        names: of the facts.

    Raises:
        ValueError: a fact is missing, or the caller wants what would change the result.
    """
    try:
        facts = {name: meta[name] for name in names}
        before = TrainConfig(**{name: _tuple(value) for name, value in meta["training"].items()})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{source} holds no training run that could go on: its config.json lacks {error}"
        ) from error
    if facts["preset"] != preset:
        raise ValueError(
            f"the run in {source} trains {facts['preset']}, not {preset}: name that preset, or start a new run"
        )
    if data not in (None, facts["data"]):
        raise ValueError(f"the run in {source} uses the data {facts['data']!r}, not {data!r}")
    for name, value in settings.items():
        if name not in FREE_ON_RESUME and value != getattr(before, name):
            raise ValueError(
                f"the run in {source} was started with {name}={getattr(before, name)}, which cannot become {value} "
                "on resume: leave the option out, or start a new run in another folder"
            )
    return facts, dataclasses.replace(before, **settings)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
