"""`arcore sample` of a model that labels pixels: pictures in, masks and scores out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from arcore.catalog import load_checkpoint

image_module = pytest.importorskip("PIL.Image")
pytest.importorskip("pytorch_lightning")

from arcore.training import train  # noqa: E402

SETTINGS = {"steps": 2, "batch_size": 2, "checkpoint_every": 2, "accelerator": "cpu"}
TINY = {"depth": 1, "embed_dim": 16, "image_size": 16, "d_state": 4, "dropout": 0.0}


def write(path: Path, values: torch.Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = values.shape
    bytes_ = values.to(torch.uint8).contiguous().numpy().tobytes()
    image_module.frombytes("L", (width, height), bytes_).save(path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten grey pictures and pairs, white squares on grey; the masks say where."""
    torch.manual_seed(0)
    for number in range(10):
        picture = torch.randint(60, 120, (20 + number, 24))
        other, mask = picture.clone(), torch.zeros_like(picture)
        picture[4:12, 5:15] = 250
        mask[4:12, 5:15] = 1
        for name, values in (("images", picture), ("A", picture), ("B", other), ("masks", mask)):
            write(tmp_path / "data" / name / f"p{number}.png", values)
    (tmp_path / "data" / "classes.txt").write_text("ground\nsquare\n")
    return tmp_path / "data"


def run(preset: str, out: Path, data: Path, **options):
    channels = {"channels": 1}
    return train(
        preset,
        out=out,
        data=str(data),
        show_progress=False,
        **{"settings": SETTINGS, "model_settings": TINY, **channels, **options},
    )


def test_a_run_labels_pictures_and_goes_on(arcore, fails, data: Path, tmp_path: Path):
    result = run("roma_segmenter_tiny", tmp_path / "run", data, flip=True, zoom=1.5)
    model = load_checkpoint(result.checkpoint)[0]["model"]
    assert model.config.num_classes == 2
    held_out = [row for row in result.history if row["split"] == "test"]
    assert {"mIoU", "mF1", "F1", "loss"} <= held_out[-1].keys()
    out = tmp_path / "masks"
    words = ("sample", tmp_path / "run", "--images", data / "images", "--out", out)
    outcome = arcore(*words, "--masks", data / "masks")
    assert outcome.code == 0, outcome
    assert f"wrote 10 masks into {out}" in outcome.out
    assert "mIoU" in outcome.out
    with image_module.open(out / "p3.png") as written:
        assert (written.size, written.mode) == ((24, 23), "P")
        assert max(written.tobytes()) <= 1
    assert "say of which with --images" in fails("sample", tmp_path / "run")
    assert "labels single pictures: leave --after out" in fails(*words, "--after", data / "B")
    assert "lacks masks of p0, p1, p2 and 7 more" in fails(*words, "--masks", tmp_path)
    again = run(
        "roma_segmenter_tiny",
        tmp_path / "run",
        data,
        resume=tmp_path / "run",
        settings={"steps": 3},
        channels=None,
        model_settings=None,
    )
    assert again.steps == 1
    write(data / "masks" / "p0.png", torch.zeros(20, 24))
    with pytest.raises(ValueError, match="is not the same"):
        run(
            "roma_segmenter_tiny",
            tmp_path / "run",
            data,
            resume=tmp_path / "run",
            settings={"steps": 4},
            channels=None,
            model_settings=None,
        )


def test_pairs_of_pictures(arcore, fails, data: Path, tmp_path: Path):
    changes = TINY | {"decoder_channels": (8, 8, 8)}
    result = run("roma_change_tiny", tmp_path / "run", data, model_settings=changes, layer_decay=0.5)
    assert load_checkpoint(result.checkpoint)[1]["class_names"] == ["unchanged", "changed"]
    words = ("sample", tmp_path / "run", "--images", data / "A" / "p1.png")
    assert "give the ones after with --after" in fails(*words)
    outcome = arcore(
        *words,
        "--after",
        data / "B" / "p1.png",
        "--masks",
        data / "masks" / "p1.png",
        "--out",
        tmp_path / "out",
    )
    assert outcome.code == 0, outcome
    assert "changed" in outcome.out
    assert (tmp_path / "out" / "p1.png").is_file()
