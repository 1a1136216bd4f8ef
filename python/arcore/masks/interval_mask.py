"""`IntervalMask`: an attention mask stored as at most two key ranges per query row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from arcore._kinds import Size, check_kinds
from arcore.masks import _spans
from arcore.masks._arguments import MAX_LENGTH, integers, length, numbers
from arcore.masks._value import Value
from arcore.masks.labels import Labels
from arcore.masks.tile_plan import TilePlan, compute_tile_plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch.nn.attention.flex_attention import BlockMask

# Ranges handled at once where key_bounds cut rows into pieces; bounds the extra memory.
_PIECES_AT_ONCE = 1 << 21


class IntervalMask(Value):
    """An attention mask as data: for each query row a union of at most two half-open key ranges.

    Query i may see key j iff j lies in one of row i's ranges and, where `key_bounds` are given, i lies in key j's
    query range. Batch and head sizes of 1 broadcast, as one mask usually serves all heads and layers.

    A mask is a value: immutable, hashable and equal by content (on one device), printable, picklable, and moved by
    ``to(device)``. Make masks with the constructors of `arcore.masks`, combine them with ``|`` and ``&``, and cut them
    with `rows` or ``mask[start:stop]``. Memory is O(Nq + Nk); only `to_bool` builds the Nq x Nk square.

    Args:
        bounds: integer ``[Bm, Hm, Nq, 2]`` or ``[Bm, Hm, Nq, 4]`` (or without the first two dimensions): the ranges
            ``[lo, hi)`` or ``[lo, hi, lo2, hi2)`` of each row, with ``0 <= lo <= hi <= nk``. Ranges may come in any
            order, overlap, touch or be empty; they are copied and brought into normal form.
        nk: number of keys.
        key_bounds: integer ``[Bm, Nk, 2]`` or ``[Nk, 2]``: for each key the half-open range of query rows that may
            see it, with ``0 <= lo <= hi <= Nq``. For padding and deleted tokens.
        labels: what queries and keys are, for `plot`; no part of the value.

    Attributes:
        bounds: int32 ``[Bm, Hm, Nq, 2 * num_intervals]``, contiguous, in normal form: sorted, disjoint, not adjacent,
            absent ranges (0, 0) and last. Must not be written to.
        key_bounds: int32 ``[Bm, Nk, 2]``, contiguous, empty ranges (0, 0), or None. Must not be written to.
        nk: number of keys.
        labels: as given.

    Raises:
        TypeError: `bounds` or `key_bounds` is not an integer tensor.
        ValueError: a shape does not fit or a range lies outside; names the first such row or key.
    """

    __slots__ = ("bounds", "key_bounds", "labels", "nk")
    _CONTENT = ("bounds", "nk", "key_bounds")
    _DECORATION = ("labels",)

    bounds: Tensor
    key_bounds: Tensor | None
    nk: int
    labels: Labels | None

    def __init__(
        self, bounds: Tensor, nk: int, *, key_bounds: Tensor | None = None, labels: Labels | None = None
    ) -> None:
        nk = length("IntervalMask", "nk", nk)
        if isinstance(bounds, Tensor) and bounds.dtype == torch.bool:
            raise TypeError(
                "arcore.masks.IntervalMask: expected key ranges but got a bool mask; call from_bool"
            )
        rows = integers("arcore.masks.IntervalMask", "bounds", bounds)
        keys = None if key_bounds is None else integers("arcore.masks.IntervalMask", "key_bounds", key_bounds)
        device = bounds.device
        # Masks outlive the call that makes them: tensors of inference mode could not be saved for a backward.
        with torch.inference_mode(False):
            rows = _normal_bounds(rows, nk)
            if keys is not None:
                keys = _normal_key_bounds(keys, rows.shape[2], nk)
                if 1 != rows.shape[0] != keys.shape[0] != 1:
                    raise ValueError(
                        "arcore.masks.IntervalMask: expected bounds and key_bounds of one batch size (or 1) but got "
                        f"{rows.shape[0]} and {keys.shape[0]}"
                    )
                keys = keys.to(device)
            self._freeze(bounds=rows.to(device), key_bounds=keys, nk=nk, labels=labels)

    @classmethod
    def trusted(cls, bounds: Tensor, nk: int, key_bounds: Tensor | None = None) -> IntervalMask:
        """A mask from bounds that are known to be in normal form: nothing is checked or copied.

        For loops that make a mask at each step, and for graphs that `torch.compile` traces, in which values cannot be
        looked at. Wrong bounds give undefined results.

        Args:
            bounds: int32 ``[Bm, Hm, Nq, 2 * num_intervals]``, contiguous, in normal form.
            nk: number of keys.
            key_bounds: int32 ``[Bm, Nk, 2]``, contiguous, in normal form, or None.
        """
        mask = object.__new__(cls)
        mask._freeze(bounds=bounds, key_bounds=key_bounds, nk=nk, labels=None)
        return mask

    @property
    def nq(self) -> int:
        """Number of query rows."""
        return self.bounds.shape[2]

    @property
    def batch(self) -> int:
        """Batch size of the mask; 1 broadcasts."""
        of_keys = 1 if self.key_bounds is None else self.key_bounds.shape[0]
        return max(self.bounds.shape[0], of_keys)

    @property
    def heads(self) -> int:
        """Number of heads of the mask; 1 broadcasts."""
        return self.bounds.shape[1]

    @property
    def num_intervals(self) -> int:
        """Key ranges stored per row: 1 or 2."""
        return self.bounds.shape[3] // 2

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(batch, heads, nq, nk)``."""
        return self.batch, self.heads, self.nq, self.nk

    @property
    def num_pairs(self) -> int:
        """Exact number of allowed (query, key) pairs over `batch` and `heads`."""
        return self._cached(
            "num_pairs", lambda: sum(int((hi - lo).clamp(min=0).sum()) for _, lo, hi in self._pieces())
        )

    @property
    def density(self) -> float:
        """Allowed pairs as a fraction of all pairs; 0 for a mask without pairs."""
        total = self.batch * self.heads * self.nq * self.nk
        return self.num_pairs / total if total else 0.0

    def __repr__(self) -> str:
        parts = [f"nq={self.nq}, nk={self.nk}"]
        parts += [f"batch={self.batch}"] if self.batch > 1 else []
        parts += [f"heads={self.heads}"] if self.heads > 1 else []
        parts += [f"intervals={self.num_intervals}"]
        parts += ["key_bounds"] if self.key_bounds is not None else []
        parts += [f"density={self.density:.3g}"]
        parts += [f"device={self.device}"] if self.device.type != "cpu" else []
        return f"IntervalMask({', '.join(parts)})"

    def to_bool(self) -> Tensor:
        """Bool ``[Bm, Hm, Nq, Nk]``, True where the pair is allowed. The only method of O(Nq * Nk) memory."""
        queries = torch.arange(self.nq, device=self.device)
        keys = torch.arange(self.nk, device=self.device)
        key_bounds = None if self.key_bounds is None else self.key_bounds.unsqueeze(1)
        return _spans.allowed_pairs(self.bounds, key_bounds, queries, keys)

    @classmethod
    def from_bool(cls, mask: Tensor, *, labels: Labels | None = None) -> IntervalMask:
        """The mask that is True exactly where `mask` is.

        Args:
            mask: bool ``[Nq, Nk]`` or ``[Bm, Hm, Nq, Nk]``.
            labels: as in the constructor.

        Raises:
            TypeError: `mask` is not a bool tensor.
            ValueError: a row has more than two runs of allowed keys; names the first.
        """
        where = "arcore.masks.from_bool"
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = str(mask.dtype).removeprefix("torch.") if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(
                f"{where}: expected a bool tensor but got {got}; write mask.bool() if True means allowed"
            )
        if mask.dim() not in (2, 4):
            raise ValueError(
                f"{where}: expected a mask of shape [Nq, Nk] or [Bm, Hm, Nq, Nk] but got {tuple(mask.shape)}; "
                "give a mask per batch entry a head dimension with mask.unsqueeze(1)"
            )
        host = mask.detach().cpu()
        host = host.reshape(1, 1, *host.shape) if host.dim() == 2 else host
        nk = host.shape[-1]
        edge = torch.nn.functional.pad(host.flatten(0, 2), (1, 1))
        row, lo = (edge[:, 1:] & ~edge[:, :-1]).nonzero().unbind(-1)
        hi = (edge[:, :-1] & ~edge[:, 1:]).nonzero()[:, 1]
        bounds, count = _spans.unite(row, lo, hi, edge.shape[0], nk)
        _spans.check_fits(count.view(host.shape[:3]), where)
        return cls(bounds.view(*host.shape[:3], 4).to(mask.device), nk, labels=labels)

    @check_kinds
    def to_cudnn(self, batch: Size | None = None) -> Tensor:
        """The mask as ``mask_func`` of ``cudnn.flex_attention.create_mask_plan`` (nvidia-cudnn-frontend 1.32).

        Args:
            batch: entries of the batch that the plan is for; the mask's own by default.

        Returns:
            int32 ``[Hm, 1 + 2 I, batch * Nq]``: for each query the ends F of ``[0, F0) U [F1, F2) U ...`` in rising
            order, F0 = 0. Row ``b * Nq + i`` belongs to query i of batch entry b.

        Raises:
            NotImplementedError: the mask has key_bounds, which a union of key intervals per query cannot say.
            ValueError: `batch` is not what the mask has.
        """
        if self.key_bounds is not None:
            raise NotImplementedError(
                "arcore.masks.IntervalMask.to_cudnn: expected a mask without key_bounds but got one with them; "
                "build it with from_bool, whose bounds are per query"
            )
        size = self.batch if batch is None else batch
        if self.batch not in (1, size):
            raise ValueError(
                f"arcore.masks.IntervalMask.to_cudnn: expected batch={self.batch}, which the mask has, but got {batch}"
            )
        ranges = self.bounds.clamp(0, self.nk).unflatten(-1, (-1, 2))  # [Bm, Hm, Nq, I, 2]
        order = ranges[..., 0].argsort(dim=-1, stable=True).unsqueeze(-1).expand_as(ranges)
        ends = [torch.zeros_like(self.bounds[..., 0])]
        for low, high in (pair.unbind(-1) for pair in ranges.gather(-2, order).unbind(-2)):
            low = torch.maximum(low, ends[-1])
            ends += [low, torch.maximum(high, low)]
        endpoints = torch.stack(ends).expand(-1, size, -1, -1)  # [1 + 2 I, B, Hm, Nq]
        return endpoints.permute(2, 0, 1, 3).flatten(2).to(torch.int32).contiguous()

    def to_block_mask(self, block_size: int | tuple[int, int] = 128) -> BlockMask:
        """This mask for `torch.nn.attention.flex_attention`.

        Its mask_mod compares key indices with bounds looked up by the query index, ``(kv >= lo[q]) & (kv < hi[q])``,
        the form that FlexAttention's interval analysis recognises. Blocks that reach over the end of the sequence
        are partial, as in `create_block_mask`.

        Args:
            block_size: tokens per block, or ``(query tokens, key tokens)``.

        Raises:
            ValueError: the mask has no queries or no keys.
        """
        from arcore.masks.block_mask import to_block_mask

        return to_block_mask(self, block_size)

    @classmethod
    def from_block_mask(cls, block_mask: BlockMask) -> IntervalMask:
        """The mask that a FlexAttention `BlockMask` stands for.

        Full blocks are taken as they are; mask_mod is evaluated on partial blocks only.

        Raises:
            TypeError: `block_mask` is not a BlockMask.
            ValueError: a row has more than two runs of allowed keys; names the first.
        """
        from arcore.masks.block_mask import read_block_mask

        return cls(*read_block_mask(block_mask))

    def with_key_bounds(self, key_bounds: Tensor) -> IntervalMask:
        """This mask, with each key seen only from the query rows of its range.

        A token that was deleted at row d is ``[0, d)`` or, under a causal mask, ``[j, d)``. Where the mask has key
        bounds already, both hold.

        Args:
            key_bounds: integer ``[Nk, 2]`` or ``[B, Nk, 2]``, half-open, ``0 <= lo <= hi <= Nq``.
        """
        fresh = IntervalMask(self.bounds, self.nk, key_bounds=key_bounds, labels=self.labels)
        if self.key_bounds is None:
            return fresh
        return self & fresh

    def with_padding(self, lengths: Sequence[int] | Tensor, side: str = "right") -> IntervalMask:
        """This mask for a padded batch: no query sees a padding key.

        Rows of padding queries keep their ranges; their output means nothing and is ignored by the caller.

        Args:
            lengths: number of real keys of each batch entry, ``[B]``, from 0 to Nk.
            side: "right" if the padding follows the real keys, "left" if it comes before them.

        Returns:
            A mask of batch size B.
        """
        where = "arcore.masks.IntervalMask.with_padding"
        if side not in ("right", "left"):
            raise ValueError(f"{where}: expected side to be 'right' or 'left' but got {side!r}")
        real = numbers(where, "lengths", lengths)
        if real.dim() != 1 or real.numel() == 0:
            raise ValueError(f"{where}: expected lengths of shape [B] but got {tuple(real.shape)}")
        if int(real.min()) < 0 or int(real.max()) > self.nk:
            raise ValueError(f"{where}: expected lengths from 0 to nk={self.nk} but got {real.tolist()}")
        key = torch.arange(self.nk, device="cpu")
        real = real.unsqueeze(1)
        padding = key >= real if side == "right" else key < self.nk - real  # [B, Nk]
        hi = torch.where(padding, 0, self.nq)
        return self.with_key_bounds(torch.stack([torch.zeros_like(hi), hi], -1))

    def rows(self, start: int, stop: int, nk: int | None = None) -> IntervalMask:
        """The mask of query rows ``[start, stop)``, for a step of cached decoding.

        Args:
            start: first row.
            stop: row after the last, ``0 <= start <= stop <= nq``.
            nk: number of keys that are in the cache at this step; all by default.

        Raises:
            ValueError: the rows lie outside, or one of them sees a key at `nk` or beyond; names the first.
        """
        where = "arcore.masks.IntervalMask.rows"
        start, stop = length("IntervalMask.rows", "start", start), length("IntervalMask.rows", "stop", stop)
        nk = self.nk if nk is None else length("IntervalMask.rows", "nk", nk)
        if not start <= stop <= self.nq:
            raise ValueError(
                f"{where}: expected 0 <= start <= stop <= nq={self.nq} but got {start} and {stop}"
            )
        if nk > self.nk:
            raise ValueError(
                f"{where}: expected nk to be at most {self.nk}, the keys of the mask, but got {nk}"
            )
        bounds = self.bounds[:, :, start:stop]
        key_bounds = None if self.key_bounds is None else (self.key_bounds - start).clamp(0, stop - start)
        labels = None if self.labels is None else self.labels.cut(start, stop, nk)
        if nk < self.nk:
            cut = IntervalMask(bounds, self.nk, key_bounds=key_bounds)
            for row, lo, hi in cut._pieces():
                beyond = ((hi > nk) & (lo < hi)).nonzero()
                if len(beyond):
                    batch, head, r, piece = beyond[0].tolist()
                    index = (batch * self.heads + head) * self.nq + start + row + r
                    raise ValueError(
                        f"{where}: expected rows that see keys below nk={nk} only but "
                        f"{_spans.name_row(index, self.batch, self.heads, self.nq)} sees key "
                        f"{int(hi[batch, head, r, piece]) - 1}; put its keys into the cache first"
                    )
            bounds = bounds.clamp(max=nk)
            key_bounds = None if key_bounds is None else key_bounds[:, :nk]
        return IntervalMask(bounds, nk, key_bounds=key_bounds, labels=labels)

    def __getitem__(self, index: slice | tuple[slice, slice]) -> IntervalMask:
        """``mask[start:stop]`` are rows; ``mask[start:stop, :nk]`` also cuts the keys to the cache (see `rows`)."""
        queries, keys = index if isinstance(index, tuple) and len(index) == 2 else (index, slice(None))
        if not isinstance(queries, slice) or not isinstance(keys, slice):
            raise TypeError(
                f"arcore.masks.IntervalMask: expected mask[start:stop] or mask[start:stop, :nk] but got {index!r}; "
                "for one row write mask[i:i+1]"
            )
        if queries.step not in (None, 1) or keys.step not in (None, 1) or keys.start not in (None, 0):
            raise ValueError(
                "arcore.masks.IntervalMask: expected mask[start:stop] or mask[start:stop, :nk], rows in steps of 1 and "
                f"keys from 0, but got {index!r}"
            )
        start, stop = _edge(queries.start, 0, self.nq), _edge(queries.stop, self.nq, self.nq)
        return self.rows(start, stop, _edge(keys.stop, self.nk, self.nk))

    def __and__(self, other: IntervalMask) -> IntervalMask:
        """Pairs that both masks allow. ValueError if a row would need more than two ranges."""
        if not isinstance(other, IntervalMask):
            return NotImplemented
        a, b = self._aligned(other, "&")
        lo = torch.maximum(a[..., 0::2].unsqueeze(-1), b[..., 0::2].unsqueeze(-2)).flatten(-2)
        hi = torch.minimum(a[..., 1::2].unsqueeze(-1), b[..., 1::2].unsqueeze(-2)).flatten(-2)
        key_bounds = self.key_bounds if other.key_bounds is None else other.key_bounds
        if self.key_bounds is not None and other.key_bounds is not None:
            first = torch.maximum(self.key_bounds[..., 0], other.key_bounds[..., 0])
            last = torch.minimum(self.key_bounds[..., 1], other.key_bounds[..., 1])
            key_bounds = torch.stack([first, torch.maximum(first, last)], -1)
        return self._combined(lo, hi, key_bounds, other, "&")

    def __or__(self, other: IntervalMask) -> IntervalMask:
        """Pairs that at least one mask allows. ValueError if a row would need more than two ranges."""
        if not isinstance(other, IntervalMask):
            return NotImplemented
        key_bounds, left, right = self.key_bounds, self, other
        if not _equal(key_bounds, other.key_bounds):
            # Key bounds of one side must not cut the other's pairs: write both sides as rows.
            key_bounds, left, right = None, self._as_rows("|"), other._as_rows("|")
        a, b = left._aligned(right, "|")
        batch, heads = max(a.shape[0], b.shape[0]), max(a.shape[1], b.shape[1])
        both = torch.cat([a.expand(batch, heads, -1, -1), b.expand(batch, heads, -1, -1)], -1)
        return self._combined(both[..., 0::2], both[..., 1::2], key_bounds, other, "|")

    def plan(self, tile_q: int, tile_k: int) -> TilePlan:
        """The tiles of `tile_q` x `tile_k` that hold an allowed pair, no more and no fewer; computed once.

        Args:
            tile_q: queries per tile, at least 1.
            tile_k: keys per tile, at least 1.
        """
        tile_q = length("IntervalMask.plan", "tile_q", tile_q, 1)
        tile_k = length("IntervalMask.plan", "tile_k", tile_k, 1)
        return self._cached(("plan", tile_q, tile_k), lambda: compute_tile_plan(self, tile_q, tile_k))

    def plot(
        self,
        ax: Axes | None = None,
        *,
        batch: int = 0,
        head: int = 0,
        title: str | None = None,
        path: str | Path | None = None,
    ) -> Axes:
        """A picture: queries down, keys across, allowed pairs in the colour of their key (scale, clean, noisy, ...).

        Args:
            ax: matplotlib axes to draw on; new ones by default.
            batch: batch entry of the mask to show.
            head: its head.
            title: text above the picture.
            path: also write the picture to this file, as PNG, SVG or PDF by its suffix.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from arcore.masks.picture import draw_interval_mask

        return draw_interval_mask(self, ax, batch=batch, head=head, title=title, path=path)

    def _pieces(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each row's ranges, cut by `key_bounds`: (first row, lo, hi) with lo, hi int64 ``[B, H, rows, pieces]``.

        Pieces are sorted and disjoint but may be empty (lo >= hi) or adjacent.
        """
        bounds = self.bounds.cpu().expand(self.batch, -1, -1, -1).to(torch.int64)
        if self.key_bounds is None or self.nk == 0:
            yield 0, bounds[..., 0::2], bounds[..., 1::2]
            return
        key_bounds = self.key_bounds.cpu().to(torch.int64)
        # Neighbouring keys with the same query range form a run; padding makes two of them, deletions a few.
        changes = (key_bounds[:, 1:] != key_bounds[:, :-1]).any(-1).any(0).nonzero()[:, 0] + 1
        run_lo = torch.nn.functional.pad(changes, (1, 0))
        run_hi = torch.nn.functional.pad(changes, (0, 1), value=self.nk)
        seen_from, seen_to = key_bounds[:, run_lo].unbind(-1)  # [Bk, R]
        step = max(1, _PIECES_AT_ONCE // (run_lo.numel() * self.num_intervals * self.batch * self.heads))
        for first in range(0, self.nq, step):
            part = bounds[:, :, first : first + step]
            row = torch.arange(first, first + part.shape[2], device="cpu").unsqueeze(-1)
            seen = (row >= seen_from.unsqueeze(1)) & (row < seen_to.unsqueeze(1))  # [Bk, rows, R]
            # [B, H, rows, I, R]
            lo = torch.maximum(part[..., 0::2].unsqueeze(-1), run_lo)
            hi = torch.minimum(part[..., 1::2].unsqueeze(-1), run_hi).where(seen[:, None, :, None], 0)
            yield first, lo.flatten(3), hi.flatten(3)

    def _as_rows(self, sign: str) -> IntervalMask:
        """The same pairs without key bounds."""
        if self.key_bounds is None:
            return self
        parts = [_united(lo, hi, self.nk) for _, lo, hi in self._pieces()]
        if not parts:
            return IntervalMask(self.bounds.expand(self.batch, -1, -1, -1), self.nk, labels=self.labels)
        bounds, count = (torch.cat(column, 2) for column in zip(*parts, strict=True))
        _spans.check_fits(count, f"arcore.masks.IntervalMask: {sign} of masks with different key_bounds")
        return IntervalMask(bounds.to(self.device), self.nk, labels=self.labels)

    def _aligned(self, other: IntervalMask, sign: str) -> tuple[Tensor, Tensor]:
        where = f"arcore.masks.IntervalMask: {sign}"
        if self.device != other.device:
            raise ValueError(f"{where} expected masks on one device but got {self.device} and {other.device}")
        if (self.nq, self.nk) != (other.nq, other.nk):
            raise ValueError(
                f"{where} expected masks of one length but got {self.nq} x {self.nk} and {other.nq} x {other.nk}"
            )
        for name, a, b in (("batch", self.batch, other.batch), ("head", self.heads, other.heads)):
            if 1 != a != b != 1:
                raise ValueError(f"{where} expected one {name} size (or 1) but got {a} and {b}")
        return self.bounds.cpu(), other.bounds.cpu()

    def _combined(
        self, lo: Tensor, hi: Tensor, key_bounds: Tensor | None, other: IntervalMask, sign: str
    ) -> IntervalMask:
        bounds, count = _united(lo, hi, self.nk)
        _spans.check_fits(count, f"arcore.masks.IntervalMask: {sign}")
        labels = self.labels if self.labels is not None else other.labels
        return IntervalMask(bounds.to(self.device), self.nk, key_bounds=key_bounds, labels=labels)


def _united(lo: Tensor, hi: Tensor, nk: int) -> tuple[Tensor, Tensor]:
    """Bounds ``[B, H, N, 4]`` in normal form of ranges ``[B, H, N, S]``, and how many ranges each row has."""
    shape = lo.shape[:3]
    row = torch.arange(shape.numel(), device="cpu").repeat_interleave(lo.shape[3])
    lo, hi = lo.flatten().to(torch.int64), hi.flatten().to(torch.int64)
    bounds, count = _spans.unite(row, lo, hi, shape.numel(), nk)
    return bounds.view(*shape, 4), count.view(shape)


def _normal_bounds(bounds: Tensor, nk: int) -> Tensor:
    where = "arcore.masks.IntervalMask"
    given = tuple(bounds.shape)
    bounds = bounds.view(1, 1, *given) if len(given) == 2 else bounds
    if bounds.dim() != 4 or bounds.shape[3] not in (2, 4) or 0 in bounds.shape[:2]:
        raise ValueError(
            f"{where}: expected bounds of shape [Nq, 2 or 4] or [Bm, Hm, Nq, 2 or 4] but got {given}"
        )
    if bounds.shape[2] > MAX_LENGTH:
        raise ValueError(f"{where}: expected at most {MAX_LENGTH} rows but got {bounds.shape[2]}")
    lo, hi = bounds[..., 0::2], bounds[..., 1::2]
    bad = ((lo < 0) | (lo > hi) | (hi > nk)).any(-1).flatten()
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"{where}: expected key ranges [lo, hi) with 0 <= lo <= hi <= nk={nk} but "
            f"{_spans.name_row(first, *bounds.shape[:3])} has {bounds.flatten(0, 2)[first].tolist()}"
        )
    normal, _ = _united(lo, hi, nk)
    return normal if normal[..., 2:].any() else normal[..., :2].contiguous()


