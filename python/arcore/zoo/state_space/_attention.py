"""The attention layers of hybrids of state spaces and attention, and the cache that both kinds of layer share.

Legend: B rows, L tokens, C width, H query heads, G key heads, D width of a head, W taps of the convolution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.masks import IntervalMask, causal
from arcore.nn import StateCache, StateSnapshot
from arcore.nn.linear import Linear
from arcore.nn.rotary import Angles, RotaryTable
from arcore.nn.ssm import CausalConv1d
from arcore.ops import block_sparse_attention

# Widths of the feed-forward network inside an attention layer are rounded up to a multiple of this.
INNER_MULTIPLE = 256
# Tokens that a cache of unknown length has room for at first; it doubles when they are used up.
FIRST_ROOM = 64


@dataclass(frozen=True, kw_only=True)
class AttentionSettings:
    """What hybrids say about their attention layers; without effect where `attn_layer_idx` is empty.

    Attributes:
        attn_layer_idx: layers with attention in place of the state-space mixer, from 0.
        attn_num_heads: query heads.
        attn_num_heads_kv: key heads, a divisor of the query heads; None: as many.
        attn_head_dim: width of a head; None: C over the query heads.
        attn_mlp_dim: width of the first product of a gated network beside the attention, rounded up to a multiple of
            256; 0: none.
        attn_qkv_bias, attn_out_bias: biases of the projections in and out.
        attn_scale: factor on the scores; None: 1 / sqrt(head width).
        attn_d_conv: taps of a causal convolution of queries, keys and values; 0: none.
        attn_rotary_dim: leading channels of each head that are turned by position; 0: none.
        attn_rotary_base: base of the rates of turning.
        attn_rotary_interleaved: channels 2 i and 2 i + 1 are a pair, instead of i and i + attn_rotary_dim / 2.
    """

    attn_layer_idx: tuple[int, ...] = ()
    attn_num_heads: int = 0
    attn_num_heads_kv: int | None = None
    attn_head_dim: int | None = None
    attn_mlp_dim: int = 0
    attn_qkv_bias: bool = True
    attn_out_bias: bool = True
    attn_scale: float | None = None
    attn_d_conv: int = 0
    attn_rotary_dim: int = 0
    attn_rotary_base: float = 10000.0
    attn_rotary_interleaved: bool = False

    def check_attention(self, d_model: int, n_layer: int) -> None:
        """Raise ValueError where the settings do not fit together."""
        layers = self.attn_layer_idx
        if not layers:
            return
        if any(not 0 <= i < n_layer for i in layers) or len(set(layers)) == n_layer:
            raise ValueError(
                f"expected attn_layer_idx to name some of the layers 0 to {n_layer - 1}, not all, but got {layers}"
            )
        heads = self.attn_num_heads
        keys = heads if self.attn_num_heads_kv is None else self.attn_num_heads_kv
        if heads < 1 or keys < 1 or heads % keys:
            raise ValueError(
                f"expected attn_num_heads to be a multiple of attn_num_heads_kv, both at least 1, but got {heads} and "
                f"{keys}"
            )
        if self.attn_head_dim is None and d_model % heads:
            raise ValueError(f"expected attn_num_heads to divide d_model={d_model} but got {heads}")
        size = d_model // heads if self.attn_head_dim is None else self.attn_head_dim
        if size < 1:
            raise ValueError(f"expected attn_head_dim to be at least 1 but got {size}")
        if not 0 <= self.attn_rotary_dim <= size or self.attn_rotary_dim % 2:
            raise ValueError(
                f"expected attn_rotary_dim to be even and from 0 to {size}, the width of a head, but got "
                f"{self.attn_rotary_dim}"
            )
        if self.attn_d_conv < 0 or self.attn_d_conv == 1 or self.attn_mlp_dim < 0:
            raise ValueError(
                "expected attn_d_conv to be 0 or at least 2 and attn_mlp_dim to be at least 0 but got "
                f"{self.attn_d_conv} and {self.attn_mlp_dim}"
            )


def official_attention(content: Mapping[str, Any]) -> dict[str, Any]:
    """What configs of the authors' code say about attention layers.

    Raises:
        ValueError: the attention sees later tokens, or has unknown settings.
    """
    layers = content.get("attn_layer_idx") or ()
    if not layers:
        return {}
    given = dict(content.get("attn_cfg") or {})
    if not given.pop("causal", False):
        raise ValueError(
            "attn_cfg has causal=false, also where it says nothing: such layers see later tokens, so the model cannot "
            "predict them one after the other; add causal=true if it was trained that way"
        )
    names = {
        "num_heads": "attn_num_heads",
        "num_heads_kv": "attn_num_heads_kv",
        "head_dim": "attn_head_dim",
        "mlp_dim": "attn_mlp_dim",
        "qkv_proj_bias": "attn_qkv_bias",
        "out_proj_bias": "attn_out_bias",
        "softmax_scale": "attn_scale",
        "d_conv": "attn_d_conv",
        "rotary_emb_dim": "attn_rotary_dim",
        "rotary_emb_base": "attn_rotary_base",
        "rotary_emb_interleaved": "attn_rotary_interleaved",
    }
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ValueError(f"attn_cfg has unknown settings: {', '.join(unknown)}")
    fields = {ours: given[theirs] for theirs, ours in names.items() if theirs in given}
    return fields | {"attn_layer_idx": tuple(sorted(int(i) for i in layers))}


class Reading(NamedTuple):
    """Which keys new tokens see, and where they stand.

    Attributes:
        mask: of the new tokens.
        positions: int64 `[L]` or `[B, L]`.
        counts: int64 `[B]`, tokens of each row that are no padding, where padding stands before some of them.
    """

    mask: IntervalMask
    positions: Tensor
    counts: Tensor | None = None


class HybridSnapshot(NamedTuple):
    """A copy of what a `HybridCache` held."""

    states: StateSnapshot
    keys: Tensor
    values: Tensor
    taps: Tensor


class HybridCache(StateCache):
    """A `StateCache` whose other layers keep keys and values, which grow with the text.

    Args:
        state_layers: layers with a state.
        attention_layers: layers with keys and values.
        num_heads: key heads G.
        head_dim: width D of a head.
        taps_shape: of the inputs that the attention layers' convolutions remember, (taps - 1, channels).
        room: tokens for which there is room at first.
        others: those of `StateCache`.
    """

    def __init__(
        self,
        *,
        state_layers: Sequence[int],
        attention_layers: Sequence[int],
        num_heads: int,
        head_dim: int,
        taps_shape: Sequence[int],
        room: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__(num_layers=len(state_layers), **others)
        self._state_slots = {layer: slot for slot, layer in enumerate(state_layers)}
        self._slots = {layer: slot for slot, layer in enumerate(attention_layers)}
        shape = (len(attention_layers), self.batch, num_heads, FIRST_ROOM if room is None else room, head_dim)
        # Zeros: a masked value still meets a weight of 0, and what was never written may be NaN.
        self.keys = self.conv.new_zeros(shape)
        self.values = self.conv.new_zeros(shape)
        self.taps = self.conv.new_zeros(len(attention_layers), self.batch, *taps_shape)
        self._taps_trail: Tensor | None = None
        self._memo: tuple[tuple[int, ...], int, Tensor | None, Reading] | None = None

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        return super().layer(self._state_slots[layer])

    def trail(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        return super().trail(self._state_slots[layer])

    def taps_of(self, layer: int) -> Tensor:
        """What the convolution of an attention layer remembers, `[B, W - 1, channels]`, to be written in place."""
        return self.taps[self._slots[layer]]

    def taps_trail(self, layer: int) -> Tensor | None:
        """Room for what it remembers before and after each staged token, `[B, tokens + 1, W - 1, channels]`."""
        return None if self._taps_trail is None else self._taps_trail[self._slots[layer]]

    def reading(self, new: int, seq_idx: Tensor | None = None) -> Reading:
        """How the next `new` tokens of each row are read; padding, negative in `seq_idx`, stands before them only."""
        if self._memo is not None:
            lengths, count, packed, found = self._memo
            if lengths == self.lengths and count == new and packed is seq_idx:
                return found
        device = self.keys.device
        starts = self._lengths
        counts = None if seq_idx is None else (seq_idx >= 0).sum(1)
        same = len(set(starts)) <= 1
        first = torch.tensor(starts[:1] or [0] if same else starts, dtype=torch.int64, device=device)
        positions = first[:, None] + torch.arange(new, device=device)
        stop = (positions + 1).to(torch.int32)
        bounds = torch.stack([torch.zeros_like(stop), stop], -1).unsqueeze(1)
        mask = IntervalMask.trusted(bounds.contiguous(), self.length + new)
        found = Reading(mask, positions, counts)
        self._memo = (self.lengths, new, seq_idx, found)
        return found

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put the keys and values of new tokens, `[B, G, L, D]`, behind each row's end, without counting them in.

        Returns:
            Those of the layer, `[B, G, length + L, D]`; what lies behind a shorter row's new tokens must be masked.
        """
        slot, new = self._slots[layer], keys.shape[2]
        stop = self.length + new
        self._reserve(stop)
        if len(set(self._lengths)) <= 1:
            self.keys[slot, :, :, stop - new : stop] = keys
            self.values[slot, :, :, stop - new : stop] = values
        else:
            rows = torch.arange(self.batch, device=keys.device)[:, None]
            places = torch.tensor(self._lengths, device=keys.device)[:, None] + torch.arange(
                new, device=keys.device
            )
            self.keys[slot][rows, :, places] = keys.transpose(1, 2).to(self.keys.dtype)
            self.values[slot][rows, :, places] = values.transpose(1, 2).to(self.values.dtype)
        return self.keys[slot, :, :, :stop], self.values[slot, :, :, :stop]

    def _reserve(self, length: int) -> None:
        room = self.keys.shape[3]
        if length > room:
            grown = (0, 0, 0, max(length, 2 * room) - room)
            self.keys, self.values = F.pad(self.keys, grown), F.pad(self.values, grown)

    def advance(self, counts: int | Tensor | Sequence[int]) -> None:
        super().advance(counts)
        self._taps_trail = None

    def snapshot(self) -> Any:
        stop = self.length
        keys, values = (stored[:, :, :, :stop].clone() for stored in (self.keys, self.values))
        return HybridSnapshot(super().snapshot(), keys, values, self.taps.clone())

    def restore(self, snapshot: Any) -> None:
        if not isinstance(snapshot, HybridSnapshot) or snapshot.taps.shape != self.taps.shape:
            raise ValueError(f"HybridCache: expected a snapshot of {self!r} but got one of another cache")
        super().restore(snapshot.states)
        stop = snapshot.keys.shape[3]
        self._reserve(stop)
        self.keys[:, :, :, :stop] = snapshot.keys
        self.values[:, :, :, :stop] = snapshot.values
        self.taps.copy_(snapshot.taps)
        self._taps_trail = None

    def stage(self, tokens: int) -> None:
        super().stage(tokens)
        self._taps_trail = self.taps.new_empty(*self.taps.shape[:2], tokens + 1, *self.taps.shape[2:])

    def _take(self, numbers: Sequence[int]) -> None:
        super()._take(numbers)
        if self._taps_trail is not None and self.taps.shape[2]:
            rows, at = torch.arange(self.batch), torch.tensor(numbers, dtype=torch.int64)
            self.taps.copy_(self._taps_trail[:, rows.to(self.taps.device), at.to(self.taps.device)])

    def select(self, rows: Tensor | Sequence[int]) -> None:
        super().select(rows)
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.keys.device)
        self.keys, self.values, self.taps = (
            stored.index_select(1, index) for stored in (self.keys, self.values, self.taps)
        )
        self._taps_trail = self._memo = None

    def __repr__(self) -> str:
        layers, _, heads, room, dim = self.keys.shape
        return (
            f"HybridCache(states={super().__repr__()}, attention_layers={layers}, num_heads={heads}, head_dim={dim}, "
            f"room={room})"
        )


