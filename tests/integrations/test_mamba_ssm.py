"""The peer's functions: signatures, and results from the formulas."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arcore.integrations import mamba_ssm
from arcore.nn import MambaMixer
from arcore.ops import reference_selective_scan

SIGNATURES = {
    "selective_scan_fn": "u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, "
    "return_last_state=False",
    "mamba_inner_fn": "xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, "
    "out_proj_bias, A, B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, "
    "delta_softplus=True, checkpoint_lvl=1, b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None, "
    "b_c_dt_rms_eps=1e-06",
    "causal_conv1d_fn": "x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, "
    "final_states_out=None, activation=None",
    "causal_conv1d_update": "x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, "
    "conv_state_indices=None, pad_slot_id=-1",
    "causal_conv1d_ref": "x, weight, bias=None, initial_states=None, return_final_states=False, "
    "final_states_out=None, activation=None",
    "causal_conv1d_varlen_states": "x, cu_seqlens, state_len",
    "mamba_chunk_scan_combined": "x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, "
    "seq_idx=None, cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, inf), return_final_states=False, "
    "return_varlen_states=False, state_dtype=None",
    "mamba_split_conv1d_scan_combined": "zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, "
    "initial_states=None, seq_idx=None, dt_limit=(0.0, inf), return_final_states=False, activation='silu', "
    "rmsnorm_weight=None, rmsnorm_eps=1e-06, outproj_weight=None, outproj_bias=None, headdim=None, ngroups=1, "
    "norm_before_gate=True, state_dtype=None",
    "mamba_inner_ref": "xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, "
    "out_proj_bias, A, B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, "
    "delta_softplus=True",
    "selective_state_update": "state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, "
    "state_batch_indices=None, pad_slot_id=-1",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_names_order_and_defaults_are_the_peers(name: str):
    signature = inspect.signature(getattr(mamba_ssm, name))
    # What can only be named comes on top.
    positional = [p for p in signature.parameters.values() if p.kind != p.KEYWORD_ONLY]
    plain = [p.replace(annotation=p.empty) for p in positional]
    assert str(inspect.Signature(plain)) == f"({SIGNATURES[name]})"


def weights(inner: int = 24, rank: int = 3, d_state: int = 8, dim: int = 10) -> dict[str, Any]:
    return {
        "conv1d_weight": torch.randn(inner, 1, 4),
        "conv1d_bias": torch.randn(inner),
        "x_proj_weight": torch.randn(rank + 2 * d_state, inner) / 5,
        "delta_proj_weight": torch.randn(inner, rank),
        "out_proj_weight": torch.randn(dim, inner) / 5,
        "out_proj_bias": torch.randn(dim),
        "A": -torch.rand(inner, d_state) - 0.1,
        "D": torch.randn(inner),
        "delta_bias": torch.randn(inner) - 2,
    }


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def by_formulas(xz: Tensor, w: dict[str, Any], norms: tuple[Tensor, ...] = ()) -> Tensor:
    x, z = xz.chunk(2, dim=1)
    u = F.pad(x, (3, 0)).unfold(2, 4, 1).mul(w["conv1d_weight"].transpose(1, 2).squeeze(2)[:, None]).sum(-1)
    u = F.silu(u + w["conv1d_bias"][:, None])
    low, b, c = (u.transpose(1, 2) @ w["x_proj_weight"].T).split([3, 8, 8], dim=-1)
    delta = low @ w["delta_proj_weight"].T
    b, c = b + w.get("B_proj_bias", 0.0), c + w.get("C_proj_bias", 0.0)
    if norms:
        b, c, delta = rms(b, norms[0]), rms(c, norms[1]), rms(delta, norms[2])
    b, c = (w.get(name, made.transpose(1, 2)) for name, made in (("B", b), ("C", c)))
    y = reference_selective_scan(
        u, delta.transpose(1, 2), w["A"], b, c, w["D"], z, w["delta_bias"], delta_softplus=True
    )
    return y.transpose(1, 2) @ w["out_proj_weight"].T + w["out_proj_bias"]


def test_inner_function_by_its_formulas():
    w, xz = weights(), torch.randn(2, 48, 13)
    torch.testing.assert_close(mamba_ssm.mamba_inner_fn(xz, **w), by_formulas(xz, w), rtol=1e-5, atol=1e-5)
    biased = w | {"B_proj_bias": torch.randn(8), "C_proj_bias": torch.randn(8)}
    norms = (torch.rand(8) + 0.5, torch.rand(8) + 0.5, torch.rand(24) + 0.5)
    named = dict(zip(("b_rms_weight", "c_rms_weight", "dt_rms_weight"), norms, strict=True))
    out = mamba_ssm.mamba_inner_fn(xz, **biased, **named)
    torch.testing.assert_close(out, by_formulas(xz, biased, norms), rtol=1e-5, atol=1e-5)


def test_inner_function_with_given_matrices():
    w, xz = weights(), torch.randn(2, 48, 13)
    given = {"B": torch.randn(24, 8), "C": torch.randn(2, 8, 13)}
    expected = by_formulas(xz, w | given)
    # The projection has no rows for what is given.
    for names, rows in (
        (("B", "C"), slice(0, 3)),
        (("B",), [0, 1, 2, *range(11, 19)]),
        (("C",), slice(0, 11)),
    ):
        some = {name: given[name] for name in names}
        out = mamba_ssm.mamba_inner_fn(xz, **w | some | {"x_proj_weight": w["x_proj_weight"][rows]})
        torch.testing.assert_close(out, by_formulas(xz, w | some), rtol=1e-5, atol=1e-5)
    assert (expected - by_formulas(xz, w)).abs().max() > 0.1


def test_inner_function_is_our_mixer_with_its_gradients():
    mixer, x = MambaMixer(12, d_state=8), torch.randn(2, 9, 12)
    xz = mixer.in_proj(x).transpose(1, 2)
    out = mamba_ssm.mamba_inner_fn(
        xz,
        mixer.conv1d.weight,
        mixer.conv1d.bias,
        mixer.x_proj.weight,
        mixer.dt_proj.weight,
        mixer.out_proj.weight,
        None,
        mixer.decay(),
        None,
        None,
        mixer.D,
        delta_bias=mixer.dt_proj.bias,
    )
    expected, seed = mixer(x), torch.randn(2, 9, 12)
    torch.testing.assert_close(out, expected)
    ours, theirs = (torch.autograd.grad(o, list(mixer.parameters()), seed) for o in (out, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_scan_function_returns_the_last_state_on_request():
    u, delta = torch.randn(2, 6, 9), torch.randn(2, 6, 9)
    a, b, c = -torch.rand(6, 4), torch.randn(2, 4, 9), torch.randn(2, 4, 9)
    out, state = mamba_ssm.selective_scan_fn(u, delta, a, b, c, None, None, None, True, True)
    expected = reference_selective_scan(u, delta, a, b, c, delta_softplus=True, return_last_state=True)
    torch.testing.assert_close((out, state), expected, rtol=1e-5, atol=1e-5)


def test_convolution_and_its_step():
    x, weight, bias = torch.randn(2, 6, 9), torch.randn(6, 4), torch.randn(6)
    out, state = mamba_ssm.causal_conv1d_fn(x[:, :, :5], weight, bias, None, None, True, None, "silu")
    steps = [mamba_ssm.causal_conv1d_update(x[:, :, t], state, weight, bias, "silu") for t in range(5, 9)]
    padded = F.conv1d(F.pad(x, (3, 0)), weight.unsqueeze(1), bias, groups=6)
    torch.testing.assert_close(
        torch.cat([out, torch.stack(steps, 2)], 2), F.silu(padded), rtol=1e-5, atol=1e-5
    )


def test_steps_continue_the_scan():
    u, delta, z = (torch.randn(2, 6, 9) for _ in range(3))
    a, b, c, d = -torch.rand(6, 4), torch.randn(2, 4, 9), torch.randn(2, 4, 9), torch.randn(6)
    expected = mamba_ssm.selective_scan_fn(u, delta, a, b, c, d, z, d, True)
    state = torch.zeros(2, 6, 4)
    for t in range(9):
        out = mamba_ssm.selective_state_update(
            state, u[..., t], delta[..., t], a, b[..., t], c[..., t], d, z[..., t], d, True
        )
        torch.testing.assert_close(out, expected[..., t], rtol=1e-5, atol=1e-5)


def split_layer(beside: int = 0, groups: int = 2) -> tuple[Tensor, dict[str, Any]]:
    heads, per_head, d_state = 4, 6, 5
    dim, channels = heads * per_head, heads * per_head + 2 * groups * d_state
    return torch.randn(2, 9, 2 * beside + dim + channels + heads), {
        "conv1d_weight": torch.randn(channels, 4),
        "conv1d_bias": torch.randn(channels),
        "dt_bias": torch.randn(heads),
        "A": -torch.rand(heads) - 0.1,
        "D": torch.randn(heads),
        "chunk_size": 4,
        "headdim": per_head,
        "ngroups": groups,
    }


@pytest.mark.parametrize("beside", [0, 3])
@pytest.mark.parametrize("before", [True, False])
def test_split_scan_by_its_formulas(beside: int, before: bool):
    zxbcdt, layer = split_layer(beside)
    weight, out_weight, out_bias = torch.rand(24) + 0.5, torch.randn(7, beside + 24), torch.randn(7)
    pair, z, xbc, dt = zxbcdt.split([2 * beside, 24, 44, 4], dim=-1)
    padded = F.pad(xbc.transpose(1, 2), (3, 0)).unfold(2, 4, 1)
    xbc = F.silu(
        (padded * layer["conv1d_weight"][:, None]).sum(-1) + layer["conv1d_bias"][:, None]
    ).transpose(1, 2)
    x, b, c = xbc.split([24, 10, 10], dim=-1)
    step = F.softplus(dt + layer["dt_bias"]).clamp(0.1, 2.0)
    state, ys = torch.zeros(2, 4, 6, 5), []
    for t in range(9):
        xt, bt, ct = x[:, t].view(2, 4, 6), b[:, t].view(2, 2, 5), c[:, t].view(2, 2, 5)
        bt, ct = (m.repeat_interleave(2, dim=1) for m in (bt, ct))
        decay = (step[:, t] * layer["A"]).exp()[..., None, None]
        state = decay * state + (step[:, t, :, None] * xt)[..., None] * bt[:, :, None]
        ys.append(((state * ct[:, :, None]).sum(-1) + layer["D"][:, None] * xt).flatten(1))
    y = torch.stack(ys, 1)
    gated = y if before else y * F.silu(z)
    normed = (
        gated.unflatten(-1, (2, 12))
        * (gated.unflatten(-1, (2, 12)).square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    )
    normed = normed.flatten(2) * weight * (F.silu(z) if before else 1.0)
    gate, value = pair.chunk(2, dim=-1)
    expected = torch.cat([F.silu(gate) * value, normed], -1) @ out_weight.T + out_bias
    options = {"rmsnorm_weight": weight, "norm_before_gate": before, "dt_limit": (0.1, 2.0)}
    options |= {"outproj_weight": out_weight, "outproj_bias": out_bias}
    out, last = mamba_ssm.mamba_split_conv1d_scan_combined(
        zxbcdt, **layer, **options, return_final_states=True
    )
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, state, rtol=1e-4, atol=1e-4)
    reference = mamba_ssm.mamba_split_conv1d_scan_ref(zxbcdt, **layer, **options)
    torch.testing.assert_close(reference, expected, rtol=1e-4, atol=1e-4)


def test_split_scan_names_what_does_not_fit():
    zxbcdt, layer = split_layer()
    with pytest.raises(ValueError, match="expected headdim where D has one dimension"):
        mamba_ssm.mamba_split_conv1d_scan_combined(zxbcdt, **layer | {"headdim": None})
    with pytest.raises(ValueError, match="with dim=24, heads=4, ngroups=2, but got 71 and 44"):
        mamba_ssm.mamba_split_conv1d_scan_combined(zxbcdt[..., :-1], **layer)


def test_states_of_packed_sequences():
    lengths = [5, 1, 70]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    x, b, c = torch.randn(1, 76, 4, 6), torch.randn(1, 76, 2, 5), torch.randn(1, 76, 2, 5)
    dt, a = torch.rand(1, 76, 4), -torch.rand(4)
    out, final, each = mamba_ssm.mamba_chunk_scan_combined(
        x,
        dt,
        a,
        b,
        c,
        16,
        seq_idx=ids,
        cu_seqlens=bounds,
        return_final_states=True,
        return_varlen_states=True,
    )
    again, last = mamba_ssm.mamba_chunk_scan_combined(
        x, dt, a, b, c, 16, seq_idx=ids, return_final_states=True
    )
    torch.testing.assert_close(out, again, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(final, last, rtol=1e-5, atol=1e-5)
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        piece = [t[:, start:stop] for t in (x, dt, b, c)]
        _, alone = mamba_ssm.mamba_chunk_scan_combined(
            *piece[:2], a, *piece[2:], 16, return_final_states=True
        )
        torch.testing.assert_close(each[i : i + 1], alone)
    with pytest.raises(
        ValueError, match="expected cu_seqlens, and no initial_states, with return_varlen_states"
    ):
        mamba_ssm.mamba_chunk_scan_combined(x, dt, a, b, c, 16, return_varlen_states=True)


@pytest.mark.parametrize("state_len", [0, 3, 9])
def test_last_inputs_of_packed_sequences(state_len: int):
    x, bounds = torch.randn(20, 6), torch.tensor([0, 0, 5, 7, 20])
    states = mamba_ssm.causal_conv1d_varlen_states(x, bounds, state_len)
    assert torch.equal(states, mamba_ssm.causal_conv1d_varlen_states_ref(x, bounds, state_len))
    assert states.shape == (4, 6, state_len)
    assert not states[0].any()
    if state_len == 3:
        assert torch.equal(states[2], F.pad(x[5:7].T, (1, 0)))
        assert torch.equal(states[3], x[17:].T)


def test_references_are_the_functions():
    w, xz = weights(), torch.randn(2, 48, 13)
    torch.testing.assert_close(mamba_ssm.mamba_inner_ref(xz, **w), by_formulas(xz, w), rtol=1e-5, atol=1e-5)
    x, weight, state = torch.randn(2, 6, 9), torch.randn(6, 4), torch.randn(2, 6, 3)
    ours = mamba_ssm.causal_conv1d_fn(x, weight, None, None, state, True, None, "silu")
    for one, other in zip(
        ours, mamba_ssm.causal_conv1d_ref(x, weight, None, state, True, None, "silu"), strict=True
    ):
        torch.testing.assert_close(one, other)
    a, b = state.clone(), state.clone()
    step = mamba_ssm.causal_conv1d_update(x[..., 0], a, weight)
    torch.testing.assert_close(step, mamba_ssm.causal_conv1d_update_ref(x[..., 0], b, weight))
    assert torch.equal(a, b)
