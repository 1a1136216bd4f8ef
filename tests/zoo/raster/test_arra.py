"""ARRA: the tap, the loss against its formula, principal components, and runs from the command line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arcore.catalog import create_model, load_checkpoint
from arcore.training import train
from arcore.zoo.raster.arra.model import Adaptor, Components, alignment_loss
from arcore.zoo.raster.llamagen import LlamaGen
from tests.zoo.protocol_raster import Protocol as RasterProtocol

SETTINGS = {
    "steps": 4,
    "batch_size": 32,
    "checkpoint_every": 2,
    "accelerator": "cpu",
    "warmup": 0,
    "final_lr": 1.0,
}


class Protocol(RasterProtocol):
    """How the model contract drives it: as its base."""


def test_the_tap_is_the_state_behind_a_layer():
    model = create_model("arra_tiny").eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    codes, labels = torch.randint(4, (3, 64)), torch.tensor([0, 5, 10])
    seen = []
    hook = model.layers[1].register_forward_hook(lambda _, __, out: seen.append(out))
    logits, tap = model.tapped(codes, labels, 2)
    hook.remove()
    assert torch.equal(logits, model(codes, labels))
    assert torch.equal(tap, seen[0][:, 1:])
    assert tap.shape == (3, 63, 64)
    for layer in (0, 4):
        with pytest.raises(ValueError, match="layer from 1 to 3"):
            model.tapped(codes, labels, layer)
    plain = LlamaGen(model.config)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(codes, labels), model(codes, labels))


def test_alignment_is_one_minus_the_mean_cosine():
    torch.manual_seed(0)
    adapted, features = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    expected = 0.0
    for b in range(2):
        for n in range(3):
            one, two = adapted[b, n].tolist(), features[b].tolist()
            dot = sum(x * y for x, y in zip(one, two, strict=True))
            expected += 1 - dot / math.sqrt(sum(x * x for x in one) * sum(y * y for y in two))
    loss = alignment_loss(adapted, features)
    assert loss.item() == pytest.approx(expected / 6, abs=1e-6)
    loss.backward()
    assert features.grad is None
    assert adapted.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"\[B, F\]"):
        alignment_loss(adapted, features[:1])


def test_components_are_the_principal_ones():
    torch.manual_seed(0)
    images = torch.randn(50, 1, 3, 4) * torch.linspace(0.1, 3, 12).view(3, 4) + 1
    found = Components(images, 3).features(images)
    centred = (images.flatten(1) - images.flatten(1).mean(0)).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred / 50)
    expected = centred @ vectors[:, -3:].flip(1) / values[-3:].flip(0).sqrt()
    torch.testing.assert_close(found.double().abs(), expected.abs(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.pow(2).mean(0), torch.ones(3), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="more than 16 images"):
        Components(images[:9], 16)


def test_a_run_goes_on_bit_for_bit_and_its_model_is_the_base(tmp_path: Path):
    tokenizer = train(
        "vq16_tiny",
        out=tmp_path / "vq",
        show_progress=False,
        data="digits",
        image_size=8,
        settings=SETTINGS | {"steps": 2},
    ).checkpoint
    options = {
        "tokenizer": tokenizer,
        "data": "digits",
        "image_size": 8,
        "components": 4,
        "show_progress": False,
    }
    train("arra_tiny", out=tmp_path / "run", settings=SETTINGS | {"steps": 2}, **options)
    resumed = train(
        "arra_tiny", out=tmp_path / "run", resume=tmp_path / "run", settings={"steps": 4}, show_progress=False
    ).checkpoint
    whole = train("arra_tiny", out=tmp_path / "whole", settings=SETTINGS, **options).checkpoint
    for name in ("model", "adaptor"):
        first, second = (load_file(path / f"{name}.safetensors") for path in (resumed, whole))
        assert all(torch.equal(value, second[key]) for key, value in first.items())
    model = load_checkpoint(whole)[0]["model"]
    LlamaGen(model.config).load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="align-layer must be from 1 to 3"):
        train("arra_tiny", out=tmp_path / "x", settings=SETTINGS, align_layer=9, **options)
    with pytest.raises(ValueError, match="holds no network with features"):
        train("arra_tiny", out=tmp_path / "y", settings=SETTINGS, align=str(tokenizer), **options)


def test_adaptor_widths():
    assert Adaptor(8, 3)(torch.zeros(2, 5, 8)).shape == (2, 5, 3)
