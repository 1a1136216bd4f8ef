"""Options by recipe, hints that work when they are pasted, and what is said where nothing can be drawn or done."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from arcore.catalog import create_model, save_checkpoint

pytest.importorskip("PIL.Image")
pytest.importorskip("pytorch_lightning")

QUICK = ("--steps", 2, "--batch-size", 4, "--accelerator", "cpu")


def options_of(help_text: str) -> set[str]:
    return {
        word
        for line in help_text.splitlines()
        for word in line.replace("│", " ").split()[:3]
        if word[:2] == "--"
    }


def test_words_for_values_that_are_none_of_their_kind(fails):
    for words, says in (
        (("--steps", "2.5"), "--steps must be a whole number but got '2.5'"),
        (("--lr", "abc"), "--lr must be a number but got 'abc'"),
        (("--lr", "nan"), "--lr must be a number but got nan"),
        (("--betas", "5"), "--betas must be X X but got '5'"),
        (("--schedule", "foo"), "--schedule must be one of constant, cosine, wsd but got 'foo'"),
        (("--resume",), "--resume needs a value"),
    ):
        assert f"error: {says}" in fails("train", "dit_tiny", *words)
    assert "--samples must be at least 1 but got 0" in fails(
        *("run", "ear", "--checkpoint", "x", "--erase", "1", "--toward", "2", "--samples", "0")
    )


def test_what_is_not_used_of_the_data_is_said(arcore, tmp_path: Path):
    from PIL import Image

    for name, count in (("a", 3), ("b", 20)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (8, 8), 10 * i).save(tmp_path / "data" / name / f"{i}.png")
    (tmp_path / "data" / "a" / ".hidden").touch()
    said = arcore("train", "dit_tiny", "--data", tmp_path / "data", "--out", tmp_path / "run", *QUICK).err
    assert "data: the class a has fewer than 10 images, too few to hold any out" in said
    assert said.count("1 hidden entry skipped") == 1
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("some text, " * 500)
    (tmp_path / "text" / "b.md").write_text("not this")
    said = arcore(
        *("train", "mamba_tiny", "--data", tmp_path / "text", "--out", tmp_path / "text_run", *QUICK),
        *("--context", "16"),
    ).err
    assert "1 file not read that end" in said


def test_a_preset_shows_the_options_of_its_recipe_and_no_others(arcore):
    shown = {
        name: options_of(arcore("train", name, "--help").out)
        for name in ("var_tiny", "acdit_tiny", "mamba_tiny")
    }
    own = {
        "var_tiny": {"--tokenizer", "--tokenizer-steps", "--image-size", "--flip"},
        "acdit_tiny": {"--block-size", "--image-size", "--flip"},
        "mamba_tiny": {"--tokenizer", "--context"},
    }
    every = set().union(*own.values())
    for name, options in own.items():
        assert options <= shown[name], name
        assert not (every - options) & shown[name], name
        assert {"--steps", "--epochs", "--lr", "--betas", "--ema", "--init-from", "--held-out"} <= shown[name]
    text = arcore("train", "mamba_tiny", "--help").out
    assert "kjv (in the package" in text, "a value is written as it is typed"
    assert "Passes over the training data" in text
    out = arcore("train", "acdit_tiny", "--help").out
    assert "(default: 2000)" in out, "steps of its own recipe"
    assert "(default: 0.0)" in out, "weight decay of its own recipe"


def test_a_model_shows_the_options_of_its_sampling(arcore, tmp_path):
    for preset, own, others in (
        ("dit_tiny", {"--class", "--steps", "--solver", "--cfg"}, {"--prompt", "--top-k", "--lag"}),
        ("mamba_tiny", {"--prompt", "--max-new-tokens", "--top-k"}, {"--class", "--steps"}),
    ):
        save_checkpoint(tmp_path / preset, {"model": create_model(preset)}, {})
        shown = options_of(arcore("sample", tmp_path / preset, "--help").out)
        assert own <= shown
        assert not others & shown


def test_latents_are_kept_as_numbers_with_a_sentence(arcore, tmp_path):
    from safetensors.torch import load_file

    model = create_model("dit_tiny", in_channels=4)
    save_checkpoint(tmp_path / "latent", {"model": model}, {})
    words = ("sample", tmp_path / "latent", "--class", 3, "-n", 2, "--steps", 2, "--out", tmp_path / "x.png")
    outcome = arcore(*words)
    assert outcome.code == 0, outcome.err
    assert "as latents of 4 channels (2, 4, 8, 8)" in outcome.out
    assert "--vae FILE" in outcome.out
    assert not (tmp_path / "x.png").exists()
    assert load_file(tmp_path / "x.safetensors")["latents"].shape == (2, 4, 8, 8)


def test_a_checkpoint_without_class_names_takes_numbers(arcore, fails, tmp_path):
    from safetensors.torch import load_file

    save_checkpoint(tmp_path / "plain", {"model": create_model("dit_tiny")}, {})
    words = (
        "sample",
        tmp_path / "plain",
        "-n",
        1,
        "--steps",
        2,
        "--out",
        tmp_path / "x.safetensors",
        "--class",
    )
    assert arcore(*words, 9).code == 0
    assert load_file(tmp_path / "x.safetensors")["images"].shape == (1, 1, 8, 8)
    assert "there is no class '10'" in fails(*words, 10)


def test_bad_options_are_refused_before_weights_are_read(fails, tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"gigabytes that nobody may read")
    words = ("sample", "dit_tiny", "--weights", tmp_path / "weights.pt")
    assert "say what to draw with --class" in fails(*words)
    assert "must end in one of" in fails(*words, "--class", 3, "--out", "x.xyz")
    assert "say what it goes on from with --prompt" in fails("sample", "mamba_tiny", *words[2:])
    assert "is a preset: give its published weights" in fails("sample", "dit_tiny", "--class", 3)
    assert "draws nothing" in fails("sample", "roma_tiny", "--weights", tmp_path / "weights.pt")
    line = fails(*words, "--class", 3, "--solver", "foo")
    assert "ddim, ddpm, dpm" in line
    assert "None" not in line
    assert "--cfg must be a finite number" in fails(*words, "--class", 3, "--cfg", "inf")
    assert "expected cpu, cuda" in fails(*words, "--class", 3, "--device", "meta")


def test_the_printed_commands_work_with_spaces_in_the_path(arcore, tmp_path, monkeypatch):
    from arcore.training.task import Task

    out = tmp_path / "my run"
    original = Task.training_step

    def failing(self, batch, batch_idx):
        if self.step == 3:
            raise RuntimeError("power cut")
        return original(self, batch, batch_idx)

    words = (
        "train",
        "dit_tiny",
        "--out",
        out,
        "--steps",
        4,
        "--batch-size",
        4,
        "--accelerator",
        "cpu",
        "--lr",
        "5e-4",
    )
    with monkeypatch.context() as patch:
        patch.setattr(Task, "training_step", failing)
        outcome = arcore(*words, "--checkpoint-every", 2)
    assert outcome.code == 2
    *_, hint, error = outcome.err.splitlines()
    assert error == "arcore train: error: power cut"
    command = shlex.split(hint.partition("with: ")[2])
    assert command[0] == "arcore"
    outcome = arcore(*command[1:])
    assert outcome.code == 0, outcome.err
    assert f"checkpoint: {out / 'step-00000004'}" in outcome.out
    draw = next(line for line in outcome.out.splitlines() if line.startswith("draw images: "))
    assert arcore(*shlex.split(draw.removeprefix("draw images: "))[1:], "--steps", 2).code == 0
    assert (out / "samples.png").is_file()
    again = arcore("train", "dit_tiny", "--resume", out)
    assert again.code == 0
    assert "nothing to do, the run is at step 4 already; --steps N goes on" in again.out
    elsewhere = arcore("train", "dit_tiny", "--resume", out, "--out", out.with_name("other"))
    assert f"draw images: arcore sample {shlex.quote(str(out))}" in elsewhere.out, (
        "there is nothing in the other folder"
    )


def test_more_processes_than_cores(fails, tmp_path):
    line = fails("train", "dit_tiny", "--out", tmp_path / "run", *QUICK, "--devices", 9999)
    assert "would start 9999 processes" in line
    assert "--oversubscribe" in line
    assert not (tmp_path / "run").exists()


def test_a_batch_above_the_data_is_said(arcore, tmp_path):
    outcome = arcore(
        "train",
        "dit_tiny",
        "--out",
        tmp_path / "run",
        "--steps",
        1,
        "--batch-size",
        1500,
        "--accelerator",
        "cpu",
    )
    assert outcome.code == 0
    assert "a step takes 1500 items and there are 1442" in outcome.err


def test_fields_of_the_model(arcore, fails, tmp_path):
    from arcore.catalog import load_checkpoint
    from arcore.training.checkpoint import find

    outcome = arcore(
        "train", "dit_tiny", "--out", tmp_path / "run", *QUICK, "--set", "depth=2", "mlp_ratio=2.0"
    )
    assert outcome.code == 0, outcome.err
    config = load_checkpoint(find(tmp_path / "run"))[0]["model"].config
    assert (config.depth, config.mlp_ratio) == (2, 2.0)
    assert "has no setting 'depht'" in fails("train", "dit_tiny", "--out", tmp_path / "b", "--set", "depht=2")
    assert "--set expects NAME=VALUE" in fails("train", "dit_tiny", "--out", tmp_path / "b", "--set", "depth")


def test_the_average_is_chosen_at_sampling(arcore, fails, tmp_path):
    run = tmp_path / "run"
    assert (
        arcore("train", "dit_tiny", "--out", run, *QUICK, "--ema", 0.5, "--warmup", 0, "--lr", 0.05).code == 0
    )
    words = ("sample", run, "--class", 3, "-n", 1, "--steps", 3)
    assert arcore(*words, "--out", tmp_path / "raw.png").code == 0
    assert arcore(*words, "--ema", "--out", tmp_path / "ema.png").code == 0
    assert (tmp_path / "raw.png").read_bytes() != (tmp_path / "ema.png").read_bytes()
    assert arcore("train", "dit_tiny", "--out", tmp_path / "none", *QUICK).code == 0
    assert "holds no moving average" in fails(
        "sample", tmp_path / "none", "--class", 3, "--ema", "--out", tmp_path / "x.png"
    )


def test_what_nobody_expects_is_one_line_too(fails, monkeypatch, tmp_path):
    def strange(*_, **__):
        raise KeyError("layers.0")

    monkeypatch.setattr("arcore.recipes._run.fit", strange)
    line = fails("train", "dit_tiny", "--out", tmp_path / "run", *QUICK)
    assert "KeyError: 'layers.0'" in line


def test_run_folder_of_a_checkpoint():
    from arcore.cli.train import _run_folder

    assert (
        _run_folder(Path("run/step-00000010"))
        == _run_folder(Path("run"))
        == _run_folder(Path("run/best"))
        == Path("run")
    )


def test_a_misspelt_folder_is_found_beside_it_before_anything_is_said(fails, capsys, tmp_path, monkeypatch):
    (tmp_path / "my_photos").mkdir()
    monkeypatch.chdir(tmp_path)
    said = fails("train", "var_tiny", "--data", "my_photoss/", "--out", "run")
    assert "neither a data set nor a folder 'my_photoss/': did you mean 'my_photos'?" in said
    assert "training the tokenizer" not in capsys.readouterr().out + said
    assert not (tmp_path / "run" / "tokenizer").exists()


def test_options_that_there_are_not_are_named_with_close_ones(fails, tmp_path):
    said = fails("train", "var_tiny", "--step", "10", "--out", tmp_path / "run")
    assert "Unrecognized options: --step; did you mean --steps" in said
    assert "Optimiser steps" not in said
