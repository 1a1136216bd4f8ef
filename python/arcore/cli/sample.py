"""`arcore sample`"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from arcore.cli._output import check_file
from arcore.cli._parse import parse
from arcore.cli._pictures import grid, image_format, save_picture


@dataclass(frozen=True)
class SampleOptions:
    """Draw images of a class from a trained model.

    Example: arcore sample --checkpoint out/demo/checkpoint --class 3 -n 16 --seed 0 --out three.png

    The same checkpoint, options and seed give the same picture.
    """

    checkpoint: Annotated[Path, arg(metavar="FOLDER")]
    """Checkpoint or run folder of `arcore train` or `arcore demo`."""
    label: Annotated[str, arg(name="class", metavar="NAME|NUMBER")]
    """Class to draw: its name, or its number from 0."""
    count: Annotated[int, arg(name="num", aliases=("-n",), metavar="N")] = 16
    """Number of images."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("samples.png")
    """Picture with all images in a grid: .png, .jpg or .webp."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Decides all random draws."""
    cfg: Annotated[float, arg(metavar="STRENGTH")] = 1.5
    """Classifier-free guidance at the finest scale; 0 turns it off."""
    temperature: Annotated[float, arg(metavar="T")] = 1.0
    """Above 1 draws more varied tokens, below 1 likelier ones."""
    top_k: Annotated[int | None, arg(metavar="K", help_behavior_hint="(default: all)")] = None
    """Keep the K likeliest tokens of each draw."""
    top_p: Annotated[float | None, arg(metavar="P", help_behavior_hint="(default: all)")] = None
    """Keep the smallest set of tokens with this much probability, 0 to 1."""
    columns: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: about square)")] = None
    """Images per row."""
    device: Annotated[str, arg(metavar="NAME")] = "cpu"
    """Where to compute: cpu, cuda, cuda:1, ..."""


def main(argv: Sequence[str]) -> int:
    options = parse(SampleOptions, "sample", argv)
    for name, value in (("-n", options.count), ("--columns", options.columns or 1)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1 but got {value}")
    import torch

    from arcore.decoding import generate_next_scale
    from arcore.models import load_checkpoint
    from arcore.training.checkpoint import find

    image_format(options.out)
    networks, meta = load_checkpoint(find(options.checkpoint))
    if "model" not in networks:
        raise ValueError(
            f"{options.checkpoint} holds a tokenizer only; images are drawn from a model such as var_tiny"
        )
    label = _class_number(options.label, meta["class_names"])
    check_file(options.out)
    device = _device(options.device)
    model: Any = networks["model"].to(device)
    tokenizer: Any = networks["tokenizer"].to(device)
    images = generate_next_scale(
        model,
        tokenizer,
        torch.full((options.count,), label, device=device),
        cfg_scale=options.cfg,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    ).images
    save_picture(grid(images.cpu(), options.columns), options.out)
    print(f"{options.out}: {options.count} x class {meta['class_names'][label]}, seed {options.seed}")
    return 0


def _class_number(wanted: str, names: list[str]) -> int:
    if wanted in names:
        return names.index(wanted)
    if wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    close = difflib.get_close_matches(wanted, names, n=1)
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    hint = f"did you mean {close[0]!r}?" if close else f"the model knows {shown}"
    raise ValueError(f"there is no class {wanted!r}: {hint}")


def _device(name: str) -> Any:
    import torch

    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this torch sees no GPU; use --device cpu")
    return device
