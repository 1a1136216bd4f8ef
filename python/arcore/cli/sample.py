"""`arcore sample`"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from arcore.cli._output import check_file
from arcore.cli._parse import parse
from arcore.cli._pictures import grid, image_format, save_animation, save_picture

if TYPE_CHECKING:
    from torch import Tensor

    from arcore.schedules import Solver


@dataclass(frozen=True)
class SampleOptions:
    """Draw images or videos of a class from a trained model.

    Example: arcore sample --checkpoint out/demo/checkpoint --class 3 -n 16 --seed 0 --out three.png

    The same checkpoint, options and seed give the same picture. Videos move in a .gif; in other formats each is a
    row of frames.
    """

    checkpoint: Annotated[Path, arg(metavar="FOLDER")]
    """Checkpoint or run folder of `arcore train` or `arcore demo`."""
    label: Annotated[str, arg(name="class", metavar="NAME|NUMBER")]
    """Class to draw: its name, or its number from 0."""
    count: Annotated[int, arg(name="num", aliases=("-n",), metavar="N")] = 16
    """Number of images."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("samples.png")
    """Picture with all images in a grid: .png, .jpg, .webp or .gif."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Decides all random draws."""
    cfg: Annotated[float, arg(metavar="STRENGTH")] = 1.5
    """Classifier-free guidance: of models that draw tokens its strength at the finest scale, 0 turns it off; of
    diffusion models the weight of the conditional prediction, 1 turns it off."""
    temperature: Annotated[float, arg(metavar="T")] = 1.0
    """Above 1 draws more varied tokens, below 1 likelier ones; scales the noise of --solver ddpm."""
    top_k: Annotated[int | None, arg(metavar="K", help_behavior_hint="(default: all)")] = None
    """Keep the K likeliest tokens of each draw."""
    top_p: Annotated[float | None, arg(metavar="P", help_behavior_hint="(default: all)")] = None
    """Keep the smallest set of tokens with this much probability, 0 to 1."""
    steps: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 25, 100 for mar_*)")] = None
    """Evaluations of a diffusion model per block, or of a diffusion head per token."""
    solver: Annotated[
        Literal["dpm", "ddim", "ddpm"] | None,
        arg(metavar="dpm|ddim|ddpm", help_behavior_hint="(default: dpm, ddpm for mar_*)"),
    ] = None
    """How a diffusion model steps: DPM-Solver++ of second order, DDIM, or ancestral."""
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

    from arcore.models import load_checkpoint
    from arcore.nn import MaskedModel
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
    networks = {name: network.to(device) for name, network in networks.items()}
    labels = torch.full((options.count,), label, device=device)
    draw = _draw_tokens if "tokenizer" in networks else _denoise
    if isinstance(networks["model"], MaskedModel):
        draw = _draw_masked
    images = draw(networks, labels, options).cpu()
    if images.dim() == 5:
        save_animation(images, options.out, options.columns)
    else:
        save_picture(grid(images, options.columns), options.out)
    print(f"{options.out}: {options.count} x class {meta['class_names'][label]}, seed {options.seed}")
    return 0


def _draw_tokens(networks: Mapping[str, Any], labels: Tensor, options: SampleOptions) -> Tensor:
    from arcore.decoding import generate_next_scale

    _refuse(options, ("steps", "solver"), "a model that draws tokens")
    return generate_next_scale(
        networks["model"],
        networks["tokenizer"],
        labels,
        cfg_scale=options.cfg,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    ).images


def _denoise(networks: Mapping[str, Any], labels: Tensor, options: SampleOptions) -> Tensor:
    from arcore.decoding import generate_blocks
    from arcore.nn import BlockModel

    model = networks["model"]
    if not isinstance(model, BlockModel):
        raise ValueError(f"{options.checkpoint} holds a {type(model).__name__}, which draws no images")
    _refuse(options, ("top_k", "top_p"), "a diffusion model")
    schedule: Any = model.schedule
    steps = min(25, schedule.num_steps - 1) if options.steps is None else options.steps
    solver, times = _solver(
        model,
        options.solver or "dpm",
        steps,
        options.temperature,
        getattr(networks["model"].config, "learn_sigma", False),
    )
    blocks = generate_blocks(
        model, labels, solver=solver, times=times, cfg_scale=options.cfg, seed=options.seed
    )
    pixels: Tensor = networks["model"].to_pixels(blocks)
    return pixels


def _draw_masked(networks: Mapping[str, Any], labels: Tensor, options: SampleOptions) -> Tensor:
    from arcore.decoding import generate_masked

    model = networks["model"]
    _refuse(options, ("top_k", "top_p"), "a model with a diffusion head")
    steps = min(100, model.head.schedule.num_steps - 1) if options.steps is None else options.steps
    solver, times = _solver(
        model.head, options.solver or "ddpm", steps, options.temperature, model.head.learn_variance
    )
    tokens = generate_masked(
        model, labels, solver=solver, times=times, cfg_scale=options.cfg, seed=options.seed
    )
    pixels: Tensor = model.to_pixels(tokens)
    return pixels


def _solver(source: Any, kind: str, steps: int, temperature: float, learned: bool) -> tuple[Solver, Tensor]:
    """The solver of that name, and its times, for what has a schedule and a prediction."""
    from arcore.schedules import DDIM, DDPM, DPMSolver2M

    if kind != "ddpm" and temperature != 1.0:
        raise ValueError(f"--temperature is for --solver ddpm: {kind} draws no noise on its way")
    schedule = source.schedule
    times = schedule.grid(steps, "leading_inner" if kind == "dpm" else "linspace")
    if kind != "ddpm":
        return (DDIM if kind == "ddim" else DPMSolver2M)(schedule, source.prediction), times
    variance: Any = "learned" if learned else "posterior"
    return DDPM(schedule, source.prediction, variance=variance, temperature=temperature), times


def _refuse(options: SampleOptions, names: Sequence[str], kind: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} does nothing for {kind}: leave it out")


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
