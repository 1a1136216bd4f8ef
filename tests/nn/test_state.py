"""The constant-size cache of state-space layers."""

from __future__ import annotations

import pytest
import torch

from arcore.nn import StateCache


def filled(batch: int = 3) -> StateCache:
    cache = StateCache(num_layers=2, batch=batch, conv_shape=(6, 3), state_shape=(6, 4))
    cache.conv.copy_(torch.randn(cache.conv.shape))
    cache.ssm.copy_(torch.randn(cache.ssm.shape))
    cache.advance(5)
    return cache


def test_starts_empty_with_float32_states():
    cache = StateCache(num_layers=2, batch=3, conv_shape=(6, 3), state_shape=(2, 3, 4), dtype=torch.bfloat16)
    assert cache.conv.shape == (2, 3, 6, 3)
    assert cache.ssm.shape == (2, 3, 2, 3, 4)
    assert (cache.conv.dtype, cache.ssm.dtype) == (torch.bfloat16, torch.float32)
    assert not cache.conv.any()
    assert not cache.ssm.any()
    assert (cache.batch, cache.length) == (3, 0)
    assert "batch=3, conv_shape=(6, 3), state_shape=(2, 3, 4), length=0" in repr(cache)


def test_layers_are_views():
    cache = filled()
    conv, state = cache.layer(1)
    conv.zero_()
    state.fill_(2.0)
    assert not cache.conv[1].any()
    assert cache.conv[0].any()
    assert (cache.ssm[1] == 2.0).all()


def test_snapshot_and_restore():
    cache = filled()
    conv, ssm = cache.conv.clone(), cache.ssm.clone()
    snapshot = cache.snapshot()
    for layer in range(2):
        for part in cache.layer(layer):
            part.add_(1.0)
    cache.advance(4)
    cache.restore(snapshot)
    assert torch.equal(cache.conv, conv)
    assert torch.equal(cache.ssm, ssm)
    assert cache.length == 5
    # The snapshot is a copy: it can be gone back to again.
    cache.layer(0)[1].zero_()
    cache.restore(snapshot)
    assert torch.equal(cache.ssm, ssm)
    with pytest.raises(ValueError, match="expected a snapshot of StateCache"):
        filled(batch=2).restore(snapshot)


def test_select_reorders_repeats_and_drops_rows():
    cache = filled()
    conv, ssm = cache.conv.clone(), cache.ssm.clone()
    cache.select([2, 0, 0, 2])
    assert cache.batch == 4
    assert torch.equal(cache.conv, conv[:, [2, 0, 0, 2]])
    assert torch.equal(cache.ssm, ssm[:, [2, 0, 0, 2]])
    cache.layer(0)[1].zero_()
    assert not cache.ssm[0].any()
    cache.select(torch.tensor([], dtype=torch.int64))
    assert cache.batch == 0


def test_sizes_out_of_range():
    with pytest.raises(
        ValueError, match="expected at least one layer and no negative size but got num_layers=0"
    ):
        StateCache(num_layers=0, batch=1, conv_shape=(1, 1), state_shape=(1, 1))


def test_staged_tokens_are_counted_in_per_row():
    cache = filled()
    conv, ssm, batch = cache.conv.clone(), cache.ssm.clone(), cache.batch
    with pytest.raises(ValueError, match="expected a count from 0 to 0, the tokens staged"):
        cache.commit(1)
    cache.stage(2)
    for layer in range(cache.conv.shape[0]):
        for entries, trail in zip(cache.layer(layer), cache.trail(layer), strict=True):
            for k in range(3):
                trail[:, k] = entries + k
            entries.add_(2)
    cache.rewind()
    assert torch.equal(cache.conv, conv)
    length, counts = cache.length, [k % 3 for k in range(batch)]
    with pytest.raises(ValueError, match="expected a count from 0 to 2"):
        cache.commit(3)
    cache.commit(torch.tensor(counts))
    for row, count in enumerate(counts):
        assert torch.equal(cache.conv[:, row], conv[:, row] + count)
        assert torch.equal(cache.ssm[:, row], ssm[:, row] + count)
    assert cache.lengths == tuple(length + count for count in counts)
    cache.truncate([length] * batch)
    assert torch.equal(cache.conv, conv)
    with pytest.raises(ValueError, match="a state that was passed is only kept in a snapshot"):
        cache.truncate(length - 1)
    cache.advance(1)
    assert cache.trail(0) == (None, None)
    cache.stage(1)
    with pytest.raises(ValueError, match="follow one chain of drafts, not a tree"):
        cache.keep([[1]] * batch)
