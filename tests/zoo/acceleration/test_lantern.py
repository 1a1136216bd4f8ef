"""LANTERN: the contract of a lossy decoder, whose distance from plain sampling is bounded for one chosen draft."""

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
from arcore.decoding import Context, ModelDrafter, Sampling, generate, speculative_tree
from arcore.decoding.laws import small_model, text_law
from arcore.ops import verify_relaxed
from arcore.ops.speculative import codebook_neighbours
from arcore.zoo.acceleration.lantern.drafter import FeatureDrafter, config_for, feature_loss, tree_of
from arcore.zoo.acceleration.lantern.relax import decode_image, relaxed_target


class Protocol:
    """A drafter in training on a random image model."""

    def __init__(self, preset: str) -> None:
        self.base = shaken(arcore.create_model("llamagen_tiny")).eval().requires_grad_(False)
        self.ids = torch.cat([self.base.prompt(torch.tensor([0, 5, 10])), torch.randint(4, (3, 63))], dim=1)

    def loss(self, drafter: Any) -> Tensor:
        return feature_loss(drafter, self.base, self.ids)


class Contract:
    """The next token when one token is proposed."""

    bound = 0.2

    def __init__(self) -> None:
        self.law = text_law(small_model(5), [1, 2], 1, Sampling())
        self.near = codebook_neighbours(torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), 4)

    def draw(self, count: int, seed: int) -> tuple[Tensor, int]:
        p = self.law.float().expand(count, 2, 5).contiguous()
        drafts = torch.full((count, 1), int(self.law.argmax()))
        seeds = torch.arange(count) + seed * 1_000_003
        out = verify_relaxed(p, drafts, self.near, seed=seeds, offset=0, delta=self.bound)
        return out.tokens[:, 0], count

    def plain_calls(self, count: int) -> int:
        return count


def test_the_relaxed_target_is_what_the_op_verifies_with() -> None:
    torch.manual_seed(0)
    p = torch.randn(6).softmax(-1)
    near = codebook_neighbours(torch.randn(6, 2), 3)
    target = relaxed_target(p, near, 0.3)
    torch.testing.assert_close(target.sum(-1), torch.ones(6))
    count = 40_000
    for draft in range(6):
        out = verify_relaxed(
            p.expand(count, 2, 6).contiguous(),
            torch.full((count, 1), draft),
            near,
            seed=torch.arange(count),
            offset=0,
            delta=0.3,
        )
        found = torch.bincount(out.tokens[:, 0], minlength=6) / count
        assert (found - target[draft]).abs().max() < 0.015


def test_images_with_delta_zero_are_those_of_plain_decoding() -> None:
    model = shaken(arcore.create_model("llamagen_tiny")).eval()
    drafter = ModelDrafter(shaken(arcore.create_model("llamagen_tiny"), seed=5).eval(), count=3)
    drafter.sampling = Sampling(temperature=0.0)
    prompt, codebook = model.prompt(torch.tensor([3, 10])), torch.randn(4, 2)
    out = decode_image(model, drafter, codebook, prompt, side=8, delta=0.0, seed=2)
    assert torch.equal(out.ids, generate(model, prompt, max_new_tokens=64, seed=2).ids)
    loose = decode_image(model, drafter, codebook, prompt, side=8, delta=0.5, seed=2)
    assert loose.tokens_per_round >= out.tokens_per_round
    pp = decode_image(model, drafter, codebook, prompt, side=8, delta=3.0, multiplicative=True, seed=2)
    assert pp.ids.shape == (2, 64)


def drafter_for(model: Any) -> Any:
    return shaken(FeatureDrafter(config_for(model))).eval()


