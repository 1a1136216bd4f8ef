"""Mamba-2: Mamba with heads that share a scalar decay (Dao and Gu, arXiv:2405.21060).

The restriction makes the scan a structured matrix product: attention with decaying weights instead of a softmax. Around
the mixer (`arcore.nn.Mamba2Mixer`) the network is that of `Mamba`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import Published, System, preset
from arcore.catalog.claims import Claim, at_least, at_most, shaken
from arcore.nn import Mamba2Mixer
from arcore.nn.kinds import check_kinds
from arcore.zoo.state_space._common import (
    NEOX,
    no_more,
    original_config,
    original_layers,
    transformers_config,
)
from arcore.zoo.state_space.mamba.config import StateSpaceConfig
from arcore.zoo.state_space.mamba.model import Mamba

SYSTEM = System(
    name="mamba2",
    title="Mamba-2",
    paper="arXiv:2405.21060",
    paper_title="Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured "
    "State Space Duality",
    topic="state_space",
    kind="model",
    model="Mamba2",
    builds_on=("mamba",),
    ops=("ssd", "block_sparse_attention"),
    recipe="language",
    summary="Mamba with one decay per head, whose scan is also attention without a softmax.",
    claim="The recurrence is attention whose weights are C B^T times products of decays, without a softmax.",
    checked_on="published layout, random weights",
)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class Mamba2Config(StateSpaceConfig):
    """Settings of `Mamba2`. The defaults are those of the published models.

    Attributes:
        head_dim: channels of a head.
        n_groups: groups of heads that share input and output matrices.
        dt_limit: step sizes are clamped to this range.
        d_ssm: channels that are scanned; the others pass a gate alone. None: all.
        d_per_channel: a skip weight for every channel instead of one per head.
        gated_norm: False leaves the norm of the mixer's output out.
        norm_before_gate: norm first, gate after it.
        others: those of `StateSpaceConfig`.
    """

    pad_vocab_size_multiple: int = 16
    d_state: int = 128
    head_dim: int = 64
    n_groups: int = 1
    dt_limit: tuple[float, float] = (0.0, math.inf)
    d_ssm: int | None = None
    d_per_channel: bool = False
    gated_norm: bool = True
    norm_before_gate: bool = False


class Mamba2(Mamba):
    """The language model. A `TokenModel` (`arcore.nn.protocols`).

    Args:
        config: settings.
    """

    def make_mixer(self) -> nn.Module:
        """The mixer of one layer."""
        config: Mamba2Config = self.config
        return Mamba2Mixer(
            config.d_model,
            d_state=config.d_state,
            d_conv=config.d_conv,
            expand=config.expand,
            head_dim=config.head_dim,
            num_groups=config.n_groups,
            bias=config.bias,
            conv_bias=config.conv_bias,
            dt_limit=config.dt_limit,
            norm_eps=config.norm_eps,
            d_ssm=config.d_ssm,
            d_per_channel=config.d_per_channel,
            gated_norm=config.gated_norm,
            norm_before_gate=config.norm_before_gate,
        )

    @classmethod
    def official_config(cls, content: Mapping[str, Any]) -> Mamba2Config:
        """See `Mamba.official_config`."""
        if "d_model" in content:
            ssm = original_layers(content, "Mamba2")
            fields = original_config(content)
            names = {
                "headdim": "head_dim",
                "ngroups": "n_groups",
                "D_has_hdim": "d_per_channel",
                "rmsnorm": "gated_norm",
            }
            same = (
                "d_state",
                "d_conv",
                "expand",
                "dt_limit",
                "bias",
                "conv_bias",
                "d_ssm",
                "norm_before_gate",
            )
            names |= {name: name for name in same}
            for name in ("chunk_size", "use_mem_eff_path"):
                ssm.pop(name, None)  # changes speed, not results
            fields |= {ours: ssm.pop(theirs) for theirs, ours in names.items() if theirs in ssm}
            no_more(ssm)
        else:
            fields = transformers_config(content, "mamba2")
            inner, heads, size = (
                fields["expand"] * fields["d_model"],
                content["num_heads"],
                content["head_dim"],
            )
            if heads * size != inner:
                raise ValueError(
                    f"num_heads={heads} times head_dim={size} is not expand * hidden_size = {inner}"
                )
            fields |= {
                "d_state": content["state_size"],
                "head_dim": size,
                "n_groups": content["n_groups"],
                "dt_limit": tuple(map(_number, content.get("time_step_limit", (0.0, math.inf)))),
            }
        if "dt_limit" in fields:
            low, high = fields["dt_limit"]
            fields["dt_limit"] = (float(low), float(high))
        return Mamba2Config(**fields)


def _number(value: Any) -> float:
    """JSON has no infinity; transformers writes `{"__float__": "Infinity"}`."""
    return float(value["__float__"] if isinstance(value, dict) else value)


@preset
def mamba2_tiny() -> Mamba2Config:
    """Bytes as tokens; trains on a CPU in minutes."""
    return Mamba2Config(d_model=128, n_layer=4, vocab_size=256, d_state=32, head_dim=32, n_groups=2)


@preset(weights=Published("state-spaces/mamba2-130m", "pytorch_model.bin", ("config.json",), NEOX))
def mamba2_130m() -> Mamba2Config:
    """The Pile, GPT-NeoX tokens; weights: state-spaces/mamba2-130m."""
    return Mamba2Config(d_model=768, n_layer=24)


@preset(weights=Published("state-spaces/mamba2-370m", "pytorch_model.bin", ("config.json",), NEOX))
def mamba2_370m() -> Mamba2Config:
    """The Pile, GPT-NeoX tokens; weights: state-spaces/mamba2-370m."""
    return Mamba2Config(d_model=1024, n_layer=48)


@preset(weights=Published("state-spaces/mamba2-780m", "pytorch_model.bin", ("config.json",), NEOX))
def mamba2_780m() -> Mamba2Config:
    """The Pile, GPT-NeoX tokens; weights: state-spaces/mamba2-780m."""
    return Mamba2Config(d_model=1536, n_layer=48)


@preset(weights=Published("state-spaces/mamba2-1.3b", "pytorch_model.bin", ("config.json",), NEOX))
def mamba2_1_3b() -> Mamba2Config:
    """The Pile, GPT-NeoX tokens; weights: state-spaces/mamba2-1.3b."""
    return Mamba2Config(d_model=2048, n_layer=48)


@preset(weights=Published("state-spaces/mamba2-2.7b", "pytorch_model.bin", ("config.json",), NEOX))
def mamba2_2_7b() -> Mamba2Config:
    """The Pile, GPT-NeoX tokens; weights: state-spaces/mamba2-2.7b."""
    return Mamba2Config(d_model=2560, n_layer=64)


@torch.no_grad()
def claim(*, quick: bool) -> Claim:
    """Several lengths, with and without limits on the step sizes, against the quadratic form; and single steps."""
    passes, single, size = 0.0, 0.0, math.inf
    for limits in ((0.0, math.inf), (0.02, 0.3)):
        mixer = shaken(Mamba2Mixer(48, d_state=16, head_dim=16, num_groups=2, dt_limit=limits)).eval()
        config = Mamba2Config(
            d_model=48, n_layer=1, vocab_size=61, d_state=16, head_dim=16, n_groups=2, dt_limit=limits
        )
        model = Mamba2(config)
        for length in (1, 2, 7, 8, 9, 16, 37) if quick else (*range(1, 70), 130, 257):
            x = torch.randn(2, length, 48)
            expected = masked_attention(mixer, x)
            size = min(size, expected.std().item())
            passes = max(passes, (mixer(x) - expected).abs().max().item())
            cache = model.make_cache(2)
            by_steps = torch.stack([mixer.step(x[:, t], cache) for t in range(length)], 1)
            single = max(single, (by_steps - expected).abs().max().item())
    return Claim(
        (
            at_most("one pass against attention, largest difference", passes, 1e-5),
            at_most("single steps against attention, largest difference", single, 1e-5),
            at_least("standard deviation of the outputs, smallest", size, 0.1),
        )
    )


def masked_attention(mixer: Mamba2Mixer, x: Tensor) -> Tensor:
    """The mixer as attention: weights (C_t . B_s) exp(A sum of dt in (s, t]) on the values dt_s u_s.

    Args:
        mixer: its weights.
        x: `[B, L, C]`.

    Returns:
        `[B, L, C]`, what `mixer(x)` is up to rounding.
    """
    gate, xbc, dt = mixer.in_proj(x).split([mixer.inner, mixer.conv_shape[1], mixer.heads], dim=-1)
    taps = mixer.conv1d.weight
    padded = F.pad(xbc.transpose(1, 2), (taps.shape[2] - 1, 0))
    xbc = F.conv1d(padded, taps, mixer.conv1d.bias, groups=len(taps)).transpose(1, 2)
    xbc = xbc * xbc.sigmoid()
    u, b, c = xbc.split([mixer.inner, *[mixer.groups * mixer.d_state] * 2], dim=-1)
    u = u.unflatten(-1, (mixer.heads, -1))  # [B, L, H, P]
    b, c = (
        m.unflatten(-1, (mixer.groups, -1)).repeat_interleave(mixer.heads // mixer.groups, 2) for m in (b, c)
    )
    dt = (1 + (dt + mixer.dt_bias).exp()).log().clamp(*mixer.dt_limit)  # [B, L, H]
    total = (-mixer.A_log.exp() * dt).cumsum(1)
    decay = (total.unsqueeze(2) - total.unsqueeze(1)).exp()  # [B, L, L, H]
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    weights = torch.einsum("bthn,bshn->btsh", c, b) * decay.masked_fill(~causal[..., None], 0.0)
    y = torch.einsum("btsh,bshp->bthp", weights, dt[..., None] * u) + mixer.D[:, None] * u
    y = y.flatten(2) * gate * gate.sigmoid()
    split = y.unflatten(-1, (mixer.groups, -1))
    normed = (split / (split.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2)
    assert mixer.norm is not None
    out: Tensor = mixer.out_proj(normed * mixer.norm.weight)
    return out
