"""The KL autoencoder: diffusers' class and names, the authors' names, and their own forms."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.catalog.claims import shaken
from arcore.models import load_checkpoint, save_pretrained
from arcore.zoo.tokenizers.kl import KLAutoencoder, KLConfig

SMALL: dict[str, Any] = {
    "channels": 16,
    "channel_mult": (1, 2, 4),
    "num_res_blocks": 1,
    "norm_groups": 8,
    "image_size": 32,
}


def from_diffusers(**changes: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    wanted: dict[str, Any] = {
        "block_out_channels": (16, 32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    } | changes
    return shaken(diffusers.AutoencoderKL(**wanted)).eval()


@torch.no_grad()
def agree(model: Any, theirs: Any, images: Tensor) -> None:
    scale = theirs.config.scaling_factor
    moments = theirs.encode(images).latent_dist
    mean, log_variance = model.moments(images)
    torch.testing.assert_close(mean, moments.mean, rtol=0, atol=2e-5)
    torch.testing.assert_close(log_variance, moments.logvar, rtol=0, atol=2e-5)
    latents = model.encode(images)
    torch.testing.assert_close(latents, moments.mean * scale, rtol=0, atol=2e-5)
    drawn = theirs.decode(latents / scale).sample
    assert drawn.std() > 0.05
    torch.testing.assert_close(model.decode(latents), drawn.clamp(-1, 1), rtol=0, atol=2e-5)


def test_a_folder_of_diffusers(tmp_path: Path):
    theirs = from_diffusers(scaling_factor=0.31)
    theirs.save_pretrained(tmp_path)
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    # By the system's name all settings come from config.json beside the weights.
    model = arcore.create_model("kl", weights=tmp_path).eval()
    assert model.config.scaling == 0.31
    agree(model, theirs, images)
    wrong = "made with scaling=0.31 but the model has scaling=0.18215"
    with pytest.raises(ValueError, match=wrong):
        arcore.create_model("kl_f8", weights=tmp_path, **SMALL | {"image_size": 256})
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    agree(arcore.create_model("kl", weights=file).eval(), theirs, images)


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Attention as diffusers named it before 2023; the hub's files still have these names."""
    changes = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    return {re.sub("|".join(changes), lambda found: changes[found[0]], key): v for key, v in state.items()}


