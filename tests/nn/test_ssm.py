"""The mixers by themselves: direction, continuing from a state, sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arcore.nn import GatedRMSNorm, Mamba2Mixer, MambaMixer, RMSNorm, StateCache


def mixer_of(kind: str, **settings: Any) -> Any:
    mixer: Any = (
        MambaMixer(24, d_state=8, **settings)
        if kind == "mamba"
        else Mamba2Mixer(24, d_state=8, head_dim=12, **settings)
    )
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return mixer.eval()


def cache_for(mixer: Any, batch: int) -> StateCache:
    return StateCache(num_layers=1, batch=batch, conv_shape=mixer.conv_shape, state_shape=mixer.state_shape)


def by_definition(mixer: MambaMixer, x: Tensor) -> Tensor:
    """The mixer from the formulas of the paper, one token at a time."""
    u, z = mixer.in_proj(x).chunk(2, dim=-1)
    taps = mixer.conv1d.weight.squeeze(1)
    padded = F.pad(u, (0, 0, taps.shape[1] - 1, 0))
    u = sum(padded[:, j : j + u.shape[1]] * taps[:, j] for j in range(taps.shape[1]))
    u = F.silu(u if mixer.conv1d.bias is None else u + mixer.conv1d.bias)
    low_rank, b, c = mixer.x_proj(u).split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=-1)
    dt = F.softplus(mixer.dt_proj(low_rank))
    state, outs = torch.zeros(len(x), u.shape[2], mixer.d_state), []
    for t in range(x.shape[1]):
        decay = (dt[:, t, :, None] * -mixer.A_log.exp()).exp()
        state = decay * state + (dt[:, t] * u[:, t])[..., None] * b[:, t, None]
        outs.append((state * c[:, t, None]).sum(-1) + mixer.D * u[:, t])
    return mixer.out_proj(torch.stack(outs, 1) * F.silu(z))


@pytest.mark.parametrize(
    "settings", [{}, {"expand": 1, "bias": True, "conv_bias": False}, {"dt_rank": 5, "d_conv": 2}]
)
def test_mamba_mixer_by_its_definition(settings: dict[str, Any]):
    mixer, x = mixer_of("mamba", **settings), torch.randn(2, 19, 24, requires_grad=True)
    expected = by_definition(mixer, x)
    out = mixer(x)
    assert expected.std() > 0.05
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    weights = [x, *mixer.parameters()]
    seed = torch.randn(out.shape)
    for one, other in zip(
        torch.autograd.grad(out, weights, seed), torch.autograd.grad(expected, weights, seed), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_reverse_is_flipping_before_and_after():
    mixer, x = mixer_of("mamba", expand=1), torch.randn(3, 17, 24)
    torch.testing.assert_close(mixer(x, reverse=True), mixer(x.flip(1)).flip(1), rtol=0, atol=1e-6)
    assert (mixer(x, reverse=True) - mixer(x)).abs().max() > 0.05


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@torch.no_grad()
def test_continuing_from_a_state_at_any_place(kind: str):
    mixer, x = mixer_of(kind), torch.randn(2, 14, 24)
    whole = mixer(x)
    for cut in range(15):
        cache = cache_for(mixer, 2)
        parts = [mixer(x[:, :cut], cache=cache), mixer(x[:, cut:], cache=cache)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=2e-6)
    cache = cache_for(mixer, 2)
    steps = [mixer.step(x[:, t], cache) for t in range(14)]
    torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@torch.no_grad()
def test_steps_do_not_depend_on_batch_mates(kind: str):
    mixer, x = mixer_of(kind), torch.randn(5, 6, 24)
    whole = mixer(x)
    assert torch.equal(mixer(x[:, :0]), whole[:, :0])
    torch.testing.assert_close(mixer(x[2:3]), whole[2:3], rtol=0, atol=1e-6)
    assert mixer(x[:0]).shape == (0, 6, 24)


def test_rms_norms():
    x, gate = torch.randn(3, 5, 12) * 3, torch.randn(3, 5, 12)
    norm = RMSNorm(12, eps=1e-3)
    norm.weight.data.uniform_(0.5, 2.0)
    expected = x / (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected.float())
    # A float32 stream into bfloat16 weights is rounded once, after the norm.
    low = RMSNorm(12).bfloat16()
    assert torch.equal(low(x), F.rms_norm(x, (12,), eps=1e-5).bfloat16())
    grouped = GatedRMSNorm(12, groups=3)
    y = (x * F.silu(gate)).unflatten(-1, (3, 4))
    expected = (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2)
    torch.testing.assert_close(grouped(x, gate), expected)
    with pytest.raises(ValueError, match="expected groups to divide dim=12 but got groups=5"):
        GatedRMSNorm(12, groups=5)


def test_sizes_out_of_range():
    for settings in ({"d_state": 257}, {"d_state": 0}, {"d_conv": 1}, {"expand": 0}, {"dt_rank": 0}):
        with pytest.raises(ValueError, match="expected positive sizes, d_state <= 256 and d_conv >= 2"):
            MambaMixer(24, **settings)
