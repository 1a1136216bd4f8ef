"""From latents to pixels: finds the decoder that a model was made for, and decodes what it drew."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arcore.catalog import create_model, load_checkpoint
from arcore.catalog.hub import HUB, download, fetch
from arcore.catalog.lookup import find
from arcore.training import checkpoint

# What diffusers keeps an autoencoder in, on the hub and in folders.
DIFFUSERS_FILES = ("diffusion_pytorch_model.safetensors", "config.json")
AT_ONCE = 4
# Latent channels of the published autoencoders.
PUBLISHED = {4: "kl_f8", 16: "kl_f16"}


def open_decoder(wanted: str, preset: str | None, config: Any) -> nn.Module:
    """The decoder that is asked for.

    Args:
        wanted: a file or folder of weights (`FILE#ENTRY` takes one of several tables), a run of arcore train, the
            name of a repository on the model hub, or `hub` for that of the published model.
        preset: of the model that draws the latents, or None.
        config: of that model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file does not fit, or decodes latents of another shape than the model draws.
        OSError, ImportError: the hub cannot be reached, or a package is missing.
    """
    latent = _latent_shape(config)
    system = "titok_kl" if len(latent) == 2 else "kl"
    path = Path(wanted)
    if wanted == HUB:
        if system == "titok_kl":
            raise ValueError(
                "AR-Diffusion's decoders are on the hub in TrizZZZ/ar_diffusion, one for each data set, within the "
                "checkpoints: download that of yours and give --vae FILE"
            )
        known = PUBLISHED.get(latent[0])
        if known is None:
            raise ValueError(
                f"no decoder on the hub is known for latents of {latent[0]} channels: give --vae FILE"
            )
        decoder: Any = create_model("kl" if known == "kl_f8" else known, weights=fetch(known))
    elif path.is_dir() and checkpoint.newest(path) is not None:
        networks, _ = load_checkpoint(checkpoint.find(path))
        fitting = [network for network in networks.values() if hasattr(network, "latent_shape")]
        if len(fitting) != 1:
            raise ValueError(f"{path} holds no decoder of latents but {', '.join(networks) or 'nothing'}")
        decoder = fitting[0]
    elif not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", wanted):
        decoder = create_model(system, weights=download(wanted, DIFFUSERS_FILES, "--vae"))
    else:
        decoder = create_model(system, weights=wanted)
    takes = decoder.latent_shape
    if len(takes) != len(latent) or any(
        want not in (None, size) for want, size in zip(takes, latent, strict=True)
    ):
        shown = "x".join("any" if want is None else str(want) for want in takes)
        raise ValueError(
            f"--vae {wanted} decodes latents of {shown} values but {preset or 'the model'} draws "
            f"{'x'.join(map(str, latent))}: give the autoencoder that it was trained with"
        )
    return decoder.eval()


def model_config(preset: str | None, folder: Path | None, name: str) -> tuple[str, Any]:
    """System or preset, and config, of the model that is about to be read, without its weights."""
    from arcore.catalog import build, get_config

    if preset is not None:
        return preset, get_config(preset)
    assert folder is not None
    found = checkpoint.read_config(folder)["modules"][name]
    with torch.device("meta"):
        module: Any = build(found)
    return find(found["system"]).entry.system.name, module.config


def decoded(decoder: Any, latents: Tensor) -> Tensor:
    """Latents `[N, *S]`, or of videos `[N, F, *S]`, as images `[N, C, H, W]` or videos, a few at a time."""
    depth = latents.dim() - len(decoder.latent_shape)
    device = next(decoder.parameters()).device
    flat = latents.flatten(0, depth - 1)
    pieces = [decoder.decode(part.to(device)).cpu() for part in flat.split(AT_ONCE)]
    return torch.cat(pieces).unflatten(0, latents.shape[:depth])


def _latent_shape(config: Any) -> tuple[int, ...]:
    """Shape of one latent image: channels, height and width, or tokens and their width."""
    if getattr(config, "patch_size", 1) is None:
        return (config.tokens, config.channels)
    return (config.in_channels, config.image_size, config.image_size)
