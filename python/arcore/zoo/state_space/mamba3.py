"""Mamba-3: trapezoidal steps, states that turn by angles of the data, several inputs and outputs (state-spaces, 2026).

Three changes against `Mamba2`. The input term of the recurrence is the mean, weighted by the data, of its two ends (the
exponential-trapezoidal rule), which makes the convolution before the scan needless. Pairs of states turn by angles that
depend on the data, as complex states would; the turns are carried out on the input and output matrices, like rotary
positions. And a head may have R inputs and outputs per token (MIMO) that share one state, for more arithmetic per byte
of state.

Per head, with a = exp(dt A), w in (0, 1), matrices B and C (with biases, after their norms) turned by the sum of the
angles so far, and x of P channels:

    h_t = a_t h_(t-1) + (1 - w_t) dt_t a_t x_(t-1) B_(t-1)^T + w_t dt_t x_t B_t^T        y_t = h_t C_t + D x_t

Sequences run through `arcore.ops.mamba3_scan`, which turns, adds and weighs within its chunks; single tokens through
`arcore.ops.mamba3_update`.

Left out: the feed-forward layers between the mixers of larger models.

Legend: B rows, L tokens, C width, H heads, P channels of a head, N states, R ranks, G groups, S angles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import System, preset
from arcore.catalog.claims import Claim, at_least, at_most, shaken
from arcore.nn import Linear, RMSNorm, StateCache
from arcore.nn.kinds import check_kinds
from arcore.ops import Mamba3State, mamba3_scan, mamba3_update
from arcore.zoo.state_space._common import no_more, original_config, original_layers
from arcore.zoo.state_space.mamba.config import StateSpaceConfig
from arcore.zoo.state_space.mamba.model import Mamba

SYSTEM = System(
    name="mamba3",
    title="Mamba-3",
    paper="https://github.com/state-spaces/mamba",
    topic="state_space",
    kind="model",
    model="Mamba3",
    builds_on=("mamba", "mamba2"),
    ops=("mamba3_scan",),
    recipe="language",
    summary="Mamba-2 with trapezoidal steps, states that turn by data-dependent angles, and several inputs per head.",
    claim="Turning B and C by summed angles equals a scan of complex states by the exponential-trapezoidal rule.",
    checked_on="published layout, random weights",
)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class Mamba3Config(StateSpaceConfig):
    """Settings of `Mamba3`.

    Attributes:
        head_dim: channels P of a head.
        n_groups: groups G of heads that share input and output matrices.
        mimo_rank: inputs and outputs R per head; None for one of each, without projections of their own.
        rope_fraction: of the states that turn, 0.5 or 1.
        outproj_norm: an RMS norm per head before the gate.
        a_floor: least size of A.
        d_conv, bias, conv_bias: not used: there is no convolution, and projections have no biases.
        others: those of `StateSpaceConfig`.
    """

    d_state: int = 128
    head_dim: int = 64
    n_groups: int = 1
    mimo_rank: int | None = None
    rope_fraction: float = 0.5
    outproj_norm: bool = False
    a_floor: float = 1e-4


class Mamba3Mixer(nn.Module):
    """The mixer of Mamba-3. The parameters have the names and shapes of the published code.

    Args:
        config: settings.

    Raises:
        ValueError: sizes do not divide, or are out of range.
    """

    no_weight_decay = ("D", "dt_bias")

    def __init__(self, config: Mamba3Config) -> None:
        super().__init__()
        inner, size, n = config.expand * config.d_model, config.head_dim, config.d_state
        heads, rank = inner // max(size, 1), config.mimo_rank or 1
        turning = int(n * config.rope_fraction) // 2
        if size < 1 or heads * size != inner or rank < 1 or config.rope_fraction not in (0.5, 1.0):
            raise ValueError(
                "expected head_dim to divide expand * d_model, mimo_rank of at least 1 and rope_fraction 0.5 or 1 but "
                f"got d_model={config.d_model}, expand={config.expand}, head_dim={size}, mimo_rank={config.mimo_rank}, "
                f"rope_fraction={config.rope_fraction}"
            )
        if config.n_groups < 1 or heads % config.n_groups or turning < 1 or n % 2 or n > 256:
            raise ValueError(
                f"expected n_groups to divide the {heads} heads and an even d_state from 4 to 256 but got "
                f"n_groups={config.n_groups}, d_state={n}"
            )
        self.inner, self.heads, self.head_dim, self.d_state = inner, heads, size, n
        self.groups, self.rank, self.angles = config.n_groups, rank, turning
        self.mimo, self.a_floor = config.mimo_rank is not None, config.a_floor
        self.conv_shape = (0, 0)
        # State, angles, and the last token's turned B and inputs.
        self.parts = (size * n, turning, rank * n, rank * size)
        self.state_shape = (heads, sum(self.parts))
        matrices = n * self.groups * rank
        self.split = (inner, inner, matrices, matrices, heads, heads, heads, turning)
        self.in_proj = Linear(config.d_model, sum(self.split), bias=False)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.B_bias = nn.Parameter(torch.ones(heads, rank, n))
        self.C_bias = nn.Parameter(torch.ones(heads, rank, n))
        self.B_norm = RMSNorm(n, eps=1e-5)
        self.C_norm = RMSNorm(n, eps=1e-5)
        if self.mimo:
            self.mimo_x = nn.Parameter(torch.full((heads, rank, size), 1 / rank))
            self.mimo_z = nn.Parameter(torch.ones(heads, rank, size))
            self.mimo_o = nn.Parameter(torch.full((heads, rank, size), 1 / rank))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(inner, eps=1e-5) if config.outproj_norm else None
        self.out_proj = Linear(inner, config.d_model, bias=False)
        if not self.dt_bias.is_meta:
            with torch.no_grad():
                dt = torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp(min=1e-4)
                self.dt_bias.copy_(dt + (-torch.expm1(-dt)).log())

    def project(self, x: Tensor) -> dict[str, Tensor]:
        """What the recurrence takes of each token; step sizes, weights, decays and angles in float32.

        Args:
            x: `[..., C]`.

        Returns:
            x and z `[..., H, P]`, B and C `[..., R, G, N]` before biases and turn, dt, weight w and log_decay
            `[..., H]`, turn `[..., H, S]`, the angles by which this token turns.
        """
        z, u, b, c, dt, a, w, angles = self.in_proj(x).split(self.split, dim=-1)

        def matrices(t: Tensor, norm: nn.Module) -> Tensor:
            out: Tensor = norm(t.unflatten(-1, (self.rank, self.groups, self.d_state)))
            return out

        step = F.softplus((dt + self.dt_bias).float())
        a = a.float()
        # 1 + a above 0 and 1 / (1 - a) below: positive and smooth, with a heavy tail.
        size = a.clamp(min=0) + (1 - a.clamp(max=0)).reciprocal()
        return {
            "x": u.unflatten(-1, (self.heads, self.head_dim)),
            "z": z.unflatten(-1, (self.heads, self.head_dim)),
            "B": matrices(b, self.B_norm),
            "C": matrices(c, self.C_norm),
            "dt": step,
            "weight": w.float().sigmoid(),
            "log_decay": -size.clamp(min=self.a_floor) * step,
            "turn": (math.pi * angles.float().tanh()).unsqueeze(-2) * step.unsqueeze(-1),
        }

    def inputs(self, x: Tensor) -> Tensor:
        """`[..., H, P]` to the inputs of each rank, `[..., H, R, P]`."""
        return x.unsqueeze(-2) * self.mimo_x if self.mimo else x.unsqueeze(-2)

    def gates(self, z: Tensor) -> Tensor:
        """`[..., H, P]` to the gates of each rank, `[..., H, R, P]`."""
        return z.unsqueeze(-2) * self.mimo_z if self.mimo else z.unsqueeze(-2)

    def outputs(self, y: Tensor, gates: Tensor | None) -> Tensor:
        """Norm, gate where it is given, and the sum over ranks: `[..., H, R, P]` to `[..., C]`."""
        if self.norm is not None:
            weight = self.norm.weight.view(self.heads, 1, self.head_dim)
            y = F.rms_norm(y.float(), (self.head_dim,), eps=self.norm.eps) * weight
        if gates is not None:
            y = y * F.silu(gates)
        y = (y * self.mimo_o).sum(-2) if self.mimo else y.squeeze(-2)
        out: Tensor = self.out_proj(y.flatten(-2).to(self.out_proj.weight.dtype))
        return out

    def forward(
        self,
        x: Tensor,
        *,
        seq_idx: Tensor | None = None,
        cache: StateCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Mix whole sequences; arguments and result are those of `arcore.nn.MambaMixer.forward`."""
        t = self.project(x)
        state = None if cache is None else self._unpack(cache.layer(layer)[1])
        gates = self.gates(t["z"])
        inside = self.norm is None  # the gate of the op stands behind nothing but the scan
        y, last = mamba3_scan(
            self.inputs(t["x"]),
            t["dt"],
            t["log_decay"],
            t["weight"],
            t["B"],
            t["C"],
            t["turn"],
            self.B_bias,
            self.C_bias,
            self.D,
            gates if inside else None,
            return_last_state=True,
            initial_state=state,
            seq_idx=seq_idx,
            halves=self.mimo,
        )
        if state is not None:
            with torch.no_grad():
                for old, new in zip(state, last, strict=True):
                    old.copy_(new)
        return self.outputs(y, None if inside else gates)

    def step(self, x: Tensor, cache: StateCache, layer: int = 0) -> Tensor:
        """Mix one token per row, `[B, C]` to `[B, C]`, or S, `[B, S, C]`; the layer's state moves on in place."""
        state, trail = cache.layer(layer)[1], cache.trail(layer)[1]
        if x.dim() == 3:
            outs = []
            for i, token in enumerate(x.unbind(1)):
                if trail is not None:
                    trail[:, i] = state
                outs.append(self.step(token, cache, layer))
            if trail is not None:
                trail[:, len(outs)] = state
            return torch.stack(outs, 1)
        t = self.project(x)
        y = mamba3_update(
            self._unpack(state),
            self.inputs(t["x"]),
            t["dt"],
            t["log_decay"],
            t["weight"],
            t["B"],
            t["C"],
            t["turn"],
            self.B_bias,
            self.C_bias,
            self.D,
            halves=self.mimo,
        )
        return self.outputs(y, self.gates(t["z"]))

    def _unpack(self, state: Tensor) -> Mamba3State:
        """Views of a layer's state `[B, H, ...]`."""
        h, angles, b, x = state.split(self.parts, dim=-1)
        ranks = (self.rank, -1)
        return Mamba3State(
            h.unflatten(-1, (self.head_dim, self.d_state)),
            angles,
            b.unflatten(-1, ranks),
            x.unflatten(-1, ranks),
        )


