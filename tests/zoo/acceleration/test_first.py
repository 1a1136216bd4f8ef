"""FiRST: what routers decide, and models that skip layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.catalog import load_checkpoint, save_checkpoint
from arcore.catalog.claims import shaken
from arcore.cli import main
from arcore.decoding import LookupDrafter, Sampling, generate, speculative_chain
from arcore.decoding.laws import outcomes, small_model, text_law
from arcore.zoo.acceleration.first.routing import (
    FirstPatch,
    Routers,
    SkippingModel,
    calibrate,
    config_for,
    routed_loss,
    routed_skipping_loss,
)


class Protocol:
    """What both phases train, on a random model. Routers and adapters have no pass of their own to hold to more."""

    def __init__(self, preset: str) -> None:
        base = shaken(arcore.create_model("llama_tiny")).eval().requires_grad_(False)
        self.base = base
        self.ids = torch.randint(256, (4, 17))

    def loss(self, patch: Any) -> Tensor:
        base = copy.deepcopy(self.base)
        patch.attach(base)
        soft, _ = routed_loss(base, patch.routers, self.ids, price=0.1)
        skipping, _ = routed_skipping_loss(base, patch.routers, self.ids, prompt=8)
        return soft + skipping


class Contract:
    """Texts of two tokens out of three by a model whose routers keep all layers."""

    bound = 0.0

    def __init__(self) -> None:
        model = small_model(3, layers=3)
        self.model = SkippingModel(model, Routers(32, 3))
        self.law = text_law(model, [1, 2], 2, Sampling())

    def draw(self, count: int, seed: int) -> tuple[Tensor, int]:
        out = generate(self.model, [[1, 2]] * count, max_new_tokens=2, seed=seed)
        return outcomes(out.ids, 3), 2 * count

    def plain_calls(self, count: int) -> int:
        return 2 * count


@torch.no_grad()
def test_skipping_with_a_cache_is_the_model_without_those_layers() -> None:
    model, shorter = small_model(7, layers=5), small_model(7, layers=5)
    del shorter.layers[3], shorter.layers[1]
    skipping = SkippingModel(model, skip=[1, 3])
    prompts = [[1, 2, 1, 2], [3]]
    expected = generate(shorter, prompts, max_new_tokens=20, seed=3).rows()
    assert generate(skipping, prompts, max_new_tokens=20, seed=3).rows() == expected
    assert speculative_chain(skipping, LookupDrafter(), prompts, max_new_tokens=20, seed=3).rows() == expected
    assert model.skipped == frozenset()
    cache = skipping.make_cache(2, 12)
    skipping.prefill(torch.tensor([[1, 2], [3, 4]]), cache)
    assert cache.keys.shape[0] == 3
    assert torch.equal(model(torch.tensor([[1, 2]])), small_model(7, layers=5)(torch.tensor([[1, 2]])))


@torch.no_grad()
def test_routers_decide_by_their_mean_over_the_prompt() -> None:
    model, routers = small_model(7, layers=4), Routers(32, 4)
    routers.routers[1].bias.fill_(-3.0)
    assert SkippingModel(model, routers).decide(torch.tensor([[1, 2, 3]])) == (1,)
    # The ends are never skipped.
    for router in routers.routers:
        router.bias.fill_(-3.0)
    assert SkippingModel(model, routers).decide(torch.tensor([[1, 2, 3]])) == (1, 2)
    # A router that looks at the state: above the mean one way, below it the other.
    x = model.embed(torch.tensor([[1, 2, 3]]))
    visible, angles = model.behind((0,), 3, x.device)
    direction = model.layers[0](x, angles, visible).mean(1)[0]
    for sign, expected in ((1.0, (2,)), (-1.0, (1, 2))):
        routers.routers[1].weight.copy_(sign * direction.unsqueeze(0))
        routers.routers[1].bias.fill_(0.0)
        assert SkippingModel(model, routers).decide(torch.tensor([[1, 2, 3]])) == expected


def test_the_soft_loss_is_the_model_where_all_is_kept_and_prices_the_rest() -> None:
    model, routers = small_model(7, layers=4), Routers(32, 4)
    ids = torch.randint(7, (3, 9))
    with torch.no_grad():
        for router in routers.routers:
            router.bias.fill_(40.0)
    loss, mean = routed_loss(model, routers, ids, price=0.5)
    plain = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, plain + 0.5)
    assert mean == 1.0
    loss.backward()
    assert all(p.grad is None for p in model.parameters())


def test_refuses_what_does_not_fit() -> None:
    model = small_model(7, layers=3)
    with pytest.raises(ValueError, match="one of them"):
        SkippingModel(model)
    with pytest.raises(ValueError, match="not all, but got"):
        SkippingModel(model, skip=[0, 1, 2])
    with pytest.raises(ValueError, match="at most 1 layers"):
        Routers(8, 1)
    with pytest.raises(ValueError, match="without padding"):
        generate(SkippingModel(model, Routers(32, 3)), [[1, 2], [3]], max_new_tokens=2)


def test_sharpness_is_smallest_for_sure_routers() -> None:
    model, routers = small_model(7, layers=4), Routers(32, 4)
    ids = torch.randint(7, (3, 9))
    losses = []
    for bias in (0.0, 40.0):
        for router in routers.routers:
            router.bias.data.fill_(bias)
        plain, sharp = (routed_loss(model, routers, ids, price=0.0, sharpness=s)[0] for s in (0.0, 1.0))
        losses.append(float((sharp - plain).detach()))
    assert losses == pytest.approx([0.25, 0.0], abs=1e-6)


def test_the_threshold_is_set_so_that_the_wanted_share_is_skipped() -> None:
    model, routers = small_model(7, layers=6, seed=3), Routers(32, 6)
    for router in routers.routers:
        torch.nn.init.normal_(router.weight)
        torch.nn.init.zeros_(router.bias)
    texts = [torch.randint(7, (1, 5)) for _ in range(40)]
    for skip in (1 / 6, 2 / 6):
        assert calibrate(model, routers, texts, skip) == pytest.approx(skip, abs=0.05)
        decided = [SkippingModel(model, routers).decide(text) for text in texts]
        assert sum(map(len, decided)) / (6 * 40) == pytest.approx(skip, abs=0.05)


def test_adapters_change_nothing_at_first_and_are_merged_into_the_weights() -> None:
    model, plain = small_model(7, layers=4), small_model(7, layers=4)
    ids = torch.randint(7, (2, 9))
    patch = FirstPatch(config_for(model))
    patch.attach(model)
    assert torch.equal(model(ids), plain(ids))
    loss, share = routed_skipping_loss(model, patch.routers, ids, prompt=4)
    torch.testing.assert_close(loss, F.cross_entropy(plain(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()))
    assert share == 0
    loss.backward()
    assert all(adapter.up.grad.abs().sum() > 0 for layer in patch.adapters for adapter in layer)
    with torch.no_grad():
        for parameter in patch.adapters.parameters():
            parameter.normal_(std=0.1)
        changed = model(ids)
        patch.merge(model)
    torch.testing.assert_close(model(ids), changed)
    assert not torch.allclose(changed, plain(ids))
    assert set(model.state_dict()) == set(plain.state_dict())


def test_rows_that_skip_other_layers_are_those_that_run_alone() -> None:
    model, routers = small_model(7, layers=5, seed=2), Routers(32, 5)
    for router in routers.routers:
        torch.nn.init.normal_(router.weight, std=3.0)
        torch.nn.init.zeros_(router.bias)
    ids = torch.randint(7, (8, 9))
    chooser = SkippingModel(model, routers)
    decided = [chooser.decide(row[None, :4]) for row in ids]
    assert len(set(decided)) > 1
    together, _ = routed_skipping_loss(model, routers, ids, prompt=4)
    alone = [routed_skipping_loss(model, routers, row[None], prompt=4)[0] for row in ids]
    torch.testing.assert_close(together, torch.stack(alone).mean())


def test_a_patch_of_another_model_is_refused() -> None:
    patch = FirstPatch(config_for(small_model(7, layers=4)))
    with pytest.raises(ValueError, match="of 4 layers of width 32 but this one has 5"):
        patch.check(small_model(7, layers=5))
    with pytest.raises(TypeError, match="layers of Llama's kind"):
        config_for(torch.nn.Linear(2, 2))


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"preset": "llama_tiny", "text_tokenizer": "bytes"}
    sizes = {"dim": 32, "num_layers": 4, "num_heads": 2, "num_kv_heads": 1, "hidden_dim": 48}
    save_checkpoint(tmp_path / "lm", {"model": shaken(arcore.create_model("llama_tiny", **sizes))}, facts)
    (tmp_path / "text.txt").write_text("in the beginning was the word, and the word was " * 60)
    asked = ["train", "first", "--base", str(tmp_path / "lm"), "--data", str(tmp_path / "text.txt")]
    asked += [
        "--context",
        "16",
        "--steps",
        "4",
        "--batch-size",
        "4",
        "--checkpoint-every",
        "2",
        "--keep-last",
        "2",
    ]
    assert main([*asked, "--skip", "0.25", "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    write = ["sample", str(tmp_path / "run"), "--prompt", "in the", "--max-new-tokens", "5"]
    assert main(write) == 0
    assert "skipped layers: " in capsys.readouterr().out
    assert main([*write, "--decoder", "suffix", "--temperature", "0"]) == 0
    # The routers stay as they are while the model is adapted.
    networks = [
        load_checkpoint(tmp_path / "run" / name)[0]["model"] for name in ("step-00000002", "step-00000004")
    ]
    for name, value in networks[0].routers.named_parameters():
        assert torch.equal(value, dict(networks[1].routers.named_parameters())[name])
    assert any(adapter.up.abs().sum() > 0 for layer in networks[1].adapters for adapter in layer)
    for more, complaint in (
        (["--skip", "0.9"], "at most 0.50 of the 4 layers may be skipped"),
        (["--skip", "1.5"], "--skip must be between 0 and 1"),
    ):
        assert main([*asked, *more, "--out", str(tmp_path / "other")]) == 2
        assert complaint in capsys.readouterr().err
    assert main(["train", "first", "--out", str(tmp_path / "other")]) == 2
    assert "--base FOLDER" in capsys.readouterr().err
