"""The preallocated cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import arcore
from arcore.nn import Cache, KVCache
from arcore.nn.cache import storage_dtype

SIZES = {"num_layers": 2, "batch": 3, "num_heads": 2, "max_length": 10, "head_dim": 8}


def tokens(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 2, count, 8), torch.randn(3, 2, count, 8)


def test_appended_tokens_come_back_as_views():
    cache, parts = KVCache(**SIZES), [tokens(n) for n in (1, 4, 5)]
    for layer in (0, 1):
        for i, (k, v) in enumerate(parts):
            keys, values = cache.append(layer, k, v)
            assert torch.equal(keys, torch.cat([k for k, _ in parts[: i + 1]], dim=2))
            assert torch.equal(values, torch.cat([v for _, v in parts[: i + 1]], dim=2))
            assert keys.data_ptr() == cache.keys[layer].data_ptr()
            assert values.data_ptr() == cache.values[layer].data_ptr()
    assert cache.length == cache.max_length == 10


def test_a_device_without_autocast_keeps_the_own_type():
    """On meta, where the memory of a cache is counted without taking it."""
    assert storage_dtype(torch.empty(1, device="meta")) is torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert storage_dtype(torch.empty(1)) is torch.bfloat16
        assert storage_dtype(torch.empty(1, dtype=torch.float64)) is torch.float64
        assert storage_dtype(torch.empty(1, device="meta")) is torch.float32


def test_length_counts_what_all_layers_hold():
    cache = KVCache(**SIZES)
    assert cache.length == 0
    cache.append(0, *tokens(4))
    assert cache.length == 0
    cache.append(1, *tokens(4))
    assert cache.length == 4
    assert repr(cache) == "KVCache(num_layers=2, batch=3, num_heads=2, head_dim=8, length=4/10)"


def test_truncated_tokens_are_overwritten_in_place():
    cache, (first, second, other) = KVCache(**SIZES), [tokens(n) for n in (2, 3, 4)]
    for layer in (0, 1):
        cache.append(layer, *first)
        cache.append(layer, *second)
    cache.truncate(2)
    assert cache.length == 2
    keys, values = cache.append(1, *other)
    assert torch.equal(keys, torch.cat([first[0], other[0]], dim=2))
    assert torch.equal(values, torch.cat([first[1], other[1]], dim=2))
    cache.truncate(0)
    assert torch.equal(cache.append(0, *other)[0], other[0])


def test_storage_has_one_dtype_and_takes_any_strides():
    cache = KVCache(**SIZES, dtype=torch.bfloat16)
    k = torch.randn(3, 4, 2, 8).transpose(1, 2)
    keys, _ = cache.append(0, k, k)
    assert keys.dtype == torch.bfloat16
    assert torch.equal(keys, k.bfloat16())


def test_errors():
    cache = KVCache(**SIZES)
    with pytest.raises(ValueError, match=r"shape \(B=3, H=2, N, D=8\) but got \(2, 2, 1, 8\)"):
        cache.append(0, torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 1, 8))
    with pytest.raises(ValueError, match=r"but got \(3, 2, 1, 8\) and \(3, 2, 2, 8\)"):
        cache.append(0, torch.zeros(3, 2, 1, 8), torch.zeros(3, 2, 2, 8))
    with pytest.raises(ValueError, match=r"but got \(3, 2, 8\)"):
        cache.append(0, torch.zeros(3, 2, 8), torch.zeros(3, 2, 8))
    cache.append(0, *tokens(8))
    with pytest.raises(ValueError, match="8 tokens are stored and 3 more do not fit into max_length=10"):
        cache.append(0, *tokens(3))
    with pytest.raises(ValueError, match="length from 0 to 0, the tokens stored, but got 1"):
        cache.truncate(1)
    with pytest.raises(ValueError, match="got -1"):
        cache.truncate(-1)
    with pytest.raises(ValueError, match="num_layers=0"):
        KVCache(**SIZES | {"num_layers": 0})


def fill(cache: KVCache, tokens: int, value: float, keep: bool = True) -> Tensor:
    """Write `tokens` tokens into all layers; the last layer's keys as the cache hands them out."""
    for layer in range(2):
        new = torch.full((1, 2, tokens, 8), value)
        keys, _ = cache.append(layer, new, new) if keep else cache.stage(layer, new, new)
    return keys[0, 0, :, 0]


