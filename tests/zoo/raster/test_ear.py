"""EAR: the loss against a plain transcription, the patch on and off, windows, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import arcore
from arcore.catalog import save_checkpoint
from arcore.catalog.claims import shaken
from arcore.cli import main
from arcore.zoo.raster.ear.erasing import (
    Erasing,
    attention_weights,
    class_samples,
    erase,
    erase_loss,
    patched,
)

Batch = dict[str, Tensor]


class Contract:
    learns = ("hidden",)
    tolerance = 1e-12

    def batch(self, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        names = ("hidden", "target", "positive", "neutral")
        batch = {name: torch.randn(4, 6, 5, generator=generator, dtype=torch.float64) for name in names}
        return batch | {"mask": torch.arange(6) < torch.tensor([6, 1, 4, 3])[:, None]}

    def loss(self, batch: Batch, **settings: Any) -> Tensor:
        return erase_loss(**batch, **settings)

    def reference(self, batch: Batch) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        rows, length, width = batch["hidden"].shape
        for row in range(rows):
            for place in range(length):
                if batch["mask"][row, place]:
                    for c in range(width):
                        h, t, p, n = (
                            batch[k][row, place, c] for k in ("hidden", "target", "positive", "neutral")
                        )
                        total = total + (h - (t - 1.0 * (p - n))) ** 2 / (rows * width)
        return total

    def special_case(self) -> tuple[Tensor, Tensor]:
        """At strength 0 it is the distance from the target."""
        batch = self.batch(5)
        error = (batch["hidden"] - batch["target"]).square().mean(-1)
        return self.loss(batch, strength=0.0), error[batch["mask"]].sum() / 4

    def padded(self, batch: Batch) -> Batch:
        wide = {
            name: torch.nn.functional.pad(value, (0, 0, 0, 2), value=3.0)
            for name, value in batch.items()
            if name != "mask"
        }
        return wide | {"mask": torch.nn.functional.pad(batch["mask"], (0, 2))}


@pytest.fixture(scope="module")
def model() -> Any:
    return shaken(arcore.create_model("llamagen_tiny", side=4)).eval().requires_grad_(False)


def test_only_attention_of_the_first_layers_is_trained(model: Any) -> None:
    names = set(attention_weights(model, 2))
    assert names == {f"layers.{i}.attention.{part}.weight" for i in (0, 1) for part in ("qkv", "out")}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    patch = erase(
        model, 3, 8, Erasing(updates=3, pairs=2, window=5, cfg=1.5, layers=2, threshold=0, keep=0.1)
    )
    assert set(patch) == names
    assert all(not torch.equal(value, state[name]) for name, value in patch.items())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_patch_comes_off_bit_for_bit(model: Any) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    patch = {name: value + 1 for name, value in attention_weights(model).items()}
    before = class_samples(model, 1, cfg=1.5, seed=3)
    with pytest.raises(RuntimeError, match="on purpose"), patched(model, patch):
        assert not torch.equal(class_samples(model, 1, cfg=1.5, seed=3), before)
        raise RuntimeError("on purpose")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(class_samples(model, 1, cfg=1.5, seed=3), before)
    with (
        pytest.raises(ValueError, match="it was made for another model"),
        patched(model, {"layers.9.x": before}),
    ):
        pass


def test_windows_below_the_threshold_are_left_out(model: Any) -> None:
    patch = erase(model, 3, 8, Erasing(updates=2, pairs=1, window=4, cfg=1, threshold=1e9))
    own = dict(model.named_parameters())
    assert all(torch.equal(value, own[name]) for name, value in patch.items())


def test_the_official_context_is_one_code(model: Any) -> None:
    full, official = (
        erase(model, 3, 8, Erasing(updates=1, pairs=2, cfg=1, keep=0, context=c))
        for c in ("full", "official")
    )  # type: ignore[arg-type]
    name = "layers.0.attention.qkv.weight"
    assert not torch.equal(full[name], official[name])
    # A code that sees only itself has no use for queries and keys.
    heads = 2 * model.config.dim
    own = dict(model.named_parameters())[name]
    assert torch.equal(official[name][:heads], own[:heads])
    assert not torch.equal(official[name][heads:], own[heads:])


def test_refuses_what_does_not_fit(model: Any) -> None:
    for pair in ((3, 3), (3, 10), (-1, 2)):
        with pytest.raises(ValueError, match="two different classes from 0 to 9"):
            erase(model, *pair, Erasing())
    with pytest.raises(ValueError, match="of one shape"):
        erase_loss(torch.zeros(1, 2, 3), *(torch.zeros(1, 3, 3) for _ in range(3)))
    with pytest.raises(ValueError, match="--context half: choose full or official"):
        Erasing(context="half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--updates must be at least 1"):
        Erasing(updates=0)


def test_the_command_refuses_other_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(
        tmp_path / "llama", {"model": arcore.create_model("llama_tiny")}, {"preset": "llama_tiny"}
    )
    words = ["run", "ear", "--checkpoint", str(tmp_path / "llama"), "--erase", "3", "--toward", "8"]
    assert main(words) == 2
    assert "holds no raster image model" in capsys.readouterr().err
    assert main([*words[:2], "--checkpoint", str(tmp_path / "none"), *words[4:]]) == 2
    assert main(["run", "ear", "--erase", "3"]) == 2
    assert "needs --checkpoint, --toward" in capsys.readouterr().err
