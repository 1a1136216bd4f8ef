"""Text by loops that draft, from the command line's recipe, and the table that compares them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import arcore
from arcore.catalog import save_checkpoint
from arcore.catalog.claims import shaken
from arcore.cli import main
from arcore.recipes.language import RECIPE, TextSampling, language_model
from arcore.zoo.acceleration.hydra.heads import HydraConfig, HydraHeads


@pytest.fixture
def run(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = shaken(arcore.create_model("llama_tiny", dim=64, num_layers=2, num_heads=4, hidden_dim=96))
    save_checkpoint(tmp_path / "lm", {"model": model}, {"preset": "llama_tiny", "text_tokenizer": "bytes"})
    heads = HydraHeads(HydraConfig(dim=64, vocab_size=256, num_heads=2)).start_from(model)
    save_checkpoint(
        tmp_path / "heads", {"model": heads}, {"preset": "hydra_tiny", "base": str(tmp_path / "lm")}
    )
    return tmp_path


def sampled(folder: Path, **options: object) -> list[str]:
    from arcore.recipes._sampling import sample

    chosen = TextSampling(prompt="and the ", max_new_tokens=12, num=2, seed=3, **options)  # type: ignore[arg-type]
    return sample(RECIPE, chosen, checkpoint_folder=folder).texts


def test_all_decoders_write_the_same_text(run: Path) -> None:
    plain = sampled(run / "lm")
    assert sampled(run / "lm", decoder="lookup", window=4) == plain
    assert sampled(run / "lm", decoder="jacobi", window=4) == plain
    with pytest.raises(ValueError, match="choose plain, lookup or jacobi"):
        TextSampling(prompt="x", decoder="beam")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--window must be at least 2"):
        TextSampling(prompt="x", window=1)


def test_the_table_of_loops_and_heads(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--heads", str(run / "heads"), "--tokens", "6", "--batch", "4"]
    threads = torch.get_num_threads()
    try:
        assert main(["bench", "decoding", str(run / "lm"), *options]) == 0
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "plain", "lookup, 4 drafts", "lookup, 8 drafts", "jacobi, window 8", "hydra heads"
    ]  # fmt: skip
    assert all(line.endswith("8 of 8 the same") for line in lines[2:])
    assert (
        main(["sample", str(run / "heads"), "--prompt", "and", "--temperature", "0", "--max-new-tokens", "5"])
        == 0
    )
    assert "tokens per call of the model" in capsys.readouterr().out


def test_what_is_no_language_model_is_refused(run: Path) -> None:
    with pytest.raises(ValueError, match="holds no language model"):
        language_model(str(run / "heads"))
    with pytest.raises(FileNotFoundError):
        language_model(str(run / "nothing"))
