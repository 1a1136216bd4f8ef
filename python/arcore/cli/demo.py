"""`arcore demo`"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from tyro.conf import arg

from arcore import masks
from arcore._optional import require
from arcore.cli._compare import Comparison, compare_attention, compare_training_step
from arcore.cli._output import check_folder
from arcore.cli._parse import parse
from arcore.training.config import TrainConfig

TOKENIZER, MODEL = "msvq_tiny", "var_tiny"
SAMPLES_PER_CLASS = 50
SHOWN_PER_CLASS = 12
CLASSES = 10
CFG = 0.5
PICTURES = ("samples.png", "reconstructions.png", "loss.png", "mask.png")


@dataclass(frozen=True)
class DemoOptions:
    """Train a small next-scale image model on handwritten digits and show what it learnt.

    Example: arcore demo --out out/demo

    In about two minutes on one CPU core: trains a tokenizer (msvq_tiny) and a VAR (var_tiny) on 1442 real 8 x 8
    digits, draws new digits of each class, lets a classifier that was fitted on real digits read them, and compares
    arcore's attention with PyTorch's. Writes samples.png, reconstructions.png, loss.png, mask.png and checkpoint/
    into the folder. Nothing is downloaded.
    """

    out: Annotated[Path, arg(metavar="FOLDER")] = Path("out/demo")
    """Folder for pictures and checkpoint; an earlier demo there is replaced."""
    tokenizer_steps: Annotated[int, arg(metavar="N")] = 500
    """Training steps of the tokenizer."""
    steps: Annotated[int, arg(metavar="N")] = 400
    """Training steps of the model."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Decides initial weights, image order and all draws."""
    threads: Annotated[int, arg(metavar="N")] = 1
    """CPU threads. Steps this small gain little from a second one and lose much on a busy machine."""


def main(argv: Sequence[str]) -> int:
    options = parse(DemoOptions, "demo", argv)
    for package in ("pytorch_lightning", "sklearn", "matplotlib", "rich"):
        require(package, extra="train")
    if options.threads < 1:
        raise ValueError(f"--threads must be at least 1 but got {options.threads}")
    if options.tokenizer_steps < 1:
        raise ValueError(f"--tokenizer-steps must be at least 1 but got {options.tokenizer_steps}")
    TrainConfig(**_settings(options.steps, options.seed))
    check_folder(options.out)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        _run(options, options.out)
    finally:
        torch.set_num_threads(before)
    return 0


def _run(options: DemoOptions, out: Path) -> None:
    from rich.console import Console

    from arcore.catalog import save_checkpoint
    from arcore.cli import _figures
    from arcore.data import load_digits
    from arcore.decoding import generate_next_scale

    console = Console(highlight=False)
    train_digits, test_digits = load_digits("train"), load_digits("test")
    classes = train_digits.class_names
    console.print(
        f"{len(train_digits)} handwritten digits to learn from, {len(test_digits)} held out; "
        f"{options.threads} CPU thread{'s' if options.threads > 1 else ''}"
    )
    seconds: dict[str, float] = {}
    tokenizer, tokenizer_history = _train_tokenizer(options, out, seconds)
    model, model_history = _train_model(options, out, tokenizer, seconds)
    facts = {"preset": MODEL, "data": "digits", "class_names": list(classes)}
    save_checkpoint(out / "checkpoint", {"model": model, "tokenizer": tokenizer}, facts)

    began = time.perf_counter()
    labels = torch.arange(CLASSES).repeat_interleave(SAMPLES_PER_CLASS)
    samples = generate_next_scale(model, tokenizer, labels, cfg_scale=CFG, seed=options.seed).images
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
    _figures.samples(samples[shown], right[shown], classes, out / "samples.png")
    _figures.reconstructions(tokenizer, test_digits, out / "reconstructions.png")
    _figures.losses(tokenizer_history, model_history, out / "loss.png")
    masks.next_scale(model.patch_nums).plot(
        title="What each token of var_tiny may look at (4 scales, 30 tokens)", path=out / "mask.png"
    )

    console.print("comparing attention with PyTorch's ...")
    batch = (train_digits.images[:64], train_digits.labels[:64])
    comparisons = (compare_training_step(model, tokenizer, *batch), compare_attention())
    console.print(_results(options, facts_shown, seconds))
    console.print(_speeds(comparisons, options.threads))
    print(f"written to {out}: {', '.join(PICTURES)}, checkpoint")
    words = ["arcore", "sample", str(out / "checkpoint"), "--class", "3", "--out", str(out / "three.png")]
    print(f"draw more: {shlex.join(words)}")