def _normal_key_bounds(key_bounds: Tensor, nq: int, nk: int) -> Tensor:
    where = "arcore.masks.IntervalMask"
    given = tuple(key_bounds.shape)
    key_bounds = key_bounds.unsqueeze(0) if len(given) == 2 else key_bounds
    if key_bounds.dim() != 3 or key_bounds.shape[1:] != (nk, 2) or key_bounds.shape[0] == 0:
        raise ValueError(f"{where}: expected key_bounds of shape [{nk}, 2] or [Bm, {nk}, 2] but got {given}")
    lo, hi = key_bounds.unbind(-1)
    bad = ((lo < 0) | (lo > hi) | (hi > nq)).flatten()
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"{where}: expected query ranges [lo, hi) with 0 <= lo <= hi <= nq={nq} but key {first % nk} of batch "
            f"{first // nk} has {key_bounds.flatten(0, 1)[first].tolist()}"
        )
    return torch.where((lo < hi).unsqueeze(-1), key_bounds, 0).to(torch.int32)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.device == b.device and torch.equal(a, b)


def _edge(value: Any, default: int, size: int) -> int:
    """A slice's edge, negative values counted from the end; unlike Python's slices it does not clamp."""
    if value is None:
        return default
    edge = cast(int, value.__index__())
    return edge + size if edge < 0 else edge
