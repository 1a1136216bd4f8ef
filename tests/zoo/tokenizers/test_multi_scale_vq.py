"""The multi-scale quantiser: published names and tables, arithmetic, gradients, health of the codebook."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.catalog.claims import shaken
from arcore.tokenizers import MultiScaleVQ, MultiScaleVQConfig
from arcore.zoo.tokenizers.multi_scale_vq import quantizer as quantizing
from arcore.zoo.tokenizers.multi_scale_vq.quantizer import MultiScaleQuantizer, phi_indices

SMALL = {
    "in_channels": 1,
    "channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "norm_groups": 2,
    "z_channels": 4,
    "vocab_size": 12,
    "patch_nums": (1, 2, 3, 4),
}


@pytest.fixture
def tokenizer() -> MultiScaleVQ:
    return MultiScaleVQ(MultiScaleVQConfig(**SMALL)).eval()


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of vae_ch160v4096z32.pth."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, inside: int, out: int, side: int = 3) -> None:
        shapes[f"{name}.weight"] = (out, inside, side, side)
        shapes[f"{name}.bias"] = (out,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def block(name: str, inside: int, out: int) -> None:
        norm(f"{name}.norm1", inside)
        conv(f"{name}.conv1", inside, out)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out)
        if inside != out:
            conv(f"{name}.nin_shortcut", inside, out, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        conv(f"{name}.qkv", width, 3 * width, 1)
        conv(f"{name}.proj_out", width, width, 1)

    widths = [160, 160, 320, 320, 640]
    for side, blocks, z_side in (("encoder", 2, "conv_out"), ("decoder", 3, "conv_in")):
        conv(f"{side}.conv_in", *((3, 160) if side == "encoder" else (32, 640)))
        for level, width in enumerate(widths):
            up = side == "decoder"
            before = widths[min(level + 1, 4)] if up else [160, *widths][level]
            name = f"{side}.{'up' if up else 'down'}.{level}"
            for j in range(blocks):
                block(f"{name}.block.{j}", before if j == 0 else width, width)
                if level == 4:
                    attention(f"{name}.attn.{j}", width)
            if up and level > 0:
                conv(f"{name}.upsample.conv", width, width)
            if not up and level < 4:
                conv(f"{name}.downsample.conv", width, width)
        block(f"{side}.mid.block_1", 640, 640)
        attention(f"{side}.mid.attn_1", 640)
        block(f"{side}.mid.block_2", 640, 640)
        norm(f"{side}.norm_out", 640 if side == "encoder" else 160)
        conv(f"{side}.conv_out", *((640, 32) if side == "encoder" else (160, 3)))
        assert f"{side}.{z_side}.weight" in shapes
    conv("quant_conv", 32, 32)
    conv("post_quant_conv", 32, 32)
    shapes["quantize.embedding.weight"] = (4096, 32)
    shapes["quantize.ema_vocab_hit_SV"] = (10, 4096)
    for i in range(4):
        conv(f"quantize.quant_resi.qresi_ls.{i}", 32, 32)
    return shapes


def test_published_names_and_sizes():
    with torch.device("meta"):
        model = arcore.create_model("msvq_ch160")
    expected = published_shapes()
    assert len(expected) == 324
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(108.95, abs=0.005)
    assert model.config.image_size == 256


def test_published_trainer_file(tokenizer: MultiScaleVQ, tmp_path: Path):
    trainer = {"var_wo_ddp": {"x": torch.zeros(1)}, "vae_local": tokenizer.state_dict(), "var_opt": {}}
    torch.save({"trainer": trainer, "args": {}, "epoch": 0, "iter": 0}, tmp_path / "trainer.pth")
    other = arcore.create_model("msvq_tiny", weights=tmp_path / "trainer.pth", **SMALL).eval()
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(other(images).reconstruction, tokenizer(images).reconstruction)


def test_phi_tables():
    assert phi_indices(10, 4) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert phi_indices(14, 4) == (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3)
    assert phi_indices(4, 4) == (0, 1, 2, 3)
    assert phi_indices(1, 4) == (0,)
    assert phi_indices(7, 1) == (0,) * 7
    assert phi_indices(10, 2) == (0,) * 5 + (1,) * 5


def test_phi_rule_gives_the_published_tables(monkeypatch: pytest.MonkeyPatch):
    tables = dict(quantizing._PHI_TABLES)
    monkeypatch.setattr(quantizing, "_PHI_TABLES", {})
    for arguments, table in tables.items():
        assert phi_indices(*arguments) == table


@pytest.mark.parametrize("num_scales", [2, 3, 5, 8, 11, 12, 13, 15, 20])
def test_phi_rule_is_exact_up_to_ties(num_scales: int):
    ticks = [Fraction(1, 12) + Fraction(10, 36) * i for i in range(4)]
    for k, chosen in enumerate(phi_indices(num_scales, 4)):
        distances = [abs(tick - Fraction(k, num_scales - 1)) for tick in ticks]
        assert distances[chosen] == min(distances)


def textbook_encode(quantizer: MultiScaleQuantizer, f: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Codes and what they add per scale, from the paper's algorithm 1, one vector at a time."""
    codebook, sides = quantizer.embedding.weight, quantizer.patch_nums
    residual, codes, updates = f.clone(), [], []
    for k, side in enumerate(sides):
        small = F.adaptive_avg_pool2d(residual, side)
        indices = torch.empty(len(f), side * side, dtype=torch.int64)
        picked = torch.empty_like(small)
        for b in range(len(f)):
            for y in range(side):
                for x in range(side):
                    distances = (codebook - small[b, :, y, x]).square().sum(1)
                    indices[b, y * side + x] = distances.argmin()
                    picked[b, :, y, x] = codebook[distances.argmin()]
        up = F.interpolate(picked, size=f.shape[-2:], mode="bicubic", align_corners=False)
        phi = quantizer.quant_resi.qresi_ls[phi_indices(len(sides), 4)[k]]
        update = 0.5 * up + 0.5 * F.conv2d(up, phi.weight, phi.bias, padding=1)
        residual = residual - update
        codes.append(indices)
        updates.append(update)
    return codes, updates