class CausalAttention(nn.Module):
    """Attention in place of a state-space mixer, with the names and shapes of the authors' code.

    The authors' code remembers the convolution's outputs in place of its inputs when it reads a prompt for decoding;
    here decoding gives what a pass over the whole text gives.

    Args:
        dim: width C.
        settings: checked ones.
    """

    def __init__(self, dim: int, settings: AttentionSettings) -> None:
        super().__init__()
        heads = settings.attn_num_heads
        self.num_heads = heads
        self.num_kv_heads = heads if settings.attn_num_heads_kv is None else settings.attn_num_heads_kv
        self.head_dim = dim // heads if settings.attn_head_dim is None else settings.attn_head_dim
        self.scale = settings.attn_scale
        self.inner = -(-settings.attn_mlp_dim // INNER_MULTIPLE) * INNER_MULTIPLE
        self.interleaved = settings.attn_rotary_interleaved
        self.turned = settings.attn_rotary_dim
        self.rotary = (
            RotaryTable(self.turned, theta=settings.attn_rotary_base) if settings.attn_rotary_dim else None
        )
        self.channels = self.head_dim * (heads + 2 * self.num_kv_heads)
        self.in_proj = Linear(dim, self.channels + self.inner, bias=settings.attn_qkv_bias)
        taps = settings.attn_d_conv
        self.taps_shape = (taps - 1, self.channels) if taps else (0, 0)
        self.conv1d = CausalConv1d(self.channels, taps, activation=None) if taps else None
        self.out_proj = Linear(heads * self.head_dim + self.inner // 2, dim, bias=settings.attn_out_bias)

    def forward(
        self,
        x: Tensor,
        *,
        seq_idx: Tensor | None = None,
        cache: HybridCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Mix whole sequences; arguments and result are those of `MambaMixer.forward`."""
        qkv, beside = self._project(x)
        if self.conv1d is not None:
            state = None if cache is None else cache.taps_of(layer)
            qkv = self.conv1d(qkv.transpose(1, 2), seq_idx=seq_idx, state=state).transpose(1, 2)
        reading = _whole(x, seq_idx) if cache is None else cache.reading(x.shape[1], seq_idx)
        return self._mixed(self._attend(qkv, reading, cache, layer), beside)

    def step(self, x: Tensor, cache: HybridCache, layer: int = 0) -> Tensor:
        """Mix one token per row, `[B, C]` to `[B, C]`, or S, `[B, S, C]`."""
        qkv, beside = self._project(x)
        several = x.dim() == 3
        if self.conv1d is not None:
            qkv = self.conv1d.step(qkv, cache.taps_of(layer), cache.taps_trail(layer) if several else None)
        if not several:
            qkv = qkv.unsqueeze(1)
        seen = self._attend(qkv, cache.reading(qkv.shape[1]), cache, layer)
        return self._mixed(seen if several else seen.squeeze(1), beside)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Queries, keys and values together, and what the network beside them makes of x."""
        projected = self.in_proj(x)
        if not self.inner:
            return projected, None
        qkv, beside = projected.split([self.channels, self.inner], dim=-1)
        values, gates = beside.chunk(2, dim=-1)
        return qkv, values * F.silu(gates)

    def _attend(self, qkv: Tensor, reading: Reading, cache: HybridCache | None, layer: int) -> Tensor:
        """`[B, L, channels]` to `[B, L, H * D]`."""
        batch, length, _ = qkv.shape
        shift = None
        if reading.counts is not None:
            # Rows begin at the first slot of the cache, so padding before them is moved behind them.
            shift = (length - reading.counts)[:, None]
            places = torch.arange(length, device=qkv.device)
            take = (places + shift).clamp(max=length - 1)
            qkv = qkv.gather(1, take.unsqueeze(-1).expand(-1, -1, qkv.shape[-1]))
        turning = self.num_heads + self.num_kv_heads
        split = qkv.unflatten(-1, (turning + self.num_kv_heads, self.head_dim))
        qk, v = split[:, :, :turning], split[:, :, turning:].transpose(1, 2)
        if self.rotary is not None:
            qk = self._turn(qk, self.rotary.at(reading.positions))
        q = qk[:, :, : self.num_heads].transpose(1, 2)
        k = qk[:, :, self.num_heads :].transpose(1, 2)
        if cache is not None:
            k, v = cache.write(layer, k, v)
        out = block_sparse_attention(q, k, v, reading.mask, scale=self.scale)
        out = out.transpose(1, 2).reshape(batch, length, -1)
        if shift is not None:
            back = places - shift
            out = out.gather(1, back.clamp(min=0).unsqueeze(-1).expand(-1, -1, out.shape[-1]))
            out = out.masked_fill((back < 0).unsqueeze(-1), 0.0)
        return out

    def _turn(self, x: Tensor, angles: Angles) -> Tensor:
        """Queries and keys `[B, L, H + G, D]`, the leading channels turned; both alike, so pairs may change places."""
        turned = x[..., : self.turned]
        if self.interleaved:
            turned = turned.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return torch.cat([angles.turn(turned), x[..., self.turned :]], dim=-1)

    def _mixed(self, seen: Tensor, beside: Tensor | None) -> Tensor:
        out: Tensor = self.out_proj(seen if beside is None else torch.cat([seen, beside], dim=-1))
        return out


def _whole(x: Tensor, seq_idx: Tensor | None) -> Reading:
    """How whole rows `[B, L, C]` are read, each one sequence or several; see `MambaMixer.forward`."""
    length, device = x.shape[1], x.device
    places = torch.arange(length, device=device)
    if seq_idx is None:
        return Reading(causal(length).to(device), places)
    real = seq_idx >= 0
    # The token before, padding passed over.
    last = torch.where(real, places, -1).cummax(1).values
    before = F.pad(last, (1, -1), value=-1)
    other = seq_idx.gather(1, before.clamp(min=0)) != seq_idx
    begins = real & ((before < 0) | other)
    start = torch.where(begins, places, 0).cummax(1).values
    rank = real.cumsum(1)
    positions = (rank - rank.gather(1, start)).clamp(min=0)
    bounds = torch.stack([start, places + 1 + torch.zeros_like(start)], -1)
    bounds = bounds.masked_fill(~real.unsqueeze(-1), 0).to(torch.int32)
    ends = torch.stack([torch.zeros_like(start), real * length], -1).to(torch.int32)
    mask = IntervalMask.trusted(bounds.unsqueeze(1).contiguous(), length, ends.contiguous())
    return Reading(mask, positions)
