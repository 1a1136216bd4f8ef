"""Erasing a class of a trained model, from the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arcore._files import atomic_path
from arcore._optional import require
from arcore.catalog import load_checkpoint
from arcore.catalog.running import Report, check_bounds
from arcore.nn.kinds import check_kinds
from arcore.zoo.raster._digits import accuracy, train_classifier
from arcore.zoo.raster.ear.erasing import Erasing, check_classes, class_samples, erase, patched


@check_kinds
@dataclass(frozen=True, kw_only=True)
class Options(Erasing):
    """Erase a class from a trained model.

    Attributes:
        checkpoint: run folder or checkpoint of `arcore train llamagen_tiny`.
        erase: class to erase, its number from 0.
        toward: class that takes its place.
        samples: images of each class that an independent classifier judges.
        out: file for the patch (.safetensors). Default: beside the checkpoint, ear_ERASE.safetensors.
    """

    checkpoint: Path
    erase: int
    toward: int
    samples: int = 20
    out: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, least={"samples": 1})


def run(options: Options) -> Report:
    """Erase a class of a trained model, write the patch, and let a classifier judge samples with and without it."""
    from arcore.data import open_dataset
    from arcore.training import checkpoint

    folder = checkpoint.find(options.checkpoint)
    networks, facts = load_checkpoint(folder)
    model: Any = networks.get("model")
    tokenizer: Any = networks.get("tokenizer")
    if model is None or tokenizer is None or not hasattr(model, "prompt"):
        raise ValueError(
            f"{options.checkpoint} holds no raster image model; train one with `arcore train llamagen_tiny`"
        )
    model, tokenizer = (network.eval().requires_grad_(False) for network in (model, tokenizer))
    names = list(facts["class_names"])
    check_classes(model, options.erase, options.toward)
    config: Any = tokenizer.config
    shape = {"image_size": config.image_size, "channels": config.in_channels}
    images, labels = _all(open_dataset(facts["data"], split="train", **shape))
    # The judge also sees what the tokenizer can show, of every second image.
    shown = torch.cat([tokenizer.decode(tokenizer.encode(part)) for part in images[::2].split(250)])
    judge = train_classifier(
        torch.cat([images, shown]), torch.cat([labels, labels[::2]]), classes=len(names), count=500
    )
    held_out, truth = _all(open_dataset(facts["data"], split="test", **shape))
    seen = accuracy(judge, held_out, truth) if len(truth) else float("nan")
    patch = erase(model, options.erase, options.toward, options)
    out = options.out or folder.parent / f"ear_{options.erase}.safetensors"
    with atomic_path(out) as temporary:
        require("safetensors.torch", extra="zoo").save_file(patch, temporary)
    rates, pictures = {}, {}
    for what, change in (("before", {}), ("after", patch)):
        with patched(model, change):
            codes = class_samples(model, options.samples, cfg=options.cfg, seed=options.seed + 10_000_000)
        drawn = tokenizer.decode(codes.flatten(0, 1)).unflatten(0, codes.shape[:2])
        truth = torch.arange(len(names)).repeat_interleave(options.samples)
        hits = (judge(drawn.flatten(0, 1)).argmax(-1) == truth).float().view(len(names), -1).mean(1)
        rates[what], pictures[what] = hits, drawn
    others = [c for c in range(len(names)) if c != options.erase]
    lines = [
        f"an independent classifier, right for {seen:.3f} of held-out images, takes for their class of "
        f"{options.samples} samples each:"
    ]
    lines += [
        f"  {names[c]:>12}  before {rates['before'][c]:.2f}  after {rates['after'][c]:.2f}"
        + ("  (erased)" if c == options.erase else "")
        for c in range(len(names))
    ]
    mean = float(rates["after"][others].mean())
    lines += [
        f"erased class {float(rates['after'][options.erase]):.2f}, mean of the others {mean:.2f}",
        f"patch: {out}",
    ]

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, 2)
        for place, (what, drawn) in zip(axes, pictures.items(), strict=True):
            shown = drawn[:, :8, 0]
            sheet = shown.permute(0, 2, 1, 3).flatten(0, 1).flatten(1)
            place.imshow(sheet, cmap="gray", vmin=-1, vmax=1)
            place.set(title=what, xticks=[], yticks=[])

    values = {what: hits.tolist() for what, hits in rates.items()}
    values |= {"others": mean, "patch": str(out), "classifier": seen}
    return Report("\n".join(lines), values, draw, (9.0, 6.0))


def _all(data: Any) -> tuple[Tensor, Tensor]:
    """Images and classes of a dataset."""
    if not len(data):
        return torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    images, labels = zip(*(data[i] for i in range(len(data))), strict=True)
    return torch.stack(images), torch.tensor([int(label) for label in labels])
