"""`arcore sample` of a classifier: pictures in, classes and probabilities out."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from arcore.catalog import create_model, save_checkpoint
from arcore.data._pictures import read_picture
from arcore.training.augment import normalized

pytest.importorskip("PIL.Image")
pytest.importorskip("pytorch_lightning")

NAMES = ["cat, big", "dog"]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    from PIL import Image

    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    for number in range(3):
        colour = (80 * number, 200 - 60 * number, 30)
        Image.new("RGB", (60 + number, 50), colour).save(folder / "deeper" / f"{number}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = create_model("roma_classifier_tiny", num_classes=2, in_channels=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    facts = {"class_names": NAMES, "options": {"normalize": "imagenet"}}
    save_checkpoint(tmp_path / "run", {"model": model}, facts)
    return tmp_path / "run"


def test_a_folder_and_a_file(arcore, run: Path, pictures: Path, tmp_path: Path):
    out = tmp_path / "classes.csv"
    outcome = arcore("sample", run, "--images", pictures, "--top", 1, "--out", out)
    assert outcome.code == 0, outcome
    assert f"wrote {out}: 3 pictures" in outcome.out
    assert "1 file that is no picture skipped" in outcome.err
    with out.open(newline="") as file:
        header, *rows = list(csv.reader(file))
    assert header == ["picture", "class", "p(cat, big)", "p(dog)"]
    from arcore.catalog import load_checkpoint

    model = load_checkpoint(run)[0]["model"].eval()
    for number, row in enumerate(rows):
        path = pictures / "deeper" / f"{number}.png"
        with torch.no_grad():
            # The values are scaled as they were for training.
            expected = model(normalized(read_picture(path, 48, 3)[None])).softmax(-1)[0]
        assert row[0] == str(path)
        assert row[1] == NAMES[int(expected.argmax())]
        assert [float(value) for value in row[2:]] == pytest.approx(expected.tolist(), abs=1e-5)
        assert f"{path}: {row[1]} {100 * float(expected.max()):.1f}%" in outcome.out
    one = arcore("sample", run, "--images", pictures / "deeper" / "1.png")
    assert one.out.count("%") == 2
    arcore("sample", run, "--images", pictures / "deeper" / "1.png", "--normalize", "half", "--out", out)
    with out.open(newline="") as file:
        assert list(csv.reader(file))[1][2:] != rows[1][2:]


def test_what_cannot_be_classified(arcore, fails, run: Path, pictures: Path, tmp_path: Path):
    assert "--images FILE|FOLDER" in fails("sample", run)
    assert "there is no picture or folder" in fails("sample", run, "--images", tmp_path / "nowhere")
    assert "not a readable image" in fails("sample", run, "--images", pictures / "notes.txt")
    (tmp_path / "empty").mkdir()
    assert "holds no pictures" in fails("sample", run, "--images", tmp_path / "empty")
    assert "--out must be a .csv" in fails("sample", run, "--images", pictures, "--out", "x.png")
    assert "--top must be at least 1" in fails("sample", run, "--images", pictures, "--top", 0)
    (pictures / "notes.txt").unlink()
    (pictures / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    assert "broken.png" in fails("sample", run, "--images", pictures)
    with pytest.warns(UserWarning, match="left out"):
        assert arcore("sample", run, "--images", pictures, "--skip-bad").code == 0
    (pictures / "gone.png").symlink_to(tmp_path / "gone.png")
    assert "links that lead nowhere" in fails("sample", run, "--images", pictures, "--skip-bad")
    model = create_model("roma_classifier_tiny", num_classes=2)
    torch.nn.init.constant_(model.head.bias, float("nan"))
    save_checkpoint(tmp_path / "bad", {"model": model}, {"class_names": NAMES})
    assert "no finite numbers" in fails("sample", tmp_path / "bad", "--images", pictures / "deeper")
    save_checkpoint(tmp_path / "three", {"model": model}, {"class_names": [*NAMES, "cow"]})
    assert "names 3" in fails("sample", tmp_path / "three", "--images", pictures / "deeper")
