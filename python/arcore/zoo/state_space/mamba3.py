"""Mamba-3: trapezoidal steps, states that turn by angles of the data, several inputs and outputs (state-spaces, 2026).

Three changes against `Mamba2`. The input term of the recurrence is the mean, weighted by the data, of its two ends (the
exponential-trapezoidal rule), which makes the convolution before the scan needless. Pairs of states turn by angles that
depend on the data, as complex states would; the turns are carried out on the input and output matrices, like rotary
positions. And a head may have R inputs and outputs per token (MIMO) that share one state, for more arithmetic per byte
of state.

Per head, with a = exp(dt A), w in (0, 1), matrices B and C (with biases, after their norms) turned by the sum of the
angles so far, and x of P channels:

    h_t = a_t h_(t-1) + (1 - w_t) dt_t a_t x_(t-1) B_(t-1)^T + w_t dt_t x_t B_t^T        y_t = h_t C_t + D x_t

What x_s B_s^T adds to all later states is decayed as a whole, so sequences run through `arcore.ops.ssd` with the step
w_s dt_s + (1 - w_(s+1)) dt_(s+1), less the second part where a token reads itself.

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
from arcore.ops import ssd
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
    ops=("ssd",),
    recipe="language",
    summary="Mamba-2 with trapezoidal steps, states that turn by data-dependent angles, and several inputs per head.",
    claim="Turning B and C by summed angles equals a scan of complex states by the exponential-trapezoidal rule.",
    checked_on="published layout, random weights",
)


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
        # State, angles, and the last token's turned B and x.
        self.parts = (size * n, turning, rank * n, size)
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
        """What the recurrence takes of each token, in float32.

        Args:
            x: `[..., C]`.

        Returns:
            x and z `[..., H, P]`, B and C `[..., H, R, N]` before their turn, dt, weight w and log_decay `[..., H]`,
            turn `[..., H, S]`, the angles by which this token turns.
        """
        z, u, b, c, dt, a, w, angles = self.in_proj(x).split(self.split, dim=-1)
        per_head = self.heads // self.groups

        def matrices(t: Tensor, norm: nn.Module, bias: Tensor) -> Tensor:
            t = norm(t.unflatten(-1, (self.rank, self.groups, self.d_state))).float()
            return t.repeat_interleave(per_head, dim=-2).transpose(-2, -3) + bias

        step = F.softplus((dt + self.dt_bias).float())
        a = a.float()
        # 1 + a above 0 and 1 / (1 - a) below: positive and smooth, with a heavy tail.
        size = a.clamp(min=0) + (1 - a.clamp(max=0)).reciprocal()
        return {
            "x": u.unflatten(-1, (self.heads, self.head_dim)).float(),
            "z": z.unflatten(-1, (self.heads, self.head_dim)).float(),
            "B": matrices(b, self.B_norm, self.B_bias),
            "C": matrices(c, self.C_norm, self.C_bias),
            "dt": step,
            "weight": w.float().sigmoid(),
            "log_decay": -size.clamp(min=self.a_floor) * step,
            "turn": (math.pi * angles.float().tanh()).unsqueeze(-2) * step.unsqueeze(-1),
        }

    def turned(self, m: Tensor, angles: Tensor) -> Tensor:
        """`m` `[..., H, R, N]` with pairs of states turned by `angles` `[..., H, S]`.

        Pairs are neighbours; with several inputs they lie N / 2 apart. States beyond the first S pairs stay.
        """
        shape = (2, self.d_state // 2) if self.mimo else (self.d_state // 2, 2)
        first, second = m.unflatten(-1, shape).unbind(-2 if self.mimo else -1)
        cos, sin = (
            F.pad(f(angles).unsqueeze(-2), (0, self.d_state // 2 - self.angles), value=rest)
            for f, rest in ((torch.cos, 1.0), (torch.sin, 0.0))
        )
        pair = (first * cos - second * sin, first * sin + second * cos)
        return torch.stack(pair, dim=-2 if self.mimo else -1).flatten(-2)

    def inputs(self, x: Tensor) -> Tensor:
        """`[..., H, P]` to the inputs of each rank, `[..., H, R, P]`."""
        return x.unsqueeze(-2) * self.mimo_x if self.mimo else x.unsqueeze(-2)

    def outputs(self, y: Tensor, z: Tensor) -> Tensor:
        """Norm, gate, and the sum over ranks: `y` `[..., H, R, P]`, `z` `[..., H, P]` to `[..., C]`."""
        z = z.unsqueeze(-2) * self.mimo_z if self.mimo else z.unsqueeze(-2)
        if self.norm is not None:
            weight = self.norm.weight.view(self.heads, 1, self.head_dim)
            y = F.rms_norm(y, (self.head_dim,), eps=self.norm.eps) * weight
        y = y * F.silu(z)
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
        batch, length = x.shape[:2]
        turn, later = t["turn"], (1 - t["weight"]) * t["dt"]
        if seq_idx is None:
            then = F.pad(later[:, 1:], (0, 0, 0, 1))
        else:
            turn = torch.where((seq_idx >= 0)[..., None, None], turn, 0.0)
            then = _of_the_next_token(later, seq_idx)
        # float64: differences of long sums.
        angles = turn.cumsum(1, dtype=torch.float64)
        first, state = None, None
        if cache is not None:
            state = cache.layer(layer)[1]
            h, turned, b0, x0 = self._unpack(state)
            angles = angles + turned.unsqueeze(1)
            first = h + torch.einsum("bhrn,bhrp,bh->bhpn", b0, self.inputs(x0), later[:, 0])
        angles = angles.remainder(2 * math.pi).float()
        b, c, u = self.turned(t["B"], angles), self.turned(t["C"], angles), self.inputs(t["x"])
        step = (-t["log_decay"]).clamp(min=1e-20)
        driven = u * ((t["weight"] * t["dt"] + then) / step)[..., None, None]
        # Every output of a head reads every input: heads, outputs and inputs become heads of the scan.
        r = self.rank

        def heads(m: Tensor, dim: int) -> Tensor:
            spread = m.unsqueeze(dim).expand(*m.shape[:3], r, r, m.shape[-1])
            return spread.reshape(batch, length, -1, m.shape[-1])

        if first is not None:
            only_one = torch.zeros(r, device=x.device)
            only_one[0] = 1.0  # the state before counts once for each output
            first = torch.einsum("bhpn,i->bhipn", first, only_one).unsqueeze(2)
            first = first.expand(-1, -1, r, -1, -1, -1).flatten(1, 3)
        y, last = ssd(
            heads(driven, 3),
            step.repeat_interleave(r * r, dim=-1),
            -torch.ones(self.heads * r * r, device=x.device),
            heads(b, 3),
            heads(c, 4),
            return_last_state=True,
            initial_state=first,
            seq_idx=seq_idx,
        )
        y = y.unflatten(2, (self.heads, r, r)).sum(4)
        own = torch.einsum("blhqn,blhrn->blhqr", c, b) * then[..., None, None]
        y = y - own @ u + self.D[:, None, None] * u
        if state is not None:
            last = last.unflatten(1, (self.heads, r, r))[:, :, 0].sum(2)
            self._pack(state, last, angles[:, -1], b[:, -1], t["x"][:, -1])
        return self.outputs(y, t["z"])

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
        h, angles, b0, x0 = self._unpack(state)
        angles = (angles + t["turn"]).remainder(2 * math.pi)
        b, c, u = self.turned(t["B"], angles), self.turned(t["C"], angles), self.inputs(t["x"])
        before = torch.einsum("bhrn,bhrp->bhpn", b0, self.inputs(x0))
        now = torch.einsum("bhrn,bhrp->bhpn", b, u)
        decay, dt, w = (t[n][..., None, None] for n in ("log_decay", "dt", "weight"))
        h = decay.exp() * (h + (1 - w) * dt * before) + w * dt * now
        self._pack(state, h, angles, b, t["x"])
        y = torch.einsum("bhpn,bhrn->bhrp", h, c) + self.D[:, None, None] * u
        return self.outputs(y, t["z"])

    def _unpack(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h, angles, b, x = state.split(self.parts, dim=-1)
        n = self.d_state
        return h.unflatten(-1, (self.head_dim, n)), angles, b.unflatten(-1, (self.rank, n)), x

    def _pack(self, state: Tensor, h: Tensor, angles: Tensor, b: Tensor, x: Tensor) -> None:
        with torch.no_grad():
            state.copy_(torch.cat([h.flatten(-2), angles, b.flatten(-2), x], dim=-1))


def _of_the_next_token(values: Tensor, seq_idx: Tensor) -> Tensor:
    """`values` `[B, L, H]` of each token's successor in its sequence, padding passed over; 0 where it has none."""
    length = seq_idx.shape[1]
    places = torch.arange(length, device=seq_idx.device)
    real = torch.where(seq_idx >= 0, places, length)
    nearest = real.flip(1).cummin(1).values.flip(1)  # the first token from here on
    after = F.pad(nearest[:, 1:], (0, 1), value=length)
    follows = after < length
    after = after.clamp(max=max(length - 1, 0))
    follows &= seq_idx.gather(1, after) == seq_idx
    found = values.gather(1, after[..., None].expand_as(values))
    return torch.where(follows[..., None], found, 0.0)


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

    b, c, u = paired(t["B"]), paired(t["C"]), mixer.inputs(t["x"])
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
        outs.append(mixer.outputs((y + mixer.D[:, None, None] * u[:, i]).float(), t["z"][:, i].float()))
    return torch.stack(outs, 1)
