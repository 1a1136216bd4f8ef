from __future__ import annotations

import itertools

import pytest

from arcore.training.config import TrainConfig
from arcore.training.stream import StreamSampler, derive_seed


def batches(num_images=10, batch_size=4, start=0, stop=20, seed=0, **options):
    return list(StreamSampler(num_images, batch_size, start=start, stop=stop, seed=seed, **options))


def test_every_epoch_visits_each_image_once():
    stream = list(itertools.chain.from_iterable(batches(num_images=10, batch_size=4, stop=20)))
    epochs = [stream[start : start + 10] for start in range(0, 80, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8, "each epoch has its own order"


def test_a_later_start_gives_the_same_later_batches():
    assert batches(start=7) == batches()[7:]


def test_order_depends_on_the_seed():
    assert batches(seed=0) == batches(seed=0)
    assert batches(seed=0) != batches(seed=1)


def test_small_batches_joined_are_the_large_batch():
    small, large = batches(batch_size=3, stop=20), batches(batch_size=6, stop=10)
    assert [a + b for a, b in zip(small[::2], small[1::2], strict=True)] == large


def test_ranks_share_the_stream_of_one_device():
    ranks = [batches(batch_size=3, stop=5, rank=rank, world_size=2) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == batches(batch_size=6, stop=5)


def test_dataset_smaller_than_a_batch():
    assert sorted(batches(num_images=2, batch_size=4, stop=1)[0]) == [0, 0, 1, 1]


def test_empty_dataset():
    with pytest.raises(ValueError, match="no images"):
        batches(num_images=0)


def test_derived_seeds_differ_by_key_and_fit_a_generator():
    seeds = {derive_seed(0, "step", step) for step in range(1000)} | {
        derive_seed(1, "step", 0),
        derive_seed(0, "x", 0),
    }
    assert len(seeds) == 1002
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_learning_rate_warms_up_and_decays():
    config = TrainConfig(steps=100, warmup=9, final_lr=0.1)
    factors = [config.lr_factor(step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == pytest.approx(1)
    assert factors[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(factors[9:]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", -1),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("devices", "two"),
        ("final_lr", 2.0),
        ("seed", -1),
    ],
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} must"):
        TrainConfig(**{field: value})
