"""MAR: the paper's claims, its published weights, sampling, shapes and errors."""

from __future__ import annotations

import argparse
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.decoding import generate_masked, masked_counts
from arcore.models import MAR
from arcore.objectives import draw_visible
from arcore.schedules import DDIM

from ..conftest import shaken


def make(**overrides: Any) -> MAR:
    torch.manual_seed(0)
    return shaken(arcore.create_model("mar_tiny", **overrides)).eval()


def batch(model: MAR, rows: int = 2, seen: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(rows, *model.token_shape, generator=generator)
    order = torch.rand(rows, model.config.tokens, generator=generator).argsort(1)
    return tokens, order[:, :seen].sort(1).values, torch.arange(rows)


def official(model: MAR, state: dict[str, Tensor], tokens: Tensor, visible: Tensor, labels: Tensor) -> Tensor:
    """z by the released architecture from its formulas, on a checkpoint by its own names.

    The encoder runs on all places with the masked ones hidden as keys, instead of on gathered tokens.
    """
    config = model.config
    dim, heads, buffer = config.embed_dim, config.num_heads, config.buffer_size

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, (dim,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    def block(name, x, keys=None):
        q, k, v = (
            linear(f"{name}.attn.qkv", norm(f"{name}.norm1", x))
            .reshape(len(x), -1, 3, heads, dim // heads)
            .permute(2, 0, 3, 1, 4)
        )
        mask = None if keys is None else keys[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(x.shape)
        x = x + linear(f"{name}.attn.proj", y)
        y = F.gelu(linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", x)))
        return x + linear(f"{name}.mlp.fc2", y)

    classes = torch.cat([state["class_emb.weight"], state["fake_latent"]])[labels]
    shown = torch.zeros(tokens.shape[:2], dtype=torch.bool).scatter(1, visible, True)
    x = torch.cat([classes[:, None].expand(-1, buffer, -1), linear("z_proj", tokens)], 1)
    x = norm("z_proj_ln", x + state["encoder_pos_embed_learned"])
    keys = torch.cat([torch.ones(len(x), buffer, dtype=torch.bool), shown], 1)
    for layer in range(config.depth):
        x = block(f"encoder_blocks.{layer}", x, keys)
    x = linear("decoder_embed", norm("encoder_norm", x))
    x = torch.where(keys[..., None], x, state["mask_token"]) + state["decoder_pos_embed_learned"]
    for layer in range(config.depth):
        x = block(f"decoder_blocks.{layer}", x)
    return norm("decoder_norm", x)[:, buffer:] + state["diffusion_pos_embed_learned"]


def official_head(state: dict[str, Tensor], depth: int, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
    def linear(name, x):
        return F.linear(x, state[f"diffloss.net.{name}.weight"], state[f"diffloss.net.{name}.bias"])

    waves = t.float()[:, None] * torch.exp(-math.log(1e4) * torch.arange(128, dtype=torch.float32) / 128)
    waves = torch.cat([waves.cos(), waves.sin()], -1)
    y = linear("time_embed.mlp.2", F.silu(linear("time_embed.mlp.0", waves))) + linear("cond_embed", z)
    h = linear("input_proj", x)
    width = h.shape[1:]
    for layer in range(depth):
        name = f"res_blocks.{layer}"
        shift, scale, gate = linear(f"{name}.adaLN_modulation.1", F.silu(y)).chunk(3, 1)
        norm = [state[f"diffloss.net.{name}.in_ln.{part}"] for part in ("weight", "bias")]
        inner = F.layer_norm(h, width, *norm, eps=1e-6) * (1 + scale) + shift
        h = h + gate * linear(f"{name}.mlp.2", F.silu(linear(f"{name}.mlp.0", inner)))
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(y)).chunk(2, 1)
    return linear("final_layer.linear", F.layer_norm(h, width, eps=1e-6) * (1 + scale) + shift)


def official_state(model: MAR) -> dict[str, Tensor]:
    """Our weights by the published names and shapes."""
    names = {
        "embed.": "z_proj.",
        "embed_norm.": "z_proj_ln.",
        "encoder_positions": "encoder_pos_embed_learned",
        "decoder_positions": "decoder_pos_embed_learned",
        "head_positions": "diffusion_pos_embed_learned",
        "head.time_embed.fc1.": "diffloss.net.time_embed.mlp.0.",
        "head.time_embed.fc2.": "diffloss.net.time_embed.mlp.2.",
        "head.cond_embed.": "diffloss.net.cond_embed.",
        "head.input_proj.": "diffloss.net.input_proj.",
        "head.out.": "diffloss.net.final_layer.linear.",
        "head.modulation.": "diffloss.net.final_layer.adaLN_modulation.1.",
    }
    parts = {
        ".norm.": ".in_ln.",
        ".fc1.": ".mlp.0.",
        ".fc2.": ".mlp.2.",
        ".modulation.": ".adaLN_modulation.1.",
    }
    state = {}
    for key, value in model.state_dict().items():
        if key == "class_embed.weight":
            state["class_emb.weight"], state["fake_latent"] = value[:-1], value[-1:]
            continue
        for ours, theirs in names.items():
            if key.startswith(ours):
                key = theirs + key.removeprefix(ours)
        if key.startswith("head.blocks."):
            key = "diffloss.net.res_blocks." + key.removeprefix("head.blocks.")
            for ours, theirs in parts.items():
                key = key.replace(ours, theirs)
        state[key] = value.clone()
    return state


@torch.no_grad()
@pytest.mark.parametrize("seen", [0, 5, 16])
def test_encoding_gathered_tokens_equals_hiding_the_others(seen, tmp_path):
    """z and the head's output equal those of the released architecture, whose checkpoint loads strictly."""
    model = make(learn_variance=True, prediction="eps")
    state = official_state(model)
    path = tmp_path / "checkpoint-last.pth"
    torch.save(
        {"model": {}, "model_ema": state, "epoch": 3, "args": argparse.Namespace(model="mar_tiny")}, path
    )
    loaded = arcore.create_model("mar_tiny", learn_variance=True, prediction="eps", weights=path).eval()
    tokens, visible, labels = batch(model, seen=seen)
    labels[1] = model.null_class
    z = loaded(tokens, visible, labels)
    assert z.std() > 0.1
    assert (z - official(model, state, tokens, visible, labels)).abs().max() <= 1e-5
    other = tokens + 9 * torch.ones(tokens.shape[:2]).scatter(1, visible, 0.0)[..., None]
    assert torch.equal(loaded(other, visible, labels), z)

    x, t, cond = torch.randn(7, model.token_shape[1]), torch.randint(1000, (7,)), z.flatten(0, 1)[:7]
    out = torch.cat(loaded.head(x, t, cond), 1)
    assert out.std() > 0.1
    assert (out - official_head(state, model.config.head_depth, x, t, cond)).abs().max() <= 1e-5


@pytest.mark.parametrize(("size", "millions"), [("b", 208), ("l", 479), ("h", 943)])
def test_published_sizes(size, millions):
    [info] = [one for one in arcore.model_info("mar").presets if one.name == f"mar_{size}"]
    # The paper rounds up.
    assert math.ceil(info.parameters / 1e6) == millions
    with torch.device("meta"):
        model = MAR(info.config)
    shapes = {key: tuple(value.shape) for key, value in official_state(model).items()}
    dim, width = info.config.embed_dim, info.config.head_width
    assert shapes["encoder_pos_embed_learned"] == (1, 320, dim)
    assert shapes["diffusion_pos_embed_learned"] == (1, 256, dim)
    assert shapes["class_emb.weight"] == (1000, dim)
    assert shapes["z_proj.weight"] == (dim, 16)
    assert shapes["diffloss.net.final_layer.linear.weight"] == (32, width)


@pytest.mark.parametrize(
    ("tokens", "iterations"), [(256, 8), (256, 64), (256, 256), (1024, 64), (16, 16), (16, 1), (1, 1)]
)
def test_iterations_draw_every_token_once(tokens, iterations):
    counts = masked_counts(tokens, iterations)
    new = [before - after for before, after in pairwise(counts)]
    assert len(new) == iterations
    assert sum(new) == tokens
    assert min(new) >= 1
    if (tokens, iterations) == (256, 8):
        assert counts == [256, 251, 236, 212, 181, 142, 97, 49, 0]


def test_training_masks():
    visible, masked = draw_visible(5, 256, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.cat([visible, masked], 1).sort(1).values, torch.arange(256).expand(5, -1))
    assert not torch.equal(masked[0], masked[1])
    generator = torch.Generator().manual_seed(1)
    shares = (
        torch.tensor([draw_visible(1, 1000, generator=generator)[1].shape[1] for _ in range(2000)]) / 1000
    )
    assert shares.min() >= 0.7
    assert shares.max() <= 1.0
    # A normal number around 1 cut to [0.7, 1] is half of one, cut at 1.2 deviations.
    low, cut = 1 - math.exp(-0.72), math.sqrt(2 * math.pi) * 0.5 * math.erf(1.2 / math.sqrt(2))
    assert float(shares.mean()) == pytest.approx(1 - 0.25 * low / cut, abs=0.006)
    with pytest.raises(ValueError, match="least < 1"):
        draw_visible(1, 4, least=1.0)


def test_a_row_never_depends_on_its_batch_mates():
    model = make(learn_variance=True)
    model.head.float()
    labels = torch.tensor([3, 1, 2])
    settings: dict[str, Any] = {
        "iterations": 5,
        "times": model.head.schedule.grid(6, "linspace"),
        "cfg_scale": 2.0,
    }
    whole = generate_masked(model, labels, seed=[5, 6, 7], **settings)
    assert whole.shape == (3, *model.token_shape)
    assert whole.isfinite().all()
    part = generate_masked(model, labels[[2, 0]], seed=[7, 5], **settings)
    torch.testing.assert_close(part, whole[[2, 0]], rtol=1e-4, atol=1e-4)
    other = generate_masked(model, labels, seed=[5, 6, 8], **settings)
    torch.testing.assert_close(other[:2], whole[:2], rtol=1e-4, atol=1e-4)
    assert (other[2] - whole[2]).abs().max() > 0.1
    for changed in (
        {"cfg_scale": 1.0},
        {"cfg_schedule": "constant"},
        {"temperature": 0.5},
        {"iterations": 4},
    ):
        assert not torch.allclose(
            generate_masked(model, labels, seed=[5, 6, 7], **{**settings, **changed}), whole
        )


def test_pixels_and_tokens_are_inverse():
    model = make()
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(model.to_pixels(model.to_tokens(images)), images)


def test_bad_inputs():
    model = make()
    tokens, visible, labels = batch(model)
    with pytest.raises(ValueError, match=r"tokens of shape \('B', 16, 4\)"):
        model(tokens[:, :5], visible, labels)
    with pytest.raises(ValueError, match="visible places from 0 to 15"):
        model(tokens, visible + 16, labels)
    with pytest.raises(TypeError, match="float32 but got float16"):
        model(tokens.half(), visible, labels)
    with pytest.raises(ValueError, match="latents of shape"):
        model.to_tokens(torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match="1 to 16 iterations"):
        generate_masked(model, labels, iterations=17)
    with pytest.raises(ValueError, match="cfg_scale >= 0"):
        generate_masked(model, labels, cfg_scale=-1.0)
    with pytest.raises(ValueError, match="temperature is for the default solver"):
        generate_masked(model, labels, solver=DDIM(model.head.schedule, "v"), temperature=0.9)
    with pytest.raises(TypeError, match="keep the head in float32"):
        generate_masked(model.half(), labels, iterations=2)


def test_a_half_precision_transformer_keeps_a_float32_head():
    model = make().bfloat16()
    model.head.float()
    times = model.head.schedule.grid(4, "linspace")
    tokens = generate_masked(model, torch.tensor([1, 2]), iterations=3, times=times, cfg_scale=2.0)
    assert tokens.dtype == torch.float32
    assert tokens.isfinite().all()
    assert generate_masked(model, torch.zeros(0, dtype=torch.int64), times=times).shape == (0, 16, 4)
