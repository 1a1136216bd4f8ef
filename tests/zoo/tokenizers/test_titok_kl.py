"""TiTok with continuous tokens: published names and sizes, and an independent transcription of the forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.catalog.claims import shaken
from arcore.zoo.tokenizers.titok_kl.claim import claim
from arcore.zoo.tokenizers.titok_kl.config import TiTokKLConfig
from arcore.zoo.tokenizers.titok_kl.model import TiTokKL

# One head of 64 channels, and norms of 16 groups as wide as the finest level: what a file's shapes tell.
SMALL: dict[str, Any] = {
    "depth": 2,
    "embed_dim": 64,
    "num_heads": 1,
    "image_size": 16,
    "patch_size": 4,
    "num_tokens": 5,
    "code_dim": 24,
    "latent_dim": 12,
    "channels": 16,
    "channel_mult": (1, 1, 2),
    "norm_groups": 16,
}


def test_claim():
    found = claim(quick=True)
    assert all(row.holds for row in found.rows), found.rows


def published_shapes(c: TiTokKLConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released autoencoder."""
    dim, shapes = c.embed_dim, {"latent_tokens": (c.num_tokens, c.embed_dim)}

    def layer(name: str, *shape: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    for side in ("encoder", "decoder"):
        shapes[f"{side}.class_embedding"] = (1, dim)
        shapes[f"{side}.positional_embedding"] = (c.side**2 + 1, dim)
        shapes[f"{side}.latent_token_positional_embedding"] = (c.num_tokens, dim)
        layer(f"{side}.ln_pre", dim)
        layer(f"{side}.ln_post", dim)
        for k in range(c.depth):
            block = f"{side}.transformer.{k}"
            layer(f"{block}.ln_1", dim)
            layer(f"{block}.ln_2", dim)
            shapes[f"{block}.attn.in_proj_weight"] = (3 * dim, dim)
            shapes[f"{block}.attn.in_proj_bias"] = (3 * dim,)
            layer(f"{block}.attn.out_proj", dim, dim)
            layer(f"{block}.mlp.c_fc", 4 * dim, dim)
            layer(f"{block}.mlp.c_proj", dim, 4 * dim)
    layer("encoder.patch_embed", dim, c.in_channels, c.patch_size, c.patch_size)
    layer("encoder.conv_out", 2 * c.token_dim, dim, 1, 1)
    layer("decoder.decoder_embed", dim, c.token_dim)
    shapes["decoder.mask_token"] = (1, 1, dim)
    layer("decoder.ffn.0", 2 * dim, dim, 1, 1)
    layer("decoder.ffn.2", c.code_dim, 2 * dim, 1, 1)
    layer("pixel_quantize_conv", c.latent_dim, c.code_dim, 1, 1)
    widths = [c.channels * mult for mult in c.channel_mult]
    layer("pixel_decoder.conv_in", widths[-1], c.latent_dim, 3, 3)

    def res(name: str, before: int, after: int) -> None:
        layer(f"{name}.norm1", before)
        layer(f"{name}.conv1", after, before, 3, 3, bias=False)
        layer(f"{name}.norm2", after)
        layer(f"{name}.conv2", after, after, 3, 3, bias=False)
        if before != after:
            layer(f"{name}.nin_shortcut", after, after, 1, 1, bias=False)

    for k in range(c.num_res_blocks):
        res(f"pixel_decoder.mid.{k}", widths[-1], widths[-1])
    for level, width in enumerate(widths):
        before = widths[min(level + 1, len(widths) - 1)]
        for k in range(c.num_res_blocks):
            res(f"pixel_decoder.up.{level}.block.{k}", before if k == 0 else width, width)
        if level:
            layer(f"pixel_decoder.up.{level}.upsample_conv", width, width, 3, 3)
    layer("pixel_decoder.norm_out", widths[0])
    layer("pixel_decoder.conv_out", c.in_channels, widths[0], 3, 3)
    return shapes


def test_published_names_and_sizes():
    with torch.device("meta"):
        model = arcore.create_model("titok_kl_l32")
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes == published_shapes(model.config)
    assert round(sum(value.numel() for value in model.parameters()) / 1e6) == 641


def released(c: TiTokKLConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    state = {}
    for key, shape in published_shapes(c).items():
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        fan = max(1, drawn[0].numel()) if len(shape) > 1 else 1
        centre = 1.0 if "norm" in key.split(".")[-2:][0] or ".ln_" in key else 0.0
        is_scale = centre == 1.0 and key.endswith("weight")
        state[key] = 1 + 0.1 * drawn if is_scale else drawn / fan**0.5 if len(shape) > 1 else 0.1 * drawn
    return state


def transcribed(
    w: dict[str, Tensor], c: TiTokKLConfig, images: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Moments `[B, 2 c, 1, K]` of images in [0, 1], and images in [0, 1] of tokens `[B, c, 1, K]`."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].flatten(1).T + w[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))

    def trunk(side: str, image: Tensor, short: Tensor) -> Tensor:
        first = w[f"{side}.class_embedding"].expand(len(image), 1, -1)
        image = torch.cat([first, image], 1) + w[f"{side}.positional_embedding"]
        x = norm(
            torch.cat([image, short + w[f"{side}.latent_token_positional_embedding"]], 1), f"{side}.ln_pre"
        )
        for k in range(c.depth):
            name = f"{side}.transformer.{k}"
            qkv = (
                norm(x, f"{name}.ln_1") @ w[f"{name}.attn.in_proj_weight"].T + w[f"{name}.attn.in_proj_bias"]
            )
            q, key, v = (part.unflatten(-1, (c.num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
            weights = (q @ key.mT / q.shape[-1] ** 0.5).softmax(-1)
            x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{name}.attn.out_proj")
            x = x + linear(gelu(linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")), f"{name}.mlp.c_proj")
        return x

    def conv(x: Tensor, name: str) -> Tensor:
        weight = w[f"{name}.weight"]
        return F.conv2d(x, weight, w.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    def group(x: Tensor, name: str) -> Tensor:
        return F.silu(F.group_norm(x, c.norm_groups, w[f"{name}.weight"], w[f"{name}.bias"], 1e-6))

    def res(x: Tensor, name: str) -> Tensor:
        h = conv(group(conv(group(x, f"{name}.norm1"), f"{name}.conv1"), f"{name}.norm2"), f"{name}.conv2")
        return h + (conv(h, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in w else x)

    patches = F.conv2d(
        images, w["encoder.patch_embed.weight"], w["encoder.patch_embed.bias"], stride=c.patch_size
    )
    queries = w["latent_tokens"].expand(len(images), -1, -1)
    read = norm(trunk("encoder", patches.flatten(2).mT, queries)[:, -c.num_tokens :], "encoder.ln_post")
    # The K x D numbers of an image are taken for D x K without being transposed.
    moments = linear(
        read.reshape(len(images), c.embed_dim, c.num_tokens).mT, "encoder.conv_out"
    ).mT.unsqueeze(2)
    unit = tokens / tokens.norm(dim=1, keepdim=True)
    short = linear(unit.squeeze(2).mT, "decoder.decoder_embed")
    masked = w["decoder.mask_token"].expand(len(tokens), c.side**2, -1)
    x = norm(trunk("decoder", masked, short)[:, 1 : 1 + c.side**2], "decoder.ln_post")
    logits = linear(torch.tanh(linear(x, "decoder.ffn.0")), "decoder.ffn.2")
    codes = logits.softmax(-1).mT.unflatten(2, (c.side, c.side))
    x = conv(conv(codes, "pixel_quantize_conv"), "pixel_decoder.conv_in")
    for k in range(c.num_res_blocks):
        x = res(x, f"pixel_decoder.mid.{k}")
    for level in reversed(range(len(c.channel_mult))):
        for k in range(c.num_res_blocks):
            x = res(x, f"pixel_decoder.up.{level}.block.{k}")
        if level:
            x = conv(
                x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"pixel_decoder.up.{level}.upsample_conv"
            )
    return moments, conv(group(x, "pixel_decoder.norm_out"), "pixel_decoder.conv_out")


@pytest.mark.parametrize("kind", ["alone", "inside a model", "half"])
@torch.no_grad()
def test_published_weights_give_published_arithmetic(tmp_path: Path, kind: str):
    config = TiTokKLConfig(**SMALL)
    state = released(config)
    images, tokens = (
        torch.rand(2, 3, 16, 16, dtype=torch.float64),
        torch.randn(2, 4, 1, 5, dtype=torch.float64),
    )
    stored = {key: value.half() for key, value in state.items()} if kind == "half" else state
    if kind == "inside a model":
        stored = {f"vae.{key}": value for key, value in state.items()}
        stored |= {"context_emb": torch.zeros(77, 768), "diffusion_model.betas": torch.zeros(9)}
    torch.save(stored, tmp_path / "weights.bin")
    # Alone a file tells the layout; heads have 64 channels.
    model: Any = arcore.create_model("titok_kl", weights=tmp_path / "weights.bin").eval()
    assert model.config == config
    weights = {key: value.half().double() for key, value in state.items()} if kind == "half" else state
    moments, drawn = transcribed(weights, config, images, tokens)
    mean, log_variance = model.double().moments(2 * images - 1)
    both = torch.cat([mean, log_variance], 2).mT.unsqueeze(2)
    torch.testing.assert_close(both, moments.clamp(-30, 20).float(), rtol=0, atol=2e-5)
    decoded = model.decode(tokens.squeeze(2).mT * 7)
    assert drawn.std() > 0.05
    torch.testing.assert_close(decoded, (2 * drawn - 1).clamp(-1, 1).float(), rtol=0, atol=2e-5)


def test_only_draws_in_training_differ():
    model = shaken(arcore.create_model("titok_kl_tiny"))
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    assert not torch.equal(model.train()(images).reconstruction, model(images).reconstruction)
    assert torch.equal(model.eval()(images).reconstruction, model(images).reconstruction)
    assert model.decode(torch.zeros(0, 8, 4)).shape == (0, 1, 8, 8)
    assert model.decode(torch.randn(1, 8, 4).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 4}, "patch_size to be 2 to the number of levels less 1"),
        ({"image_size": 9}, "patch_size to divide image_size=9"),
        ({"num_heads": 3}, "num_heads to divide embed_dim=64"),
        ({"norm_groups": 5}, "norm_groups to divide"),
        ({"num_tokens": 0}, "num_tokens to be at least 1"),
    ],
)
def test_bad_configs(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        arcore.create_model("titok_kl_tiny", **change)


def test_bad_inputs(tmp_path: Path):
    model: TiTokKL = arcore.create_model("titok_kl_tiny")  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"images of shape \('B', 1, 8, 8\) but got \(1, 1, 8, 9\)"):
        model(torch.zeros(1, 1, 8, 9))
    with pytest.raises(ValueError, match=r"tokens of shape \('B', 8, 4\) but got \(1, 4, 8\)"):
        model.decode(torch.zeros(1, 4, 8))
    torch.save({"x": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no weights of AR-Diffusion's autoencoder"):
        arcore.create_model("titok_kl", weights=tmp_path / "other.pt")
