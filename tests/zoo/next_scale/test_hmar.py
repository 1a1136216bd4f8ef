"""HMAR: published layout and arithmetic, both branches, refined drawing."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import arcore
from arcore import masks
from arcore.catalog.claims import shaken
from arcore.decoding import generate_next_scale
from arcore.models import load_weights
from arcore.zoo.next_scale.hmar.model import HMAR, HMARConfig
from arcore.zoo.next_scale.hmar.refine import generate_refined, with_refinement
from arcore.zoo.next_scale.hmar.schedule import (
    SIDES_256,
    SIDES_512,
    lognorm_weights,
    own_inputs,
    published_schedule,
)
from arcore.zoo.next_scale.var import VAR, VARConfig

from .test_var import official_shapes as var_shapes
from .test_var import official_weights as var_weights

SMALL: dict[str, Any] = {
    "depth": 3,
    "embed_dim": 32,
    "num_heads": 2,
    "num_classes": 5,
    "vocab_size": 24,
    "z_channels": 8,
    "patch_nums": (1, 2, 3),
}


def official_shapes(config: HMARConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the files that the authors publish."""
    plain = var_shapes(config)
    shapes = {
        name: shape
        for name, shape in plain.items()
        if not name.startswith(("blocks.", "head", "word_embed.bias"))
    }
    shapes |= {"word_embed_bias": (config.embed_dim,), "mask_embed.weight": (1, config.embed_dim)}
    for branch in ("ns", "mask"):
        shapes |= {f"{branch}_{n}": shape for n, shape in plain.items() if n.startswith("head")}
    inner = {n.removeprefix("blocks.0."): s for n, s in plain.items() if n.startswith("blocks.0.")}
    for group, count in (("base", config.depth - config.tail), ("ns", config.tail), ("mask", config.tail)):
        shapes |= {f"{group}_blocks.{i}.{n}": s for i in range(count) for n, s in inner.items()}
    return shapes


@pytest.mark.parametrize(("preset", "keys", "millions"), [("hmar_d16", 329, 467.69), ("hmar_d30", 511, None)])
def test_published_sizes(preset: str, keys: int, millions: float | None):
    with torch.device("meta"):
        model = arcore.create_model(preset)
    shapes = official_shapes(model.config)
    assert len(shapes) == keys
    if millions is not None:
        numbers = sum(p.numel() for p in model.parameters()) / 1e6
        assert numbers == pytest.approx(millions, abs=0.3)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    derived = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")
    renamed = model.from_official({k: v for k, v in state.items() if not k.endswith(derived)})
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in model.state_dict().items()}


@torch.no_grad()
@pytest.mark.parametrize("mask", [masks.next_scale, masks.next_scale_markov])
def test_published_checkpoint_gives_vars_arithmetic_scale_by_scale(tmp_path: Path, mask: Any):
    """Each branch is a VAR of the base blocks and its own, on one scale, with the other term in the input."""
    config = HMARConfig(**SMALL, tail=2)
    weights = {name: 0.3 * torch.randn(shape) for name, shape in official_shapes(config).items()}
    for name, value in weights.items():
        if name.endswith("zero_k_bias"):
            value.zero_()
    weights["lvl_1L"] = torch.tensor([[0] + [1] * 4 + [2] * 9])
    weights["attn_bias_for_masking"] = torch.where(mask((1, 2, 3)).to_bool(), 0.0, -torch.inf)
    torch.save(weights, tmp_path / "hmar.pth")
    model = HMAR(config).eval()
    load_weights(model, tmp_path / "hmar.pth")
    labels = torch.tensor([1, 5])
    inputs, codes = torch.randn(2, 9, 8), torch.randn(2, 9, 8)
    masked = torch.rand(2, 9) < 0.5
    token = weights["mask_embed.weight"]
    for branch in ("ns", "mask"):
        peer = VAR(VARConfig(**SMALL)).eval()
        state: dict[str, Tensor] = {}
        for name, value in weights.items():
            if name.startswith("base_blocks.0."):
                state[name.removeprefix("base_")] = value
            elif name.startswith(f"{branch}_blocks."):
                _, layer, rest = name.split(".", 2)
                state[f"blocks.{int(layer) + 1}.{rest}"] = value
            elif name.startswith(f"{branch}_head"):
                state[name.removeprefix(f"{branch}_")] = value
            elif "blocks" not in name and "_head" not in name:
                state[name] = value
        state["word_embed.bias"] = state.pop("word_embed_bias")
        del state["mask_embed.weight"], state["attn_bias_for_masking"]
        peer.load_state_dict(peer.from_official(state))
        cond = peer.class_embed(labels)
        x = inputs @ state["word_embed.weight"].T + state["word_embed.bias"]
        if branch == "mask":
            x = x + torch.where(masked[..., None], token, codes @ state["word_embed.weight"].T)
        x = x + state["lvl_embed.weight"][2] + state["pos_1LC"][:, 5:]
        expected = peer._transform(x, cond, masks.full(9, 9))
        found = (
            model.scale_logits(2, inputs, labels, model.make_cache(2))
            if branch == "ns"
            else model.refine_logits(2, inputs, codes, masked, labels)
        )
        assert expected.std() > 0.1
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
def test_a_checkpoint_of_var_begins_the_second_stage(tmp_path: Path):
    torch.save(var_weights(VARConfig(**SMALL)), tmp_path / "var.pth")
    model, first, peer = (
        HMAR(HMARConfig(**SMALL, tail=2)),
        HMAR(HMARConfig(**SMALL, tail=2, refinement=False)),
        None,
    )
    for net in (model, first):
        load_weights(net, tmp_path / "var.pth")
    peer = VAR(VARConfig(**SMALL)).eval()
    load_weights(peer, tmp_path / "var.pth")
    peer.mask = masks.next_scale_markov(peer.patch_nums)
    inputs, labels = torch.randn(2, 13, 8), torch.tensor([0, 3])
    expected = peer(inputs, labels)
    for net in (model, first, with_refinement(first)):
        torch.testing.assert_close(net.eval()(inputs, labels), expected)
    # With every token masked, the branch that was copied says what the first one says.
    nothing = torch.ones(2, 9, dtype=torch.bool)
    out = with_refinement(first).eval().refine_logits(2, inputs[:, 4:], torch.randn(2, 9, 8), nothing, labels)
    torch.testing.assert_close(out, expected[:, 5:])
    with pytest.raises(ValueError, match="refinement=False; make one with"):
        first.refine_logits(2, inputs[:, 4:], inputs[:, 4:], nothing, labels)