class Mamba3(Mamba):
    """The language model. A `TokenModel` (`arcore.nn.protocols`).

    Args:
        config: settings.
    """

    def make_mixer(self) -> nn.Module:
        """The mixer of one layer."""
        return Mamba3Mixer(self.config)

    @classmethod
    def official_config(cls, content: Mapping[str, Any]) -> Mamba3Config:
        """See `Mamba.official_config`; of the authors' code only."""
        if "d_model" not in content:
            raise ValueError("expected the config of the authors' code, with d_model")
        ssm = original_layers(content, "Mamba3")
        fields = original_config(content)
        rank = ssm.pop("mimo_rank", 4)
        fields["mimo_rank"] = rank if ssm.pop("is_mimo", False) else None
        for name in ("chunk_size", "fuse_pregate_headwise_norm", "dropout"):  # change speed, not results
            ssm.pop(name, None)
        names = {
            "headdim": "head_dim",
            "ngroups": "n_groups",
            "is_outproj_norm": "outproj_norm",
            "A_floor": "a_floor",
        } | {name: name for name in ("d_state", "expand", "rope_fraction")}
        fields |= {ours: ssm.pop(theirs) for theirs, ours in names.items() if theirs in ssm}
        no_more(ssm)
        return Mamba3Config(**fields)


