from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("pytorch_lightning")

QUICK = ("--steps", 2, "--batch-size", 8, "--accelerator", "cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The run folder of a model that was trained for two steps."""
    from arcore.cli import main

    folder = tmp_path_factory.mktemp("runs")
    tokenizer, model = folder / "tokenizer", folder / "model"
    assert main([str(word) for word in ("train", "msvq_tiny", "--out", tokenizer, *QUICK)]) == 0
    assert (
        main([str(word) for word in ("train", "var_tiny", "--tokenizer", tokenizer, "--out", model, *QUICK)])
        == 0
    )
    return model


def test_train_reports_where_the_checkpoint_is(arcore, trained, tmp_path):
    outcome = arcore("train", "var_tiny", "--tokenizer", trained, "--out", tmp_path / "run", *QUICK)
    assert outcome.code == 0, outcome.err
    assert f"checkpoint: {tmp_path / 'run' / 'step-00000002'}" in outcome.out
    assert f"arcore sample {tmp_path / 'run'}" in outcome.out
    assert "var_tiny: step 2/2  loss" in outcome.err


def test_an_encoder_draws_its_predictions_and_a_classifier_starts_from_it(arcore, fails, tmp_path):
    run = tmp_path / "encoder"
    outcome = arcore("train", "roma_tiny", "--data", "photos", "--out", run, *QUICK)
    assert outcome.code == 0, outcome.err
    assert f"held-out images and their predictions: {run / 'predictions.png'}" in outcome.out
    assert "arcore sample" not in outcome.out
    with Image.open(run / "predictions.png") as picture:
        assert picture.size == (8 * (96 + 4) + 4, 2 * (96 + 4) + 4)
    words = ("train", "roma_classifier_tiny", "--data", "photos", "--pretrained", run, *QUICK)
    outcome = arcore(*words, "--out", tmp_path / "classifier")
    assert outcome.code == 0, outcome.err
    assert "accuracy" in outcome.out
    assert f"pictures: arcore sample {tmp_path / 'classifier'} --images" in outcome.out
    assert "holds no checkpoint" in fails(
        "train", "roma_classifier_tiny", "--pretrained", tmp_path, "--out", tmp_path / "x", *QUICK
    )


def test_train_goes_on(arcore, fails, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    assert "already holds a run" in fails("train", "var_tiny", "--out", run, *QUICK)
    outcome = arcore("train", "var_tiny", "--resume", run, "--steps", 4)
    assert outcome.code == 0, outcome.err
    assert f"checkpoint: {run / 'step-00000004'}" in outcome.out
    assert sorted(path.name for path in run.iterdir()) == ["metrics.csv", "run.json", "step-00000004"]


def test_same_seed_same_picture(arcore, trained, tmp_path):
    def draw(name: str, *options: object) -> bytes:
        path = tmp_path / name
        outcome = arcore("sample", "--checkpoint", trained, "--class", 3, "-n", 6, "--out", path, *options)
        assert outcome.code == 0, outcome.err
        return path.read_bytes()

    first = draw("one.png", "--seed", 7)
    assert draw("two.png", "--seed", 7) == first
    assert draw("other.png", "--seed", 8) != first
    assert draw("greedy.png", "--seed", 7, "--top-k", 1) != first
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.size == (3 * 68 + 4, 2 * 68 + 4)


def test_same_seed_same_picture_in_a_new_process(arcore, trained, tmp_path):
    here, there = tmp_path / "here.png", tmp_path / "there.png"
    options = ["sample", "--checkpoint", trained, "--class", "3", "-n", "4"]
    assert arcore(*options, "--out", here).code == 0
    command = [sys.executable, "-m", "arcore", *map(str, options), "--out", str(there)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert here.read_bytes() == there.read_bytes()


def test_more_images_keep_the_first_ones(arcore, trained, tmp_path):
    for count in (2, 4):
        path = tmp_path / f"{count}.png"
        arcore("sample", "--checkpoint", trained, "--class", 3, "-n", count, "--columns", 2, "--out", path)
    with Image.open(tmp_path / "2.png") as few, Image.open(tmp_path / "4.png") as many:
        assert many.crop((0, 0, *few.size)).tobytes() == few.tobytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_is_saved_and_goes_on_to_the_same_weights(tmp_path, arcore, number):
    """Ctrl-C or SIGTERM in a real process: the step under way is saved, and the command that continues is told."""
    run = tmp_path / "run"
    words = ["train", "msvq_tiny", "--steps", "100000", "--checkpoint-every", "0", "--schedule", "constant"]
    words += ["--batch-size", "2", "--accelerator", "cpu", "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "arcore", *words, "--out", str(run)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 60
    table = run / "metrics.csv"
    while not (table.is_file() and table.read_text().count("\n") > 1) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "this step is finished and saved" in err
    assert f"go on from the last checkpoint with: arcore train msvq_tiny --resume {run}" in err
    (saved,) = run.glob("step-*")
    steps = str(int(saved.name.removeprefix("step-")) + 2)
    assert arcore("train", "msvq_tiny", "--resume", run, "--steps", steps).code == 0
    words[words.index("100000")] = steps
    assert arcore(*words, "--out", tmp_path / "straight").code == 0
    ends = [
        folder / f"step-{int(steps):08}" / "tokenizer.safetensors" for folder in (run, tmp_path / "straight")
    ]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_what_is_said_depends_on_what_is_saved(tmp_path):
    from arcore.cli.train import _how_to_go_on

    assert _how_to_go_on("var_tiny", tmp_path) == "there was no checkpoint yet"
    (tmp_path / "run.json").write_text("{}")
    command = f"arcore train var_tiny --resume {tmp_path}"
    said = _how_to_go_on("var_tiny", tmp_path)
    assert said == f"nothing is saved yet; begin again, with the same settings, with: {command}"
    (tmp_path / "tokenizer" / "step-00000010").mkdir(parents=True)
    assert _how_to_go_on("var_tiny", tmp_path) == f"go on from the last checkpoint with: {command}"


class TestTrainRefusals:
    def test_no_preset(self, fails):
        assert "PRESET" in fails("train")

    def test_unknown_preset_suggests_close_ones(self, fails, tmp_path):
        assert "did you mean var_tiny" in fails("train", "var_tinny", "--out", tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_value_of_the_wrong_kind(self, fails):
        assert "--steps" in fails("train", "var_tiny", "--steps", "many")

    def test_number_out_of_range(self, fails, tmp_path):
        assert "steps must be at least 1 but got 0" in fails(
            "train", "msvq_tiny", "--out", tmp_path / "run", "--steps", 0
        )

    def test_missing_data_folder(self, fails, tmp_path):
        line = fails("train", "msvq_tiny", "--data", tmp_path / "photos", "--out", tmp_path / "run")
        assert "photos does not exist" in line
        assert not (tmp_path / "run").exists()

    def test_digits_for_a_large_model(self, fails, tmp_path):
        assert "the model takes 3 x 256 x 256" in fails("train", "msvq_ch160", "--out", tmp_path / "run")

    def test_output_that_cannot_be_written(self, fails, tmp_path):
        (tmp_path / "file").write_text("")
        assert "cannot write into the folder" in fails(
            "train", "msvq_tiny", "--out", tmp_path / "file" / "run"
        )

    def test_missing_checkpoint(self, fails, tmp_path):
        assert "gone does not exist" in fails("train", "msvq_tiny", "--resume", tmp_path / "gone")

    def test_tokenizer_path_without_a_checkpoint(self, fails, tmp_path):
        assert "holds no checkpoint" in fails(
            "train", "var_tiny", "--tokenizer", tmp_path, "--out", tmp_path / "run"
        )


class TestSampleRefusals:
    def test_checkpoint_is_required(self, fails):
        assert "--checkpoint" in fails("sample", "--class", 3)

    def test_missing_checkpoint(self, fails, tmp_path):
        assert "gone does not exist" in fails("sample", "--checkpoint", tmp_path / "gone", "--class", 3)

    @pytest.mark.parametrize(
        ("label", "hint"),
        [("ten", "the model knows 0, 1, 2"), ("10", "there is no class '10'"), ("-1", "-1")],
    )
    def test_unknown_class(self, fails, trained, label, hint):
        assert hint in fails("sample", "--checkpoint", trained, "--class", label)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("-n", 0), "-n must be at least 1"),
            (("--top-k", -2), "top_k"),
            (("--top-p", 1.5), "top_p"),
            (("--temperature", -1), "temperature"),
            (("--cfg", -1), "cfg_scale"),
            (("--device", "abacus"), "abacus"),
            (("--out", "picture.xyz"), "must end in one of .png"),
        ],
    )
    def test_value_out_of_range(self, fails, trained, tmp_path, monkeypatch, options, message):
        monkeypatch.chdir(tmp_path)
        assert message in fails("sample", "--checkpoint", trained, "--class", 3, *options)
        assert list(tmp_path.iterdir()) == []

    def test_output_that_cannot_be_written(self, fails, trained, tmp_path):
        (tmp_path / "file").write_text("")
        line = fails("sample", "--checkpoint", trained, "--class", 3, "--out", tmp_path / "file" / "x.png")
        assert "cannot write into the folder" in line
        (tmp_path / "folder.png").mkdir()
        line = fails("sample", "--checkpoint", trained, "--class", 3, "--out", tmp_path / "folder.png")
        assert "is a folder" in line

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.safetensors"])
    def test_damaged_checkpoint(self, fails, trained, tmp_path, name):
        shutil.copytree(trained, tmp_path / "run")
        path = next((tmp_path / "run").glob("step-*")) / name
        path.write_bytes(path.read_bytes()[:100])
        line = fails("sample", "--checkpoint", tmp_path / "run", "--class", 3, "--out", tmp_path / "x.png")
        assert name in line
        assert not (tmp_path / "x.png").exists()

    def test_tokenizer_alone_wants_pictures_or_codes(self, fails, trained):
        line = fails("sample", "--checkpoint", trained.parent / "tokenizer")
        assert "give pictures with --images or codes with --codes" in line