def _train_tokenizer(
    options: DemoOptions, out: Path, seconds: dict[str, float]
) -> tuple[Any, list[dict[str, Any]]]:
    from arcore.recipes.tokenizer import Tokenizer, TokenizerTask

    config = replace(Tokenizer.defaults, **_settings(options.tokenizer_steps, options.seed), lr=5e-3)
    networks = {"tokenizer": _fresh(TOKENIZER, options.seed)}
    history = _fit(TokenizerTask(config, networks, {}), out, TOKENIZER, "tokenizer", seconds)
    return networks["tokenizer"].eval(), history


def _train_model(
    options: DemoOptions, out: Path, tokenizer: nn.Module, seconds: dict[str, float]
) -> tuple[Any, list[dict[str, Any]]]:
    from arcore.recipes.next_scale import NextScale, NextScaleTask

    config = replace(NextScale.defaults, **_settings(options.steps, options.seed), lr=3e-3, weight_decay=0.1)
    # 1442 images are few for a transformer: stochastic depth keeps it from learning them by heart.
    networks = {"tokenizer": tokenizer, "model": _fresh(MODEL, options.seed, drop_path=0.1)}
    history = _fit(NextScaleTask(config, networks, {}), out, MODEL, "model", seconds)
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


def _fit(task: Any, out: Path, title: str, phase: str, seconds: dict[str, float]) -> list[dict[str, Any]]:
    from arcore.data import load_digits
    from arcore.training import fit

    began = time.perf_counter()
    result = fit(task, load_digits("train"), out / "training" / phase, test=load_digits("test"), title=title)
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
        svc = require("sklearn.svm", extra="train").SVC(C=10, gamma=0.02)
        self._svc = svc.fit(images.flatten(1).numpy(), labels.numpy())

    def __call__(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self._svc.predict(images.flatten(1).numpy()))


def _to_nearest(images: Tensor, training: Tensor) -> float:
    """Mean distance to the nearest training image, as root mean square grey levels of 16."""
    nearest = torch.cdist(images.flatten(1), training.flatten(1)).amin(1).mean().item()
    return nearest / training[0].numel() ** 0.5 * 8


def _results(options: DemoOptions, facts: dict[str, float], seconds: dict[str, float]) -> Any:
    from rich.table import Table

    table = Table(title="What it learnt", title_justify="left", title_style="bold", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    count = SAMPLES_PER_CLASS * CLASSES
    for row in (
        ("samples read as their class", f"{facts['guided']:.1%}", f"{count} drawn with guidance {CFG}"),
        ("  without guidance", f"{facts['unguided']:.1%}", ""),
        ("  the reader on held-out digits", f"{facts['real']:.1%}", "SVC fitted on real digits"),
        ("nearest training digit", f"{facts['nearest_sample']:.2f}", "grey levels of 16; 0: a copy"),
        ("  of held-out digits", f"{facts['nearest_real']:.2f}", ""),
        ("held-out reconstruction error", f"{facts['mse'] ** 0.5 * 8:.2f}", "grey levels of 16, RMS"),
        ("  still read as their class", f"{facts['reconstructed']:.1%}", ""),
    ):
        table.add_row(*row)
    table.add_section()
    table.add_row("tokenizer training", f"{seconds['tokenizer']:.0f} s", f"{options.tokenizer_steps} steps")
    table.add_row("model training", f"{seconds['model']:.0f} s", f"{options.steps} steps")
    table.add_row("sampling", f"{seconds['sample']:.1f} s", f"{count} images, 4 passes each")
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