@preset
def mamba3_tiny() -> Mamba3Config:
    """Bytes as tokens; trains on a CPU in minutes."""
    return Mamba3Config(d_model=128, n_layer=4, vocab_size=256, d_state=32, head_dim=32)


@preset
def mamba3_mimo_tiny() -> Mamba3Config:
    """Bytes as tokens, two inputs and outputs per head."""
    return Mamba3Config(d_model=96, n_layer=3, vocab_size=256, d_state=16, head_dim=32, mimo_rank=2)


@torch.no_grad()
def claim(*, quick: bool) -> Claim:
    """Several lengths and kinds of mixers against a loop over complex states, and single steps against the pass."""
    passes, single, size = 0.0, 0.0, math.inf
    for rank, norm, fraction in ((None, False, 1.0), (None, True, 0.5), (3, False, 0.5), (2, True, 1.0)):
        config = Mamba3Config(
            d_model=32,
            n_layer=1,
            vocab_size=61,
            d_state=12,
            head_dim=16,
            n_groups=2,
            mimo_rank=rank,
            outproj_norm=norm,
            rope_fraction=fraction,
        )
        model = shaken(Mamba3(config)).eval()
        mixer = model.layers[0].mixer
        for length in (1, 2, 9, 70) if quick else (*range(1, 40), 64, 65, 130, 257):
            x = torch.randn(2, length, 32)
            expected, out = complex_scan(mixer, x), mixer(x)
            size = min(size, expected.std().item())
            passes = max(passes, (out - expected).abs().max().item())
            cache = model.make_cache(2)
            by_steps = torch.stack([mixer.step(x[:, i], cache) for i in range(length)], 1)
            single = max(single, (by_steps - expected).abs().max().item())
    return Claim(
        (
            at_most("one pass against complex states, largest difference", passes, 1e-4),
            at_most("single steps against complex states, largest difference", single, 1e-4),
            at_least("standard deviation of the outputs, smallest", size, 0.05),
        )
    )


