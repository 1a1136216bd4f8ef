"""Training diffusion models."""

from __future__ import annotations

import pytest
import torch

from arcore.data import load_digits, load_moving_digits
from arcore.models import create_model, load_checkpoint
from arcore.objectives import fused_snr_weights, min_snr_weights
from arcore.recipes.block_diffusion import BlockDiffusionTask
from arcore.recipes.diffusion import DiffusionTask
from arcore.recipes.frame_diffusion import FrameDiffusionTask
from arcore.recipes.masked_autoregressive import MaskedAutoregressiveTask
from arcore.training import TrainConfig, train

SETTINGS = {"steps": 4, "batch_size": 32, "checkpoint_every": 2, "accelerator": "cpu"}


def run(preset, out, **options):
    return train(preset, out=out, show_progress=False, **{"settings": SETTINGS, **options})


@pytest.mark.parametrize(
    ("kind", "preset"),
    [
        (DiffusionTask, "dit_tiny"),
        (BlockDiffusionTask, "acdit_tiny"),
        (MaskedAutoregressiveTask, "mar_tiny"),
    ],
)
def test_evaluation_draws_the_same_noise_and_training_does_not(kind, preset):
    task = kind(TrainConfig(), {"model": create_model(preset)}, {})
    images, labels = load_digits("test").images[:4], torch.arange(4)
    losses = [task.loss(images, labels)[0].item() for _ in range(2)]
    assert losses[0] != losses[1]
    task.eval()
    losses = [task.loss(images, labels)[0].item() for _ in range(2)]
    assert losses[0] == losses[1]
    # At first the prediction is zero.
    assert losses[0] == pytest.approx(1, abs=0.25)


def test_frames_are_trained_at_the_times_of_their_model():
    """The error of clean frames, at times that never fall; at first the prediction is zero."""
    model = create_model("ar_diffusion_tiny")
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    task = FrameDiffusionTask(TrainConfig(), {"model": model}, {})
    videos, labels = load_moving_digits("test").images[:4], torch.arange(4)
    loss, _ = task.loss(videos, labels)
    torch.testing.assert_close(loss, videos.square().mean())
    task.eval()
    task.loss(videos, labels)
    task.loss(videos, labels)
    (_, first, _), (x, t, classes), (again, same, _) = seen
    assert torch.equal(t, same)
    assert torch.equal(x, again)
    assert not torch.equal(t, first)
    assert torch.equal(classes, labels)
    assert t.shape == (4, 8)
    assert (t.diff(dim=1) >= 0).all()
    alpha, sigma = model.schedule.alpha_sigma(t)
    noise = (x - alpha[..., None, None] * model.to_frames(videos)) / sigma[..., None, None]
    assert noise.std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kind", ["fused", "min_snr", "uniform"])
def test_errors_of_frames_are_weighed(kind):
    """At times of their own, by a rule of the config; a stack of frames forgets as fast as its frames."""
    model = create_model("diffusion_forcing_tiny", loss_weight=kind, frame_stack=2, snr_decay=0.9).eval()
    seen = []
    model.register_forward_hook(lambda _, inputs, out: seen.append((inputs[1], out)))
    task = FrameDiffusionTask(TrainConfig(), {"model": model}, {}).eval()
    videos = load_moving_digits("test").images[:4]
    loss, figures = task.loss(videos, torch.arange(4))
    [(t, out)] = seen
    assert t.shape == (4, 4)
    assert (t.diff(dim=1) < 0).any()
    assert (t.diff(dim=1) > 0).any()
    errors = (out - model.to_frames(videos)).square().mean(dim=2)
    weights = {
        "fused": fused_snr_weights(t, model.schedule, prediction="x0", decay=0.81),
        "min_snr": min_snr_weights(t, model.schedule, prediction="x0"),
        "uniform": torch.ones(4, 4),
    }
    torch.testing.assert_close(loss, (weights[kind] * errors).mean())
    if kind == "uniform":
        assert figures == {}
    else:
        torch.testing.assert_close(figures["mse"], errors.mean().detach())


