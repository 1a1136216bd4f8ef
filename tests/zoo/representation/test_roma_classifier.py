"""RoMA's classifier: backward and column-wise scans, published names and arithmetic, and its start from pretraining."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import arcore
from arcore.data import load_photos
from arcore.models import (
    RoMA,
    RoMAClassifier,
    RoMAClassifierConfig,
    RoMAConfig,
    load_weights,
)
from arcore.nn import sincos_positions
from arcore.zoo.representation.roma_classifier.model import column_order

from .textbook import encoder_shapes, textbook_tokens

pytest.importorskip("sklearn")

SMALL = {
    "embed_dim": 24,
    "depth": 6,
    "num_classes": 5,
    "image_size": 24,
    "patch_size": 4,
    "d_state": 4,
    "drop_path": 0.0,
}
PRETRAINED = {
    "embed_dim": 24,
    "depth": 6,
    "decoder_dim": 64,
    "image_size": 24,
    "patch_size": 4,
    "cluster": 2,
    "block": 3,
    "d_state": 4,
}


def shake(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))


@pytest.mark.parametrize("side", [1, 2, 3, 14])
def test_column_order_is_its_own_inverse(side: int):
    order = column_order(side)
    assert torch.equal(order[order], torch.arange(side * side + 1))
    middle = side * side // 2
    assert order[middle] == middle
    tokens = torch.arange(side * side).view(side, side)
    with_class = torch.cat([tokens.flatten()[:middle], torch.tensor([-1]), tokens.flatten()[middle:]])
    along_columns = [token for token in with_class[order].tolist() if token != -1]
    assert along_columns == tokens.T.flatten().tolist()


def official_shapes(config: RoMAClassifierConfig) -> dict[str, tuple[int, ...]]:
    head = {"head.weight": (config.num_classes, config.embed_dim), "head.bias": (config.num_classes,)}
    return encoder_shapes(config) | head


@pytest.mark.parametrize("width", [192, 384, 512, 768, 1024, 1536])
def test_published_sizes(width: int):
    [name] = [
        name
        for name in arcore.list_models("roma_classifier_*_pz16")
        if arcore.models.get_config(name).embed_dim == width
    ]
    with torch.device("meta"):
        model = arcore.create_model(name)
    assert model.pos_embed.shape[1] == 197
    shapes = official_shapes(model.config)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    renamed = model.from_official(state)
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in model.state_dict().items()}
    if width == 768:
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(85, abs=0.5)


@torch.no_grad()
@pytest.mark.parametrize("global_pool", [False, True])
@pytest.mark.parametrize("probe", [False, True])
def test_published_checkpoint_gives_published_arithmetic(tmp_path: Path, global_pool: bool, probe: bool):
    config = RoMAClassifierConfig(**SMALL, global_pool=global_pool, probe=probe)
    weights = {name: 0.3 * torch.randn(shape) for name, shape in official_shapes(config).items()}
    stored = dict(weights)
    if probe:
        stored |= {f"head.1.{part}": stored.pop(f"head.{part}") for part in ("weight", "bias")}
        stored |= {"head.0.running_mean": torch.randn(24), "head.0.running_var": torch.rand(24) + 0.5}
        stored["head.0.num_batches_tracked"] = torch.tensor(7)
    args = argparse.Namespace(model="arm_base_pz16")
    torch.save({"model": stored, "epoch": 3, "args": args}, tmp_path / "checkpoint-3.pth")
    model = RoMAClassifier(config).eval()
    load_weights(model, tmp_path / "checkpoint-3.pth")
    images = load_photos("test", image_size=24).images[::100]

    w = {name: value.double() for name, value in weights.items()}
    x = textbook_tokens(images, w)
    x = (x[:, :18].mean(1) + x[:, 19:].mean(1)) / 2 if global_pool else x[:, 18]
    if probe:
        x = (x - stored["head.0.running_mean"]) / (stored["head.0.running_var"].double() + 1e-6).sqrt()
    expected = F.linear(x, w["head.weight"], w["head.bias"])
    torch.testing.assert_close(
        model(images), expected.float(), rtol=0, atol=3e-5 * expected.abs().max().item()
    )


@torch.no_grad()
def test_a_classifier_starts_from_a_pretrained_encoder():
    pretrained, model = RoMA(RoMAConfig(**PRETRAINED)), RoMAClassifier(RoMAClassifierConfig(**SMALL))
    shake(pretrained)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.start_from(pretrained)
    source, state = pretrained.state_dict(), model.state_dict()
    for name, value in source.items():
        if (
            name.startswith("layers.")
            and ".mixer." in name
            and "in_proj" not in name
            and "out_proj" not in name
        ):
            for k in range(4):
                assert torch.equal(state[name.replace("mixer.", f"mixer.directions.{k}.")], value), name
        elif name.startswith(("layers.", "patch_embed.")):
            assert torch.equal(state[name], value), name
    for name in ("cls_token", "norm_f.weight", "head.weight", "head.bias"):
        assert torch.equal(state[name], before[name])
    table = sincos_positions(6, 24)
    assert torch.equal(model.pos_embed[:, :18], table[:, :18])
    assert not model.pos_embed[:, 18].any()
    assert torch.equal(model.pos_embed[:, 19:], table[:, 18:])
    # Another image size: positions are interpolated, so corners stay near corners.
    larger = RoMAClassifier(RoMAClassifierConfig(**SMALL | {"image_size": 48}))
    larger.start_from(pretrained)
    assert larger.pos_embed.shape == (1, 145, 24)
    nearest = (larger.pos_embed[0, 0] - table[0]).square().sum(-1).argmin()
    assert nearest == 0
    nearest = (larger.pos_embed[0, -1] - table[0]).square().sum(-1).argmin()
    assert nearest == 35
    with pytest.raises(ValueError, match="pretrained model with embed_dim=32 but got 24"):
        RoMAClassifier(RoMAClassifierConfig(**SMALL | {"embed_dim": 32})).start_from(pretrained)


@torch.no_grad()
def test_every_patch_reaches_the_class():
    model = RoMAClassifier(RoMAClassifierConfig(**SMALL | {"depth": 1})).eval()
    shake(model)
    images = load_photos("test", image_size=24).images[:1]
    logits = model(images)
    for top in range(0, 24, 4):
        for left in range(0, 24, 4):
            other = images.clone()
            other[:, :, top : top + 4, left : left + 4] += 1
            assert not torch.equal(model(other), logits), (top, left)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 0}, "num_classes to be at least 1 but got 0"),
        ({"image_size": 26}, "image_size to be a multiple of patch_size=4 but got 26"),
        ({"drop_path": 1.5}, "drop_path to be from 0 to 1 but got 1.5"),
    ],
)
def test_bad_configs(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        RoMAClassifier(RoMAClassifierConfig(**SMALL | change))


@pytest.mark.parametrize(
    ("shape", "dtype", "kind", "message"),
    [
        ((2, 3, 24, 20), torch.float32, ValueError, r"images of shape \('B', 3, 24, 24\)"),
        ((3, 24, 24), torch.float32, ValueError, r"got \(3, 24, 24\)"),
        ((2, 3, 24, 24), torch.uint8, TypeError, "floating dtype but got uint8; scale them"),
    ],
)
def test_bad_arguments(shape: tuple, dtype: torch.dtype, kind: type[Exception], message: str):
    with pytest.raises(kind, match=message):
        RoMAClassifier(RoMAClassifierConfig(**SMALL))(torch.zeros(shape, dtype=dtype))
