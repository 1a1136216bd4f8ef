"""Training a preset of the zoo on a dataset, from nothing or from where a run stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from arcore.data import ImageDataset, open_dataset
from arcore.models import RoMA, RoMAClassifier, get_config, list_models, load_checkpoint
from arcore.training import checkpoint
from arcore.training.config import DEFAULTS, TrainConfig
from arcore.training.engine import FitResult, fit
from arcore.training.start import fresh, resumed
from arcore.training.text_runs import continue_text, train_text
from arcore.training.zoo_tasks import TokenizerTask, task_for

TOKENIZER_FOLDER = "tokenizer"
# What a next-scale model and its tokenizer must agree on.
CODE_FORMAT = ("patch_nums", "vocab_size", "z_channels")


def train(
    preset: str,
    *,
    out: str | Path,
    data: str | None = None,
    tokenizer: str | Path | None = None,
    pretrained: str | Path | None = None,
    resume: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    model_settings: Mapping[str, Any] | None = None,
    show_progress: bool = True,
) -> FitResult:
    """Train a preset.

    A next-scale model needs a tokenizer. Without one, the tokenizer preset that fits the model is trained first,
    with its own default settings, into `out/tokenizer`.

    Args:
        preset: for example `"var_tiny"` or `"msvq_tiny"`.
        out: run folder.
        data: `"digits"` (also when None; for models of videos `"moving_digits"`), `"photos"`, or a folder with one
            subfolder of images per class. For a language model what `arcore.data.load_text` takes, `"kjv"` when None.
        tokenizer: checkpoint of a trained tokenizer, for a model that reads codes. For a language model what
            `arcore.data.make_tokenizer` takes, `"bytes"` when None.
        pretrained: run folder or checkpoint of a pretrained encoder, for a classifier to start from.
        resume: run folder or checkpoint to continue from. The settings and the data are read from there; those in
            `arcore.training.config.FREE_ON_RESUME` may be changed. A run that stopped while it still trained its
            tokenizer goes on with that; all else is then taken from the arguments again.
        settings: fields of `TrainConfig` that differ from the defaults of the task.
        model_settings: fields of the model's config that differ from the preset's; None leaves the preset's.
        show_progress: show progress bars.

    Returns:
        The last checkpoint and the logged figures.

    Raises:
        ValueError: unknown preset, unusable data, settings out of range or changed on resume, damaged checkpoint.
        OSError: a file cannot be read or written.
    """
    out = Path(out)
    settings = {key: value for key, value in (settings or {}).items() if value is not None}
    task_type = task_for(preset)
    changes = {key: value for key, value in (model_settings or {}).items() if value is not None}
    model_config = get_config(preset, **changes)
    if tokenizer is not None and not task_type.needs_tokenizer and not task_type.reads_text:
        raise ValueError(f"{preset} reads pixels and no codes: leave the tokenizer out")
    half_done = None
    if resume is not None:
        half_done = checkpoint.newest(Path(resume) / TOKENIZER_FOLDER)
        if half_done is None or checkpoint.newest(Path(resume)) is not None:
            source = checkpoint.find(resume)
            if task_type.reads_text:
                if tokenizer is not None:
                    raise ValueError(f"the run in {source} has its tokenizer: leave the option out")
                return continue_text(preset, source, out, data, settings, show_progress)
            return _continue(preset, source, out, data, settings, changes, show_progress)
    elif checkpoint.newest(out) or checkpoint.newest(out / TOKENIZER_FOLDER):
        raise ValueError(
            f"{out} already holds a run: continue it with --resume {out}, or choose another --out"
        )
    config = dataclasses.replace(DEFAULTS[task_type.family], **settings)
    if task_type.reads_text:
        if pretrained is not None:
            raise ValueError(f"{preset} does not start from a pretrained encoder: leave that out")
        return train_text(preset, config, out, data, tokenizer, show_progress)
    data = data or ("moving_digits" if getattr(model_config, "frames", 1) > 1 else "digits")
    networks: dict[str, nn.Module] = {}
    if task_type.needs_tokenizer:
        networks["tokenizer"] = _tokenizer_for(preset, data, out, tokenizer, config, half_done, show_progress)
    train_set, test_set = _open(data, _image_config(networks) or model_config)
    name = "tokenizer" if task_type is TokenizerTask else "model"
    networks[name] = fresh(preset, config, **{**task_type.overrides(train_set), **changes})
    if pretrained is not None:
        _start_from(networks[name], preset, pretrained)
    facts = {"preset": preset, "data": data, "class_names": list(train_set.class_names)}
    task = task_type(config, networks, facts)
    return fit(task, train_set, out, test=test_set, title=preset, show_progress=show_progress)


def _continue(
    preset: str,
    source: Path,
    out: Path,
    data: str | None,
    settings: Mapping[str, Any],
    changes: Mapping[str, Any],
    show_progress: bool,
) -> FitResult:
    networks, meta = load_checkpoint(source)
    facts, config = resumed(source, meta, preset, data, settings, ("preset", "data", "class_names"))
    for name, value in changes.items():
        trained: Any = networks["model"].config
        if value != getattr(trained, name):
            raise ValueError(
                f"the model in {source} has {name}={getattr(trained, name)}, which cannot become {value} on resume: "
                "leave the option out, or start a new run in another folder"
            )
    train_set, test_set = _open(facts["data"], _image_config(networks))
    if list(train_set.class_names) != facts["class_names"]:
        raise ValueError(f"the classes in {facts['data']!r} are no longer those of the run in {source}")
    task = task_for(preset)(config, networks, facts)
    return fit(task, train_set, out, test=test_set, resume=source, title=preset, show_progress=show_progress)


def _image_config(networks: Mapping[str, nn.Module]) -> Any:
    """The config of the network that reads pixels, if there is one."""
    network = networks.get("tokenizer", networks.get("model"))
    return network.config if network is not None else None


def _start_from(model: nn.Module, preset: str, path: str | Path) -> None:
    networks, _ = load_checkpoint(checkpoint.find(path))
    if not isinstance(model, RoMAClassifier):
        raise ValueError(f"{preset} does not start from a pretrained encoder: leave that out")
    encoder = networks.get("model")
    if not isinstance(encoder, RoMA):
        raise ValueError(f"{path} holds no pretrained encoder such as roma_tiny but {', '.join(networks)}")
    try:
        model.start_from(encoder)
    except ValueError as error:
        raise ValueError(f"the encoder in {path} does not fit {preset}: {error}") from error


def _open(data: str, config: Any) -> tuple[ImageDataset, ImageDataset | None]:
    """Training and held-out images in the shape that a network takes."""
    shape = {"image_size": config.image_size, "channels": config.in_channels}
    shape["frames"] = getattr(config, "frames", 1)
    test = open_dataset(data, split="test", **shape)
    train = open_dataset(data, split="train", **shape)
    return train, test if len(test) else None


def _tokenizer_for(
    preset: str,
    data: str,
    out: Path,
    path: str | Path | None,
    config: TrainConfig,
    resume: Path | None,
    show_progress: bool,
) -> nn.Module:
    wanted = _code_format(get_config(preset))
    if path is not None:
        networks, _ = load_checkpoint(checkpoint.find(path))
        if "tokenizer" not in networks:
            raise ValueError(f"{path} holds no tokenizer but {', '.join(networks)}")
        found = _code_format(networks["tokenizer"].config)
        if found != wanted:
            raise ValueError(
                f"the tokenizer in {path} does not fit {preset}: it has {_shown(found)} "
                f"but the model needs {_shown(wanted)}"
            )
        return networks["tokenizer"]
    fitting = [name for name in list_models(recipe="tokenizer") if _code_format(get_config(name)) == wanted]
    if not fitting:
        raise ValueError(
            f"no tokenizer preset fits {preset} ({_shown(wanted)}): train one and give it with --tokenizer"
        )
    shared = ("seed", "accelerator", "devices", "num_nodes", "strategy", "workers")
    result = train(
        fitting[0],
        data=data,
        out=out / TOKENIZER_FOLDER,
        resume=resume,
        settings={name: getattr(config, name) for name in shared},
        show_progress=show_progress,
    )
    return load_checkpoint(result.checkpoint)[0]["tokenizer"]


def _code_format(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in CODE_FORMAT}


def _shown(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in facts.items())