def test_a_learned_variance_is_trained_by_its_bound():
    model = create_model("dit_tiny", learn_sigma=True)
    task = DiffusionTask(TrainConfig(), {"model": model}, {})
    loss, figures = task.loss(load_digits("test").images[:4], torch.arange(4))
    torch.testing.assert_close(figures["mse"] + figures["bound"], loss.detach())
    loss.backward()
    p, c = model.config.patch_size, model.config.in_channels
    by_channel = model.head.linear.bias.grad.view(p * p, 2 * c)
    assert by_channel.ne(0).all()


def test_a_head_with_a_learned_variance_is_trained_by_its_bound():
    model = create_model("mar_tiny", learn_variance=True, prediction="eps")
    task = MaskedAutoregressiveTask(TrainConfig(), {"model": model}, {})
    loss, figures = task.loss(load_digits("test").images[:4], torch.arange(4))
    torch.testing.assert_close(figures["mse"] + figures["bound"], loss.detach())
    loss.backward()
    assert model.head.out.bias.grad.ne(0).all()


def test_block_size_and_resume(tmp_path):
    first = run(
        "acdit_tiny",
        tmp_path / "run",
        settings=SETTINGS | {"steps": 2, "warmup": 0, "final_lr": 1.0},
        block_size=1,
    )
    assert load_checkpoint(first.checkpoint)[0]["model"].num_blocks == 16
    with pytest.raises(ValueError, match="block_size=1, which cannot become 4 on resume"):
        run(
            "acdit_tiny",
            tmp_path / "run",
            resume=tmp_path / "run",
            settings={"steps": 4},
            block_size=4,
        )
    resumed = run("acdit_tiny", tmp_path / "run", resume=tmp_path / "run", settings={"steps": 4})
    whole = run(
        "acdit_tiny",
        tmp_path / "whole",
        settings=SETTINGS | {"warmup": 0, "final_lr": 1.0},
        block_size=1,
    )
    one, other = (load_checkpoint(out.checkpoint)[0]["model"].state_dict() for out in (resumed, whole))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize("preset", ["acdit_video_tiny", "ar_diffusion_tiny", "diffusion_forcing_tiny"])
def test_models_of_videos_take_moving_digits(tmp_path, preset):
    out = run(preset, tmp_path / "run", settings=SETTINGS | {"steps": 1})
    _, meta = load_checkpoint(out.checkpoint)
    assert meta["data"] == "moving_digits"
    with pytest.raises(ValueError, match="use moving_digits"):
        run(preset, tmp_path / "other", data="digits")


def test_models_of_an_encoder_cannot_be_trained_on_pixels(tmp_path):
    with pytest.raises(ValueError, match="tokens of an encoder of frames, which arcore does not have"):
        run("ar_diffusion_xl", tmp_path / "run")


def test_other_models_have_no_block_size(tmp_path):
    with pytest.raises(ValueError, match="the options of dit_tiny have no 'block_size'"):
        run("dit_tiny", tmp_path / "run", block_size=4)
    with pytest.raises(ValueError, match="dit_tiny has no setting 'block_size'"):
        run("dit_tiny", tmp_path / "run", model_settings={"block_size": 4})


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_samples_of_diffusion_forcing_are_drawn_at_the_official_times(monkeypatch, solver):
    """`linspace(-1, T - 1, steps + 1)` cut to whole numbers, as the released sampler has them."""
    from arcore import create_model
    from arcore.recipes import frame_diffusion

    seen = {}
    monkeypatch.setattr(
        frame_diffusion,
        "generate_frames",
        lambda model, labels, **given: seen.update(given) or torch.zeros(1),
    )
    model = create_model("diffusion_forcing_tiny")
    monkeypatch.setattr(type(model), "to_pixels", lambda self, frames: frames)
    options = frame_diffusion.FrameSampling(steps=7, solver=solver)
    frame_diffusion.RECIPE.draw({"model": model}, torch.zeros(1, dtype=torch.int64), options)
    total = model.schedule.num_steps
    official = torch.linspace(-1, total - 1, 8).long().flip(0)
    assert seen["times"][:-1].tolist() == official[:-1].tolist()