def test_staged_tokens_are_seen_but_not_kept():
    cache = KVCache(num_layers=2, batch=1, num_heads=2, max_length=4, head_dim=8)
    fill(cache, 2, 1.0)
    assert fill(cache, 2, 2.0, keep=False).tolist() == [1, 1, 2, 2]
    assert cache.length == 2
    assert fill(cache, 1, 3.0, keep=False).tolist() == [1, 1, 3]
    assert fill(cache, 2, 4.0).tolist() == [1, 1, 4, 4]
    with pytest.raises(ValueError, match="do not fit into max_length=4"):
        fill(cache, 1, 5.0, keep=False)


def test_snapshot_and_restore():
    cache = KVCache(num_layers=2, batch=1, num_heads=2, max_length=8, head_dim=8)
    fill(cache, 2, 1.0)
    mark = cache.snapshot()
    fill(cache, 3, 2.0)
    # In the middle of a pass layers differ in length.
    new = torch.zeros(1, 2, 1, 8)
    cache.append(0, new, new)
    cache.restore(mark)
    assert cache.length == 2
    assert fill(cache, 1, 3.0).tolist() == [1, 1, 3]
    cache.restore(mark)
    cache.truncate(1)
    fill(cache, 1, 4.0)
    with pytest.raises(ValueError, match="older than a cut below"):
        cache.restore(mark)
    other = KVCache(num_layers=2, batch=1, num_heads=2, max_length=8, head_dim=8)
    with pytest.raises(ValueError, match="of another cache"):
        other.restore(cache.snapshot())


def test_select_takes_rows():
    cache = KVCache(num_layers=1, batch=3, num_heads=1, max_length=2, head_dim=8)
    rows = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 1, 8)
    cache.append(0, rows, rows)
    mark = cache.snapshot()
    cache.select([2, 2, 0, 1])
    assert (cache.batch, cache.length) == (4, 1)
    assert cache.keys[0, :, 0, 0, 0].tolist() == [2, 2, 0, 1]
    with pytest.raises(ValueError, match="snapshot"):
        cache.restore(mark)


def test_all_caches_are_of_one_family():
    models = [arcore.create_model(name) for name in ("var_tiny", "acdit_tiny", "dit_tiny")]
    caches = [model.make_cache(2) for model in models]
    caches.append(arcore.create_model("mamba_tiny").make_cache(2, 5))
    for cache in caches:
        assert isinstance(cache, Cache), type(cache)
        assert (cache.batch, cache.length) == (2, 0)


def test_absent_layers_take_no_memory():
    sizes = {"batch": 1, "num_heads": 2, "max_length": 4, "head_dim": 8}
    cache = KVCache(num_layers=4, absent=[0, 2], **sizes)
    full = KVCache(num_layers=4, **sizes)
    assert cache.nbytes * 2 == full.nbytes
    new = torch.randn(1, 2, 3, 8)
    for layer in (1, 3):
        keys, values = cache.append(layer, new + layer, new - layer)
        assert torch.equal(keys, new + layer) and torch.equal(values, new - layer)
    assert cache.length == 3
    cache.truncate(1)
    assert torch.equal(
        cache.append(3, new[:, :, :1], new[:, :, :1])[0], torch.cat([(new + 3)[:, :, :1], new[:, :, :1]], 2)
    )
    with pytest.raises(ValueError, match=r"layer 2 has no keys and values; those that have are \[1, 3\]"):
        cache.append(2, new, new)
    for absent in ([0, 1], [2]):
        with pytest.raises(ValueError, match=r"expected absent to name some of the layers 0 to 1, not all"):
            KVCache(num_layers=2, absent=absent, **sizes)
