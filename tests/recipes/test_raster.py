"""Raster models from the command line: trained with their tokenizer, drawn by every decoder, published files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import arcore
from arcore.catalog import load_checkpoint, save_checkpoint
from arcore.catalog.claims import shaken
from arcore.cli import main
from arcore.recipes._sampling import sample
from arcore.recipes.raster import RECIPE, RasterSampling
from arcore.training.checkpoint import find

QUICK = ("--steps", "2", "--batch-size", "32", "--data", "digits")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raster") / "run"
    assert main(["train", "llamagen_tiny", "--out", str(folder), *QUICK, "--tokenizer-steps", "2"]) == 0
    return folder


def codes(folder: Path, **options: object) -> torch.Tensor:
    networks, _ = load_checkpoint(find(folder))
    chosen = RasterSampling(label="3", num=3, seed=5, **options)  # type: ignore[arg-type]
    found, _ = RECIPE.codes(networks, torch.full((3,), 3), chosen)
    return found


def test_a_run_trains_its_tokenizer_first(trained: Path) -> None:
    networks, facts = load_checkpoint(find(trained))
    assert networks["model"].config.vocab_size == networks["tokenizer"].vocab_size == 256
    assert networks["model"].config.side == networks["tokenizer"].side == 4
    assert facts["class_names"] == [str(n) for n in range(10)]
    assert (trained / "tokenizer").is_dir()


def test_decoders(trained: Path) -> None:
    plain = codes(trained)
    assert plain.shape == (3, 16)
    assert torch.equal(codes(trained), plain)
    one = RasterSampling(label="3", num=1, seed=6)
    networks, _ = load_checkpoint(find(trained))
    # Picture n of a seed does not depend on how many are drawn.
    assert torch.equal(RECIPE.codes(networks, torch.tensor([3]), one)[0][0], plain[1])
    greedy = codes(trained, top_k=1)
    assert torch.equal(codes(trained, top_k=1, decoder="jacobi", window=4), greedy)
    assert torch.equal(codes(trained, top_k=1, decoder="lantern", window=4, delta=0.0), greedy)
    assert not torch.equal(codes(trained, top_k=1, decoder="lantern", delta=5.0, neighbours=255), greedy)


def test_pictures_say_how_many_calls_they_took(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", str(trained), "--class", "3", "-n", "2", "--out", str(tmp_path / "a.png")]
    assert main([*words, "--decoder", "jacobi", "--window", "16"]) == 0
    assert "calls of the model for 16 codes" in capsys.readouterr().out
    assert (tmp_path / "a.png").is_file()


def test_published_weights_need_those_of_the_tokenizer(tmp_path: Path) -> None:
    config = {"dim": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 256, "side": 7}
    model = shaken(arcore.create_model("llamagen_tiny", **config))
    tokenizer = shaken(arcore.create_model("vq16_tiny"))
    save_checkpoint(tmp_path / "run", {"model": model, "tokenizer": tokenizer}, {"preset": "llamagen_tiny"})
    drawn = sample(RECIPE, RasterSampling(label="2", num=1), checkpoint_folder=tmp_path / "run")
    assert drawn.images.shape == (1, 1, 28, 28)
    with pytest.raises(ValueError, match="give the weights of their tokenizer too, with --vq FILE"):
        sample(RECIPE, RasterSampling(label="2"), preset="llamagen_b", weights=tmp_path / "none.pt")


def test_bad_options(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="choose plain, jacobi or lantern"):
        RasterSampling(decoder="beam")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--window must be at least 2"):
        RasterSampling(window=1)
    with pytest.raises(ValueError, match="--delta and --neighbours must be at least 0"):
        RasterSampling(delta=float("nan"))
    with pytest.raises(ValueError, match="--drafter is for --decoder lantern"):
        RasterSampling(drafter=tmp_path)
    with pytest.raises(ValueError, match="holds no drafter"):
        codes(trained, decoder="lantern", drafter=trained)
    assert main(["sample", str(trained), "--class", "11"]) == 2
    assert "there is no class '11'" in capsys.readouterr().err
    assert main(["train", "msvq_tiny", "--out", str(tmp_path / "msvq"), *QUICK]) == 0
    words = [
        "train",
        "llamagen_tiny",
        "--out",
        str(tmp_path / "x"),
        "--tokenizer",
        str(tmp_path / "msvq"),
        *QUICK,
    ]
    assert main(words) == 2
    assert "reads one map of codes" in capsys.readouterr().err


def test_codes_of_a_single_map_as_a_file(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "a.png"
    words = ["sample", str(trained), "--class", "3", "-n", "1", "--out", str(picture)]
    assert main(words) == 0
    tokenizer, codes = str(trained / "tokenizer"), str(tmp_path / "codes.safetensors")
    assert main(["sample", tokenizer, "--images", str(picture), "--out", codes]) == 0
    assert "16 codes of each of 1 pictures" in capsys.readouterr().out
    assert main(["sample", tokenizer, "--codes", codes, "--out", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "b.png").is_file()
