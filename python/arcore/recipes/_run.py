"""Training a preset by its recipe, from nothing or from where a run stopped."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from arcore.catalog import load_checkpoint
from arcore.data.identity import place
from arcore.nn.checks import check_instance, check_path
from arcore.recipes._recipe import Recipe, Start, recipe_for
from arcore.training import checkpoint
from arcore.training.checks import refuse_unknown
from arcore.training.config import FREE_ON_RESUME, TrainConfig
from arcore.training.engine import FitResult, fit
from arcore.training.run_folder import read_record, run_folder


def train(
    preset: str,
    *,
    out: str | Path,
    resume: str | Path | None = None,
    init_from: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    model_settings: Mapping[str, Any] | None = None,
    show_progress: bool = True,
    **options: Any,
) -> FitResult:
    """Train a preset.

    Args:
        preset: for example `"var_tiny"` or `"msvq_tiny"`.
        out: run folder.
        resume: run folder or checkpoint to continue from. Settings, options and data are read from there; the
            settings in `arcore.training.config.FREE_ON_RESUME` may be changed, and `data` may say where the same data
            are now. A run that stopped before its first checkpoint, or while it trained its tokenizer, goes on too.
        init_from: run folder, checkpoint or published weights that a new run starts from.
        settings: fields of `TrainConfig` that differ from the defaults of the recipe.
        model_settings: fields of the model's config that differ from the preset's; None leaves the preset's.
        show_progress: show progress bars, and say what was inferred.
        **options: fields of the recipe's options, for example `data="my_images/"`; None leaves the default.

    Returns:
        The last checkpoint and the logged figures.

    Raises:
        ValueError: unknown preset, setting or option, unusable data, settings out of range or changed on resume,
            damaged checkpoint.
        OSError: a file cannot be read or written.
    """
    for name, value in (("resume", resume), ("init_from", init_from)):
        if value is not None:
            check_path(name, value)
    for name, table in (("settings", settings), ("model_settings", model_settings)):
        if table is not None:
            check_instance(name, table, Mapping, "; name each, as in {'steps': 100}")
    out = check_path("out", out)
    recipe = recipe_for(preset)
    settings, changes, chosen = (
        {name: value for name, value in (given or {}).items() if value is not None}
        for given in (settings, model_settings, options)
    )
    refuse_unknown("the settings of a run", settings, _names(TrainConfig))
    refuse_unknown(f"the options of {preset}", chosen, _names(recipe.options))
    if "steps" in settings and "epochs" in settings:
        raise ValueError("give the length of the run as steps or as epochs, not as both")
    if resume is not None:
        if init_from is not None:
            raise ValueError("init_from is for a new run, and this one is resumed: leave one of them out")
        start, picked = _resumed(recipe, preset, Path(resume), out, settings, changes, chosen, show_progress)
    else:
        start = Start(
            preset=preset,
            config=dataclasses.replace(recipe.defaults, **settings),
            out=out,
            changes=changes,
            init_from=None if init_from is None else Path(init_from),
            show_progress=show_progress,
        )
        picked = recipe.options(**chosen)
    facts = {
        "preset": preset,
        "options": {name: place(value) for name, value in dataclasses.asdict(picked).items()},
        "model_settings": dict(start.changes),
        "training": dataclasses.asdict(start.config),
        "init_from": place(start.init_from),
    }

    def refuse_a_second_run() -> None:
        if resume is None and checkpoint.begun(out):
            raise ValueError(
                f"{out} already holds a run: continue it with --resume {shlex.quote(str(out))}, or choose another --out"
            )

    with run_folder(out, facts, refuse_a_second_run):
        work = recipe.prepare(start, picked)
        work.task.run_facts = {name: facts[name] for name in ("options", "model_settings")}
        return fit(
            work.task,
            work.train,
            out,
            test=work.test,
            resume=start.source,
            title=preset,
            show_progress=show_progress,
        )


def _resumed(
    recipe: Recipe,
    preset: str,
    resume: Path,
    out: Path,
    settings: Mapping[str, Any],
    changes: Mapping[str, Any],
    chosen: Mapping[str, Any],
    show_progress: bool,
) -> tuple[Start, Any]:
    """What a run that goes on begins with, and its options."""
    source: Path | None = None
    networks: dict[str, nn.Module] = {}
    record = read_record(resume) if checkpoint.newest(resume) is None else None
    if record is None:
        source = checkpoint.find(resume)
        networks, record = load_checkpoint(source)
    where = source or resume
    try:
        before = TrainConfig(**record["training"])
        found, options, changed = record["preset"], dict(record["options"]), dict(record["model_settings"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where} holds no training run that could go on: its record lacks or has a strange {error}"
        ) from error
    if found != preset:
        raise ValueError(
            f"the run in {where} trains {found}, not {preset}: name that preset, or start a new run"
        )
    for name, value in settings.items():
        if name not in FREE_ON_RESUME:
            _refuse_change(where, name, getattr(before, name), value)
    for name, value in changes.items():
        _refuse_change(where, name, changed.get(name, "the preset's"), value)
    for name, value in chosen.items():
        if name not in recipe.movable:
            _refuse_change(where, name, options.get(name), place(value))
    if "steps" in settings:
        settings = {"epochs": None, **settings}
    start = Start(
        preset=preset,
        config=dataclasses.replace(before, **settings),
        out=out,
        changes=changed,
        networks=networks,
        facts=record if source else {},
        source=source,
        init_from=Path(record["init_from"]) if source is None and record.get("init_from") else None,
        show_progress=show_progress,
    )
    return start, recipe.options(**{**options, **chosen})


def _refuse_change(where: Path, name: str, before: Any, after: Any) -> None:
    if before != after and before != (list(after) if isinstance(after, tuple) else after):
        raise ValueError(
            f"the run in {where} was started with {name}={before}, which cannot become {after} on resume: leave the "
            "option out, or start a new run in another folder"
        )


def _names(options: type) -> list[str]:
    return [field.name for field in dataclasses.fields(options)]
