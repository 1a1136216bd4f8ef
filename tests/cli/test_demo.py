"""The demo in a very short form: everything is written, and the figures are what they claim to be."""

from __future__ import annotations

import re

import pytest

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("pytorch_lightning")

PICTURES = ("samples.png", "reconstructions.png", "loss.png", "mask.png")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    import contextlib
    import io

    from arcore.cli import main

    out = tmp_path_factory.mktemp("demo") / "out"
    # What an earlier demo has left.
    (out / "training" / "model" / "step-00000002").mkdir(parents=True)
    (out / "training" / "model" / "step-00000002" / "config.json").write_text("{}")
    (out / "checkpoint").mkdir()
    (out / "checkpoint" / "old.safetensors").write_text("")
    (out / "samples.png").write_text("")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main(["demo", "--out", str(out), "--data", "digits", "--tokenizer-steps", "4", "--steps", "4"])
    assert code == 0
    return out, printed.getvalue()


def test_writes_pictures_and_checkpoint(demo):
    out, _ = demo
    assert sorted(path.name for path in out.iterdir()) == sorted([*PICTURES, "checkpoint", "training"])
    for name in PICTURES:
        with Image.open(out / name) as picture:
            picture.load()
            assert picture.width > 300
            assert len(picture.convert("L").getcolors(256)) > 8, f"{name} is empty"


def test_prints_every_promised_figure(demo):
    _, text = demo
    for row in (
        "samples read as their class",
        "without guidance",
        "the reader on held-out digits",
        "held-out reconstruction error",
        "tokenizer training",
        "model training",
        "training step of var_tiny",
        "attention of VAR-d16",
    ):
        assert re.search(rf"{row}.*\d", text), row
    reader = float(re.search(r"reader on held-out digits\D+([\d.]+)%", text)[1])
    assert reader > 96, "the classifier knows real digits"
    read = float(re.search(r"samples read as their class\D+([\d.]+)%", text)[1])
    assert read < 60, "four steps teach nothing, and the table says so"


def test_checkpoint_draws(demo, arcore, tmp_path):
    out, _ = demo
    outcome = arcore(
        "sample", "--checkpoint", out / "checkpoint", "--class", 3, "--out", tmp_path / "three.png"
    )
    assert outcome.code == 0, outcome.err


def test_replaces_an_earlier_demo(demo):
    out, _ = demo
    assert not (out / "checkpoint" / "old.safetensors").exists()
    assert [path.name for path in (out / "training" / "model").glob("step-*")] == ["step-00000004"]


def test_refuses_bad_input_before_any_work(fails, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write into the folder" in fails("demo", "--out", tmp_path / "file" / "demo")
    assert "--threads must be at least 1" in fails("demo", "--threads", 0)
    assert "steps must be at least 1" in fails("demo", "--steps", 0, "--out", tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_comparison_really_swaps_the_attention(monkeypatch):
    """Both sides must run, and compute the same."""
    import torch

    from arcore import masks
    from arcore.cli import _compare
    from arcore.nn import SelfAttention

    layer = SelfAttention(32, 2)
    x, mask = torch.randn(2, 30, 32), masks.next_scale((1, 2, 3, 4))
    calls = []
    original = _compare.scaled_dot_product_attention
    monkeypatch.setattr(
        _compare, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    ours = layer(x, mask)
    assert not calls
    with _compare._masked_sdpa():
        theirs = layer(x, mask)
    assert calls
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(layer(x, mask), ours)
