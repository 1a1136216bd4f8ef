"""`arcore train` and `arcore sample` with models that denoise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from arcore.models import load_checkpoint, save_checkpoint

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("pytorch_lightning")

QUICK = ("--steps", 1, "--batch-size", 4, "--accelerator", "cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Run folders of models that were trained for one step."""
    from arcore.cli import main
    from arcore.training.checkpoint import find

    folder = tmp_path_factory.mktemp("runs")
    for preset, *options in (
        ("acdit_tiny", "--block-size", 16),
        ("dit_tiny",),
        ("mar_tiny",),
        ("acdit_video_tiny",),
        ("ar_diffusion_tiny",),
        ("diffusion_forcing_tiny",),
    ):
        words = ("train", preset, *options, "--out", folder / preset, *QUICK)
        assert main([str(word) for word in words]) == 0
    # After one step blocks are almost the identity and frames know nothing of each other.
    path = find(folder / "ar_diffusion_tiny")
    networks, meta = load_checkpoint(path)
    for parameter in networks["model"].parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_checkpoint(path, networks, meta)
    return folder


@pytest.mark.parametrize("preset", ["acdit_tiny", "dit_tiny", "mar_tiny"])
@pytest.mark.parametrize("solver", ["dpm", "ddim", "ddpm"])
def test_images(arcore, runs, tmp_path, preset, solver):
    def draw(name: str, *options: object) -> bytes:
        words = ("sample", "--checkpoint", runs / preset, "--class", 3, "-n", 6, "--steps", 3)
        outcome = arcore(*words, "--solver", solver, "--out", tmp_path / name, *options)
        assert outcome.code == 0, outcome.err
        return (tmp_path / name).read_bytes()

    first = draw("one.png", "--seed", 7)
    assert draw("two.png", "--seed", 7) == first
    assert draw("other.png", "--seed", 8) != first
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.size == (3 * 68 + 4, 2 * 68 + 4)


@pytest.mark.parametrize("preset", ["acdit_video_tiny", "ar_diffusion_tiny", "diffusion_forcing_tiny"])
def test_videos(arcore, runs, tmp_path, preset):
    words = ("sample", "--checkpoint", runs / preset, "--class", 3, "-n", 2, "--steps", 2)
    assert arcore(*words, "--out", tmp_path / "moving.gif").code == 0
    with Image.open(tmp_path / "moving.gif") as picture:
        assert picture.n_frames == 8
        assert picture.size == (2 * 68 + 4, 68 + 4)
    assert arcore(*words, "--out", tmp_path / "still.png").code == 0
    with Image.open(tmp_path / "still.png") as picture:
        assert picture.size == (8 * 68 + 4, 2 * 68 + 4)


def test_frames_one_after_the_other(arcore, fails, runs, tmp_path):
    """The lag changes what is drawn; what a lag cannot be is said."""

    def draw(solver: str, lag: int) -> bytes:
        words = ("sample", "--checkpoint", runs / "ar_diffusion_tiny", "--class", 3, "-n", 1, "--steps", 3)
        outcome = arcore(*words, "--solver", solver, "--lag", lag, "--out", tmp_path / "moving.gif")
        assert outcome.code == 0, outcome.err
        return (tmp_path / "moving.gif").read_bytes()

    for solver in ("dpm", "ddpm"):
        assert len({draw(solver, lag) for lag in (0, 1, 3)}) == 3
    words = ("sample", "--class", 3, "--steps", 3, "--out", tmp_path / "other.gif", "--checkpoint")
    assert "lag from 0 to steps=3 but got 4" in fails(*words, runs / "ar_diffusion_tiny", "--lag", 4)
    assert "Unrecognized options: --lag" in fails(*words, runs / "acdit_tiny", "--lag", 1)


def test_more_frames_than_in_training(arcore, fails, runs, tmp_path):
    words = ("sample", "--class", 3, "-n", 1, "--steps", 3, "--out", tmp_path / "long.gif", "--checkpoint")
    model = runs / "diffusion_forcing_tiny"
    assert arcore(*words, model, "--frames", 11).code == 0
    with Image.open(tmp_path / "long.gif") as picture:
        assert picture.n_frames == 11
    assert "frames to be on their way at once" in fails(*words, model, "--frames", 11, "--lag", 0)
    assert "at least 8 frames" in fails(*words, model, "--frames", 3)
    assert "Unrecognized options: --frames" in fails(*words, runs / "acdit_video_tiny", "--frames", 11)


def test_train_says_how_to_draw(arcore, tmp_path):
    outcome = arcore("train", "acdit_video_tiny", "--out", tmp_path / "run", *QUICK)
    assert f"draw videos: arcore sample {tmp_path / 'run'}" in outcome.out
    assert "samples.gif" in outcome.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--top-k", 3), "Unrecognized options: --top-k"),
        (("--temperature", 0.5), "--temperature is for --solver ddpm"),
        (("--steps", 1000), "1 to 999 sampling steps"),
        (("--steps", 0), "1 to 999 sampling steps"),
        (("--cfg", -1), "cfg_scale >= 0"),
        (("--class", "eleven"), "there is no class"),
    ],
)
def test_bad_options(fails, runs, tmp_path, options, message):
    words = ("sample", "--checkpoint", runs / "acdit_tiny", "--out", tmp_path / "x.png")
    assert message in fails(*words, *(() if "--class" in options else ("--class", 3)), *options)


def test_block_sizes_that_do_not_tile(fails, tmp_path):
    out = tmp_path / "run"
    assert "choose one of 1, 4, 16" in fails("train", "acdit_tiny", "--block-size", 8, "--out", out, *QUICK)
    assert "Unrecognized options: --block-size" in fails(
        "train", "var_tiny", "--block-size", 4, "--out", out, *QUICK
    )
