"""RoMA's encoder and its parts under the authors' names, written out plainly."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore.zoo.representation.roma_classifier.claim import textbook_mixer

SUFFIXES = ("", "_b", "_c", "_c_b")


def encoder_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' four-direction encoder."""
    c, states, hidden, rank = (
        config.embed_dim,
        config.d_state,
        config.embed_dim * 8 // 3,
        math.ceil(config.embed_dim / 16),
    )
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, c),
        "pos_embed": (1, (config.image_size // config.patch_size) ** 2 + 1, c),
        "patch_embed.proj.weight": (c, config.in_channels, config.patch_size, config.patch_size),
        "patch_embed.proj.bias": (c,),
        "norm_f.weight": (c,),
        "norm_f.bias": (c,),
    }
    for i in range(config.depth):
        layer = {"mixer.in_proj.weight": (2 * c, c), "mixer.out_proj.weight": (c, c)}
        for s in SUFFIXES:
            layer |= {
                f"mixer.A{s}_log": (c, states),
                f"mixer.D{s}": (c,),
                f"mixer.conv1d{s}.weight": (c, 1, 4),
                f"mixer.conv1d{s}.bias": (c,),
                f"mixer.x_proj{s}.weight": (rank + 2 * states, c),
                f"mixer.dt_proj{s}.weight": (c, rank),
                f"mixer.dt_proj{s}.bias": (c,),
            }
        for k, shape in (("1", (hidden, c)), ("2", (hidden, c)), ("3", (c, hidden))):
            layer |= {f"mlp.w{k}.weight": shape, f"mlp.w{k}.bias": shape[:1]}
        layer |= {f"norm{k}.{part}": (c,) for k in (1, 2) for part in ("weight", "bias")}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def textbook_tokens(images: Tensor, w: dict[str, Tensor]) -> Tensor:
    """Tokens `[B, G * G + 1, C]` after the last norm, in float64."""
    dim, _, patch, _ = w["patch_embed.proj.weight"].shape

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (dim,), w[f"{name}.weight"], w[f"{name}.bias"])

    x = F.conv2d(images.double(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    middle = x.shape[1] // 2
    token = w["cls_token"].expand(len(x), -1, -1)
    x = torch.cat([x[:, :middle], token, x[:, middle:]], 1) + w["pos_embed"]
    for i in range(1 + max(int(name.split(".")[1]) for name in w if name.startswith("layers."))):
        mixer = {k.split("mixer.")[1]: v for k, v in w.items() if k.startswith(f"layers.{i}.mixer.")}
        names = ("conv1d{}.weight", "conv1d{}.bias", "x_proj{}.weight", "dt_proj{}.weight", "dt_proj{}.bias")
        directions = [
            {name.format(""): mixer[name.format(s)] for name in (*names, "A{}_log", "D{}")} for s in SUFFIXES
        ]
        x = x + textbook_mixer(norm(x, f"layers.{i}.norm1"), mixer, directions)
        h, mlp = norm(x, f"layers.{i}.norm2"), f"layers.{i}.mlp"
        gate, value = (F.linear(h, w[f"{mlp}.w{k}.weight"], w[f"{mlp}.w{k}.bias"]) for k in (1, 2))
        x = x + F.linear(F.silu(gate) * value, w[f"{mlp}.w3.weight"], w[f"{mlp}.w3.bias"])
    return norm(x, "norm_f")


def pyramid_shapes(dim: int, *, norm: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' four maps."""
    last = 3 if norm else 2
    doubled = ["backbone.fpn1.0", f"backbone.fpn1.{last}", "backbone.fpn2.0"]
    shapes: dict[str, tuple[int, ...]] = {}
    for name in doubled:
        shapes |= {f"{name}.weight": (dim, dim, 2, 2), f"{name}.bias": (dim,)}
    if norm:
        shapes |= {"backbone.fpn1.1.ln.weight": (dim,), "backbone.fpn1.1.ln.bias": (dim,)}
    return shapes


def textbook_maps(images: Tensor, w: dict[str, Tensor], *, norm: bool) -> list[Tensor]:
    """Four maps of pictures, the finest first, in float64."""
    x = textbook_tokens(
        images, {k.removeprefix("backbone."): v for k, v in w.items() if k.startswith("backbone.")}
    )
    side = math.isqrt(x.shape[1] - 1)
    keep = [place for place in range(side * side + 1) if place != side * side // 2]
    x = x[:, keep].transpose(1, 2).reshape(len(x), -1, side, side)

    def doubled(x: Tensor, name: str) -> Tensor:
        return F.conv_transpose2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride=2)

    y = doubled(x, "backbone.fpn1.0")
    if norm:
        centred = y - y.mean(1, keepdim=True)
        y = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        scale, shift = (w[f"backbone.fpn1.1.ln.{part}"].view(1, -1, 1, 1) for part in ("weight", "bias"))
        y = y * scale + shift
    finest = doubled(F.gelu(y), f"backbone.fpn1.{3 if norm else 2}")
    return [finest, doubled(x, "backbone.fpn2.0"), x, F.max_pool2d(x, 2)]


def bn_shapes(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": (channels,) for part in parts} | {f"{name}.num_batches_tracked": ()}


def textbook_conv(x: Tensor, w: dict[str, Tensor], conv: str, bn: str) -> Tensor:
    """Convolution, batch norm with the running statistics, ReLU."""
    weight = w[f"{conv}.weight"]
    x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    mean, var, scale, shift = (
        w[f"{bn}.{part}"].view(1, -1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
    )
    return ((x - mean) / (var + 1e-5).sqrt() * scale + shift).clamp(min=0)


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A state dict of these shapes that keeps the variance of what goes through it."""
    weights: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(7)
        elif name.endswith("running_var") or (name.endswith(".weight") and len(shape) == 1):
            weights[name] = torch.rand(shape) + 0.5
        elif name.endswith(".weight") and "conv1d" not in name:
            weights[name] = 1.5 * torch.randn(shape) / math.prod(shape[1:]) ** 0.5
        else:
            weights[name] = 0.3 * torch.randn(shape)
    return weights
