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


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("steps", 2.5, "steps must be a whole number but got 2.5"),
        ("steps", "3", "steps must be a whole number but got '3'"),
        ("batch_size", True, "batch_size must be a whole number but got True"),
        ("lr", "1e-3", "lr must be a number but got '1e-3'"),
        ("lr", True, "lr must be a number but got True"),
        ("betas", 5, r"betas must be two numbers such as \(0.9, 0.95\) but got 5"),
        ("betas", (0.9,), "betas must be two numbers"),
        ("keep_best", 1, "keep_best must be True or False but got 1"),
        ("precision", 32, "precision must be a name but got 32"),
        ("devices", 2.0, "devices must be 'auto' or a number of devices but got 2.0"),
        ("devices", True, "devices must be 'auto' or a number of devices but got True"),
        ("epochs", "2", "epochs must be a number"),
        ("logger", ["csv"], "logger must be a text such as"),
    ],
)
def test_settings_of_the_wrong_kind_are_named(field, value, words):
    with pytest.raises(TypeError, match=words):
        TrainConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("betas", (2, 3), "betas must"),
        ("betas", (0.9, 1.0), "betas must lie in"),
        ("ema", 1.0, "ema must be below 1"),
        ("lr", float("inf"), "lr must be"),
        ("schedule", "linear", "schedule must be one of cosine, constant, wsd"),
        ("logger", "mlflow", "logger must be one of csv, tensorboard, wandb"),
        ("logger", "csv,mlflow", "or several separated by commas, but got 'csv,mlflow'"),
        ("logger", "csv,", "logger must be one of"),
        ("epochs", 0, "epochs must be above 0"),
        ("devices", 0, "devices must be 'auto' or a number"),
    ],
)
def test_values_out_of_range(field, value, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**{field: value})


def test_a_number_of_devices_is_taken():
    assert TrainConfig(devices=1) == TrainConfig(devices="1")
    assert TrainConfig(betas=[0.8, 0.9]).betas == (0.8, 0.9)


def test_other_courses_of_the_learning_rate():
    constant = [TrainConfig(steps=100, warmup=4, schedule="constant").lr_factor(step) for step in range(100)]
    assert constant[4:] == [1.0] * 96
    assert constant[0] == pytest.approx(0.2)
    wsd = TrainConfig(steps=100, warmup=4, schedule="wsd", final_lr=0.1)
    factors = [wsd.lr_factor(step) for step in range(100)]
    assert factors[4:80] == [1.0] * 76
    assert factors[-1] == pytest.approx(0.1)
    falls = [a - b for a, b in itertools.pairwise(factors[79:])]
    assert falls == pytest.approx([0.9 / 20] * 20)


def test_places_go_with_the_items():
    plain = batches(num_images=7, batch_size=3, stop=6)
    pairs = batches(num_images=7, batch_size=3, stop=6, places=True)
    assert [[item for item, _ in batch] for batch in pairs] == plain
    assert [place for batch in pairs for _, place in batch] == list(range(18))