def compvis_names(state: dict[str, Tensor], levels: int = 3) -> dict[str, Tensor]:
    """The names of the authors' code."""
    named = {}
    for key, value in state.items():
        parts = key.split(".")
        if len(parts) > 2 and parts[1] in ("down_blocks", "up_blocks"):
            kind, level = parts[1].removesuffix("_blocks"), int(parts[2])
            level = level if kind == "down" else levels - 1 - level
            rest = parts[3:]
            rest = {
                "resnets": ["block", *rest[1:]],
                "downsamplers": ["downsample", *rest[2:]],
                "upsamplers": ["upsample", *rest[2:]],
            }[rest[0]]
            parts = [parts[0], kind, str(level), *rest]
        elif len(parts) > 2 and parts[1] == "mid_block" and parts[2] == "resnets":
            parts = [parts[0], "mid", f"block_{int(parts[3]) + 1}", *parts[4:]]
        elif len(parts) > 2 and parts[1] == "mid_block":
            inner = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
            rest = [part for part in parts[4:] if part != "0"]
            parts = [parts[0], "mid", "attn_1", inner[rest[0]], *rest[1:]]
            if value.dim() == 2:
                value = value[:, :, None, None]
        name = ".".join(parts).replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        named[name] = value
    return named


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_files_of_the_authors_and_whole_stable_diffusion_checkpoints(tmp_path: Path, dtype: torch.dtype):
    theirs = from_diffusers()
    state = {key: value.to(dtype) for key, value in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    compvis = compvis_names(state)
    assert {key.split(".")[0] for key in compvis} == {"encoder", "decoder", "quant_conv", "post_quant_conv"}
    whole = {f"first_stage_model.{key}": value for key, value in compvis.items()}
    whole |= {"model.diffusion_model.out.2.bias": torch.zeros(4), "alphas_cumprod": torch.zeros(9)}
    trained = compvis | {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.bias": torch.zeros(3)}
    for kind, content in {
        "compvis": {"state_dict": trained, "epoch": 1},
        "whole": {"state_dict": whole},
        "mar": {"model": compvis},
        "old": old_names(state),
        "plain": state,
    }.items():
        file = tmp_path / f"{kind}.ckpt"
        torch.save(content, file)
        agree(arcore.create_model("kl_f8", weights=file, **SMALL).eval(), theirs, images)
        # Without a preset the layout is read from the shapes; groups of norms cannot be.
        inferred = arcore.create_model("kl", weights=file, norm_groups=8, image_size=32)
        assert inferred.config == KLConfig(**SMALL)


def transcribed(w: dict[str, Tensor], images: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Moments and the image of their mean, from weights under the authors' names, for any layout."""

    def norm(x: Tensor, name: str) -> Tensor:
        shaped = x.reshape(len(x), groups, -1)
        mean, var = shaped.mean(2, keepdim=True), shaped.var(2, unbiased=False, keepdim=True)
        x = ((shaped - mean) / (var + 1e-6).sqrt()).reshape(x.shape)
        return x * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    def conv(x: Tensor, name: str, **more: Any) -> Tensor:
        weight = w[f"{name}.weight"]
        return F.conv2d(x, weight, w[f"{name}.bias"], **{"padding": weight.shape[-1] // 2} | more)

    def swish(x: Tensor) -> Tensor:
        return x / (1 + (-x).exp())

    def block(x: Tensor, name: str) -> Tensor:
        h = conv(swish(norm(x, f"{name}.norm1")), f"{name}.conv1")
        h = conv(swish(norm(h, f"{name}.norm2")), f"{name}.conv2")
        return h + (conv(x, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in w else x)

    def attend(x: Tensor, name: str) -> Tensor:
        q, k, v = (conv(norm(x, f"{name}.norm"), f"{name}.{part}").flatten(2) for part in "qkv")
        weights = (torch.einsum("bci,bcj->bij", q, k) / q.shape[1] ** 0.5).softmax(2)
        return x + conv(torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape), f"{name}.proj_out")

    def level(x: Tensor, name: str) -> Tensor:
        place = 0
        while f"{name}.block.{place}.norm1.weight" in w:
            x = block(x, f"{name}.block.{place}")
            if f"{name}.attn.{place}.norm.weight" in w:
                x = attend(x, f"{name}.attn.{place}")
            place += 1
        return x

    def mid(x: Tensor, name: str) -> Tensor:
        return block(attend(block(x, f"{name}.block_1"), f"{name}.attn_1"), f"{name}.block_2")

    levels = sum(f"encoder.down.{k}.block.0.norm1.weight" in w for k in range(9))
    x = conv(images, "encoder.conv_in")
    for k in range(levels):
        x = level(x, f"encoder.down.{k}")
        if k + 1 < levels:
            x = conv(F.pad(x, (0, 1, 0, 1)), f"encoder.down.{k}.downsample.conv", stride=2, padding=0)
    x = conv(swish(norm(mid(x, "encoder.mid"), "encoder.norm_out")), "encoder.conv_out")
    moments = conv(x, "quant_conv")
    x = mid(conv(conv(moments.chunk(2, 1)[0], "post_quant_conv"), "decoder.conv_in"), "decoder.mid")
    for k in reversed(range(levels)):
        x = level(x, f"decoder.up.{k}")
        if k:
            x = conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"decoder.up.{k}.upsample.conv")
    return moments, conv(swish(norm(x, "decoder.norm_out")), "decoder.conv_out")


def authors_state(model: KLAutoencoder) -> dict[str, Tensor]:
    """Weights under the authors' names: queries, keys and values apart."""
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if ".qkv." in key:
            state |= {
                key.replace("qkv", part): piece for part, piece in zip("qkv", value.chunk(3), strict=True)
            }
        else:
            state[key] = value
    return state


@torch.no_grad()
def test_the_layout_of_mar(tmp_path: Path):
    layout = {"channels": 8, "norm_groups": 4, "num_res_blocks": 1, "image_size": 32}
    model = shaken(arcore.create_model("kl_f16", **layout)).double().eval()
    assert model.config.factor == 16
    state = authors_state(model)
    torch.save({"model": state}, tmp_path / "kl16.ckpt")
    assert {key for key in state if "attn" in key and "encoder.down" in key} == {
        f"encoder.down.4.attn.0.{part}.{kind}"
        for part in ("norm", "q", "k", "v", "proj_out")
        for kind in ("weight", "bias")
    }
    assert not any("attn" in key for key in state if key.startswith("decoder.up"))
    images = torch.rand(2, 3, 32, 64, dtype=torch.float64) * 2 - 1
    moments, drawn = transcribed(state, images, 4)
    torch.testing.assert_close(model.moments(images)[0], moments.chunk(2, 1)[0].float(), rtol=0, atol=1e-5)
    latents = moments.chunk(2, 1)[0] * 0.2325
    torch.testing.assert_close(model.decode(latents), drawn.float().clamp(-1, 1), rtol=0, atol=1e-5)
    loaded = arcore.create_model("kl", weights=tmp_path / "kl16.ckpt", norm_groups=4, image_size=32)
    assert loaded.config == model.config


def test_published_sizes():
    for name, keys, millions in (("kl_f8", 248, 83.65), ("kl_f16", 312, 66.46)):
        with torch.device("meta"):
            model = arcore.create_model(name)
        state = authors_state(model)
        assert (len(state), round(sum(v.numel() for v in state.values()) / 1e6, 2)) == (keys, millions)


def test_draws_in_training_and_the_divergence():
    model = shaken(arcore.create_model("kl_tiny"))
    images = torch.rand(4, 1, 8, 8) * 2 - 1
    model.train()
    assert not torch.equal(model(images).reconstruction, model(images).reconstruction)
    model.eval()
    assert torch.equal(model(images).reconstruction, model(images).reconstruction)
    mean, log_variance = model.moments(images)
    own = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    normal = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(own, normal).sum() / images.numel()
    torch.testing.assert_close(model(images).kl, expected)


def test_half_precision_decodes_float32_latents(tmp_path: Path):
    model = shaken(arcore.create_model("kl_tiny")).eval()
    latents = torch.randn(2, 2, 4, 4)
    exact = model.decode(latents)
    assert model.bfloat16().decode(latents).dtype == torch.float32
    assert (model.decode(latents) - exact).abs().max() < 0.1
    save_pretrained(model.float(), tmp_path)
    assert torch.equal(
        load_checkpoint(tmp_path)[0]["model"].eval().decode(latents.bfloat16()).isnan(), exact != exact
    )


def test_no_images_and_no_latents():
    model = arcore.create_model("kl_tiny").eval()
    assert model.decode(torch.zeros(0, 2, 4, 4)).shape == (0, 1, 8, 8)
    assert model.encode(torch.zeros(0, 1, 8, 8)).shape == (0, 2, 4, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_groups": 7}, "norm_groups to divide every width"),
        ({"channel_mult": ()}, "channel_mult to hold positive numbers"),
        ({"image_size": 9}, "image_size to be a multiple of 2"),
        ({"scaling": 0.0}, "scaling > 0"),
        ({"z_channels": 0}, "z_channels to be at least 1"),
    ],
)
def test_bad_configs(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        arcore.create_model("kl_tiny", **change)


def test_bad_inputs(tmp_path: Path):
    model = arcore.create_model("kl_tiny")
    with pytest.raises(ValueError, match=r"H and W multiples of 2, but got \(1, 1, 7, 8\)"):
        model(torch.zeros(1, 1, 7, 8))
    with pytest.raises(TypeError, match="images"):
        model(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"latents of shape \[B, 2, h, w\] but got \(1, 4, 4, 4\)"):
        model.decode(torch.zeros(1, 4, 4, 4))
    torch.save({"x": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no weights of a KL autoencoder"):
        arcore.create_model("kl", weights=tmp_path / "other.pt")
    for content, message in (
        ({"_class_name": "UNet2DModel", "sample_size": 4}, "expected an AutoencoderKL"),
        ({"_class_name": "AutoencoderKL", "shift_factor": 0.1}, "its shift_factor are not built here"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            arcore.create_model("kl", weights=tmp_path)


def test_own_images_in_colour_and_of_another_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from PIL import Image

    from arcore.cli import main
    from arcore.models import load_checkpoint

    for name, colour in (("sky", (40, 90, 220)), ("leaf", (30, 160, 60))):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (21, 21), tuple(value + number for value in colour)).save(
                tmp_path / "data" / name / f"{number}.png"
            )
    run, short = str(tmp_path / "run"), ["--steps", "2", "--batch-size", "32", "--accelerator", "cpu"]
    assert main(["train", "kl_tiny", "--data", str(tmp_path / "data"), *short, "--out", run]) == 0
    assert "kl_tiny is built for 20 x 20 pixels, colour" in capsys.readouterr().err
    [model] = load_checkpoint(next((tmp_path / "run").glob("step-*")))[0].values()
    assert (model.config.image_size, model.config.in_channels) == (20, 3)
    shown = ["sample", run, "--images", str(tmp_path / "data"), "--out"]
    assert main([*shown, str(tmp_path / "x.png")]) == 0
    assert "12 pictures, PSNR" in capsys.readouterr().out
    assert main([*shown, str(tmp_path / "x.safetensors")]) == 0
    assert "latents (12, 2, 10, 10)" in capsys.readouterr().out
    assert main(["sample", run]) == 2
    assert "--images" in capsys.readouterr().err
    with pytest.raises(ValueError, match="at least 2 pixels"):
        model.config.for_images(1, 3)
