"""Paths of candles drawn from Kronos, all paths of a window behind one copy of the window's keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arcore.decoding.draws import row_seeds
from arcore.decoding.sampling import Sampling
from arcore.masks import IntervalMask
from arcore.nn.checks import came, check_whole
from arcore.nn.kinds import check_kinds
from arcore.zoo.series._kronos_layers import angles_of, packed_paths
from arcore.zoo.series._ohlcv import CLIP


class PathCache:
    """Keys and values of a window and, behind them, of several paths that continue it.

    The window is stored once. Each path has room for its rows in one piece, so that what a row sees is two intervals.

    Args:
        layers: layers A.
        batch: windows B.
        heads: heads H.
        head_dim: width of a head.
        prefix: rows P of a window.
        paths: of each window.
        length: most rows S of a path.
        like: gives dtype and device.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        head_dim: int,
        prefix: int,
        paths: int,
        length: int,
        like: Tensor,
    ) -> None:
        shape = (layers, batch, heads, prefix + paths * length, head_dim)
        # Rows that nobody has written are masked, but must not be NaN.
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.prefix, self.paths, self.size = prefix, paths, length
        self.filled = 0

    def stage(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's window `[B, H, P, d]`, or then one row of every path `[B, H, paths, d]`; returns everything.

        The window comes first; `count_in` says that a row of all layers is written.
        """
        for store, new in ((self.keys[layer], keys), (self.values[layer], values)):
            if not self.filled:
                store[:, :, : self.prefix] = new
            else:
                store[:, :, self.prefix + self.filled - 1 :: self.size] = new
        return self.keys[layer], self.values[layer]

    def count_in(self) -> None:
        """The window, or a row of every path, is written in all layers."""
        self.filled += 1

    def mask(self, rows: int) -> IntervalMask:
        """What the newest row of each path sees: the window and the first `rows` rows of its path."""
        path = torch.arange(self.paths, dtype=torch.int32, device=self.keys.device)
        begin = self.prefix + path * self.size
        shared = torch.full_like(begin, self.prefix)
        bounds = torch.stack([torch.zeros_like(begin), shared, begin, begin + rows], -1)
        return IntervalMask(bounds, nk=self.keys.shape[3])

    def window(self) -> IntervalMask:
        """What the rows of the window see."""
        stop = torch.arange(1, self.prefix + 1, dtype=torch.int32, device=self.keys.device)
        return IntervalMask.trusted(
            torch.stack([torch.zeros_like(stop), stop], -1)[None, None], self.keys.shape[3]
        )


class Paths(NamedTuple):
    """What `generate_paths` returns.

    Attributes:
        values: `[paths, B, H, C]`, normalised candles.
        s1, s2: tokens of them, int64 `[paths, B, H]`.
    """

    values: Tensor
    s1: Tensor
    s2: Tensor


@torch.no_grad()
@check_kinds
def generate_paths(
    model: Any,
    tokenizer: Any,
    values: Tensor,
    calendar: Tensor,
    horizon: int,
    *,
    paths: int = 1,
    seed: int | Sequence[int] = 0,
    sampling: Sampling | None = None,
    cached: bool = True,
) -> Paths:
    """Draw candles that follow windows.

    While window and path fit into the rows that the model is made for, keys and values are kept, the window's once for
    all paths. From then on the rows slide as in the released code, and everything is computed anew.

    Args:
        model: a `Kronos` in evaluation mode.
        tokenizer: the `KronosTokenizer` of its tokens, likewise.
        values: normalised candles `[B, T, C]`.
        calendar: int64 `[B, T + horizon, 5]`.
        horizon: candles H to draw.
        paths: of each window.
        seed: a number, or one per window. Path p of a window is the same for any number of paths and windows.
        sampling: temperature and filters of both tokens; draws from the whole distribution when None.
        cached: False computes everything anew for every candle; the paths are the same up to rounding.

    Raises:
        TypeError, ValueError: a count is below 1, shapes do not fit, or model and tokenizer have other tokens.
    """
    for name, given, kind, parts in (
        ("model", model, "Kronos", ("coarse", "fine")),
        ("tokenizer", tokenizer, "KronosTokenizer", ("encode", "decode")),
    ):
        if not all(hasattr(given, part) for part in parts):
            raise TypeError(f"arcore.generate_paths: expected {name} to be a {kind} but got {came(given)}")
    horizon, paths = check_whole("horizon", horizon, 1, "candles"), check_whole("paths", paths, 1)
    batch, length = values.shape[:2]
    if calendar.shape != (batch, length + horizon, 5):
        raise ValueError(
            f"expected a calendar of shape [{batch}, {length} + {horizon}, 5] but got {tuple(calendar.shape)}"
        )
    if model.vocab_sizes != tokenizer.vocab_sizes:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_sizes} coarse and fine tokens but the model {model.vocab_sizes}: they "
            "do not belong together"
        )
    if not batch:
        empty = torch.zeros(paths, 0, horizon, dtype=torch.int64, device=values.device)
        return Paths(values.new_zeros(paths, 0, horizon, values.shape[2]), empty, empty)
    own = row_seeds(seed, batch).tolist() if isinstance(seed, int) else list(seed)
    seeds = torch.stack([row_seeds(one, paths, values.device) for one in own])
    s1, s2 = tokenizer.encode(values.clamp(-CLIP, CLIP))
    draw = _Draw(sampling or Sampling(), seeds)
    total = length + horizon
    kept = min(horizon, max(0, model.max_length - length + 1)) if cached else 0
    new1, new2 = (
        _through_cache(model, s1, s2, calendar, kept, draw) if kept else (_none(s1, paths), _none(s1, paths))
    )
    full1, full2 = (
        torch.cat([old.unsqueeze(1).expand(-1, paths, -1), new], -1) for old, new in ((s1, new1), (s2, new2))
    )
    while full1.shape[-1] < total:
        count = full1.shape[-1]
        start = max(0, count - model.max_length)
        rows = (full1[..., start:].flatten(0, 1), full2[..., start:].flatten(0, 1))
        dates = calendar[:, start:count].repeat_interleave(paths, 0)
        hidden = model.hidden(*rows, dates)
        first = draw(model.coarse(hidden[:, -1]).unflatten(0, (batch, paths)), count - length, 0)
        given = torch.cat([rows[0][:, 1:], first.flatten()[:, None]], 1)
        second = draw(model.fine(hidden, given)[:, -1].unflatten(0, (batch, paths)), count - length, 1)
        full1, full2 = torch.cat([full1, first[..., None]], -1), torch.cat([full2, second[..., None]], -1)
    out = _decode(tokenizer, full1, full2, length, min(total, model.max_length), shared=cached)
    return Paths(out.movedim(1, 0), full1[..., length:].movedim(1, 0), full2[..., length:].movedim(1, 0))


class _Draw:
    """Draws the tokens of all paths; two draws per candle, keyed by the candle's place in the path."""

    def __init__(self, sampling: Sampling, seeds: Tensor) -> None:
        self.sampling, self.seeds = sampling, seeds

    def __call__(self, logits: Tensor, step: int, level: int) -> Tensor:
        offsets = torch.full_like(self.seeds, 2 * step + level)
        flat = self.sampling.draw(logits.flatten(0, 1).contiguous(), self.seeds.flatten(), offsets.flatten())
        assert isinstance(flat, Tensor)
        return flat.view(self.seeds.shape)


def _through_cache(
    model: Any, s1: Tensor, s2: Tensor, calendar: Tensor, steps: int, draw: _Draw
) -> tuple[Tensor, Tensor]:
    """The first tokens of all paths, `[B, paths, steps]`, behind one copy of the window."""
    batch, prefix = s1.shape
    paths = draw.seeds.shape[1]
    dependency, mode = model.dependency, model.config.dependency
    attention = model.layers[0].attention
    like = model.fuse.weight
    sizes = (prefix, paths, max(1, steps - 1), like)
    cache = PathCache(len(model.layers), batch, attention.num_heads, attention.head_dim, *sizes)
    context = PathCache(1, batch, model.config.dim // dependency.head_dim, dependency.head_dim, *sizes)
    angles = angles_of(model.rotary, prefix, s1.device)
    hidden = model.run(model.embed(s1, s2, calendar[:, :prefix]), angles, cache.window(), cache)
    cache.count_in()
    spans = angles_of(dependency.rotary, prefix, s1.device)
    keys = context.stage(0, *dependency.keys(hidden, spans, mode))
    context.count_in()
    last = hidden[:, -1:].expand(-1, paths, -1)
    found1, found2 = [], []
    for step in range(steps):
        found1.append(draw(model.coarse(last), step, 0))
        at = dependency.rotary.span(prefix + step - 1, prefix + step, s1.device)
        sibling = model.embed_s1(found1[-1])
        mixed = dependency.mix(last, sibling, keys, context.mask(step), at, mode)
        found2.append(draw(model.fine_logits(mixed), step, 1))
        if step + 1 < steps:
            dates = calendar[:, prefix + step].unsqueeze(1).expand(-1, paths, -1)
            x = model.embed(found1[-1], found2[-1], dates)
            at = model.rotary.span(prefix + step, prefix + step + 1, s1.device)
            last = model.run(x, at, cache.mask(step + 1), cache)
            cache.count_in()
            at = dependency.rotary.span(prefix + step, prefix + step + 1, s1.device)
            keys = context.stage(0, *dependency.keys(last, at, mode))
            context.count_in()
    return torch.stack(found1, -1), torch.stack(found2, -1)


def _decode(tokenizer: Any, s1: Tensor, s2: Tensor, prefix: int, rows: int, *, shared: bool) -> Tensor:
    """Candles `[B, paths, H, C]` behind the first `prefix` of the tokens `[B, paths, T]`; the last `rows` are read."""
    batch, paths, total = s1.shape
    if shared and rows == total:
        mask, positions = packed_paths(prefix, paths, total - prefix, s1.device)
        packed = (torch.cat([one[:, 0, :prefix], one[..., prefix:].flatten(1)], 1) for one in (s1, s2))
        out = tokenizer.decode(*packed, mask, positions)
        values: Tensor = out[:, prefix:].unflatten(1, (paths, total - prefix))
        return values
    out = tokenizer.decode(*(one[..., -rows:].flatten(0, 1) for one in (s1, s2)))
    values = out[:, -(total - prefix) :].unflatten(0, (batch, paths))
    return values


def _none(like: Tensor, paths: int) -> Tensor:
    return like.new_zeros(len(like), paths, 0)
