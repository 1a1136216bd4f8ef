"""`arcore sample`"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from arcore.cli._output import check_file, check_folder
from arcore.cli._parse import Group, parse_groups

if TYPE_CHECKING:
    from arcore.recipes import Recipe

TEXT = """\
Draw from a trained model: images or videos of a class, or text that goes on from a prompt.

Example: arcore sample out/demo/checkpoint --class 3 -n 16 --seed 0 --out three.png

Example: arcore sample out/mamba_tiny --prompt "In the beginning" --temperature 0.8

Example: arcore sample mamba_130m --weights FOLDER --prompt "The sea is" (published weights)

The same model, options and seed give the same result.
"""
MORE = "`arcore sample MODEL --help` shows the options of that model: pictures and text have different ones."


@dataclass(frozen=True)
class ModelOptions:
    """The model.

    Attributes:
        model: checkpoint or run folder of arcore train or arcore demo, or a preset to load published weights into.
        checkpoint: the same folder, as an option.
        weights: file or folder of published weights, for a preset; `package` where an installed package ships them,
            `hub` to fetch them from the model hub (extra hub).
        ema: take the moving average of the weights (of a run with --ema).
        device: where to compute: cpu, cuda, cuda:1, ...
        precision: bfloat16 is faster where the device has units for it, and gives other pictures of the same kind; auto
            takes it there for models of image codes, float32 never does. Models of text: stored keeps the 8- or 4-bit
            blocks of a GGUF file, q8_0, q4_1 and q4_0 make such blocks; a CPU writes faster from them.
    """

    model: str | None = field(default=None, metadata={"positional": True, "metavar": "FOLDER|PRESET"})
    checkpoint: Path | None = None
    weights: Path | None = None
    ema: bool = False
    device: str = "cpu"
    precision: Literal["auto", "float32", "bfloat16", "stored", "q8_0", "q4_1", "q4_0"] = "auto"


def main(argv: Sequence[str]) -> int:
    named, preset = _model(argv)
    groups = {"model": Group(ModelOptions)}
    if named is None:
        if {"-h", "--help"} & set(argv):
            parse_groups("sample", f"{TEXT}\n{MORE}", groups, argv)
        got = f", but got {' '.join(argv)}" if argv else ""
        raise ValueError(
            f"name a model first, its folder (--checkpoint FOLDER) or PRESET --weights FILE{got}"
        )
    folder, recipe = _recipe(named, argv)
    if preset is not None and folder is not None:
        _check_preset(preset, folder)
    if recipe.sampling is None:
        raise ValueError(f"{named} draws nothing: it is no model of images, videos, text or series")
    groups["sampling"] = Group(recipe.sampling)
    chosen = parse_groups(f"sample {named}", TEXT, groups, argv)
    model = chosen["model"]
    if "checkpoint" in model and model.get("model") not in (None, preset, str(model["checkpoint"])):
        raise ValueError(f"name one model: got {model['model']} and --checkpoint {model['checkpoint']}")
    if folder is None and "weights" not in model:
        raise ValueError(
            f"{named} is a preset: give its published weights with --weights FILE, or a trained folder"
        )
    if folder is not None and "weights" in model:
        raise ValueError("published weights need a preset such as mamba_130m, and no checkpoint")
    options = recipe.sampling(**chosen["sampling"])
    recipe.check_sampling(options)
    if options.out is not None:
        (check_folder if recipe.many_files else check_file)(options.out)
    from arcore.recipes._sampling import sample

    drawn = sample(
        recipe,
        options,
        checkpoint_folder=folder,
        preset=None if folder else named,
        weights=model.get("weights"),
        averaged=model.get("ema", False),
        device=model.get("device", "cpu"),
        precision=model.get("precision", "auto"),
        show=_show,
    )
    for line in drawn.save(options.out):
        print(line)
    return 0


def _recipe(named: str, argv: Sequence[str]) -> tuple[Path | None, Recipe]:
    """The folder that is meant, or None for a preset; and its recipe."""
    from arcore.catalog import list_models
    from arcore.recipes import recipe_for
    from arcore.recipes._sampling import recipe_of_checkpoint

    if not Path(named).exists() and (named in list_models() or any(w.startswith("--weights") for w in argv)):
        return None, recipe_for(named)
    return Path(named), recipe_of_checkpoint(named)


def _model(argv: Sequence[str]) -> tuple[str | None, str | None]:
    """The folder or preset among the arguments: the first word, or what follows --checkpoint; and the preset that is
    named beside a checkpoint, or None."""
    first = argv[0] if argv and not argv[0].startswith("-") else None
    folder = None
    for index, word in enumerate(argv):
        if word.startswith("--checkpoint="):
            folder = word.partition("=")[2]
        elif word == "--checkpoint" and index + 1 < len(argv):
            folder = argv[index + 1]
    if first is None or folder is None or Path(first).exists():
        return first or folder, None
    return folder, first


def _check_preset(preset: str, folder: Path) -> None:
    """Refuse a checkpoint of another system than that of the preset that is named beside it."""
    from arcore.catalog import find
    from arcore.training import checkpoint

    held = checkpoint.read_config(checkpoint.find(folder))["modules"]["model"]["system"]
    if find(preset).entry.system.name != held:
        raise ValueError(f"{folder} holds a {held}, not a {preset}: name one model")


def _show(text: str) -> None:
    """Print at once, with ? for characters that the terminal cannot show."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, errors="replace").decode(encoding), end="", flush=True)
