"""Pretraining an encoder and the classifier that starts from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from arcore.data import load_digits
from arcore.models import RoMAClassifier, create_model, load_checkpoint
from arcore.objectives import next_cluster_loss
from arcore.recipes.classifier import RECIPE as CLASSIFIER
from arcore.recipes.classifier import ClassifierTask
from arcore.recipes.next_cluster import NextClusterTask
from arcore.training import TrainConfig, train

SETTINGS = {"steps": 4, "batch_size": 32, "checkpoint_every": 2, "accelerator": "cpu"}


def run(preset, out, **options):
    return train(preset, out=out, show_progress=False, **{"settings": SETTINGS, **options})


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return run("roma_tiny", tmp_path_factory.mktemp("encoder") / "run").checkpoint


def test_training_rotates_and_evaluation_does_not(monkeypatch):
    model = create_model("roma_tiny")
    task = NextClusterTask(TrainConfig(), {"model": model}, {})
    images = load_digits("test", image_size=48).images[:3]
    seen = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args: (seen.append(args), forward(*args))[1])
    torch.manual_seed(3)
    loss, figures = task.loss(images, torch.zeros(3))
    [(rotated, windows)] = seen
    assert not torch.equal(rotated, images)
    assert windows.shape == (3, 3)
    assert set(windows[:, 2].tolist()) <= {6, 4, 2}
    expected = next_cluster_loss(forward(rotated, windows), images, patch_size=4)
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(figures["patches"], expected.patches)
    task.eval()
    task.loss(images, torch.zeros(3))
    assert torch.equal(seen[-1][0], images)
    assert seen[-1][1] is None


def test_a_resumed_encoder_ends_with_the_same_weights(encoder, tmp_path):
    run("roma_tiny", tmp_path / "run", settings=SETTINGS | {"steps": 2, "warmup": 0, "final_lr": 1.0})
    resumed = run("roma_tiny", tmp_path / "run", resume=tmp_path / "run", settings={"steps": 4}).checkpoint
    whole = run(
        "roma_tiny", tmp_path / "whole", settings=SETTINGS | {"warmup": 0, "final_lr": 1.0}
    ).checkpoint
    first, second = (load_checkpoint(path)[0]["model"].state_dict() for path in (resumed, whole))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert not torch.equal(first["ar_token"], load_checkpoint(encoder)[0]["model"].state_dict()["ar_token"])


def test_a_classifier_starts_from_a_run(encoder, tmp_path):
    out = run(
        "roma_classifier_tiny", tmp_path / "run", pretrained=encoder.parent, settings=SETTINGS | {"lr": 1e-9}
    )
    model = load_checkpoint(out.checkpoint)[0]["model"]
    assert model.config.num_classes == 10
    expected = RoMAClassifier(model.config)
    expected.start_from(load_checkpoint(encoder)[0]["model"])
    for name in ("pos_embed", "layers.3.mixer.directions.2.x_proj.weight", "layers.5.mlp.w1.weight"):
        torch.testing.assert_close(model.state_dict()[name], expected.state_dict()[name], rtol=0, atol=1e-6)


def test_classifier_loss_is_cross_entropy():
    model = create_model("roma_classifier_tiny").eval()
    task = ClassifierTask(TrainConfig(), {"model": model}, {})
    images, labels = load_digits("test", image_size=48).images[:4], torch.tensor([0, 3, 9, 1])
    with torch.no_grad():
        loss, figures = task.loss(images, labels)
        logits = model(images).log_softmax(-1)
    torch.testing.assert_close(loss, -logits[torch.arange(4), labels].mean())
    torch.testing.assert_close(figures["accuracy"], (logits.argmax(-1) == labels).float().mean())
    assert CLASSIFIER.overrides(load_digits("test")) == {"num_classes": 10}


def test_what_does_not_start_from_what(encoder, tmp_path):
    with pytest.raises(ValueError, match="the options of roma_tiny have no 'pretrained'"):
        run("roma_tiny", tmp_path / "a", pretrained=encoder)
    with pytest.raises(ValueError, match="the options of roma_tiny have no 'tokenizer'"):
        run("roma_tiny", tmp_path / "b", tokenizer=encoder)
    tokenizer = run("msvq_tiny", tmp_path / "c").checkpoint
    with pytest.raises(ValueError, match="holds no pretrained encoder such as roma_tiny but tokenizer"):
        run("roma_classifier_tiny", tmp_path / "d", pretrained=tokenizer)
