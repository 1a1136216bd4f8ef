"""`RingCache`: a stream read in pieces against the whole sequence under a window."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from arcore import masks
from arcore.masks import IntervalMask
from arcore.nn import RingCache
from arcore.ops import block_sparse_attention, reference_block_sparse_attention

LAYERS, BATCH, HEADS, DIM = 2, 2, 2, 8


def make(window: int, room: int, sinks: int = 0) -> RingCache:
    return RingCache(
        num_layers=LAYERS, batch=BATCH, num_heads=HEADS, window=window, room=room, sinks=sinks, head_dim=DIM
    )


def stream(length: int) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(LAYERS, BATCH, 2 * HEADS, length, DIM)
    return q, torch.randn(LAYERS, BATCH, HEADS, length, DIM), torch.randn(LAYERS, BATCH, HEADS, length, DIM)


def read(cache: RingCache, q: Tensor, k: Tensor, v: Tensor, new: int, within: str = "causal") -> Tensor:
    """Attention of the next `new` tokens in all layers; they are staged, not counted in."""
    at = slice(cache.length, cache.length + new)
    mask = cache.mask(new, within)
    return torch.stack(
        [
            block_sparse_attention(q[n][:, :, at], *cache.stage(n, k[n][:, :, at], v[n][:, :, at]), mask)
            for n in range(LAYERS)
        ]
    )


@pytest.mark.parametrize(
    ("window", "room", "sinks"), [(1, 1, 0), (5, 1, 0), (5, 3, 0), (4, 7, 2), (16, 4, 3), (3, 2, 6)]
)
def test_a_stream_in_pieces_is_the_whole_sequence_under_a_window(window: int, room: int, sinks: int) -> None:
    length = 3 * (window + room) + 2 * sinks + 5
    q, k, v = stream(length)
    cache, picks = make(window, room, sinks), random.Random(window)
    bytes_before = cache.nbytes
    exact = [
        reference_block_sparse_attention(
            q[n].double(), k[n].double(), v[n].double(), masks.sliding_window(length, window, sinks)
        )
        for n in range(LAYERS)
    ]
    while cache.length < length:
        new = min(picks.randint(1, room), length - cache.length)
        at = slice(cache.length, cache.length + new)
        out = read(cache, q, k, v, new)
        for n in range(LAYERS):
            torch.testing.assert_close(out[n].double(), exact[n][:, :, at], rtol=0, atol=2e-6)
        cache.commit(new)
    assert cache.nbytes == bytes_before and cache.keys.shape[3] == sinks + window - 1 + room


def test_frames_see_themselves_whole_and_a_window_before() -> None:
    frame, frames, window, sinks = 4, 7, 12, 4
    length = frame * frames
    q, k, v = stream(length)
    rows = []
    for t in range(length):
        stop = (t // frame + 1) * frame
        rows.append((0, min(sinks, stop), max(stop - window, 0), stop))
    whole = IntervalMask(torch.tensor(rows), length)
    cache = make(window, frame, sinks)
    for f in range(frames):
        at = slice(f * frame, (f + 1) * frame)
        out = read(cache, q, k, v, frame, "full")
        for n in range(LAYERS):
            want = block_sparse_attention(q[n], k[n], v[n], whole)[:, :, at]
            torch.testing.assert_close(out[n], want, rtol=0, atol=2e-6)
        cache.commit(frame)


def test_drafts_that_are_taken_back_leave_no_trace() -> None:
    window, room, length = 6, 4, 40
    q, k, v = stream(length)
    plain, drafting, picks = make(window, room), make(window, room), random.Random(0)
    while plain.length < length - room:
        bad = torch.full_like(k, 1e3)
        read(drafting, q, bad, bad, picks.randint(1, room))  # staged and never counted in
        count = picks.randint(1, room)
        mark = drafting.length
        read(drafting, q, bad, bad, count)
        drafting.commit(count)
        drafting.truncate(mark)
        new = picks.randint(1, room)
        assert torch.equal(read(drafting, q, k, v, new), read(plain, q, k, v, new))
        kept = picks.randint(0, new)
        plain.commit(kept)
        drafting.commit(kept)


def test_every_mask_holds_the_positions_that_it_should() -> None:
    for window, room, sinks in itertools.product((1, 2, 5), (1, 2, 4), (0, 1, 3)):
        cache = make(window, room, sinks)
        held: dict[int, int] = {}  # position in each slot
        for step in range(4 * (window + room + sinks)):
            new = step % room + 1
            marks = torch.arange(cache.length, cache.length + new, dtype=torch.float32)
            tokens = marks.view(1, 1, new, 1).expand(BATCH, HEADS, new, DIM)
            mask = cache.mask(new)
            keys, _ = cache.stage(0, tokens, tokens)
            held = dict(enumerate(keys[0, 0, :, 0].long().tolist()))
            assert mask.nk == len(held) == cache.slots(new)
            for i, row in enumerate(mask.to_bool()[0, 0].tolist()):
                at = cache.length + i
                seen = {held[slot] for slot, allowed in enumerate(row) if allowed}
                assert seen == {p for p in range(at + 1) if p > at - window or p < sinks}
            cache.commit(new)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"RingCache: expected num_layers, .* window and room of at least 1"):
        make(0, 1)
    cache = make(4, 2)
    one = torch.zeros(BATCH, HEADS, 1, DIM)
    with pytest.raises(ValueError, match=r"expected up to room=2 new tokens but got 3; stage them in parts"):
        cache.mask(3)
    with pytest.raises(ValueError, match=r"expected keys and values of shape \(B=2, H=2, N, D=8\) but got"):
        cache.stage(0, one[:1], one)
    with pytest.raises(ValueError, match=r"expected a layer from 0 to 1 but got 2"):
        cache.stage(2, one, one)
    with pytest.raises(ValueError, match=r"expected within 'causal' or 'full' but got 'none'"):
        cache.mask(1, "none")
    with pytest.raises(
        ValueError, match=r"expected at most window=1 tokens that all see each other but got 2"
    ):
        make(1, 2).mask(2, "full")
    with pytest.raises(ValueError, match=r"expected a count from 0 to 0, the tokens staged, but got 1"):
        cache.commit(1)
    for _ in range(5):
        cache.stage(0, one, one)
        cache.commit(1)
    with pytest.raises(
        ValueError, match=r"expected a length from 3 to 5 but got 2; what came before has been written"
    ):
        cache.truncate(2)
    assert "window=4" in repr(cache)
