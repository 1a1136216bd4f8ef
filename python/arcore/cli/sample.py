"""`arcore sample`"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from arcore.cli._output import check_file
from arcore.cli._parse import parse
from arcore.cli._pictures import grid, image_format, save_animation, save_picture

if TYPE_CHECKING:
    from torch import Tensor

    from arcore.schedules import Solver


@dataclass(frozen=True)
class SampleOptions:
    """Draw from a trained model: images or videos of a class, or text that goes on from a prompt.

    Example: arcore sample --checkpoint out/demo/checkpoint --class 3 -n 16 --seed 0 --out three.png

    Example: arcore sample --checkpoint out/mamba_tiny --prompt "In the beginning" --temperature 0.8

    Example: arcore sample mamba_130m --weights FOLDER --prompt "The sea is" (published weights)

    What the checkpoint holds decides which options apply. The same checkpoint, options and seed give the same result.
    Videos move in a .gif; in other formats each is a row of frames.
    """

    preset: Positional[
        Annotated[str | None, arg(metavar="PRESET", help_behavior_hint="(with --weights)")]
    ] = None
    """Text model to load published weights into, e.g. mamba_130m. A checkpoint knows its own."""
    checkpoint: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Checkpoint or run folder of `arcore train` or `arcore demo`."""
    weights: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Folder with published weights and their tokenizer.json, for PRESET."""
    label: Annotated[str | None, arg(name="class", metavar="NAME|NUMBER", help_behavior_hint="")] = None
    """Images: class to draw, its name, or its number from 0."""
    prompt: Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")] = None
    """Text: what the model goes on from."""
    max_new_tokens: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 200)")] = None
    """Text: tokens to write (bytes, if the model was trained on bytes)."""
    count: Annotated[
        int | None,
        arg(name="num", aliases=("-n",), metavar="N", help_behavior_hint="(default: 16 images, 1 text)"),
    ] = None
    """Number of images or texts."""
    out: Annotated[
        Path | None, arg(metavar="FILE", help_behavior_hint="(default: samples.png; no text file)")
    ] = None
    """Images: all in a grid, .png, .jpg, .webp or .gif. Text: a file for what is printed."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Decides all random draws."""
    cfg: Annotated[float | None, arg(metavar="STRENGTH", help_behavior_hint="(default: 1.5)")] = None
    """Images: classifier-free guidance: of models that draw tokens its strength at the finest scale, 0 turns it off; of
    diffusion models the weight of the conditional prediction, 1 turns it off."""
    temperature: Annotated[float, arg(metavar="T")] = 1.0
    """Above 1 draws more varied tokens, below 1 likelier ones; scales the noise of --solver ddpm."""
    top_k: Annotated[int | None, arg(metavar="K", help_behavior_hint="(default: all)")] = None
    """Keep the K likeliest tokens of each draw."""
    top_p: Annotated[float | None, arg(metavar="P", help_behavior_hint="(default: all)")] = None
    """Keep the smallest set of tokens with this much probability, 0 to 1."""
    steps: Annotated[
        int | None,
        arg(metavar="N", help_behavior_hint="(default: 25, 100 for mar_*, 50 for frame by frame)"),
    ] = None
    """Evaluations of a diffusion model per block or frame, or of a diffusion head per token."""
    lag: Annotated[
        int | None,
        arg(
            metavar="N",
            help_behavior_hint="(default: a tenth of --steps for ar_diffusion_*, --steps for diffusion_forcing_*)",
        ),
    ] = None
    """Steps by which ar_diffusion_* and diffusion_forcing_* start each frame of a video later than the one before: 0
    denoises all frames together, as many as --steps one after the other."""
    frames: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: as in training)")] = None
    """Frames of a video by ar_diffusion_* or diffusion_forcing_*; more than in training slide a window over them."""
    solver: Annotated[
        Literal["dpm", "ddim", "ddpm"] | None,
        arg(
            metavar="dpm|ddim|ddpm",
            help_behavior_hint="(default: dpm, ddpm for mar_*, ddim for frame by frame)",
        ),
    ] = None
    """How a diffusion model steps: DPM-Solver++ of second order, DDIM, or ancestral."""
    columns: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: about square)")] = None
    """Images per row."""
    device: Annotated[str, arg(metavar="NAME")] = "cpu"
    """Where to compute: cpu, cuda, cuda:1, ..."""


FOR_IMAGES = ("label", "cfg", "columns", "steps", "solver", "lag", "frames")
FOR_TEXT = ("prompt", "max_new_tokens")