def complex_scan(mixer: Mamba3Mixer, x: Tensor) -> Tensor:
    """The mixer token by token with complex states that turn themselves, in float64; B and C are not turned.

    Args:
        mixer: its weights.
        x: `[B, L, C]`.

    Returns:
        `[B, L, C]`, what `mixer(x)` is up to rounding.
    """
    t = {name: value.double() for name, value in mixer.project(x).items()}
    half = mixer.d_state // 2

    def paired(m: Tensor) -> Tensor:
        first, second = (m[..., :half], m[..., half:]) if mixer.mimo else (m[..., ::2], m[..., 1::2])
        return torch.complex(first, second)

    def of_heads(m: Tensor, bias: Tensor) -> Tensor:
        return m.repeat_interleave(mixer.heads // mixer.groups, dim=-2).transpose(-2, -3) + bias

    b, c = paired(of_heads(t["B"], mixer.B_bias)), paired(of_heads(t["C"], mixer.C_bias))
    u = mixer.inputs(t["x"])
    turn = F.pad(t["turn"], (0, half - mixer.angles))
    state = torch.zeros(len(x), mixer.heads, mixer.head_dim, half, dtype=torch.complex128)
    before = torch.zeros_like(state)
    outs = []
    for i in range(x.shape[1]):
        # A state that turns back by the angle stands for matrices that turn forward.
        flow = torch.polar(t["log_decay"][:, i, :, None].exp().expand_as(turn[:, i]), -turn[:, i])[:, :, None]
        dt, w = t["dt"][:, i, :, None, None], t["weight"][:, i, :, None, None]
        now = torch.einsum("bhrn,bhrp->bhpn", b[:, i], u[:, i].to(b.dtype))
        state = flow * (state + (1 - w) * dt * before) + w * dt * now
        before = now
        y = torch.einsum("bhpn,bhrn->bhrp", state, c[:, i].conj()).real
        gates = mixer.gates(t["z"][:, i]).float()
        outs.append(mixer.outputs((y + mixer.D[:, None, None] * u[:, i]).float(), gates))
    return torch.stack(outs, 1)
