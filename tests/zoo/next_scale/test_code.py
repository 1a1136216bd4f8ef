"""CoDe: the law of a pair, the refiner's first pass, temperature behind the filters, what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import arcore
from arcore.catalog.claims import shaken
from arcore.decoding import generate_next_scale
from arcore.models import save_checkpoint
from arcore.tokenizers import MultiScaleVQ
from arcore.zoo.next_scale.code import TEMPERATURES, Options, _draw, decode_together, run, small_pair
from arcore.zoo.next_scale.var import VAR, VARConfig
from arcore.zoo.tokenizers.multi_scale_vq.config import MultiScaleVQConfig


class Contract:
    """The codes of the first scale, by the drafter, and of the first place of the second one, by the refiner."""

    bound = 0.0

    def __init__(self) -> None:
        sizes = {"num_heads": 1, "num_classes": 2, "vocab_size": 3, "z_channels": 4, "patch_nums": (1, 2)}
        self.pair = tuple(
            shaken(VAR(VARConfig(depth=depth, embed_dim=8, **sizes)), seed=depth, scale=0.5).eval()
            for depth in (2, 1)
        )
        self.tokenizer = shaken(
            MultiScaleVQ(
                MultiScaleVQConfig(
                    in_channels=1,
                    channels=4,
                    channel_mult=(1,),
                    num_res_blocks=1,
                    norm_groups=2,
                    z_channels=4,
                    vocab_size=3,
                    patch_nums=(1, 2),
                )
            )
        ).eval()
        labels = torch.ones(3, dtype=torch.int64)
        codes = [torch.arange(3)[:, None], torch.zeros(3, 4, dtype=torch.int64)]
        with torch.no_grad():
            inputs = self.tokenizer.scale_inputs(codes)
            first, second = (model(inputs, labels).double().softmax(-1) for model in self.pair)
        self.law = (first[0, 0, :, None] * second[:, 1]).flatten()

    def draw(self, count: int, seed: int) -> tuple[Tensor, int]:
        out = decode_together(
            *self.pair,
            self.tokenizer,
            torch.ones(count, dtype=torch.int64),
            draft_scales=1,
            cfg_scale=0.0,
            top_k=None,
            top_p=None,
            seed=[seed * 1_000_003 + i for i in range(count)],
        )
        return out.indices[0][:, 0] * 3 + out.indices[1][:, 0], sum(out.calls)

    def plain_calls(self, count: int) -> int:
        return 2


@pytest.fixture(scope="module")
def tokenizer() -> MultiScaleVQ:
    return shaken(arcore.create_model("msvq_tiny")).eval()


@torch.no_grad()
def test_the_first_pass_of_the_refiner_fills_its_cache() -> None:
    large, _ = small_pair()
    inputs, labels = torch.randn(2, 13, 16), torch.tensor([1, 5])
    steps, once = large.make_cache(2), large.make_cache(2)
    for k, (start, stop) in enumerate(((0, 1), (1, 5), (5, 14))):
        logits = large.scale_logits(k, inputs[:, start - 1 : stop - 1] if k else None, labels, steps)
    torch.testing.assert_close(large.prefill(inputs, labels, once), logits, rtol=0, atol=1e-5)
    assert once.length == steps.length == 14
    torch.testing.assert_close(once.keys[:, :, :, :14], steps.keys[:, :, :, :14], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="14 tokens in the cache"):
        large.prefill(inputs, labels, once)
    with pytest.raises(ValueError, match=r"inputs for whole scales, \[5, 14, 30\]"):
        large.prefill(inputs[:, :7], labels, large.make_cache(2))


def test_rows_ignore_their_batch_mates(tokenizer: MultiScaleVQ) -> None:
    pair = small_pair()
    labels = torch.tensor([0, 3, 1])
    options = {"draft_scales": 2, "temperature": (1.1, 1.1, 1.0, 1.0)}
    out = decode_together(*pair, tokenizer, labels, seed=[4, 5, 6], **options)
    part = decode_together(*pair, tokenizer, labels[1:2], seed=[5], **options)
    assert all(torch.equal(a[1:2], b) for a, b in zip(out.indices, part.indices, strict=True))
    assert out.calls == (2, 2)
    assert out.images.shape == (3, 1, 8, 8)


def test_temperature_divides_what_the_filters_kept() -> None:
    """At top_p 0.6 the filters keep two codes of (0.5, 0.3, 0.15, 0.05); hot draws are of these two still."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, 1, 4)
    codes = _draw(logits, None, 5.0, None, 0.6, torch.arange(20_000)[:, None], 0)
    share = torch.bincount(codes.flatten(), minlength=4) / 20_000
    hot = torch.tensor([0.5, 0.3]) ** 0.2
    torch.testing.assert_close(share, torch.cat([hot / hot.sum(), torch.zeros(2)]), rtol=0, atol=0.015)
    assert len(TEMPERATURES) == 10


