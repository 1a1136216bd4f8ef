"""`arcore train`"""

from __future__ import annotations

import ast
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcore.cli._output import check_folder
from arcore.cli._parse import Group, parse_groups

if TYPE_CHECKING:
    from arcore.recipes import Recipe
    from arcore.training import FitResult

TEXT = """\
Train a model of the zoo on your images, videos, text or tables.

Example: arcore train var_tiny --data digits --out out/digits

Example: arcore train mamba_tiny --data book.txt --out out/book

The run folder receives checkpoints (step-*/), metrics.csv and run.json. After Ctrl-C or an error the printed command
goes on from the last checkpoint and ends with the same weights, bit for bit, as a run that never stopped.
"""
MORE = "`arcore zoo` lists the presets; `arcore train PRESET --help` shows what that one takes, with its defaults."


@dataclass(frozen=True)
class RunOptions:
    """A run.

    Attributes:
        preset: what to train, for example var_tiny or msvq_tiny.
        out: run folder. Default: out/PRESET, or the resumed run.
        resume: run folder or checkpoint to continue; its settings and options hold.
        init_from: run folder, checkpoint or published weights that a new run starts from. Default: random weights.
        set: fields of the model's config that differ from the preset's, e.g. depth=8; `arcore zoo PRESET` lists them.
    """

    preset: str | None = field(default=None, metadata={"positional": True, "metavar": "PRESET"})
    out: Path | None = None
    resume: Path | None = None
    init_from: Path | None = None
    set: tuple[str, ...] | None = field(default=None, metadata={"metavar": "NAME=VALUE"})


def main(argv: Sequence[str]) -> int:
    from arcore.recipes import recipe_for, train

    named = _preset(argv)
    recipe = recipe_for(named) if named else None
    if recipe is None and not {"-h", "--help"} & set(argv):
        got = f", but got {' '.join(argv)}" if argv else ""
        raise ValueError(f"name a PRESET first, for example `arcore train var_tiny` (see `arcore zoo`){got}")
    chosen = parse_groups(f"train {named}" if named else "train", *_help(named, recipe), argv)
    run = chosen["run"]
    assert recipe is not None, "help ends the program"
    preset: str = run["preset"]
    out = run.get("out") or _run_folder(run.get("resume")) or Path("out") / preset
    check_folder(out)
    try:
        result = train(
            preset,
            out=out,
            resume=run.get("resume"),
            init_from=run.get("init_from"),
            settings=chosen["training"],
            model_settings=dict(map(_setting, run.get("set", ()))),
            **chosen["recipe"],
        )
    except (KeyboardInterrupt, SystemExit):
        # Lightning turns Ctrl-C into SystemExit.
        print(f"arcore train: interrupted: {_how_to_go_on(preset, out)}", file=sys.stderr)
        return 130
    except Exception as error:
        _say_how_to_go_on(preset, out, error)
        raise
    if result.rank == 0:
        _report(recipe, preset, out, result)
    return 0


def _help(preset: str | None, recipe: Recipe | None) -> tuple[str, dict[str, Group]]:
    """The help text and the groups of options of a preset; without one, what all have in common."""
    from arcore.training.config import TrainConfig

    groups = {"run": Group(RunOptions)}
    if recipe is None:
        return f"{TEXT}\n{MORE}", groups
    groups["recipe"] = Group(recipe.options)
    groups["training"] = Group(TrainConfig, defaults=vars(recipe.defaults))
    text = TEXT.replace("var_tiny --data digits --out out/digits", f"{preset} --out out/{preset}", 1)
    return text, groups


def _preset(argv: Sequence[str]) -> str | None:
    """The preset among the arguments: the first word, or the one that names a preset."""
    if argv and not argv[0].startswith("-"):
        return argv[0]
    from arcore.catalog import list_models

    known = set(list_models())
    return next((word for word in argv if word in known), None)


def _setting(text: str) -> tuple[str, Any]:
    """`depth=8` as a name and a value."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"--set expects NAME=VALUE such as depth=8 but got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _report(recipe: Recipe, preset: str, out: Path, result: FitResult) -> None:
    from arcore.training.checkpoint import read_meta

    if not result.steps:
        step = read_meta(result.checkpoint)["step"]
        print(f"{preset}: nothing to do, the run is at step {step} already; --steps N goes on to step N")
    last = result.history[-1] if result.history else {}
    if last and result.steps:
        figures = ", ".join(
            f"{name} {value:.4g}" for name, value in last.items() if name not in ("step", "split")
        )
        early = ", stopped early: the held-out loss falls no more" if result.stopped_early else ""
        print(f"{preset}: step {last['step']}, {last['split']} {figures}{early}")
    print(f"checkpoint: {result.checkpoint}")
    # A run that was finished before wrote nothing into another folder.
    for line in recipe.finish(result.checkpoint, out if result.steps else result.checkpoint.parent):
        print(line)


def _say_how_to_go_on(preset: str, out: Path, error: Exception) -> None:
    """After an error of a run that can be resumed: the command, before the error's own line."""
    from arcore.training.checkpoint import begun
    from arcore.training.guard import Diverged
    from arcore.training.run_folder import started_here

    if begun(out) and started_here(out) and not isinstance(error, Diverged):
        print(f"arcore train: {_how_to_go_on(preset, out)}", file=sys.stderr)


def _how_to_go_on(preset: str, out: Path) -> str:
    from arcore.training.checkpoint import begun, steps_of

    if not begun(out):
        return "there was no checkpoint yet"
    saved = steps_of(out) or any(out.glob("*/step-*"))  # of what is trained first
    where = (
        "go on from the last checkpoint"
        if saved
        else "nothing is saved yet; begin again, with the same settings,"
    )
    return f"{where} with: {shlex.join(['arcore', 'train', preset, '--resume', str(out)])}"


def _run_folder(resume: Path | None) -> Path | None:
    """The run that a checkpoint belongs to."""
    if resume is None:
        return None
    return resume.parent if resume.name.startswith("step-") or resume.name == "best" else resume
