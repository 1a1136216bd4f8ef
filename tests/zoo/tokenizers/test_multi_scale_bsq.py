"""Multi-scale BSQ: bits and codes, the published arithmetic and names, flipped bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import arcore
from arcore.catalog import create_model, load_weights
from arcore.catalog.claims import shaken
from arcore.zoo.tokenizers.multi_scale_bsq.config import MultiScaleBSQConfig
from arcore.zoo.tokenizers.multi_scale_bsq.model import MultiScaleBSQ

SMALL = {
    "in_channels": 3,
    "channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "norm_groups": 2,
    "z_channels": 6,
    "patch_nums": (1, 2, 4),
}


@pytest.fixture(params=[False, True])
def tokenizer(request: pytest.FixtureRequest) -> MultiScaleBSQ:
    return shaken(MultiScaleBSQ(MultiScaleBSQConfig(**SMALL, patchify=request.param))).eval()


def test_bits_and_codes_are_one_to_one(tokenizer: MultiScaleBSQ):
    codes = torch.randint(tokenizer.vocab_size, (50, 3))
    bits = tokenizer.bits_of(codes)
    assert bits.shape == (50, 3, tokenizer.bits)
    assert torch.equal(tokenizer.codes_of(bits), codes)
    # The first bit is the highest.
    first = torch.zeros(tokenizer.bits, dtype=torch.bool)
    first[0] = True
    assert int(tokenizer.codes_of(first)) == 2 ** (tokenizer.bits - 1)
    images = torch.rand(2, 3, tokenizer.image_size, tokenizer.image_size) * 2 - 1
    rows = tokenizer.encode_bits(images)
    numbers = tokenizer.encode(images)
    assert torch.equal(tokenizer.decode(rows), tokenizer.decode(numbers))
    assert torch.equal(tokenizer.scale_inputs(rows), tokenizer.scale_inputs(numbers))


@torch.no_grad()
def test_residuals_are_coded_as_published(tokenizer: MultiScaleBSQ):
    """Signs of the normalised residual, trilinear enlargement of a map with one frame, pixel-unshuffled where asked."""
    images = torch.rand(2, 3, tokenizer.image_size, tokenizer.image_size) * 2 - 1
    f = tokenizer.encoder(images)[:, :, None]
    two = 2 if tokenizer.config.patchify else 1
    sides = [(1, side * two, side * two) for side in tokenizer.patch_nums]
    found, bits, inputs = torch.zeros_like(f), [], []
    for k, size in enumerate(sides):
        left = f - found
        if k != len(sides) - 1:
            left = F.interpolate(left, size=size, mode="area")
        z = left / left.norm(dim=1, keepdim=True)
        codes = torch.where(z > 0, 1.0, -1.0) / 6**0.5
        bits.append((codes > 0)[:, :, 0])
        found = found + F.interpolate(codes, size=sides[-1], mode="trilinear")
        if k + 1 < len(sides):
            entering = F.interpolate(found, size=sides[k + 1], mode="trilinear")[:, :, 0]
            if two == 2:
                entering = F.pixel_unshuffle(entering, 2)
            inputs.append(entering.flatten(2).transpose(1, 2))
    ours = tokenizer.encode_bits(images)
    for mine, theirs in zip(ours, bits, strict=True):
        theirs = F.pixel_unshuffle(theirs.float(), 2) if two == 2 else theirs.float()
        assert torch.equal(mine.float(), theirs.flatten(2).transpose(1, 2))
    torch.testing.assert_close(tokenizer.scale_inputs(ours), torch.cat(inputs, 1), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        tokenizer.decode(ours), tokenizer.decoder(found[:, :, 0]).clamp(-1, 1), rtol=0, atol=1e-5
    )


@torch.no_grad()
def test_flipped_bits_are_read_but_never_targets():
    tokenizer = shaken(MultiScaleBSQ(MultiScaleBSQConfig(**SMALL))).eval()
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    f = tokenizer.latent(images)
    bits, inputs = tokenizer.corrected(f, torch.zeros(3))
    assert torch.equal(inputs, tokenizer.scale_inputs(bits))
    # All bits of the first scale flipped: its bits stay, the others are those of what is then left.
    flipped, read = tokenizer.corrected(f, torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(flipped[0], bits[0])
    wrong = tokenizer.add_scale(0, ~bits[0], tokenizer.empty_latent(2))
    assert torch.equal(read[:, :4], tokenizer.next_input(0, wrong))
    left = F.interpolate(f - wrong, size=(2, 2), mode="area").flatten(2).transpose(1, 2) > 0
    assert torch.equal(flipped[1], left)
    torch.manual_seed(0)
    some, _ = tokenizer.corrected(f.repeat(200, 1, 1, 1), torch.tensor([0.25, 0.0, 0.0]))
    again = tokenizer.scale_inputs([some[0], some[1], some[2]])
    torch.manual_seed(0)
    _, read = tokenizer.corrected(f.repeat(200, 1, 1, 1), torch.tensor([0.25, 0.0, 0.0]))
    share = ((read[:, 0] - again[:, 0]).abs() > 0.1).float().mean()
    assert 0.2 < share < 0.3


def official_names(name: str) -> str:
    """Ours under the names of the published files: convolutions and norms are wrapped."""
    head, _, last = name.rpartition(".")
    module = head.rsplit(".", 1)[-1]
    return f"{head}.{'norm' if 'norm' in module else 'conv'}.{last}"


def test_published_names(tmp_path: Path):
    model = shaken(MultiScaleBSQ(MultiScaleBSQConfig(**SMALL)))
    state = {official_names(name): value for name, value in model.state_dict().items()}
    assert "encoder.down.0.downsample.conv.conv.weight" in state
    assert "decoder.mid.block_1.norm1.norm.weight" in state
    state["quantizer.lfq.mask"] = 2 ** torch.arange(5, -1, -1)
    torch.save({"vae": state}, tmp_path / "vae.pth")
    other = MultiScaleBSQ(MultiScaleBSQConfig(**SMALL))
    load_weights(other, tmp_path / "vae.pth")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    seven = MultiScaleBSQ(MultiScaleBSQConfig(**{**SMALL, "z_channels": 7}))
    with pytest.raises(ValueError, match="6 bits, not 7"):
        load_weights(seven, tmp_path / "vae.pth")


@pytest.mark.parametrize(
    ("preset", "bits", "size"),
    [("msbsq_d16", 16, 256), ("msbsq_d32", 32, 1024), ("msbsq_d14", 56, 1024), ("msbsq_d64", 64, 256)],
)
def test_published_sizes(preset: str, bits: int, size: int):
    with torch.device("meta"):
        model = create_model(preset)
    assert (model.bits, model.image_size) == (bits, size)


def test_refusals():
    with torch.device("meta"):
        wide = create_model("msbsq_d64")
    with pytest.raises(ValueError, match="64 bits does not fit"):
        wide.codes_of(torch.zeros(3, 64, dtype=torch.bool))
    tokenizer = create_model("msbsq_tiny")
    with pytest.raises(ValueError, match=r"expected images of shape \[B, 1, 24, 24\]"):
        tokenizer.encode(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="codes of 5 scales"):
        tokenizer.decode([torch.zeros(2, 1, dtype=torch.int64)])
    with pytest.raises(ValueError, match=r"\(2, 1, 8\) but got \(2, 1, 7\)"):
        tokenizer.add_scale(0, torch.zeros(2, 1, 7, dtype=torch.bool), tokenizer.empty_latent(2))
    with pytest.raises(ValueError, match="one token, but got 3"):
        tokenizer.config.for_images(3, 1)
    assert arcore.models.get_config("msbsq_tiny").for_images(32, 3)["patch_nums"] == (1, 2, 3, 4, 6, 8)