def main(argv: Sequence[str]) -> int:
    options = parse(SampleOptions, "sample", argv)
    for name, value in (("-n", options.count), ("--columns", options.columns)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1 but got {value}")
    if options.preset is not None or options.weights is not None:
        _sample_published(options)
    elif options.checkpoint is not None:
        _sample_checkpoint(options, options.checkpoint)
    else:
        raise ValueError("name a model with --checkpoint FOLDER, or with PRESET --weights FOLDER")
    return 0


def _sample_checkpoint(options: SampleOptions, checkpoint: Path) -> None:
    from arcore.models import load_checkpoint
    from arcore.nn.protocols import TokenModel
    from arcore.training.checkpoint import find

    folder = find(checkpoint)
    networks, meta = load_checkpoint(folder)
    if "model" not in networks:
        raise ValueError(
            f"{checkpoint} holds a tokenizer only; images are drawn from a model such as var_tiny"
        )
    model: Any = networks["model"]
    if isinstance(model, TokenModel):
        from arcore.training.text_runs import tokenizer_of

        _write_text(options, model, tokenizer_of(folder, meta))
    else:
        _draw(options, networks, meta["class_names"])


def _sample_published(options: SampleOptions) -> None:
    from arcore.data.text_tokenizers import FILE, BPETokenizer
    from arcore.models import create_model
    from arcore.nn.protocols import TokenModel

    if options.preset is None or options.weights is None or options.checkpoint is not None:
        raise ValueError("published weights need PRESET and --weights FOLDER, and no --checkpoint")
    model: Any = create_model(options.preset, weights=options.weights)
    if not isinstance(model, TokenModel):
        raise ValueError(
            f"{options.preset} writes no text: published weights are for text models such as mamba_130m"
        )
    folder = options.weights if options.weights.is_dir() else options.weights.parent
    if not (folder / FILE).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {FILE}: put the tokenizer of the published weights there (EleutherAI/gpt-neox-20b's "
            "for the Mamba models of state-spaces)"
        )
    _write_text(options, model, BPETokenizer.load(folder / FILE))


def _write_text(options: SampleOptions, model: Any, tokenizer: Any) -> None:
    from arcore.cli._sample_text import sample_text

    _refuse(options, FOR_IMAGES, "a text model")
    if options.prompt is None:
        raise ValueError('this is a text model: say what it goes on from with --prompt "..."')
    device = _device(options.device)
    sample_text(
        model.to(device),
        tokenizer,
        prompt=options.prompt,
        count=options.count or 1,
        max_new_tokens=200 if options.max_new_tokens is None else options.max_new_tokens,
        out=options.out,
        device=device,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )


def _draw(options: SampleOptions, networks: Mapping[str, Any], class_names: list[str]) -> None:
    import torch

    from arcore.nn import FrameModel, MaskedModel

    _refuse(options, FOR_TEXT, "a model of images")
    if options.label is None:
        raise ValueError(f"{options.checkpoint} is a model of images: say what to draw with --class")
    out, count = options.out or Path("samples.png"), options.count or 16
    image_format(out)
    label = _class_number(options.label, class_names)
    check_file(out)
    device = _device(options.device)
    networks = {name: network.to(device) for name, network in networks.items()}
    labels = torch.full((count,), label, device=device)
    draw = _draw_tokens if "tokenizer" in networks else _denoise
    if isinstance(networks["model"], MaskedModel):
        draw = _draw_masked
    if isinstance(networks["model"], FrameModel):
        draw = _denoise_frames
    else:
        _refuse(options, ("lag", "frames"), "a model whose frames have no times of their own")
    images = draw(networks, labels, options).cpu()
    if images.dim() == 5:
        save_animation(images, out, options.columns)
    else:
        save_picture(grid(images, options.columns), out)
    print(f"{out}: {count} x class {class_names[label]}, seed {options.seed}")


def _guidance(options: SampleOptions) -> float:
    return 1.5 if options.cfg is None else options.cfg


def _draw_tokens(networks: Mapping[str, Any], labels: Tensor, options: SampleOptions) -> Tensor:
    from arcore.decoding import generate_next_scale

    _refuse(options, ("steps", "solver"), "a model that draws tokens")
    return generate_next_scale(
        networks["model"],
        networks["tokenizer"],
        labels,
        cfg_scale=_guidance(options),
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
        model, labels, solver=solver, times=times, cfg_scale=_guidance(options), seed=options.seed
    )
    pixels: Tensor = networks["model"].to_pixels(blocks)
    return pixels


def _denoise_frames(networks: Mapping[str, Any], labels: Tensor, options: SampleOptions) -> Tensor:
    from arcore.decoding import generate_frames

    model = networks["model"]
    _refuse(options, ("top_k", "top_p"), "a diffusion model")
    steps = min(50, model.schedule.num_steps) if options.steps is None else options.steps
    solver, times = _solver(model, options.solver or "ddim", steps, options.temperature, False)
    frames = generate_frames(
        model,
        labels,
        lag=options.lag,
        frames=options.frames,
        solver=solver,
        times=times,
        cfg_scale=_guidance(options),
        seed=options.seed,
    )
    pixels: Tensor = model.to_pixels(frames)
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
        model, labels, solver=solver, times=times, cfg_scale=_guidance(options), seed=options.seed
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
            flag = "class" if name == "label" else name.replace("_", "-")
            raise ValueError(f"--{flag} does nothing for {kind}: leave it out")


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
