"""Checkpoints hold all state of any task, and say beforehand what they cannot hold."""

from __future__ import annotations

import os
import stat

import pytest
import torch
from torch import nn

from arcore.data import load_digits
from arcore.training import Task, TrainConfig, checkpoint, fit
from arcore.training.state import overlaps

SETTINGS = {"batch_size": 8, "checkpoint_every": 3, "accelerator": "cpu", "warmup": 0, "final_lr": 1.0}


class Counter(nn.Module):
    """Counts its calls in a state that is no tensor."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * (1 + 0.001 * self.calls)

    def get_extra_state(self):
        return {"calls": self.calls, "name": "counter"}

    def set_extra_state(self, state):
        self.calls = state["calls"]


class Net(nn.Module):
    """A head that is the embedding, windows that overlap, a buffer that is one number seen many times, a counter."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(64, 16)
        self.embedding = nn.Embedding(10, 16)
        self.head = nn.Linear(16, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.counter = Counter()
        self.register_buffer("scale", torch.ones(1).expand(16))
        line = torch.arange(20.0)
        self.register_buffer("windows", line.unfold(0, 5, 1))
        self.register_buffer("part", line[3:9])

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.scale[:1].mul_(1.01)
                self.windows[0].add_(0.1)
        hidden = (
            self.counter(self.body(x.flatten(1))) * self.scale + 0.01 * self.windows[2, 0] + self.part.mean()
        )
        return self.head(hidden)


class Strange(Task):
    saved = ("model",)

    def __init__(self, config):
        super().__init__(config)
        torch.manual_seed(0)
        self.model = Net()
        self.temperature = nn.Parameter(torch.ones(()))

    def loss(self, images, labels):
        return nn.functional.cross_entropy(self.model(images) / self.temperature, labels), {}

    def meta(self):
        return {}


def run(task, out, **options):
    return fit(task, load_digits("train"), out, show_progress=False, **options)


def test_strange_state_is_resumed_bit_for_bit(tmp_path):
    whole = Strange(TrainConfig(steps=6, **SETTINGS))
    run(whole, tmp_path / "whole")
    run(Strange(TrainConfig(steps=3, **SETTINGS)), tmp_path / "parts")
    resumed = Strange(TrainConfig(steps=6, **SETTINGS))
    run(resumed, tmp_path / "parts", resume=tmp_path / "parts")
    one, other = whole.state_dict(), resumed.state_dict()
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key
    assert resumed.model.counter.calls == 6
    assert resumed.model.scale[3] != 1
    assert resumed.temperature != 1
    model = resumed.model
    assert model.head.weight is model.embedding.weight
    assert model.scale.stride() == (0,)
    assert model.part.untyped_storage().data_ptr() == model.windows.untyped_storage().data_ptr()


def test_a_finished_strange_run_is_only_loaded(tmp_path):
    first = Strange(TrainConfig(steps=2, **SETTINGS))
    run(first, tmp_path)
    again = Strange(TrainConfig(steps=2, **SETTINGS))
    result = run(again, tmp_path, resume=tmp_path)
    assert result.steps == 0
    assert torch.equal(again.model.windows, first.model.windows)
    assert again.model.counter.calls == 2


@pytest.mark.parametrize(
    ("shape", "stride", "expected"),
    [
        ((3, 4), (4, 1), False),
        ((3, 4), (1, 1), True),
        ((3,), (0,), True),
        ((1, 4), (0, 1), False),
        ((2, 2), (2, 1), False),
    ],
)
def test_overlaps(shape, stride, expected):
    assert overlaps(torch.zeros(20).as_strided(shape, stride)) is expected


def _sparse(model):
    model.register_buffer("links", torch.eye(3).to_sparse())


def _code(model):
    model.counter.get_extra_state = lambda: {"code": lambda x: x}


def _expanded(model):
    model.wide = nn.Parameter(torch.zeros(1).expand(5))


def _lazy(model):
    model.lazy = nn.LazyLinear(3)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_sparse, r"cannot hold model\.links \(it is no dense tensor"),
        (_code, r"cannot hold model\.counter\._extra_state \(its extra state"),
        (_expanded, r"parameter model\.wide cannot be trained: several of its elements"),
        (_lazy, r"cannot hold model\.lazy\.weight \(its shape is not known"),
    ],
)
def test_what_cannot_be_held_is_named_before_the_first_step(spoil, words, tmp_path):
    task = Strange(TrainConfig(steps=1, **SETTINGS))
    spoil(task.model)
    with pytest.raises(ValueError, match=words):
        run(task, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_names_that_are_no_network(tmp_path):
    task = Strange(TrainConfig(steps=1, **SETTINGS))
    task.saved = ("model", "teacher")
    with pytest.raises(ValueError, match="names 'teacher', which is no network"):
        run(task, tmp_path / "run")
    task.saved = ("model",)
    task.meta = lambda: {"device": torch.device("cpu")}
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        run(task, tmp_path / "run")


def test_files_have_the_mode_that_the_umask_asks_for(toy_task, tmp_path):
    before = os.umask(0o027)
    try:
        result = run(toy_task(TrainConfig(steps=1, ema=0.9, **SETTINGS)), tmp_path / "run")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) >= 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}
    assert stat.S_IMODE(result.checkpoint.stat().st_mode) == 0o750


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("write failed: No space left on device"),
        # What torch's writer says on a full disk.
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 212608 vs 212500"),
    ],
)
def test_a_full_disk_is_one_sentence_that_names_the_place(toy_task, tmp_path, monkeypatch, error):
    run(toy_task(TrainConfig(steps=3, **SETTINGS)), tmp_path)

    def full(*_):
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="no space is left on the disk") as caught:
        run(toy_task(TrainConfig(steps=6, **SETTINGS)), tmp_path, resume=tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert f"cannot write the checkpoint {tmp_path / 'step-00000006'}" in message
    assert f"the last checkpoint is {tmp_path / 'step-00000003'}" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "run.json", "step-00000003"]


