"""The tokenizer as others use it: step by step, trained, resumed, compiled, in reduced precision."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arcore.tokenizers import MultiScaleVQ, MultiScaleVQConfig
from arcore.zoo.tokenizers.multi_scale_vq.model import msvq_tiny

SMALL = MultiScaleVQConfig(
    in_channels=2,
    channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    norm_groups=4,
    z_channels=5,
    vocab_size=19,
    patch_nums=(1, 3, 4, 6),
)


def make(**changes: object) -> MultiScaleVQ:
    torch.manual_seed(0)
    return MultiScaleVQ(dataclasses.replace(SMALL, **changes))


def pictures(batch: int = 3) -> Tensor:
    return torch.rand(batch, 2, 12, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_sizes():
    tokenizer = make()
    assert (tokenizer.in_channels, tokenizer.image_size) == (2, 12)
    assert (tokenizer.z_channels, tokenizer.vocab_size, tokenizer.patch_nums) == (5, 19, (1, 3, 4, 6))


@torch.no_grad()
def test_training_inputs_are_those_of_generation():
    tokenizer = make().eval()
    indices = tokenizer.encode(pictures())
    latent, steps = tokenizer.empty_latent(3), []
    for k in range(3):
        latent = tokenizer.add_scale(k, indices[k], latent)
        steps.append(tokenizer.next_input(k, latent))
    assert torch.equal(tokenizer.scale_inputs(indices), torch.cat(steps, dim=1))
    last = tokenizer.add_scale(3, indices[3], latent)
    assert torch.equal(tokenizer.decode(indices), tokenizer.decode_latent(last))


@torch.no_grad()
def test_inputs_do_not_depend_on_later_scales():
    tokenizer = make().eval()
    indices = tokenizer.encode(pictures())
    changed = [*indices[:2], (indices[2] + 1) % 19, indices[3]]
    inputs, others = tokenizer.scale_inputs(indices), tokenizer.scale_inputs(changed)
    assert torch.equal(inputs[:, : 9 + 16], others[:, : 9 + 16])
    assert not torch.equal(inputs[:, 9 + 16 :], others[:, 9 + 16 :])


@torch.no_grad()
def test_reconstruction_is_the_decoded_codes():
    tokenizer = make().eval()
    out = tokenizer(pictures())
    assert same(out.indices, tokenizer.encode(pictures()))
    torch.testing.assert_close(tokenizer.decode(out.indices), out.reconstruction.clamp(-1, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_encode_agrees_with_forward_under_autocast(dtype: torch.dtype):
    tokenizer = make().eval()
    indices = tokenizer.encode(pictures())
    inputs = tokenizer.scale_inputs(indices)
    with torch.autocast("cpu", dtype=dtype):
        assert same(tokenizer.encode(pictures()), tokenizer(pictures()).indices)
        assert torch.equal(tokenizer.scale_inputs(indices), inputs)


def test_bfloat16_weights():
    tokenizer = make(restart_below=0.1).bfloat16()
    images = pictures().bfloat16()
    out = tokenizer(images)
    assert out.reconstruction.dtype == torch.bfloat16
    (out.reconstruction.square().mean() + out.vq_loss).backward()
    assert tokenizer.encoder.conv_in.weight.grad.isfinite().all()
    assert tokenizer.decode(tokenizer.encode(images)).dtype == torch.bfloat16


def test_restart_adds_nothing_to_the_state():
    assert make(restart_below=0.1).state_dict().keys() == make().state_dict().keys()


def test_restart_goes_on_from_a_state_dict():
    """All that decides on a restart is in the state: a copy goes on with the same codebook, given the same draws."""
    first = make(restart_below=0.1)
    for batch in (1, 2):
        first(pictures(batch))
    second = MultiScaleVQ(first.config)
    second.load_state_dict(first.state_dict())
    before = first.quantize.embedding.weight.detach().clone()
    for tokenizer in (first, second):
        torch.manual_seed(5)
        for _ in range(60):
            tokenizer(pictures(1))
    assert not torch.equal(first.quantize.embedding.weight, before)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_training_step_compiles():
    tokenizer = make(restart_below=0.1, patch_nums=(1, 6))
    copy = MultiScaleVQ(tokenizer.config)
    copy.load_state_dict(tokenizer.state_dict())
    torch.manual_seed(3)
    expected = tokenizer(pictures())
    torch.manual_seed(3)
    out = torch.compile(copy, backend="eager", fullgraph=True)(pictures())
    assert torch.equal(out.reconstruction, expected.reconstruction)
    assert torch.equal(out.vq_loss, expected.vq_loss)
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(value, copy.state_dict()[name]), name


def test_bad_steps():
    tokenizer = make()
    codes, latent = tokenizer.encode(pictures())[1], tokenizer.empty_latent(3)
    with pytest.raises(ValueError, match=r"codes of scale 2 of shape \(3, 16\) but got \(3, 9\)"):
        tokenizer.add_scale(2, codes, latent)
    with pytest.raises(ValueError, match=r"codes of scale 1 of shape \(2, 9\) but got \(3, 9\)"):
        tokenizer.add_scale(1, codes, latent[:2])
    for k in (-1, 4):
        with pytest.raises(ValueError, match=rf"expected k from 0 to 3, .* but got {k}"):
            tokenizer.add_scale(k, codes, latent)
    with pytest.raises(ValueError, match=r"expected k from 0 to 2, .* but got 3"):
        tokenizer.next_input(3, latent)
    with pytest.raises(
        ValueError, match=rf"codes of scale 1 from 0 to {tokenizer.vocab_size - 1} but got -1"
    ):
        tokenizer.add_scale(1, codes - codes - 1, latent)
    with pytest.raises(TypeError, match="codes of scale 1 of dtype int64 but got float32"):
        tokenizer.add_scale(1, codes.float(), latent)
    for use in (
        tokenizer.decode_latent,
        partial(tokenizer.next_input, 0),
        partial(tokenizer.add_scale, 1, codes),
    ):
        with pytest.raises(ValueError, match=r"expected a latent of shape \[B, 5, 6, 6\] but got"):
            use(latent[:, :2])


def test_bad_beta():
    with pytest.raises(ValueError, match=r"beta to be at least 0 but got -0\.1"):
        dataclasses.replace(SMALL, beta=-0.1)


@pytest.mark.slow
def test_tiny_learns_digits():
    """The whole tokenizer, trained for seconds, on held-out digits; the quick claim trains its quantiser alone.

    All scales together leave at most a fifth of the latent that the first leaves; that alone a collapsed latent could
    also show, so images must come back and the codes be in use.
    """
    pytest.importorskip("sklearn")
    from arcore.data import load_digits

    steps, lr = 240, 4e-3
    train, held_out = load_digits("train").images, load_digits("test").images
    torch.manual_seed(0)
    tokenizer = MultiScaleVQ(msvq_tiny())
    assert sum(p.numel() for p in tokenizer.parameters()) < 600_000
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
        images = train[torch.randint(len(train), (32,))]
        out = tokenizer(images)
        optimizer.zero_grad()
        (F.mse_loss(out.reconstruction, images) + out.vq_loss).backward()
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 2.0)
        optimizer.step()
    tokenizer.eval()
    with torch.no_grad():
        f = tokenizer._latent(held_out)
        left = [F.mse_loss(f_hat, f).item() for _, _, f_hat in tokenizer.quantize.scales(f)]
        indices = tokenizer.encode(held_out)
        error = F.mse_loss(tokenizer.decode(indices), held_out).item()
    assert left[-1] <= 0.2 * left[0], left
    assert error <= 0.1 * held_out.var().item(), error
    assert len(torch.cat(indices, dim=1).unique()) >= 100