@torch.no_grad()
def test_quantiser_follows_the_algorithm(tokenizer: MultiScaleVQ):
    quantizer, f = tokenizer.quantize, torch.randn(3, 4, 4, 4)
    codes, updates = textbook_encode(quantizer, f)
    f_hat, loss, indices = quantizer(f)
    assert all(torch.equal(a, b) for a, b in zip(indices, codes, strict=True))
    torch.testing.assert_close(f_hat, sum(updates))
    partial = torch.stack(updates).cumsum(0)
    torch.testing.assert_close(loss, 1.25 * (partial - f).square().mean())
    latent = tokenizer.empty_latent(3)
    for k in range(4):
        latent = tokenizer.add_scale(k, codes[k], latent)
        torch.testing.assert_close(latent, partial[k])
        if k < 3:
            side = k + 2
            expected = F.adaptive_avg_pool2d(partial[k], side).flatten(2).transpose(1, 2)
            torch.testing.assert_close(tokenizer.next_input(k, latent), expected)


def test_gradient_goes_straight_through(tokenizer: MultiScaleVQ):
    f, weight = torch.randn(2, 4, 4, 4, requires_grad=True), torch.randn(2, 4, 4, 4)
    f_hat, loss, _ = tokenizer.quantize(f)
    [through] = torch.autograd.grad((f_hat * weight).sum(), f, retain_graph=True)
    assert torch.equal(through, weight)
    # Only the commitment term of the loss pulls f, towards the mean over scales of f_hat.
    partial = torch.stack([part for _, _, part in tokenizer.quantize.scales(f)])
    [pull] = torch.autograd.grad(loss, f, retain_graph=True)
    torch.testing.assert_close(pull, 0.25 * 2 * (f - partial.mean(0)).detach() / f.numel())
    loss.backward()
    assert tokenizer.quantize.embedding.weight.grad.any()
    assert all(phi.weight.grad.any() for phi in tokenizer.quantize.quant_resi.qresi_ls)


