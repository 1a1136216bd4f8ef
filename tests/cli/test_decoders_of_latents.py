"""Pictures of what released generators draw: `--vae` of `arcore sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from arcore.catalog.claims import shaken
from arcore.models import create_model, save_checkpoint, save_pretrained
from arcore.recipes._sampling import recipe_of_checkpoint, sample


@pytest.fixture
def autoencoder(tmp_path: Path) -> Path:
    """A folder as diffusers writes it, of a small autoencoder with random weights."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 32, 32),
        layers_per_block=1,
        norm_num_groups=16,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    shaken(model).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.mark.parametrize(
    ("preset", "changes", "more", "size"),
    [
        (
            "dit_tiny",
            {"in_channels": 4, "learn_sigma": True},
            ("--guided-channels", 3, "--solver", "ddpm"),
            (64, 64),
        ),
        ("acdit_tiny", {"in_channels": 4}, (), (64, 64)),
        ("acdit_video_tiny", {"in_channels": 4, "image_size": 8, "patch_size": 2}, (), (64, 64)),
        ("mar_tiny", {"in_channels": 4}, ("--iterations", 3, "--cfg-schedule", "constant"), (64, 64)),
    ],
)
def test_latents_become_pictures(arcore, autoencoder, tmp_path, preset, changes, more, size):
    image = pytest.importorskip("PIL.Image")
    save_checkpoint(tmp_path / "model", {"model": shaken(create_model(preset, **changes))}, {})
    words = ("sample", tmp_path / "model", "--class", 3, "-n", 2, "--steps", 2, *more)
    out = tmp_path / ("x.gif" if "video" in preset else "x.png")
    outcome = arcore(*words, "--vae", autoencoder, "--out", out)
    assert outcome.code == 0, outcome.err
    assert "as latents" not in outcome.out
    with image.open(out) as picture:
        assert picture.size == (2 * size[0] + 12, size[1] + 8)
        assert len(picture.convert("RGB").getcolors(1 << 20) or [()] * 999) > 50
        assert getattr(picture, "n_frames", 1) == (8 if "video" in preset else 1)


def test_pictures_are_the_decoded_latents(arcore, autoencoder, tmp_path):
    from safetensors.torch import load_file

    save_checkpoint(tmp_path / "model", {"model": shaken(create_model("dit_tiny", in_channels=4))}, {})
    words = ("sample", tmp_path / "model", "--class", 3, "-n", 5, "--steps", 2)
    assert arcore(*words, "--out", tmp_path / "plain.safetensors").code == 0
    assert arcore(*words, "--out", tmp_path / "drawn.safetensors", "--vae", autoencoder).code == 0
    latents = load_file(tmp_path / "plain.safetensors")["latents"]
    images = load_file(tmp_path / "drawn.safetensors")["images"]
    expected = create_model("kl", weights=autoencoder).eval().decode(latents)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_guidance_of_some_channels_changes_the_others(arcore, tmp_path):
    from safetensors.torch import load_file

    save_checkpoint(tmp_path / "model", {"model": shaken(create_model("dit_tiny", in_channels=4))}, {})
    words = ("sample", tmp_path / "model", "--class", 3, "-n", 1, "--steps", 1, "--cfg", 4)
    drawn = []
    for more in ((), ("--guided-channels", 3)):
        assert arcore(*words, *more, "--out", tmp_path / "x.safetensors").code == 0
        drawn.append(load_file(tmp_path / "x.safetensors")["latents"])
    torch.testing.assert_close(drawn[0][:, :3], drawn[1][:, :3])
    assert (drawn[0][:, 3] - drawn[1][:, 3]).abs().max() > 1e-3