@torch.no_grad()
def test_a_model_without_a_cache_serves_too(tokenizer: MultiScaleVQ) -> None:
    net = shaken(arcore.create_model("hmar_tiny")).eval()
    labels, options = torch.tensor([2, 8]), {"top_k": 600, "top_p": 0.95, "seed": 3}
    plain = generate_next_scale(net, tokenizer, labels, **options)
    out = decode_together(net, net, tokenizer, labels, draft_scales=2, **options)
    assert all(torch.equal(a, b) for a, b in zip(out.indices, plain.indices, strict=True))
    assert out.peak_cache_bytes == 0
    with pytest.raises(ValueError, match=r"inputs for whole scales, \[5, 14, 30\]"):
        net.prefill(torch.zeros(2, 6, 16), labels, net.make_cache(2))


def test_the_command_draws_with_a_trained_pair(tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    pair = {"model": arcore.create_model("var_tiny"), "tokenizer": arcore.create_model("msvq_tiny")}
    save_checkpoint(tmp_path / "run", pair)
    weights = {f"{name}_weights": str(tmp_path / "run") for name in ("drafter", "refiner", "tokenizer")}
    report = run(Options(drafter="var_tiny", refiner="var_tiny", draft_scales=3, label=7, count=2, **weights))
    # Guided rows: the refiner's 30 tokens are as many as the model alone has.
    assert report.values["ratio"] == 1.0
    assert "3 scales by var_tiny, 1 by var_tiny" in report.text
    report.draw(figure)
    assert len(figure.axes) == 2


def test_what_does_not_fit_is_named(tokenizer: MultiScaleVQ) -> None:
    large, small = small_pair()
    labels = torch.tensor([0])
    with pytest.raises(ValueError, match="draft_scales from 1 to 3 but got 4"):
        decode_together(large, small, tokenizer, labels, draft_scales=4)
    with pytest.raises(ValueError, match=r"same scales, codes and classes.*vocab_size=64"):
        other = VAR(VARConfig(**{**vars(small.config), "vocab_size": 64}))
        decode_together(large, other, tokenizer, labels, draft_scales=2)
    with pytest.raises(ValueError, match="temperature for each of 4 scales but got 2"):
        decode_together(large, small, tokenizer, labels, draft_scales=2, temperature=(1.0, 1.0))
    with pytest.raises(TypeError, match="expected refiner to be a VAR"):
        decode_together(large, tokenizer, tokenizer, labels, draft_scales=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model of codes"):
        run(Options(drafter="msvq_tiny"))


def test_a_pair_of_runs_with_a_judge(tmp_path: Path) -> None:
    """Two runs on one tokenizer; a classifier says how many pictures are of their class."""
    tokenizer = arcore.create_model("msvq_tiny")
    small = arcore.create_model("var_tiny", depth=2, embed_dim=48)
    for name, model in (("large", arcore.create_model("var_tiny")), ("small", small)):
        save_checkpoint(tmp_path / name, {"model": model, "tokenizer": tokenizer})
    judge = arcore.create_model("roma_classifier_tiny", image_size=8, in_channels=1, num_classes=10)
    save_checkpoint(tmp_path / "judge", {"model": judge})
    pair = {"drafter": "var_tiny", "refiner": "var_tiny", "draft_scales": 3, "label": 7, "count": 1}
    weights = {
        f"{name}_weights": str(tmp_path / run) for name, run in (("drafter", "large"), ("refiner", "small"))
    }
    report = run(Options(**pair, **weights, judge=tmp_path / "judge", judged=1))
    assert "taken for their class, of 10 pictures: pair" in report.text
    assert 0 <= report.values["accuracy_pair"] <= 1
    assert report.values["ratio"] < 0.65
    save_checkpoint(tmp_path / "small", {"model": small, "tokenizer": arcore.create_model("msvq_tiny")})
    with pytest.raises(ValueError, match="different tokenizers: train the second with --tokenizer"):
        run(Options(**pair, **weights))
    weights["refiner_weights"] = str(tmp_path / "file.pth")
    torch.save(small.state_dict(), weights["refiner_weights"])
    with pytest.raises(ValueError, match=r"both as files|do not fit"):
        run(Options(**pair, **weights))
