"""The judges of reconstructions against their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from arcore.nn.critics import PatchDiscriminator, PerceptualLoss

PLACES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
WIDTHS = (64, 128, 256, 512, 512)


def random_vgg() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state, width = {}, 3
    for places, wide in zip(PLACES, WIDTHS, strict=True):
        for place in places:
            std = (2 / (9 * width)) ** 0.5
            state[f"features.{place}.weight"] = torch.randn(wide, width, 3, 3, generator=generator) * std
            state[f"features.{place}.bias"] = torch.randn(wide, generator=generator) * 0.1
            width = wide
    return state


@pytest.fixture(scope="module")
def vgg() -> dict[str, torch.Tensor]:
    return random_vgg()


def textbook(state, one, two, heads=None):
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)[:, None, None]
    x, y = (((image.double() + 1) / 2 - mean) / std for image in (one, two))
    total = 0.0
    for level, places in enumerate(PLACES):
        if level:
            x, y = F.max_pool2d(x, 2, 2), F.max_pool2d(y, 2, 2)
        for place in places:
            weight, bias = (state[f"features.{place}.{part}"].double() for part in ("weight", "bias"))
            x, y = (F.conv2d(z, weight, bias, padding=1).clamp(min=0) for z in (x, y))
        gap = (x / x.pow(2).sum(1, keepdim=True).sqrt() - y / y.pow(2).sum(1, keepdim=True).sqrt()).pow(2)
        lin = torch.full((WIDTHS[level],), 1 / WIDTHS[level]) if heads is None else heads[level].flatten()
        total += (gap * lin.double()[:, None, None]).sum(1).mean().item()
    return total


@pytest.mark.parametrize("channels", [1, 3])
def test_perceptual_distance_is_that_of_the_formula(vgg, channels):
    torch.manual_seed(channels)
    one, two = torch.rand(2, 2, channels, 19, 17) * 2 - 1
    loss = PerceptualLoss(vgg)
    assert loss(one, two).item() == pytest.approx(textbook(vgg, one, two), rel=1e-4)
    assert loss(one, one).item() == 0
    heads = [torch.rand(1, width, 1, 1) for width in WIDTHS]
    weighted = PerceptualLoss(vgg | {f"lin{k}.model.1.weight": lin for k, lin in enumerate(heads)})
    assert weighted(one, two).item() == pytest.approx(textbook(vgg, one, two, heads), rel=1e-4)
    assert not any(parameter.requires_grad for parameter in loss.parameters())


def test_perceptual_weights_that_do_not_fit_are_named(vgg, tmp_path):
    with pytest.raises(ValueError, match=r"features\.5\.bias is missing"):
        PerceptualLoss({name: value for name, value in vgg.items() if name != "features.5.bias"})
    with pytest.raises(ValueError, match=r"features\.0\.weight has shape \(64, 1, 3, 3\)"):
        PerceptualLoss(vgg | {"features.0.weight": torch.zeros(64, 1, 3, 3)})
    with pytest.raises(ValueError, match="lin2"):
        PerceptualLoss(vgg | {"lin2.model.1.weight": torch.zeros(1, 3, 1, 1)})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        PerceptualLoss.from_file(tmp_path / "nowhere.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.pth holds no weights of VGG-16"):
        PerceptualLoss.from_file(tmp_path / "text.pth")


def test_a_score_of_the_discriminator_depends_on_its_image_alone():
    torch.manual_seed(0)
    judge = PatchDiscriminator(3, channels=8, depth=2)
    images = torch.randn(3, 3, 32, 32)
    scores = judge(images)
    assert scores.shape == (3, 1, 6, 6)
    assert scores.std() > 0
    torch.testing.assert_close(judge(images[1:2]), scores[1:2], rtol=0, atol=1e-5)