def test_last_checkpoints_and_the_best_stay(toy_task, tmp_path):
    config = TrainConfig(**{**SETTINGS, "steps": 15, "keep_last": 2, "keep_best": True, "lr": 0.5})
    result = run(toy_task(config), tmp_path, test=load_digits("test"))
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000012", "step-00000015"]
    losses = {row["step"]: row["loss"] for row in result.history if row["split"] == "test"}
    assert sorted(losses) == [3, 6, 9, 12, 15]
    best = min(losses, key=losses.get)
    assert checkpoint.read_meta(tmp_path / "best")["step"] == best
    assert checkpoint.find(tmp_path / "best") == tmp_path / "best"


def test_patience_ends_a_run_that_learns_no_more(toy_task, tmp_path):
    config = TrainConfig(**{**SETTINGS, "steps": 300, "patience": 2, "lr": 1e-12})
    result = run(toy_task(config, dropout=0.0), tmp_path, test=load_digits("test"))
    losses = [row["loss"] for row in result.history if row["split"] == "test"]
    assert result.stopped_early
    assert result.checkpoint.name == f"step-{3 * len(losses):08}"
    assert losses.index(min(losses)) == len(losses) - 3
    with pytest.raises(ValueError, match="go by held-out data, and there are none"):
        run(toy_task(config), tmp_path / "other")


def test_the_average_is_that_of_the_weights_after_each_step(toy_task, tmp_path):
    """Against the recursion, and resumed bit for bit."""
    seen = []

    class Spy(toy_task):
        def on_train_batch_start(self, batch, batch_idx):
            super().on_train_batch_start(batch, batch_idx)
            seen.append(self.model[1].weight.detach().clone())

    settings = {**SETTINGS, "ema": 0.8, "steps": 6}
    task = Spy(TrainConfig(**settings))
    whole = run(task, tmp_path / "whole").checkpoint
    expected = seen[0].double()
    for weight in [*seen[1:], task.model[1].weight.detach()]:
        expected = 0.8 * expected + 0.2 * weight.double()
    average = checkpoint.read_weights(whole, "model.ema")
    torch.testing.assert_close(average["1.weight"].double(), expected, rtol=0, atol=1e-6)
    run(toy_task(TrainConfig(**{**settings, "steps": 3})), tmp_path / "parts")
    resumed = run(toy_task(TrainConfig(**settings)), tmp_path / "parts", resume=tmp_path / "parts").checkpoint
    again = checkpoint.read_weights(resumed, "model.ema")
    assert all(torch.equal(value, again[key]) for key, value in average.items())
    networks = {"model": toy_task(TrainConfig()).model}
    checkpoint.load_average(whole, networks)
    assert torch.equal(networks["model"][1].weight, average["1.weight"])
    without = run(toy_task(TrainConfig(**{**settings, "ema": 0.0})), tmp_path / "without").checkpoint
    with pytest.raises(ValueError, match="holds no moving average"):
        checkpoint.load_average(without, networks)