def test_the_second_stage_trains_its_branch_alone():
    torch.manual_seed(0)
    tokenizer = shaken(arcore.create_model("msvq_tiny")).eval()
    model = with_refinement(shaken(arcore.create_model("hmar_tiny")))
    indices = [torch.randint(128, (4, p * p)) for p in model.patch_nums]
    labels = torch.tensor([0, 1, 2, 9])
    model.requires_grad_(False)
    trained = model.refinement_parameters()
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    losses = []
    for _ in range(8):
        torch.manual_seed(1)
        loss = model.eval().refinement_loss(tokenizer, indices, labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]
    assert all(parameter.grad.any() for parameter in trained)
    assert sum(p.numel() for p in trained) < sum(p.numel() for p in model.parameters())


@torch.no_grad()
def test_refined_drawing():
    tokenizer = shaken(arcore.create_model("msvq_tiny")).eval()
    model = shaken(with_refinement(shaken(arcore.create_model("hmar_tiny"))), seed=3).eval()
    labels, options = torch.tensor([3, 7, 0]), {"cfg_scale": 1.0, "top_k": 50, "top_p": 0.95}
    once = [(side * side,) for side in model.patch_nums]
    plain = generate_refined(model, tokenizer, labels, schedule=once, seed=5, **options)
    other = generate_next_scale(model, tokenizer, labels, seed=5, **options)
    assert all(torch.equal(a, b) for a, b in zip(plain.indices, other.indices, strict=True))
    refined = generate_refined(model, tokenizer, labels, seed=[5, 6, 7], **options)
    part = generate_refined(model, tokenizer, labels[1:2], seed=[6], **options)
    assert all(torch.equal(a[1:2], b) for a, b in zip(refined.indices, part.indices, strict=True))
    again = generate_refined(model, tokenizer, labels, seed=[5] * 3, **options)
    plain = generate_refined(model, tokenizer, labels, seed=[5] * 3, schedule=once, **options)
    # Of scale 1 exactly one token of four stays for certain; the others are drawn anew.
    assert ((again.indices[1] == plain.indices[1]).sum(1) >= 1).all()
    assert not torch.equal(again.indices[1], plain.indices[1])
    with pytest.raises(ValueError, match=r"summing to \[1, 4, 9, 16\]"):
        generate_refined(model, tokenizer, labels, schedule=[(1,), (1, 2), (9,), (16,)])


@torch.no_grad()
def test_what_a_scale_adds_is_its_share_of_the_reconstruction():
    tokenizer = shaken(arcore.create_model("msvq_tiny")).eval()
    indices = [torch.randint(128, (2, p * p)) for p in tokenizer.patch_nums]
    latent = tokenizer.empty_latent(2)
    for k, codes in enumerate(indices[:-1]):
        after = tokenizer.add_scale(k, codes, latent)
        if k:
            difference = tokenizer.next_input(k - 1, after) - tokenizer.next_input(k - 1, latent)
            torch.testing.assert_close(own_inputs(tokenizer, k, codes), difference, rtol=1e-4, atol=1e-5)
        latent = after


