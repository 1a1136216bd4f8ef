"""Mamba-3: published names, padding and packing, drafts, configs that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import arcore
from arcore.decoding import generate, speculative_chain
from arcore.decoding.drafters import LookupDrafter
from arcore.zoo.state_space.mamba3 import Mamba3, Mamba3Config

SMALL: dict[str, Any] = {
    "d_model": 32,
    "n_layer": 2,
    "vocab_size": 61,
    "d_state": 12,
    "head_dim": 16,
    "n_groups": 2,
}
KINDS = [{}, {"mimo_rank": 3}, {"mimo_rank": 2, "outproj_norm": True, "rope_fraction": 1.0}]


def shaken(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.no_grad()
def test_published_names_and_config(kind: dict[str, Any], tmp_path: Path):
    model = shaken(Mamba3(Mamba3Config(**SMALL, **kind, pad_vocab_size_multiple=16)))
    ids = torch.randint(61, (2, 9))
    names = {name.removeprefix("layers.0.mixer.") for name in model.state_dict() if "layers.0.mixer" in name}
    expected = {"in_proj.weight", "out_proj.weight", "dt_bias", "B_bias", "C_bias", "D"}
    expected |= {"B_norm.weight", "C_norm.weight"}
    expected |= {"mimo_x", "mimo_z", "mimo_o"} if "mimo_rank" in kind else set()
    expected |= {"norm.weight"} if "outproj_norm" in kind else set()
    assert names == expected
    rank = kind.get("mimo_rank", 1)
    mixer = model.layers[0].mixer
    assert mixer.B_bias.shape == (4, rank, 12)
    turning = 6 if kind.get("rope_fraction") == 1.0 else 3
    assert mixer.in_proj.weight.shape == (2 * 64 + 2 * 12 * 2 * rank + 3 * 4 + turning, 32)
    state = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    torch.save(state | {"lm_head.weight": state["backbone.embedding.weight"]}, tmp_path / "pytorch_model.bin")
    ssm: dict[str, Any] = {"layer": "Mamba3", "d_state": 12, "headdim": 16, "ngroups": 2, "chunk_size": 16}
    ssm |= {"is_mimo": True, "mimo_rank": rank} if "mimo_rank" in kind else {}
    ssm |= {"is_outproj_norm": True, "rope_fraction": 1.0} if "outproj_norm" in kind else {}
    content = {"d_model": 32, "n_layer": 2, "vocab_size": 61, "ssm_cfg": ssm, "pad_vocab_size_multiple": 16}
    (tmp_path / "config.json").write_text(json.dumps(content))
    loaded = arcore.create_model("mamba3", weights=tmp_path).eval()
    assert loaded.config == model.config
    assert torch.equal(loaded(ids), model(ids))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.no_grad()
def test_padding_packing_and_continuing(kind: dict[str, Any]):
    model, ids = shaken(Mamba3(Mamba3Config(**SMALL, **kind))), torch.randint(61, (2, 21))
    mask = torch.stack([torch.arange(21) >= 9, torch.ones(21, dtype=torch.bool)])
    expected = model(ids[:1, 9:])[0]
    assert (model(ids, mask=mask)[0, 9:] - expected).abs().max() <= 1e-4
    cache = model.make_cache(2)
    assert (model.prefill(ids, cache, mask)[0] - expected[-1]).abs().max() <= 1e-4
    packed = model(ids[:1], cu_seqlens=torch.tensor([0, 4, 5, 21]))[0]
    for start, stop in ((0, 4), (4, 5), (5, 21)):
        assert (packed[start:stop] - model(ids[:1, start:stop])[0]).abs().max() <= 1e-4
    # Parts that continue from a cache, and single tokens, are the whole.
    whole, cache = model(ids), model.make_cache(2)
    for start, stop in ((0, 7), (7, 8), (8, 20)):
        part = model.prefill(ids[:, start:stop], cache)
        assert (part - whole[:, stop - 1]).abs().max() <= 1e-4
    assert (model.step(ids[:, 20], cache) - whole[:, 20]).abs().max() <= 1e-4


def test_padding_between_tokens_is_passed_over():
    mixer = shaken(Mamba3(Mamba3Config(**SMALL))).layers[0].mixer
    x = torch.randn(1, 9, 32)
    ids = torch.tensor([[0, 0, -1, 0, -1, -1, 1, -1, 1]], dtype=torch.int32)
    out = mixer(x, seq_idx=ids)
    for sequence in (0, 1):
        places = (ids[0] == sequence).nonzero()[:, 0]
        torch.testing.assert_close(out[:, places], mixer(x[:, places]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_accepted_drafts_leave_the_state_of_the_accepted_text():
    model, ids = shaken(Mamba3(Mamba3Config(**SMALL))), torch.randint(61, (2, 12))
    cache = model.make_cache(2)
    model.prefill(ids[:, :5], cache)
    drafted = model.extend(ids[:, 5:9], cache)
    cache.commit([3, 0])
    for row, length in ((0, 8), (1, 5)):
        whole = model(ids[row : row + 1, :9])[0]
        assert (drafted.logits[row] - whole[5:]).abs().max() <= 1e-4
        again = model.make_cache(1)
        model.prefill(ids[row : row + 1, :length], again)
        assert (again.ssm[:, 0] - cache.ssm[:, row]).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["mamba_tiny", "mamba2_tiny", "mamba3_tiny"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_from_drafts_is_the_text_without(name: str, temperature: float):
    model = shaken(arcore.create_model(name))
    prompts = [[5, 6, 7, 5, 6, 7, 5, 6], [9, 8, 9, 8], [1]]
    options: dict[str, Any] = {
        "max_new_tokens": 24,
        "temperature": temperature,
        "seed": [3, 4, 5],
        "eos": 200,
    }
    plain = generate(model, prompts, **options)
    drafted = speculative_chain(model, LookupDrafter(4), prompts, **options)
    assert torch.equal(drafted.ids, plain.ids)
    assert torch.equal(drafted.lengths, plain.lengths)


def test_trains_and_generates():
    model = Mamba3(Mamba3Config(**SMALL, mimo_rank=2))
    ids = torch.randint(61, (2, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    out = generate(model, ids[:, :4], max_new_tokens=6, temperature=0.0).ids
    for t in range(6):
        text = torch.cat([ids[:, :4], out[:, :t]], 1)
        assert torch.equal(model(text)[:, -1, :61].argmax(-1), out[:, t])


def test_configs_that_do_not_fit():
    with pytest.raises(ValueError, match="expected head_dim to divide"):
        Mamba3(Mamba3Config(**SMALL | {"head_dim": 48}))
    with pytest.raises(ValueError, match="expected n_groups to divide the 4 heads"):
        Mamba3(Mamba3Config(**SMALL | {"n_groups": 3}))
    with pytest.raises(ValueError, match=r"rope_fraction 0\.5 or 1"):
        Mamba3(Mamba3Config(**SMALL | {"rope_fraction": 0.25}))
    with pytest.raises(ValueError, match="expected layers of kind Mamba3 but ssm_cfg has Mamba2"):
        Mamba3.official_config({"d_model": 8, "ssm_cfg": {"layer": "Mamba2"}})
    with pytest.raises(ValueError, match="unknown settings: rank"):
        Mamba3.official_config(
            {"d_model": 8, "n_layer": 1, "vocab_size": 3, "ssm_cfg": {"layer": "Mamba3", "rank": 1}}
        )