def test_a_decoder_of_other_latents_is_refused_before_weights_are_read(fails, autoencoder, tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"gigabytes that nobody may read")
    words = ("--weights", tmp_path / "weights.pt", "--class", 3)
    line = fails("sample", "mar_b", *words, "--vae", autoencoder)
    assert "decodes latents of 4xanyxany values but mar_b draws 16x16x16" in line
    assert "do not exist" in fails("sample", "dit_xl_2", *words, "--vae", tmp_path / "nothing.pt")
    # A decoder that fits lets the weights be read, and those are no weights.
    assert "weights.pt" in fails("sample", "dit_xl_2_512", *words, "--vae", autoencoder)
    (tmp_path / "other.pt").write_bytes(b"")
    torch.save({"x": torch.zeros(3)}, tmp_path / "other.pt")
    assert "no weights of a KL autoencoder" in fails(
        "sample", "dit_xl_2", *words, "--vae", tmp_path / "other.pt"
    )
    assert "--guided-channels must be" in fails("sample", "dit_xl_2", *words, "--guided-channels", -1)


def test_a_model_in_bfloat16_with_a_float32_decoder(autoencoder, tmp_path):
    model = shaken(create_model("dit_tiny", in_channels=4))
    save_checkpoint(tmp_path / "model", {"model": model}, {})
    recipe = recipe_of_checkpoint(tmp_path / "model")
    options: Any = recipe.sampling(label="3", num=2, steps=2, vae=str(autoencoder))
    exact = sample(recipe, options, checkpoint_folder=tmp_path / "model").images
    decoder = recipe.beside(None, tmp_path / "model", options)
    half = recipe.sample({"model": model.bfloat16().eval(), **decoder}, {}, options, print).images
    assert half.dtype == torch.float32
    assert half.shape == exact.shape == (2, 3, 64, 64)
    assert (half - exact).abs().mean() < 0.2


def test_an_autoencoder_of_our_own_run(arcore, tmp_path):
    trained = arcore("train", "kl_tiny", "--data", "digits", "--steps", 2, "--out", tmp_path / "run")
    assert trained.code == 0, trained.err
    model = shaken(create_model("dit_tiny", in_channels=2, image_size=4))
    save_checkpoint(tmp_path / "model", {"model": model}, {})
    words = ("sample", tmp_path / "model", "--class", 3, "-n", 1, "--steps", 2, "--out", tmp_path / "x.png")
    for vae in (tmp_path / "run",):
        assert arcore(*words, "--vae", vae).code == 0
    save_pretrained(create_model("kl_tiny"), tmp_path / "saved")
    outcome = arcore(*words, "--vae", tmp_path / "saved")
    assert outcome.code == 0, outcome.err


def test_videos_of_an_encoders_tokens(arcore, fails, tmp_path):
    image = pytest.importorskip("PIL.Image")
    changes: dict[str, Any] = {
        "patch_size": None,
        "tokens": 5,
        "channels": 4,
        "frames": 3,
        "unit_tokens": True,
    }
    model = shaken(create_model("ar_diffusion_tiny", **changes))
    save_checkpoint(tmp_path / "model", {"model": model}, {})
    sizes: dict[str, Any] = {"image_size": 16, "patch_size": 4, "num_tokens": 5, "channel_mult": (1, 1, 2)}
    decoder = shaken(create_model("titok_kl_tiny", **sizes, in_channels=3, num_heads=1, norm_groups=16))
    torch.save({f"vae.{key}": value for key, value in decoder.state_dict().items()}, tmp_path / "all.bin")
    words = ("sample", tmp_path / "model", "--class", 3, "-n", 2, "--steps", 4)
    # Without a decoder three frames are not taken for three colours.
    plain = arcore(*words, "--out", tmp_path / "plain.gif")
    assert "as latents (2, 3, 5, 4)" in plain.out, plain.err
    for more in ((), ("--as-released", "--cfg", 2)):
        outcome = arcore(*words, *more, "--vae", tmp_path / "all.bin", "--out", tmp_path / "x.gif")
        assert outcome.code == 0, outcome.err
        with image.open(tmp_path / "x.gif") as picture:
            assert picture.n_frames == 3
    torch.save(create_model("titok_kl_tiny").state_dict(), tmp_path / "other.bin")
    line = fails(*words, "--vae", tmp_path / "other.bin")
    assert "decodes latents of 8x4 values but ar_diffusion draws 5x4" in line
