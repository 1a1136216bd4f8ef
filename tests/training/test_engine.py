from __future__ import annotations

import json

import pytest
import torch

from arcore.data import load_digits
from arcore.training import checkpoint
from arcore.training.config import TrainConfig
from arcore.training.engine import fit

SETTINGS = {
    "steps": 30,
    "checkpoint_every": 10,
    "batch_size": 16,
    "warmup": 5,
    "seed": 3,
    "accelerator": "cpu",
}


def run(task, out, **options):
    return fit(task, load_digits("train"), out, show_progress=False, **options)


def equal_states(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal_states(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal_states, left, right))
    return left == right


def figures(run) -> list[str]:
    """Rows of metrics.csv without the samples per second, which no two runs share."""
    return [row.rpartition(",")[0] for row in (run / "metrics.csv").read_text().splitlines()]


def test_training_learns_and_logs(toy_task, tmp_path):
    task = toy_task(TrainConfig(**SETTINGS | {"steps": 150, "lr": 3e-3}))
    result = run(task, tmp_path / "run", test=load_digits("test"))
    train = [row for row in result.history if row["split"] == "train"]
    test = [row for row in result.history if row["split"] == "test"]
    assert [row["step"] for row in train] == list(range(10, 151, 10))
    assert [row["step"] for row in test] == list(range(10, 151, 10))
    assert train[-1]["loss"] < 0.7 * train[0]["loss"]
    assert test[-1]["accuracy"] > 0.7
    assert (
        (tmp_path / "run" / "metrics.csv")
        .read_text()
        .startswith("step,split,loss,accuracy,lr,grad_norm,samples_per_second\n")
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_run_ends_bitwise_where_the_uninterrupted_one_does(toy_task, tmp_path, accumulate):
    settings = SETTINGS | {"accumulate": accumulate}
    straight = run(toy_task(TrainConfig(**settings)), tmp_path / "straight")

    with pytest.raises(RuntimeError, match="power cut"):
        run(toy_task(TrainConfig(**settings), fail_at=17), tmp_path / "cut")
    assert checkpoint.find(tmp_path / "cut").name == "step-00000010"
    resumed = run(toy_task(TrainConfig(**settings)), tmp_path / "cut", resume=tmp_path / "cut")

    weights = [checkpoint.read_weights(result.checkpoint, "model") for result in (straight, resumed)]
    assert equal_states(*weights)
    optimizers = [checkpoint.read_optimizer(result.checkpoint) for result in (straight, resumed)]
    assert equal_states(*(state["optimizer_states"] for state in optimizers))
    tables = [figures(tmp_path / name) for name in ("straight", "cut")]
    assert tables[0] == tables[1]

    other = run(toy_task(TrainConfig(**settings | {"seed": 4})), tmp_path / "other")
    assert not equal_states(weights[0], checkpoint.read_weights(other.checkpoint, "model"))


def test_resuming_a_finished_run_only_loads_it(toy_task, tmp_path):
    first = toy_task(TrainConfig(**SETTINGS))
    run(first, tmp_path)
    again = toy_task(TrainConfig(**SETTINGS | {"seed": 9}))
    result = run(again, tmp_path, resume=tmp_path)
    assert result.checkpoint.name == "step-00000030"
    assert equal_states(dict(first.model.state_dict()), dict(again.model.state_dict()))


def test_accumulated_small_batches_equal_one_large_batch(toy_task, tmp_path):
    weights = []
    for batch_size, accumulate in ((32, 1), (8, 4)):
        task = toy_task(
            TrainConfig(**SETTINGS | {"batch_size": batch_size, "accumulate": accumulate}), dropout=0.0
        )
        result = run(task, tmp_path / str(accumulate))
        weights.append(checkpoint.read_weights(result.checkpoint, "model"))
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=0, atol=2e-5)


def test_bf16_trains_with_fp32_weights(toy_task, tmp_path):
    seen = []

    class Spy(toy_task):
        def loss(self, images, labels):
            seen.append(self.model(images).dtype)
            return super().loss(images, labels)

    task = Spy(TrainConfig(**SETTINGS | {"steps": 60, "lr": 3e-3, "precision": "bf16-mixed"}))
    result = run(task, tmp_path)
    assert set(seen) == {torch.bfloat16}
    assert {value.dtype for value in checkpoint.read_weights(result.checkpoint, "model").values()} == {
        torch.float32
    }
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_training_leaves_the_callers_random_state_alone(toy_task, tmp_path):
    task = toy_task(TrainConfig(**SETTINGS | {"steps": 2}))
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    run(task, tmp_path)
    assert torch.equal(torch.rand(1), expected)


def test_only_the_newest_checkpoint_stays_and_nothing_half_written(toy_task, tmp_path):
    run(toy_task(TrainConfig(**SETTINGS)), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "run.json", "step-00000030"]
    assert sorted(path.name for path in (tmp_path / "step-00000030").iterdir()) == [
        "config.json",
        "model.safetensors",
        "optimizer.pt",
    ]
    assert json.loads((tmp_path / "step-00000030" / "config.json").read_text())["step"] == 30


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "config.json"])
@pytest.mark.parametrize("damage", ["truncate", "garble", "remove"])
def test_damaged_checkpoint_gives_one_clear_error(toy_task, tmp_path, name, damage):
    result = run(toy_task(TrainConfig(**SETTINGS | {"steps": 2})), tmp_path)
    path = result.checkpoint / name
    content = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "garble":
        path.write_bytes(b"\xff" * len(content))
    else:
        path.unlink()
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        run(toy_task(TrainConfig(**SETTINGS)), tmp_path, resume=tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_missing_checkpoint(toy_task, tmp_path):
    with pytest.raises(FileNotFoundError, match="gone does not exist"):
        run(toy_task(TrainConfig(**SETTINGS)), tmp_path, resume=tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no checkpoint"):
        run(toy_task(TrainConfig(**SETTINGS)), tmp_path, resume=tmp_path / "empty")


def test_checkpoint_of_another_model(toy_task, tmp_path):
    run(toy_task(TrainConfig(**SETTINGS | {"steps": 2})), tmp_path)

    class Wider(toy_task):
        def __init__(self, config):
            super().__init__(config)
            self.model[1] = torch.nn.Linear(64, 48)
            self.model[4] = torch.nn.Linear(48, 10)

    with pytest.raises(ValueError, match="belongs to another model") as caught:
        run(Wider(TrainConfig(**SETTINGS)), tmp_path, resume=tmp_path)
    assert "\n" not in str(caught.value)
