"""Rejection by a classifier, progress on a terminal, arithmetic of a device."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from arcore.cli import main
from arcore.recipes import recipe_for
from arcore.recipes._progress import drawing
from arcore.recipes._rejection import Judge, open_judge
from arcore.recipes._sampling import has_bf16_units
from arcore.training import train

SETTINGS = {"steps": 2, "batch_size": 32, "checkpoint_every": 2, "accelerator": "cpu", "warmup": 0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of VAR and one of a classifier, on the digits."""
    folder = tmp_path_factory.mktemp("runs")
    quiet: dict[str, Any] = {"settings": SETTINGS, "show_progress": False}
    train("var_tiny", out=folder / "var", tokenizer_steps=1, **quiet)
    train("roma_classifier_tiny", out=folder / "judge", data="digits", **quiet)
    return folder / "var", folder / "judge"


def test_the_surest_pictures_stay(runs: tuple[Path, Path], tmp_path: Path, capsys: Any):
    from safetensors.torch import load_file

    model, judge = runs
    drawn = ["sample", str(model), "--class", "3", "-n", "2", "--seed", "5", "--out"]
    assert main([*drawn, str(tmp_path / "all.safetensors"), "--reject-by", str(judge), "--tries", "3"]) == 0
    assert "of 6 those that" in capsys.readouterr().out
    kept = load_file(tmp_path / "all.safetensors")["images"]
    every = []
    for turn in range(3):
        seed = str(5 + 1_000_003 * turn)
        one = [*drawn[:-3], "--seed", seed, "--out", str(tmp_path / "one.safetensors")]
        assert main(one) == 0
        every.append(load_file(tmp_path / "one.safetensors")["images"])
    pictures = torch.cat(every)
    sure = open_judge(judge).eval()(pictures, 3)
    torch.testing.assert_close(kept, pictures[sure.argsort(descending=True, stable=True)[:2]])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--reject-by", "nowhere"], "neither a run folder nor a file"),
        (["--tries", "0"], "--tries must be at least 1"),
        (["--reject-by", "MODEL"], "expected a classifier"),
    ],
)
def test_a_wrong_classifier_is_refused(runs: tuple[Path, Path], capsys: Any, more: list[str], words: str):
    more = [str(runs[0]) if word == "MODEL" else word for word in more]
    assert main(["sample", str(runs[0]), "--class", "3", *more]) == 2
    assert words in capsys.readouterr().err
    assert main(["sample", str(runs[0]), "--class", "none", "--reject-by", str(runs[1])]) == 2
    assert "name one with --class" in capsys.readouterr().err


def test_other_classes_are_refused(tmp_path: Path):
    judge = Judge(nn.Identity(), size=8, channels=1, imagenet=False, class_names=["cat", "dog"], logits=2)
    with pytest.raises(ValueError, match="tells cat, dog apart and the model draws 0, 1"):
        judge.check(["0", "1"], 0, tmp_path)
    with pytest.raises(ValueError, match="knows 2 classes and class 207"):
        judge.check(None, 207, tmp_path)


def test_pictures_become_what_a_classifier_of_imagenet_takes():
    seen: list[torch.Tensor] = []

    class Watching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return torch.zeros(len(x), 5)

    judge = Judge(Watching(), size=16, channels=3, imagenet=True, class_names=None, logits=5)
    chances = judge.chances(torch.full((2, 1, 8, 8), 1.0))
    assert chances.shape == (2, 5)
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(seen[0].mean((0, 2, 3)), expected)
    assert seen[0].shape == (2, 3, 16, 16)


def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    assert drawing() is None
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    told = drawing()
    assert told is not None
    told(1, 2)
    assert "drawing: scale 1 of 2" in capsys.readouterr().err


def test_arithmetic(runs: tuple[Path, Path], tmp_path: Path, capsys: Any):
    drawn = ["sample", str(runs[0]), "--class", "3", "-n", "2", "--out", str(tmp_path / "x.png")]
    for precision in ("float32", "bfloat16", "auto"):
        assert main([*drawn, "--precision", precision]) == 0
    assert has_bf16_units(torch.device("cpu")) == (torch.ops.arcore.cpu_bf16() != "none")
    assert recipe_for("var_tiny").halved
    assert not recipe_for("mamba_tiny").halved
    capsys.readouterr()
    assert main([*drawn, "--precision", "int3"]) == 2