def test_dead_codes_are_restarted_on_data():
    quantizer = MultiScaleQuantizer(MultiScaleVQConfig(**SMALL | {"restart_below": 0.1})).train()
    with torch.no_grad():
        quantizer.embedding.weight.fill_(100.0)
        quantizer.embedding.weight[3] = 0.0
    f = torch.randn(2, 4, 4, 4)
    vectors = torch.cat([v.flatten(0, 1) for v, _, _ in quantizer.scales(f)])
    quantizer(f)
    weight = quantizer.embedding.weight
    assert torch.equal(weight[3], torch.zeros(4))
    for code in [*range(3), *range(4, 12)]:
        assert (vectors == weight[code]).all(1).any()
    # A restarted code gets time: it counts as averagely used and is not moved at once.
    use = quantizer.ema_vocab_hit_SV.sum(0)
    # All 2 * 30 tokens had chosen code 3; each hit counts 0.05, and the average of 12 codes is a twelfth.
    torch.testing.assert_close(use[[0, 3, 11]], torch.tensor([3 / 12, 3.0, 3 / 12]))
    before = weight.clone()
    quantizer(torch.zeros(2, 4, 4, 4))
    assert torch.equal(weight, before)


def test_codes_stay_without_training_or_restart():
    for config, training in ((SMALL, True), (SMALL | {"restart_below": 0.5}, False)):
        quantizer = MultiScaleQuantizer(MultiScaleVQConfig(**config)).train(training)
        before = {name: value.clone() for name, value in quantizer.state_dict().items()}
        quantizer(torch.randn(2, 4, 4, 4))
        assert torch.equal(quantizer.embedding.weight, before["embedding.weight"])
        assert quantizer.ema_vocab_hit_SV.any() == training


def test_recorded_use_counts_codes():
    quantizer = MultiScaleQuantizer(MultiScaleVQConfig(**SMALL)).train()
    _, _, indices = quantizer(torch.randn(3, 4, 4, 4))
    hits = torch.stack([codes.flatten().bincount(minlength=12) for codes in indices])
    torch.testing.assert_close(quantizer.ema_vocab_hit_SV, 0.05 * hits)
    assert hits.sum(1).tolist() == [3, 12, 27, 48]


def test_training_repeats_with_the_seed():
    def weights() -> Tensor:
        torch.manual_seed(4)
        model = MultiScaleVQ(MultiScaleVQConfig(**SMALL | {"restart_below": 0.2}))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            out = model(torch.rand(4, 1, 8, 8))
            (out.reconstruction.square().mean() + out.vq_loss).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(), weights())