@torch.no_grad()
def test_the_drafters_tree_in_a_batch_is_what_it_says_about_each_text_alone() -> None:
    model = shaken(arcore.create_model("llamagen_tiny")).eval()
    network = drafter_for(model)
    shape = tree_of(7, 4)
    assert shape.depth > 2

    class Checked(type(network.drafter(model, 7))):  # type: ignore[misc]
        checked = 0

        def propose(self, context: Context) -> Any:
            draft = super().propose(context)
            for row, text in enumerate(context.texts):
                if context.limits[row] <= 1 or (context.kept is not None and not context.kept[row]):
                    continue
                ids = torch.tensor([text])
                state = model.hidden(ids[:, :-1])
                for i in range(self.max_nodes):
                    path, at = [], shape.parents[i]
                    while at >= 0:
                        path, at = [int(draft.tokens[row, at]), *path], shape.parents[at]
                    known, full = state, ids
                    # Each drafted code's state is the drafter's own.
                    for code in path:
                        known = torch.cat([known, network(model, known, full[:, 1:])[:, -1:]], dim=1)
                        full = torch.cat([full, torch.tensor([[code]])], dim=1)
                    logits = model.logits(network(model, known, full[:, 1:])[0, -1])
                    wanted = logits.topk(shape.ranks[i] + 1).values[-1]
                    assert logits[draft.tokens[row, i]] == pytest.approx(float(wanted), abs=1e-4)
                    self.checked += 1
            return draft

    prompt = model.prompt(torch.tensor([3, 10]))
    plain = generate(model, prompt, max_new_tokens=20, seed=2).ids
    drafter = Checked(network, model, shape)
    assert torch.equal(speculative_tree(model, drafter, prompt, max_new_tokens=20, seed=2).ids, plain)
    assert drafter.checked > 50
    guided = model.guided(2.0)
    plain = generate(guided, prompt, max_new_tokens=20, seed=2).ids
    out = speculative_tree(guided, network.drafter(model, 7), prompt, max_new_tokens=20, seed=2)
    assert torch.equal(out.ids, plain)


def test_the_drafters_loss_is_smallest_for_the_models_own_states() -> None:
    torch.manual_seed(0)
    model = shaken(arcore.create_model("llamagen_tiny")).eval().requires_grad_(False)
    network = FeatureDrafter(config_for(model))
    ids = torch.cat([model.prompt(torch.arange(8)), torch.randint(4, (8, 63))], dim=1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        loss = feature_loss(network, model, ids, noise=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    states = model.hidden(ids)
    law = model.logits(states[:, 1:]).softmax(-1)
    network.forward = lambda model, states, ids: model.hidden(whole)[:, 1:]  # type: ignore[method-assign]
    whole = ids
    entropy = -(law * law.log()).sum(-1).mean()
    torch.testing.assert_close(feature_loss(network, model, ids, noise=0.0), 0.1 * entropy)


def test_trees_grow_along_likely_paths_and_other_models_are_refused() -> None:
    shape = tree_of(25, 100)
    assert len(shape.parents) == 25
    assert 2 <= shape.depth <= 4
    assert max(tree_of(25, 2).ranks) == 1
    network = drafter_for(arcore.create_model("llamagen_tiny"))
    other = arcore.create_model("llamagen_tiny", vocab_size=9)
    with pytest.raises(ValueError, match="with 4 tokens but this one has width 96 and 9 tokens"):
        network.drafter(other, 4)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = arcore.create_model("vq16_tiny", image_size=16)
    fields = {"vocab_size": tokenizer.vocab_size, "side": tokenizer.side}
    model = shaken(arcore.create_model("llamagen_tiny", dim=32, num_layers=1, **fields))
    names = [str(digit) for digit in range(10)]
    facts = {"preset": "llamagen_tiny", "data": "digits", "class_names": names}
    save_checkpoint(tmp_path / "base", {"model": model, "tokenizer": tokenizer}, facts)
    asked = ["train", "lantern", "--base", str(tmp_path / "base"), "--steps", "2"]
    assert main([*asked, "--batch-size", "32", "--out", str(tmp_path / "run")]) == 0
    assert "--decoder lantern --drafter" in capsys.readouterr().out
    draw = [
        "sample",
        str(tmp_path / "base"),
        "--class",
        "3",
        "-n",
        "2",
        "--decoder",
        "lantern",
        "--window",
        "5",
    ]
    draw += ["--drafter", str(tmp_path / "run"), "--out", str(tmp_path / "x.png")]
    for more in (["--delta", "0.1", "--neighbours", "1000"], ["--delta", "1", "--bound", "multiplicative"]):
        assert main([*draw, *more]) == 0
    assert "calls of the model" in capsys.readouterr().out
    assert main([*draw[:-4], "--drafter", str(tmp_path / "base"), "--out", str(tmp_path / "y.png")]) == 2
    assert "holds no drafter" in capsys.readouterr().err
    assert main([*draw, "--bound", "loose"]) == 2
    assert main(["train", "lantern", "--out", str(tmp_path / "z")]) == 2
    assert "--base FOLDER" in capsys.readouterr().err
