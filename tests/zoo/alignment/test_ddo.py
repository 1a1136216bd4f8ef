"""DDO: the objective's contract, its closed form, self-play on a next-scale model."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import arcore
from arcore.catalog.claims import shaken
from arcore.models import load_checkpoint, save_checkpoint
from arcore.zoo.alignment.ddo import (
    Options,
    code_logprobs,
    contrastive_labels,
    ddo_loss,
    ddo_terms,
    optimum,
    run,
    self_play,
)

Batch = dict[str, Tensor]


class Contract:
    """Data and draws of up to six tokens."""

    learns = ("logp", "own")
    tolerance = 1e-12

    def batch(self, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        batch = {
            name: -2 * torch.rand(4, 6, generator=generator, dtype=torch.float64)
            for name in ("logp", "ref", "own", "own_ref")
        }
        batch["mask"] = torch.arange(6) < torch.tensor([6, 1, 4, 3])[:, None]
        batch["own_mask"] = torch.arange(6) < torch.tensor([2, 6, 5, 3])[:, None]
        return batch | {"labelled": torch.tensor([True, False, True, True])}

    def loss(self, batch: Batch) -> Tensor:
        return ddo_loss(**batch, alpha=3.0, beta=0.4)

    def reference(self, batch: Batch) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for row in range(4):
            d = torch.zeros((), dtype=torch.float64)
            own = torch.zeros((), dtype=torch.float64)
            for place in range(batch["mask"].shape[1]):
                if batch["mask"][row, place]:
                    d = d + batch["logp"][row, place] - batch["ref"][row, place]
                if batch["own_mask"][row, place]:
                    own = own + batch["own"][row, place] - batch["own_ref"][row, place]
            total = total - torch.log(1 / (1 + torch.exp(-0.4 * d))) / 4
            if batch["labelled"][row]:
                total = total - 3.0 * torch.log(1 - 1 / (1 + torch.exp(-0.4 * own))) / 4
        return total

    def special_case(self) -> tuple[Tensor, Tensor]:
        """At the reference nothing is told apart."""
        batch = self.batch(3)
        same = batch | {"logp": batch["ref"], "own": batch["own_ref"]}
        return self.loss(same), torch.tensor((1 + 3.0 * 3 / 4) * math.log(2), dtype=torch.float64)

    def padded(self, batch: Batch) -> Batch:
        wide = {
            name: torch.nn.functional.pad(batch[name], (0, 3), value=-7.0)
            for name in ("logp", "ref", "own", "own_ref")
        }
        masks = {name: torch.nn.functional.pad(batch[name], (0, 3)) for name in ("mask", "own_mask")}
        return batch | wide | masks


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.3])
def test_the_gradient_is_zero_at_the_closed_form(beta: float) -> None:
    data, ref = (torch.randn(12, dtype=torch.float64).softmax(0) for _ in range(2))
    best, alpha = optimum(data, ref, beta)
    for law, at_rest in ((best, True), (ref, False)):
        logp = law.log().clone().requires_grad_()
        of_data, of_draws = ddo_terms(logp, ref.log(), logp, ref.log(), beta=beta)
        ((data * of_data).sum() + alpha * (ref * of_draws).sum()).backward()
        assert (logp.grad.abs().max() < 1e-12) == at_rest


def test_large_ratios_stay_finite() -> None:
    far = torch.tensor([[-5000.0], [5000.0]], requires_grad=True)
    loss = ddo_loss(far, torch.zeros(2, 1), far, torch.zeros(2, 1), alpha=1.0, beta=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(5000.0)
    assert far.grad.isfinite().all()


def test_self_play_raises_data_above_own_draws(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = shaken(arcore.create_model("msvq_tiny")).eval()
    model = shaken(arcore.create_model("var_tiny"))
    images, labels = torch.rand(16, 1, 8, 8) * 2 - 1, torch.arange(16) % 10
    before = copy.deepcopy(model).eval()
    frozen = copy.deepcopy(tokenizer.state_dict())
    options = {"rounds": 2, "steps_per_round": 4, "batch_size": 8, "alpha": 1.0, "beta": 0.05, "lr": 3e-3}
    losses = self_play(model, tokenizer, images, labels, label_drop=0.0, **options)
    # Each round begins at its reference, where the loss is that of knowing nothing.
    assert losses[0] == pytest.approx(2 * math.log(2), abs=1e-5)
    assert losses[4] == pytest.approx(2 * math.log(2), abs=1e-5)
    assert losses[3] < losses[0]
    assert losses[7] < losses[4]
    codes = tokenizer.encode(images)
    with torch.no_grad():
        gain = code_logprobs(model, tokenizer, codes, labels) - code_logprobs(
            before, tokenizer, codes, labels
        )
    assert gain.sum(1).mean() > 0
    assert model.state_dict().keys() == before.state_dict().keys()
    assert all(torch.equal(value, frozen[name]) for name, value in tokenizer.state_dict().items())
    contrastive = self_play(before, tokenizer, images, labels, contrastive=True, **options)
    assert contrastive[3] < contrastive[0]
    assert contrastive_labels(torch.tensor([4, 5, 6])).tolist() == [6, 4, 5]


def test_the_command_tunes_a_checkpoint(tmp_path: Path) -> None:
    networks = {"model": arcore.create_model("var_tiny"), "tokenizer": arcore.create_model("msvq_tiny")}
    save_checkpoint(tmp_path / "old", {name: shaken(net) for name, net in networks.items()}, {"note": "ours"})
    options = Options(
        checkpoint=tmp_path / "old", data="digits", out=tmp_path / "new", rounds=1, steps=2, draws=1
    )
    report = run(options)
    assert len(report.values["losses"]) == 2
    assert {"accuracy_before", "accuracy_after"} <= report.values.keys()
    assert "before" in report.text
    with pytest.raises(ValueError, match="--data"):
        run(Options(checkpoint=tmp_path / "old"))
    tuned, meta = load_checkpoint(tmp_path / "new")
    assert meta == {"note": "ours"}
    assert not torch.equal(tuned["model"].pos_embed, networks["model"].pos_embed)
    with pytest.raises(ValueError, match="give it with --checkpoint"):
        run(Options())


def test_what_does_not_fit_is_named() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="expected beta > 0 but got 0"):
        ddo_loss(x, x, x, x, alpha=1.0, beta=0.0)
    with pytest.raises(ValueError, match="expected alpha >= 0 but got -1"):
        ddo_loss(x, x, x, x, alpha=-1.0, beta=1.0)
    with pytest.raises(ValueError, match=r"mask of shape \(2, 3\) but got \(2, 2\)"):
        ddo_loss(x, x, x, x, alpha=1.0, beta=1.0, mask=torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="a label for each picture"):
        self_play(None, None, torch.zeros(2, 1, 8, 8), torch.zeros(1, dtype=torch.int64))
