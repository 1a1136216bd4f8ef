"""RoMA's segmentation: published names and arithmetic, its start from pretraining, and bad arguments."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.models import RoMA, RoMAConfig, RoMASegmenter, RoMASegmenterConfig, load_weights

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
    "num_classes": 3,
    "image_size": 28,
    "patch_size": 4,
    "d_state": 4,
    "drop_path": 0.0,
    "channels": 8,
    "auxiliary_channels": 4,
}


def official_shapes(config: RoMASegmenterConfig) -> dict[str, tuple[int, ...]]:
    c, d, a, k = config.embed_dim, config.channels, config.auxiliary_channels, config.num_classes
    shapes = {f"backbone.{name}": shape for name, shape in encoder_shapes(config).items()}
    shapes |= pyramid_shapes(c, norm=True)
    # The authors' backbone keeps a classifier that nothing reads.
    shapes |= {"backbone.head.weight": (1000, c), "backbone.head.bias": (1000,)}
    convs = {
        **{f"decode_head.psp_modules.{i}.1": (d, c, 1, 1) for i in range(4)},
        "decode_head.bottleneck": (d, c + 4 * d, 3, 3),
        **{f"decode_head.lateral_convs.{i}": (d, c, 1, 1) for i in range(3)},
        **{f"decode_head.fpn_convs.{i}": (d, d, 3, 3) for i in range(3)},
        "decode_head.fpn_bottleneck": (d, 4 * d, 3, 3),
        "auxiliary_head.convs.0": (a, c, 3, 3),
    }
    for name, shape in convs.items():
        shapes |= {f"{name}.conv.weight": shape, **bn_shapes(f"{name}.bn", shape[0])}
    for head, width in (("decode_head", d), ("auxiliary_head", a)):
        shapes |= {f"{head}.conv_seg.weight": (k, width, 1, 1), f"{head}.conv_seg.bias": (k,)}
    return shapes


@pytest.mark.parametrize("width", [192, 384, 512, 768, 1024, 1536])
def test_published_sizes(width: int):
    [name] = [
        name
        for name in arcore.list_models("roma_segmenter_*_pz16")
        if arcore.models.get_config(name).embed_dim == width
    ]
    with torch.device("meta"):
        model = arcore.create_model(name)
    assert model.config.depth == (24 if width >= 1024 else 12)
    state = {key: torch.empty(shape, device="meta") for key, shape in official_shapes(model.config).items()}
    renamed = model.from_official(state)
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in model.state_dict().items()}


def textbook_upernet(maps: list[Tensor], w: dict[str, Tensor]) -> Tensor:
    """UPerNet on four maps: logits at the finest resolution."""

    def conv(x: Tensor, name: str) -> Tensor:
        return textbook_conv(x, w, f"decode_head.{name}.conv", f"decode_head.{name}.bn")

    def at(x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, size=like.shape[2:], mode="bilinear")

    top = maps[3]
    pooled = [top]
    for i, side in enumerate((1, 2, 3, 6)):
        pooled.append(at(conv(F.adaptive_avg_pool2d(top, side), f"psp_modules.{i}.1"), top))
    levels = [conv(maps[i], f"lateral_convs.{i}") for i in range(3)] + [
        conv(torch.cat(pooled, 1), "bottleneck")
    ]
    for i in (2, 1, 0):
        levels[i] = levels[i] + at(levels[i + 1], levels[i])
    out = [conv(levels[i], f"fpn_convs.{i}") for i in range(3)] + [levels[3]]
    x = conv(torch.cat([at(level, out[0]) for level in out], 1), "fpn_bottleneck")
    return F.conv2d(x, w["decode_head.conv_seg.weight"], w["decode_head.conv_seg.bias"])


@torch.no_grad()
def test_published_checkpoint_gives_published_arithmetic(tmp_path: Path):
    """An odd number of patches per side too, where the coarsest map is rounded down."""
    config = RoMASegmenterConfig(**SMALL)
    weights = random_weights(official_shapes(config))
    torch.save({"state_dict": weights, "meta": {"epoch": 3}}, tmp_path / "iter_160000.pth")
    model = RoMASegmenter(config).eval()
    load_weights(model, tmp_path / "iter_160000.pth")
    images, masks = torch.rand(2, 3, 28, 28) * 2 - 1, torch.randint(0, 3, (2, 28, 28))
    masks[0, :5] = 255
    w = {name: value.double() for name, value in weights.items()}
    maps = textbook_maps(images, w, norm=True)
    logits = F.interpolate(textbook_upernet(maps, w), size=(28, 28), mode="bilinear")
    torch.testing.assert_close(model(images), logits.float(), rtol=0, atol=3e-5 * logits.abs().max().item())
    other = textbook_conv(maps[2], w, "auxiliary_head.convs.0.conv", "auxiliary_head.convs.0.bn")
    other = F.conv2d(other, w["auxiliary_head.conv_seg.weight"], w["auxiliary_head.conv_seg.bias"])
    other = F.interpolate(other, size=(28, 28), mode="bilinear")
    known = masks != 255
    expected = sum(
        -share * x.log_softmax(1).gather(1, masks.clamp(max=2)[:, None])[:, 0][known].mean()
        for share, x in ((1, logits), (0.4, other))
    )
    loss, same = model(images, masks)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(same, model(images))


@torch.no_grad()
def test_it_starts_from_a_pretrained_encoder():
    encoder = RoMA(
        RoMAConfig(
            embed_dim=16, depth=6, decoder_dim=64, image_size=24, patch_size=4, cluster=2, block=3, d_state=4
        )
    )
    model = RoMASegmenter(RoMASegmenterConfig(**SMALL))
    head = model.decode_head.conv_seg.weight.clone()
    model.start_from(encoder)
    state = model.state_dict()
    expected = encoder.state_dict()["layers.3.mlp.w2.weight"]
    assert torch.equal(state["backbone.layers.3.mlp.w2.weight"], expected)
    for k in range(4):
        ours = state[f"backbone.layers.5.mixer.directions.{k}.A_log"]
        assert torch.equal(ours, encoder.state_dict()["layers.5.mixer.A_log"])
    assert torch.equal(state["decode_head.conv_seg.weight"], head)
    with pytest.raises(ValueError, match="pretrained model with embed_dim=32 but got 16"):
        RoMASegmenter(RoMASegmenterConfig(**SMALL | {"embed_dim": 32})).start_from(encoder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 0}, "num_classes to be at least 1 but got 0"),
        ({"channels": 0}, "channels to be at least 1 but got 0"),
        ({"image_size": 26}, "multiple of patch_size=4, two patches or more, but got 26"),
        ({"image_size": 4}, "two patches or more, but got 4"),
        ({"dropout": 1.0}, "0 <= dropout < 1 but got 1.0"),
        ({"drop_path": 1.5}, "drop_path to be from 0 to 1 but got 1.5"),
    ],
)
def test_bad_configs(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        RoMASegmenter(RoMASegmenterConfig(**SMALL | change))


def test_bad_arguments():
    model = RoMASegmenter(RoMASegmenterConfig(**SMALL))
    with pytest.raises(ValueError, match=r"images of shape \('B', 3, 28, 28\) but got \(2, 3, 28, 24\)"):
        model(torch.zeros(2, 3, 28, 24))
    with pytest.raises(TypeError, match="floating dtype but got uint8; scale them"):
        model(torch.zeros(2, 3, 28, 28, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"masks of shape \(2, 28, 28\) but got \(2, 1, 28, 28\)"):
        model(torch.zeros(2, 3, 28, 28), torch.zeros(2, 1, 28, 28, dtype=torch.int64))


def test_pictures_without_a_label_cost_nothing():
    model = RoMASegmenter(RoMASegmenterConfig(**SMALL)).eval()
    loss, _ = model(torch.zeros(1, 3, 28, 28), torch.full((1, 28, 28), 255))
    assert loss.item() == 0
