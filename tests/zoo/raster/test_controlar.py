"""ControlAR: additions at the right places in one pass, steps, trees and batches; edges; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import arcore
from arcore.catalog.claims import shaken
from arcore.cli import main
from arcore.data.edges import canny, edge_overlap
from arcore.decoding import AboveDrafter, generate, jacobi, speculative_tree
from arcore.zoo.raster.controlar.model import ControlAR, ControlARConfig
from tests.zoo.protocol_raster import Protocol as RasterProtocol


class Protocol(RasterProtocol):
    """Codes in raster order, given a class and edges."""

    def __init__(self, preset: str) -> None:
        super().__init__(preset)
        size = self.config.side * self.config.patch
        self.control = torch.randint(2, (3, 1, size, size)).float() * 2 - 1

    def forward(self, model: Any) -> Tensor:
        return model(self.codes, self.labels, self.control)

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        whole = self.forward(model)
        _, parts = super().stepwise(model.controlled(self.control))
        return whole, parts

    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        return super().generate(model.controlled(self.control[rows]), rows)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return shaken(arcore.create_model("controlar_tiny", side=4)).eval()


def inputs(rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(4, (rows, 16), generator=generator)
    control = torch.randint(2, (rows, 1, 4, 4), generator=generator).float() * 2 - 1
    return codes, torch.arange(rows), control


@torch.no_grad()
def test_the_addition_by_hand(model: Any) -> None:
    codes, labels, control = inputs()
    vectors = model.control_encoder(control)
    x = model.embed(torch.cat([model.prompt(labels), codes[:, :-1]], 1))
    mask, angles = model.behind((0,), 16, x.device)
    for i, layer in enumerate(model.layers):
        for j, place in enumerate(model.config.control_layers):
            if i == place:
                mlp = model.condition_layers[j]
                hidden = vectors @ mlp.fc1.weight.T
                x = x + torch.nn.functional.gelu(hidden, approximate="tanh") @ mlp.fc2.weight.T
        x = layer(x, angles, mask)
    expected = model.logits(model.norm(x))
    torch.testing.assert_close(model(codes, labels, control), expected, rtol=0, atol=2e-5)
    assert (model(codes, labels) - expected).abs().max() > 0.01
    zero = model(codes, labels, torch.zeros_like(control))
    assert torch.equal(zero, model(codes, labels))


@torch.no_grad()
def test_strength_and_guidance(model: Any) -> None:
    codes, labels, control = inputs()
    prompt = model.prompt(labels)
    ids = torch.cat([prompt, codes[:, :-1]], 1)
    none = model(codes, torch.full_like(labels, model.null_class))
    with_it, guided = model(codes, labels, control), model.controlled(control).guided(3.0)
    cache = guided.make_cache(2, 17)
    parts = [guided.prefill(prompt, cache)] + [guided.step(ids[:, i], cache) for i in range(1, 16)]
    expected = none + 3 * (with_it - none)
    torch.testing.assert_close(torch.stack(parts, 1), expected, rtol=0, atol=1e-4)
    weak = model.controlled(control, 0.0)
    assert torch.equal(weak.logits(weak.hidden(ids)), model(codes, labels))


@torch.no_grad()
def test_windows_and_trees_get_the_control_of_their_places(model: Any) -> None:
    _, labels, control = inputs(3)
    bound = model.controlled(control).guided(1.5)
    prompt = model.prompt(labels)
    plain = generate(bound, prompt, max_new_tokens=16, temperature=0.0).ids
    window = jacobi(bound, prompt, max_new_tokens=16, temperature=0.0, window=5).ids
    tree = speculative_tree(bound, AboveDrafter(4, 3), prompt, max_new_tokens=16, temperature=0.0).ids
    assert torch.equal(window, plain)
    assert torch.equal(tree, plain)


def test_a_new_model_is_its_base() -> None:
    base = shaken(arcore.create_model("llamagen_tiny", side=4)).eval()
    model: Any = arcore.create_model("controlar_tiny", side=4, dim=base.config.dim).eval()
    model.start_from(base)
    codes, labels, control = inputs()
    assert torch.equal(model(codes, labels, control), base(codes, labels))
    with pytest.raises(ValueError, match="the base model differs: side=5 instead of 4"):
        model.start_from(arcore.create_model("llamagen_tiny", side=5))


def test_refuses_what_does_not_fit(model: Any) -> None:
    codes, labels, control = inputs()
    with pytest.raises(ValueError, match=r"control images of shape \[B, 1, 4, 4\] but got \(2, 1, 8, 8\)"):
        model(codes, labels, torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="a control image for each of 2 rows but got 1"):
        model(codes, labels, control[:1])
    with pytest.raises(ValueError, match="expected 1 control images"):
        generate(model.controlled(control), model.prompt(labels[:1]), max_new_tokens=2)
    with pytest.raises(ValueError, match="different numbers from 0 to 2"):
        ControlARConfig(dim=64, num_layers=3, num_heads=4, control_layers=(0, 3))
    assert ControlARConfig(dim=64, num_layers=4, num_heads=4).control_layers == (0, 1, 2)
    assert isinstance(model, ControlAR)


def test_canny_finds_the_border_of_a_square() -> None:
    images = torch.full((2, 1, 20, 20), -1.0)
    images[0, :, 5:15, 5:15] = 1
    found = canny(images)
    assert found.shape == (2, 1, 20, 20)
    assert set(found.unique().tolist()) == {-1.0, 1.0}
    border = torch.zeros(20, 20, dtype=torch.bool)
    border[4:16, 4:16] = True
    border[7:13, 7:13] = False
    assert not ((found[0, 0] > 0) & ~border).any()
    assert 30 <= int((found[0] > 0).sum()) <= 48
    assert not (found[1] > 0).any()
    assert torch.equal(edge_overlap(found, found), torch.ones(2))
    assert edge_overlap(found[:1], -found[:1]).item() == 0
    with pytest.raises(ValueError, match="0 <= low <= high"):
        canny(images, low=0.5, high=0.1)
    with pytest.raises(ValueError, match=r"float images \[N, C, H, W\]"):
        canny(images[0])


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image_module = pytest.importorskip("PIL.Image")
    quick = ("--steps", "2", "--batch-size", "32", "--data", "digits")
    base, run = str(tmp_path / "base"), str(tmp_path / "run")
    assert main(["train", "llamagen_tiny", "--out", base, *quick, "--tokenizer-steps", "2"]) == 0
    words = ["train", "controlar_tiny", "--out", run, *quick, "--control", "canny", "--base", base]
    assert main(words) == 0
    for name, size in (("edge.png", 8), ("large.png", 9)):
        image_module.new("L", (size, size), 255).save(tmp_path / name)
    (tmp_path / "no.png").write_text("no picture")
    draw = ["sample", run, "--class", "3", "-n", "2", "--out", str(tmp_path / "a.png")]
    assert main([*draw, "--control", str(tmp_path / "edge.png")]) == 0
    capsys.readouterr()
    for control, said in (
        (tmp_path / "large.png", "has 9 x 9 pixels but the model's images have 8 x 8: scale it"),
        (tmp_path / "no.png", "cannot be read"),
        (tmp_path / "none.png", "does not exist"),
        (None, "give one with --control FILE"),
    ):
        assert main([*draw, *(["--control", str(control)] if control else [])]) == 2
        assert said in capsys.readouterr().err
    assert main([*words[:3], str(tmp_path / "x"), *quick, "--base", str(tmp_path / "run" / "..")]) == 2