def test_weights_and_schedule():
    weights = lognorm_weights(SIDES_256)
    assert sum(weights) == pytest.approx(1)
    # Sides 16 to 1 over 16: mean 0.425, deviation 0.3073; the first scale has the finest side's density.
    assert weights[0] / weights[9] == pytest.approx(
        2.718281828 ** ((((1 / 16 - 0.425) / 0.307318) ** 2 - ((1 - 0.425) / 0.307318) ** 2) / 2), rel=1e-3
    )
    assert sum(len(row) for row in published_schedule(SIDES_256)) == 14
    assert published_schedule(SIDES_512)[3] == (5, 11)
    assert all(
        sum(row) == side**2 for row, side in zip(published_schedule(SIDES_512), SIDES_512, strict=True)
    )
    assert HMAR(HMARConfig(**SMALL, tail=1)).scale_weights == pytest.approx(
        [w / n for w, n in zip(lognorm_weights((1, 2, 3)), (1, 4, 9), strict=True)]
    )


@torch.no_grad()
def test_training_weighs_the_scales():
    pytest.importorskip("pytorch_lightning")
    from arcore.recipes.next_scale import NextScaleTask
    from arcore.training import TrainConfig

    networks = {
        "model": shaken(arcore.create_model("hmar_tiny")),
        "tokenizer": arcore.create_model("msvq_tiny"),
    }
    task = NextScaleTask(TrainConfig(), networks, {}).eval()
    images, labels = torch.rand(4, 1, 8, 8) * 2 - 1, torch.arange(4)
    indices = task.tokenizer.encode(images)
    losses = -task.model(task.tokenizer.scale_inputs(indices), labels).log_softmax(-1)
    losses = losses.gather(2, torch.cat(indices, 1).unsqueeze(2)).squeeze(2)
    scales = losses.split([1, 4, 9, 16], dim=1)
    expected = sum(w * x.mean() for w, x in zip(lognorm_weights((1, 2, 3, 4)), scales, strict=True))
    torch.testing.assert_close(task.loss(images, labels)[0], expected)
    assert abs(losses.mean() - expected) > 1e-3


def test_a_wrong_setting_is_named():
    with pytest.raises(ValueError, match=r"tail in \[1, depth=3\] but got 4"):
        HMARConfig(**SMALL, tail=4)
    model = HMAR(HMARConfig(**SMALL, tail=1))
    with pytest.raises(ValueError, match="got scale 3"):
        model.scale_logits(3, torch.zeros(1, 9, 8), torch.tensor([0]), model.make_cache(1))


@torch.no_grad()
def test_scales_may_come_in_any_order():
    model = shaken(HMAR(HMARConfig(**SMALL, tail=1))).eval()
    inputs, labels, cache = torch.randn(2, 13, 8), torch.tensor([0, 1]), model.make_cache(2)
    starts = list(itertools.pairwise(model.scale_starts))[1:]
    parts = {
        k: model.scale_logits(k, inputs[:, starts[k - 1][0] - 1 : starts[k - 1][1] - 1], labels, cache)
        for k in (2, 1)
    }
    torch.testing.assert_close(torch.cat([parts[1], parts[2]], 1), model(inputs, labels)[:, 1:])


def test_both_stages_and_editing_from_the_command_line(tmp_path: Path, capsys: Any):
    from PIL import Image

    from arcore.catalog import load_checkpoint
    from arcore.cli import main

    short = ["--steps", "2", "--batch-size", "32", "--checkpoint-every", "2", "--accelerator", "cpu"]
    var, first, second = (tmp_path / name for name in ("var", "first", "second"))
    assert main(["train", "var_tiny", *short, "--tokenizer-steps", "1", "--out", str(var)]) == 0
    # A run of VAR becomes the first stage.
    tokenizer = ["--tokenizer", str(var / "tokenizer")]
    converted = ["--init-from", str(next(var.glob("step-*")) / "model.safetensors")]
    assert main(["train", "hmar_tiny", *short, *tokenizer, *converted, "--out", str(first)]) == 0
    assert main(["train", "hmar_tiny", *short, "--refine", str(first), "--out", str(second)]) == 0
    old, new = (load_checkpoint(next(run.glob("step-*")))[0]["model"] for run in (first, second))
    assert new.config.refinement
    state, copied = new.state_dict(), dict(old.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in copied.items())
    changed = [
        name
        for name, value in state.items()
        if name.startswith("mask_blocks")
        and not torch.equal(value, copied["ns_" + name.removeprefix("mask_")])
    ]
    assert changed
    Image.new("L", (8, 8), 90).save(tmp_path / "x.png")
    drawn = ["--class", "3", "-n", "2", "--out", str(tmp_path / "y.png"), "--edit", str(tmp_path / "x.png")]
    assert main(["sample", str(second), *drawn, "--redraw"]) == 0
    assert main(["sample", str(first), *drawn]) == 0
    capsys.readouterr()
    assert main(["sample", str(first), *drawn, "--redraw"]) == 2
    assert "second branch" in capsys.readouterr().err
    assert main(["train", "hmar_tiny", *short, "--refine", str(var), "--out", str(tmp_path / "no")]) == 2
    assert "no first stage" in capsys.readouterr().err
