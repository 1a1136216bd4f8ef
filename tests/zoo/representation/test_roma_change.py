"""RoMA's change detection: published names and arithmetic, what the order of pictures does, and bad arguments."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.models import RoMA, RoMAChange, RoMAChangeConfig, RoMAConfig, load_weights

from .textbook import (
    bn_shapes,
    encoder_shapes,
    pyramid_shapes,
    random_weights,
    textbook_conv,
    textbook_maps,
)

SMALL = {
    "embed_dim": 16,
    "depth": 6,
    "image_size": 48,
    "patch_size": 8,
    "d_state": 4,
    "drop_path": 0.0,
    "decoder_channels": (12, 8, 6, 4),
}


def official_shapes(config: RoMAChangeConfig) -> dict[str, tuple[int, ...]]:
    c, widths = config.embed_dim, config.decoder_channels
    shapes = {f"backbone.{name}": shape for name, shape in encoder_shapes(config).items()}
    shapes |= pyramid_shapes(c, norm=False)
    shapes |= {"backbone.head.weight": (1000, c), "backbone.head.bias": (1000,)}
    before = c
    for i, width in enumerate(widths):
        for part, inputs in (("conv1", before + (c if i < 3 else 0)), ("conv2", width)):
            name = f"decode_head.blocks.{i}.{part}"
            shapes |= {f"{name}.0.weight": (width, inputs, 3, 3), **bn_shapes(f"{name}.1", width)}
        before = width
    seg = {"decode_head.conv_seg.weight": (2, widths[-1], 1, 1), "decode_head.conv_seg.bias": (2,)}
    return shapes | seg


@pytest.mark.parametrize("width", [192, 384, 512, 768, 1024, 1536])
def test_published_sizes(width: int):
    [name] = [
        name
        for name in arcore.list_models("roma_change_*_pz16")
        if arcore.models.get_config(name).embed_dim == width
    ]
    with torch.device("meta"):
        model = arcore.create_model(name)
    state = {key: torch.empty(shape, device="meta") for key, shape in official_shapes(model.config).items()}
    renamed = model.from_official(state)
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in model.state_dict().items()}


def textbook_unet(maps: list[Tensor], w: dict[str, Tensor]) -> Tensor:
    x = maps[3]
    for i in range(4):
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        if i < 3:
            x = torch.cat([x, F.interpolate(maps[2 - i], size=x.shape[2:], mode="bilinear")], 1)
        for part in ("conv1", "conv2"):
            name = f"decode_head.blocks.{i}.{part}"
            x = textbook_conv(x, w, f"{name}.0", f"{name}.1")
    x = F.interpolate(x, size=(48, 48), mode="bilinear")
    return F.conv2d(x, w["decode_head.conv_seg.weight"], w["decode_head.conv_seg.bias"])


@torch.no_grad()
def test_published_checkpoint_gives_published_arithmetic(tmp_path: Path):
    config = RoMAChangeConfig(**SMALL)
    weights = random_weights(official_shapes(config))
    torch.save({"state_dict": weights}, tmp_path / "mamba_base_oscd.pth")
    model = RoMAChange(config).eval()
    load_weights(model, tmp_path / "mamba_base_oscd.pth")
    pairs = torch.rand(2, 2, 3, 48, 48) * 2 - 1
    w = {name: value.double() for name, value in weights.items()}
    before, after = (textbook_maps(pairs[:, time], w, norm=False) for time in range(2))
    expected = textbook_unet([(a - b).abs() for a, b in zip(before, after, strict=True)], w)
    ours = model(pairs)
    torch.testing.assert_close(ours, expected.float(), rtol=0, atol=3e-5 * expected.abs().max().item())
    torch.testing.assert_close(model(pairs.flip(1)), ours, rtol=0, atol=1e-5)
    same = model(pairs[:, :1].expand(-1, 2, -1, -1, -1))
    # Of equal pictures nothing is seen, whatever they show.
    torch.testing.assert_close(same[0], same[1])
    assert (same - ours).abs().max() > 1e-2


@torch.no_grad()
def test_it_starts_from_a_pretrained_encoder():
    encoder = RoMA(
        RoMAConfig(
            embed_dim=16, depth=6, decoder_dim=64, image_size=48, patch_size=8, cluster=2, block=3, d_state=4
        )
    )
    model = RoMAChange(RoMAChangeConfig(**SMALL))
    model.start_from(encoder)
    expected = encoder.state_dict()["layers.2.mixer.in_proj.weight"]
    assert torch.equal(model.state_dict()["backbone.layers.2.mixer.in_proj.weight"], expected)


def test_bad_configs_and_arguments():
    with pytest.raises(ValueError, match=r"decoder_channels to be 3 widths or more but got \(8, 8\)"):
        RoMAChangeConfig(**SMALL | {"decoder_channels": (8, 8)})
    model = RoMAChange(RoMAChangeConfig(**SMALL))
    with pytest.raises(ValueError, match=r"images of shape \('B', 2, 3, 48, 48\) but got \(2, 3, 48, 48\)"):
        model(torch.zeros(2, 3, 48, 48))
    with pytest.raises(ValueError, match=r"masks of shape \(1, 48, 48\) but got \(1, 24, 24\)"):
        model(torch.zeros(1, 2, 3, 48, 48), torch.zeros(1, 24, 24, dtype=torch.int64))
