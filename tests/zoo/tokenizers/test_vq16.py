"""VQ-16 against its published layout, transcribed in float64 from the names of the released files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.zoo.tokenizers.vq16 import ImageVQ, ImageVQConfig

CONFIG = ImageVQConfig(
    image_size=12, in_channels=3, channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, norm_groups=4,
    z_channels=10, code_channels=5, vocab_size=19,
)  # fmt: skip


def make(**changes: object) -> ImageVQ:
    torch.manual_seed(0)
    return ImageVQ(dataclasses.replace(CONFIG, **changes))


def pictures(batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, 12, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1


def published(config: ImageVQConfig) -> dict[str, Tensor]:
    """Random weights under the released names."""
    torch.manual_seed(0)
    state: dict[str, Tensor] = {}

    def conv(name: str, out: int, into: int, size: int) -> None:
        state[f"{name}.weight"] = torch.randn(out, into, size, size) / (into * size * size) ** 0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(out)

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width)
        state[f"{name}.bias"] = 0.1 * torch.randn(width)

    def residual(name: str, into: int, out: int) -> None:
        norm(f"{name}.norm1", into)
        conv(f"{name}.conv1", out, into, 3)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out, 3)
        if into != out:
            conv(f"{name}.nin_shortcut", out, into, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    widths = [config.channels * m for m in config.channel_mult]
    last = len(widths) - 1
    for part, order in (("encoder", range(last + 1)), ("decoder", reversed(range(last + 1)))):
        encoder = part == "encoder"
        width = config.channels if encoder else widths[-1]
        conv(f"{part}.conv_in", width, config.in_channels if encoder else config.z_channels, 3)
        for number, level in enumerate(order):
            block = f"{part}.conv_blocks.{number}"
            for j in range(config.num_res_blocks + (not encoder)):
                residual(f"{block}.res.{j}", width, widths[level])
                width = widths[level]
                if level == last:
                    attention(f"{block}.attn.{j}", width)
            if encoder and level != last:
                conv(f"{block}.downsample.conv", width, width, 3)
            if not encoder and level != 0:
                conv(f"{block}.upsample.conv", width, width, 3)
        residual(f"{part}.mid.0", widths[-1], widths[-1])
        attention(f"{part}.mid.1", widths[-1])
        residual(f"{part}.mid.2", widths[-1], widths[-1])
        norm(f"{part}.norm_out", width)
        conv(f"{part}.conv_out", config.z_channels if encoder else config.in_channels, width, 3)
    conv("quant_conv", config.code_channels, config.z_channels, 1)
    conv("post_quant_conv", config.z_channels, config.code_channels, 1)
    state["quantize.embedding.weight"] = torch.randn(config.vocab_size, config.code_channels)
    state["quantize.codebook_used"] = torch.zeros(65536)
    return state


class Transcription:
    """The released tokenizer in float64."""

    def __init__(self, state: dict[str, Tensor], config: ImageVQConfig) -> None:
        self.w = {name: value.double() for name, value in state.items()}
        self.config, self.last = config, len(config.channel_mult) - 1

    def conv(self, name: str, x: Tensor, **settings: Any) -> Tensor:
        weight = self.w[f"{name}.weight"]
        settings = settings or {"padding": weight.shape[-1] // 2}
        return F.conv2d(x, weight, self.w[f"{name}.bias"], **settings)

    def norm(self, name: str, x: Tensor) -> Tensor:
        groups = x.unflatten(1, (self.config.norm_groups, -1))
        mean = groups.mean((2, 3, 4), keepdim=True)
        spread = groups.var((2, 3, 4), unbiased=False, keepdim=True)
        flat = ((groups - mean) / (spread + 1e-6).sqrt()).flatten(1, 2)
        return flat * self.w[f"{name}.weight"][:, None, None] + self.w[f"{name}.bias"][:, None, None]

    def swish(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    def residual(self, name: str, x: Tensor) -> Tensor:
        h = self.conv(f"{name}.conv1", self.swish(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", self.swish(self.norm(f"{name}.norm2", h)))
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.w else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        y = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", y).flatten(2) for part in "qkv")
        weights = (torch.einsum("bci,bcj->bij", q, k) / q.shape[1] ** 0.5).softmax(-1)
        mixed = torch.einsum("bij,bcj->bci", weights, v).view_as(x)
        return x + self.conv(f"{name}.proj_out", mixed)

    def middle(self, part: str, x: Tensor) -> Tensor:
        x = self.attention(f"{part}.mid.1", self.residual(f"{part}.mid.0", x))
        return self.residual(f"{part}.mid.2", x)

    def blocks(self, part: str, number: int, x: Tensor) -> Tensor:
        block = f"{part}.conv_blocks.{number}"
        for j in range(self.config.num_res_blocks + (part == "decoder")):
            x = self.residual(f"{block}.res.{j}", x)
            if f"{block}.attn.{j}.norm.weight" in self.w:
                x = self.attention(f"{block}.attn.{j}", x)
        return x

    def out(self, part: str, x: Tensor) -> Tensor:
        return self.conv(f"{part}.conv_out", self.swish(self.norm(f"{part}.norm_out", x)))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv("encoder.conv_in", images.double())
        for number in range(self.last + 1):
            x = self.blocks("encoder", number, x)
            if number != self.last:
                name = f"encoder.conv_blocks.{number}.downsample.conv"
                x = self.conv(name, F.pad(x, (0, 1, 0, 1)), stride=2)
        x = self.conv("quant_conv", self.out("encoder", self.middle("encoder", x)))
        x = F.normalize(x, dim=1).permute(0, 2, 3, 1).flatten(1, 2)
        codes = F.normalize(self.w["quantize.embedding.weight"], dim=-1)
        return x, (x.unsqueeze(2) - codes).square().sum(-1).argmin(-1)

    def decode(self, indices: Tensor) -> Tensor:
        side = int(indices.shape[1] ** 0.5)
        codes = F.normalize(self.w["quantize.embedding.weight"], dim=-1)[indices]
        x = codes.transpose(1, 2).unflatten(2, (side, side))
        x = self.middle("decoder", self.conv("decoder.conv_in", self.conv("post_quant_conv", x)))
        for number in range(self.last + 1):
            x = self.blocks("decoder", number, x)
            if number != self.last:
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = self.conv(f"decoder.conv_blocks.{number}.upsample.conv", x)
        return self.out("decoder", x).clamp(-1, 1)


@torch.no_grad()
def test_the_published_layout_gives_the_numbers_of_a_transcription(tmp_path: Path) -> None:
    state = published(CONFIG)
    torch.save({"model": state}, tmp_path / "vq.pt")
    fields = {field.name: getattr(CONFIG, field.name) for field in dataclasses.fields(CONFIG)}
    model = arcore.create_model("vq16_ds16", weights=tmp_path / "vq.pt", **fields).eval()
    theirs = Transcription(state, CONFIG)
    _, codes = theirs.encode(pictures(4))
    assert torch.equal(model.encode(pictures(4)), codes)
    assert len(codes.unique()) > 5
    assert (model.decode(codes) - theirs.decode(codes)).abs().max() <= 1e-5
    for broken in ("encoder.mid.1.k.weight", "decoder.conv_blocks.0.res.0.conv1.bias"):
        torch.save({"model": {k: v for k, v in state.items() if k != broken}}, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match=r"do not fit the model: .*missing"):
            arcore.create_model("vq16_ds16", weights=tmp_path / "bad.pt", **fields)


def test_published_sizes() -> None:
    with torch.device("meta"):
        model = ImageVQ(arcore.models.get_config("vq16_ds16"))
        parameters = sum(p.numel() for p in model.parameters())
        names = len(published(ImageVQConfig()))
    assert parameters == pytest.approx(71.88e6, abs=0.005e6)
    assert names == 344
    assert ImageVQ(dataclasses.replace(CONFIG)).side == 3


@torch.no_grad()
def test_reconstruction_is_the_decoded_codes() -> None:
    model = make().eval()
    out = model(pictures())
    assert torch.equal(out.indices, model.encode(pictures()))
    torch.testing.assert_close(model.decode(out.indices), out.reconstruction.clamp(-1, 1))
    assert model.decode(out.indices[:0]).shape == (0, 3, 12, 12)
    lengths = model.codebook().norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_loss_and_straight_through_gradient() -> None:
    model = make()
    latent = torch.randn(2, 5, 3, 3, requires_grad=True)
    through, loss, indices = model.quantize(latent)
    vectors = F.normalize(latent.detach(), dim=1).permute(0, 2, 3, 1).flatten(1, 2)
    codes = model.codebook()[indices]
    assert loss.item() == pytest.approx(1.25 * (codes - vectors).square().mean().item(), rel=1e-5)
    weight = torch.randn_like(through)
    (grad,) = torch.autograd.grad((through * weight).sum(), latent)
    other = latent.detach().requires_grad_()
    (expected,) = torch.autograd.grad((F.normalize(other, dim=1) * weight).sum(), other)
    torch.testing.assert_close(grad, expected)


def test_dead_codes_restart_on_vectors_of_the_batch() -> None:
    model = make(restart_below=0.1)
    for _ in range(80):
        _, _, indices = model.quantize(torch.randn(2, 5, 3, 3))
    assert len(indices.unique()) > 6
    still = make()
    before = still.quantize.embedding.weight.clone()
    still(pictures())
    assert torch.equal(still.quantize.embedding.weight, before)


def test_bad_arguments() -> None:
    model = make().eval()
    with pytest.raises(ValueError, match=r"images of shape \[B, 3, 12, 12\] but got \(2, 3, 8, 8\)"):
        model.encode(torch.zeros(2, 3, 8, 8))
    with pytest.raises(TypeError, match="floating dtype but got uint8"):
        model(torch.zeros(2, 3, 12, 12, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"codes of shape \[B, 9\] but got \(2, 4\)"):
        model.decode(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="codes from 0 to 18 but got 19"):
        model.decode(torch.full((1, 9), 19))
    with pytest.raises(ValueError, match=r"vectors of shape \[B, 9, 5\]"):
        model.decode_vectors(torch.zeros(1, 9, 4))
    with pytest.raises(ValueError, match="image_size to be a multiple of 4"):
        make(image_size=30)
    with pytest.raises(ValueError, match="norm_groups to divide"):
        make(norm_groups=3)
    with pytest.raises(ValueError, match="beta >= 0"):
        make(beta=float("nan"))
    assert ImageVQConfig().for_images(28, 1)["channel_mult"] == (1, 1, 2)
    assert ImageVQConfig().for_images(4, 1)["image_size"] == 4
    with pytest.raises(ValueError, match="at least 4 x 4"):
        ImageVQConfig().for_images(3, 1)
