"""Drawing from a checkpoint, or from published weights, by the recipe of the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from arcore.catalog import load_checkpoint
from arcore.catalog.hub import HUB, fetch
from arcore.matmul import HALVES, half_matmul_of_commands
from arcore.nn import quantise
from arcore.ops._block_values import KINDS
from arcore.recipes._recipe import Recipe, recipe_for
from arcore.training import checkpoint

Precision = Literal["auto", "float32", "bfloat16", "stored", "q8_0", "q4_1", "q4_0"]
BLOCKED = ("stored", *KINDS)


def recipe_of_checkpoint(path: str | Path) -> Recipe:
    """The recipe of the model in a run folder or checkpoint, or of the tokenizer or autoencoder where there is none.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or holds no model.
    """
    folder = checkpoint.find(path)
    modules = checkpoint.read_config(folder)["modules"]
    for name in ("model", "tokenizer", "autoencoder"):
        if name in modules:
            return recipe_for(modules[name]["system"])
    raise ValueError(f"{path} holds no model; what is drawn comes from a model such as var_tiny")


def sample(
    recipe: Recipe,
    options: Any,
    *,
    checkpoint_folder: Path | None = None,
    preset: str | None = None,
    weights: Path | None = None,
    averaged: bool = False,
    device: str = "cpu",
    precision: Precision = "auto",
    show: Callable[[str], None] = lambda _: None,
) -> Any:
    """What a model draws.

    Args:
        recipe: of the model.
        options: of the type `recipe.sampling`.
        checkpoint_folder: run folder or checkpoint; or else
        preset: a preset, and
        weights: its published weights.
        averaged: take the moving average of the weights that a run with `ema` saved.
        device: where to compute.
        precision: bfloat16 computes matrix products and convolutions in it; auto does so where the device has units for
            it and the recipe bears it. stored keeps the 8- and 4-bit blocks of a GGUF file; q8_0, q4_1 and q4_0 make
            such blocks of floats.
        show: receives text while it grows.

    Returns:
        What `recipe.sample` returns.

    Raises:
        ValueError: unfit options or weights.
        FileNotFoundError: no such file.
    """
    place = _device(device)
    _check_blocks(precision, place, recipe, weights)
    recipe.check_sampling(options)
    if checkpoint_folder is not None:
        folder = checkpoint.find(checkpoint_folder)
        beside = recipe.beside(None, folder, options)
        networks, facts = load_checkpoint(folder)
        facts["folder"] = str(folder)
        if averaged:
            checkpoint.load_average(folder, networks)
    else:
        assert preset is not None
        assert weights is not None
        beside = recipe.beside(preset, None, options)
        if str(weights) == HUB:
            weights = fetch(preset)
        more: dict[str, Any] = {"stored": True} if precision == "stored" else {}
        networks, facts = recipe.published(preset, weights, options, **more)
    networks = {name: network.to(place).eval() for name, network in {**networks, **beside}.items()}
    if precision in KINDS:
        quantise(networks[recipe.trained], precision)
    half = _in_bfloat16(precision, place, recipe)
    if half and recipe.casts_weights:
        networks = {name: network.to(torch.bfloat16) for name, network in networks.items()}
        half = False
    with contextlib.ExitStack() as during:
        if half:
            during.enter_context(torch.autocast(place.type, torch.bfloat16))
        if half or any(p.dtype in HALVES for network in networks.values() for p in network.parameters()):
            during.enter_context(half_matmul_of_commands())
        return recipe.sample(networks, facts, options, show)


def _in_bfloat16(precision: Precision, place: torch.device, recipe: Recipe) -> bool:
    if precision not in get_args(Precision):
        raise ValueError(f"--precision {precision}: expected {', '.join(get_args(Precision))}")
    return precision == "bfloat16" or (precision == "auto" and recipe.halved and has_bf16_units(place))


def _check_blocks(precision: str, place: torch.device, recipe: Recipe, weights: Path | None) -> None:
    """Raise unless blocks, if they are asked for, can be had and read."""
    if precision not in BLOCKED:
        return
    if not recipe.keeps_blocks:
        raise ValueError(
            f"--precision {precision}: only models of text are drawn from with weights in blocks"
        )
    if place.type != "cpu":
        raise ValueError(
            f"--precision {precision}: weights in blocks are read on a CPU; leave out --device {place}"
        )
    if precision == "stored" and weights is None:
        raise ValueError(
            "--precision stored: checkpoints store floats; give a GGUF file with --weights, or choose --precision q8_0"
        )


def has_bf16_units(place: torch.device) -> bool:
    """Whether a device multiplies bfloat16 faster than float32: without units it is emulated, and slower."""
    if place.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return str(torch.ops.arcore.cpu_bf16()) != "none"


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: expected cpu, cuda, cuda:1, ...") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: expected cpu, cuda, cuda:1, ...")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this torch sees no GPU; use --device cpu")
    return device