def _two_processes(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(MultiScaleVQConfig(**SMALL | {"restart_below": 0.2}))
    torch.manual_seed(rank + 1)
    quantizer(torch.randn(2, 4, 4, 4))
    torch.save(quantizer.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_restart_the_same_codes(tmp_path: Path):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(_two_processes, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["ema_vocab_hit_SV"].any()


@torch.no_grad()
def test_autocast_does_not_change_codes(tokenizer: MultiScaleVQ):
    f = torch.randn(3, 4, 4, 4)
    expected = tokenizer.quantize(f)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        f_hat, loss, indices = tokenizer.quantize(f)
        out = tokenizer(torch.rand(2, 1, 8, 8))
    assert torch.equal(f_hat, expected[0])
    assert torch.equal(loss, expected[1])
    assert all(torch.equal(a, b) for a, b in zip(indices, expected[2], strict=True))
    assert out.reconstruction.isfinite().all()


@torch.no_grad()
def test_decode_clamps_and_takes_no_scale_short(tokenizer: MultiScaleVQ):
    indices = tokenizer.encode(torch.rand(2, 1, 8, 8))
    tokenizer.decoder.conv_out.weight.mul_(1000)
    images = tokenizer.decode(indices)
    assert images.shape == (2, 1, 8, 8)
    assert images.min() == -1
    assert images.max() == 1
    assert tokenizer.scale_inputs(indices).shape == (2, 29, 4)
    assert torch.equal(tokenizer.scale_inputs(indices[:3]), tokenizer.scale_inputs(indices))


@torch.no_grad()
def test_one_scale_and_no_images():
    model = MultiScaleVQ(MultiScaleVQConfig(**SMALL | {"patch_nums": (4,)})).eval()
    indices = model.encode(torch.rand(2, 1, 8, 8))
    assert [codes.shape for codes in indices] == [(2, 16)]
    assert model.scale_inputs(indices).shape == (2, 0, 4)
    assert model.decode(model.encode(torch.rand(0, 1, 8, 8))).shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    ("images", "kind", "message"),
    [
        (torch.zeros(1, 1, 9, 9), ValueError, r"images of shape \[B, 1, 8, 8\] but got \(1, 1, 9, 9\)"),
        (torch.zeros(1, 3, 8, 8), ValueError, r"\[B, 1, 8, 8\] but got \(1, 3, 8, 8\)"),
        (torch.zeros(1, 8, 8), ValueError, r"but got \(1, 8, 8\)"),
        (
            torch.zeros(1, 1, 8, 8, dtype=torch.uint8),
            TypeError,
            "floating dtype but got uint8; bytes become images",
        ),
        (torch.zeros(1, 1, 8, 8, dtype=torch.float64), TypeError, "dtype float32 but got float64"),
    ],
)
def test_bad_images(tokenizer: MultiScaleVQ, images: Tensor, kind: type[Exception], message: str):
    for method in (tokenizer, tokenizer.encode):
        with pytest.raises(kind, match=message):
            method(images)


def test_bad_codes(tokenizer: MultiScaleVQ):
    good = [torch.zeros(2, p * p, dtype=torch.int64) for p in (1, 2, 3, 4)]
    tokenizer.decode(good)
    cases = [
        (good[:3], ValueError, r"codes of 4 scales, for patch_nums=\(1, 2, 3, 4\), but got 3"),
        ([], ValueError, "but got 0"),
        ([*good[:3], good[2]], ValueError, r"codes of scale 3 of shape \(2, 16\) but got \(2, 9\)"),
        ([*good[:3], good[3][:1]], ValueError, r"of shape \(2, 16\) but got \(1, 16\)"),
        ([*good[:3], good[3] + 12], ValueError, "codes of scale 3 from 0 to 11 but got 12"),
        ([good[0] - 1, *good[1:]], ValueError, "codes of scale 0 from 0 to 11 but got -1"),
        ([good[0].float(), *good[1:]], TypeError, "codes of scale 0 of dtype int64 but got float32"),
    ]
    for codes, kind, message in cases:
        with pytest.raises(kind, match=message):
            tokenizer.decode(codes)
    with pytest.raises(ValueError, match="but got 2"):
        tokenizer.scale_inputs(good[:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "expected vocab_size to be at least 1 but got 0"),
        ({"channel_mult": ()}, r"channel_mult to hold positive numbers but got \(\)"),
        ({"norm_groups": 3}, "norm_groups to divide every width but got 3 groups for the width 8"),
        ({"patch_nums": (1, 1)}, "growing side lengths"),
        ({"phi_ratio": 1.5}, r"phi_ratio in \[0, 1\]"),
        ({"restart_below": 1.0}, r"restart_below in \[0, 1\)"),
    ],
)
def test_bad_configs(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MultiScaleVQConfig(**SMALL | change)


@torch.no_grad()
def test_a_wide_decoder_gives_the_same_pictures_with_channels_last():
    sizes = {"channels": 64, "channel_mult": (1, 1), "num_res_blocks": 1, "patch_nums": (1, 2, 4)}
    model = shaken(arcore.create_model("msvq_tiny", **sizes)).eval()
    latent = torch.randn(2, model.z_channels, 4, 4)
    plain = model.decoder(model.post_quant_conv(latent)).clamp(-1, 1)
    drawn = model.decode_latent(latent)
    torch.testing.assert_close(drawn, plain, rtol=0, atol=1e-5)
    assert drawn.is_contiguous()
