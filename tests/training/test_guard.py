"""A run whose numbers are no longer finite stops, says where, and leaves the last good checkpoint."""

from __future__ import annotations

import math

import pytest
import torch

from arcore.data import InMemoryImages, load_digits
from arcore.training import TrainConfig, checkpoint, fit
from arcore.training.guard import Diverged

SETTINGS = {"steps": 30, "batch_size": 8, "checkpoint_every": 10, "accelerator": "cpu"}


def spoiled(toy_task, step, spoil, **settings):
    class Spoiled(toy_task):
        def loss(self, images, labels):
            loss, figures = super().loss(images, labels)
            return (spoil(self, loss) if self.training and self.step == step else loss), figures

    return Spoiled(TrainConfig(**SETTINGS | settings))


class _InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.inf


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda task, loss: loss * math.nan, "step 13: the loss is nan"),
        (lambda task, loss: loss * math.inf, "step 13: the loss is inf"),
        (lambda task, loss: _InfiniteGradient.apply(loss), "step 13: the gradient is (inf|nan)"),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_bad_number_stops_the_run_before_the_weights_take_it(toy_task, tmp_path, spoil, words, accumulate):
    task = spoiled(toy_task, 12, spoil, accumulate=accumulate)
    with pytest.raises(Diverged, match=words) as caught:
        fit(task, load_digits("train"), tmp_path, show_progress=False)
    assert str(tmp_path / "step-00000010") in str(caught.value)
    assert "smaller lr than 0.001" in str(caught.value)
    kept = checkpoint.find(tmp_path)
    assert kept.name == "step-00000010"
    assert all(value.isfinite().all() for value in checkpoint.read_weights(kept, "model").values())
    assert all(value.isfinite().all() for value in task.model.state_dict().values())


def test_a_loss_far_above_its_beginning_is_no_finished_run(toy_task, tmp_path):
    with pytest.raises(Diverged, match=r"step \d+: .*no checkpoint was written before"):
        fit(
            toy_task(TrainConfig(**SETTINGS | {"lr": 1e6, "weight_decay": 0.0, "warmup": 0})),
            load_digits("train"),
            tmp_path,
            show_progress=False,
        )
    assert not list(tmp_path.glob("step-*"))


def test_a_weight_that_overflows_in_the_last_step_is_not_saved(toy_task, tmp_path):
    class Jump(toy_task):
        def optimizer_step(self, *args, **options):
            super().optimizer_step(*args, **options)
            if self.step == self.config.steps - 1:  # it is counted after this hook
                self.model[1].weight.data[0, 0] = math.inf

    with pytest.raises(Diverged, match=r"step 20: weights are no longer finite \(model\."):
        fit(
            Jump(TrainConfig(**SETTINGS | {"steps": 20})), load_digits("train"), tmp_path, show_progress=False
        )
    assert checkpoint.find(tmp_path).name == "step-00000010"


def test_held_out_data_with_a_bad_value_are_noticed(toy_task, tmp_path):
    digits = load_digits("test")
    images = digits.images.clone()
    images[3] = math.nan
    test = InMemoryImages(images, digits.labels, digits.class_names)
    with pytest.raises(Diverged, match="step 10: the held-out loss is nan"):
        fit(toy_task(TrainConfig(**SETTINGS)), load_digits("train"), tmp_path, test=test, show_progress=False)


def test_a_learning_rate_out_of_all_bounds_fails_on_the_command_line(tmp_path, capsys):
    from arcore.cli import main

    words = [
        "train",
        "msvq_tiny",
        "--lr",
        "1e6",
        "--steps",
        "40",
        "--batch-size",
        "8",
        "--accelerator",
        "cpu",
    ]
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert "Try a smaller lr than 1e+06" in err
    assert "Traceback" not in err
    assert "go on from" not in err, "the same run would fail again"
