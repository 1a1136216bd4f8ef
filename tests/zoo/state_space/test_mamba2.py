"""Mamba-2: the two forms of its mixer, parity with transformers, published files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import arcore
from arcore.decoding import generate
from arcore.models import Mamba2, Mamba2Config

pytest.importorskip("safetensors")

SMALL: dict[str, Any] = {
    "d_model": 48,
    "n_layer": 3,
    "vocab_size": 93,
    "d_state": 16,
    "head_dim": 16,
    "n_groups": 2,
}


def shaken(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"tie_word_embeddings": True},
        {"n_groups": 1, "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False},
        {"time_step_limit": (0.0, 0.2), "tie_word_embeddings": False},
    ],
)
@torch.no_grad()
def test_parity_with_transformers(settings: dict[str, Any], tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "state_size": 16,
        "num_heads": 6,
        "head_dim": 16,
        "n_groups": 2,
        "chunk_size": 8,
    }
    theirs = shaken(transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**sizes | settings)))
    theirs.save_pretrained(tmp_path)
    ours = arcore.create_model("mamba2", weights=tmp_path).eval()
    ids = torch.randint(96, (2, 33))
    expected = theirs(ids).logits
    assert expected.std() > 0.5
    assert (ours(ids) - expected).abs().max() <= 1e-5
    if "time_step_limit" not in settings:  # their single step forgets the limits
        continued = theirs.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None)[:, 33:]
        endless = generate(ours, ids, max_new_tokens=40, temperature=0.0, eos=())
        assert torch.equal(endless.ids, continued)


@torch.no_grad()
def test_published_names_and_config(tmp_path: Path):
    model, ids = shaken(Mamba2(Mamba2Config(**SMALL, dt_limit=(0.0, 1.0)))), torch.randint(93, (2, 9))
    state = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    torch.save(state | {"lm_head.weight": state["backbone.embedding.weight"]}, tmp_path / "pytorch_model.bin")
    content = {
        "d_model": 48,
        "d_intermediate": 0,
        "n_layer": 3,
        "vocab_size": 93,
        "ssm_cfg": {
            "layer": "Mamba2",
            "d_state": 16,
            "headdim": 16,
            "ngroups": 2,
            "chunk_size": 8,
            "dt_limit": [0.0, 1.0],
        },
        "attn_layer_idx": [],
        "rms_norm": True,
        "residual_in_fp32": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    loaded = arcore.create_model("mamba2", weights=tmp_path).eval()
    assert loaded.config == model.config
    assert torch.equal(loaded(ids), model(ids))
    with pytest.raises(ValueError, match="expected layers of kind Mamba1 but ssm_cfg has Mamba2"):
        arcore.create_model("mamba", weights=tmp_path)


@torch.no_grad()
def test_padding_and_packing():
    model, ids = shaken(Mamba2(Mamba2Config(**SMALL))), torch.randint(93, (2, 21))
    mask = torch.stack([torch.arange(21) >= 9, torch.ones(21, dtype=torch.bool)])
    expected = model(ids[:1, 9:])[0]
    assert (model(ids, mask=mask)[0, 9:] - expected).abs().max() <= 1e-5
    cache = model.make_cache(2)
    assert (model.prefill(ids, cache, mask)[0] - expected[-1]).abs().max() <= 1e-5
    packed = model(ids[:1], cu_seqlens=torch.tensor([0, 4, 5, 21]))[0]
    for start, stop in ((0, 4), (4, 5), (5, 21)):
        assert (packed[start:stop] - model(ids[:1, start:stop])[0]).abs().max() <= 1e-5


def test_configs_that_do_not_fit():
    with pytest.raises(ValueError, match="head_dim to divide expand"):
        Mamba2(Mamba2Config(**SMALL | {"head_dim": 36}))
    with pytest.raises(ValueError, match="expected num_groups to divide the 6 heads but got 4"):
        Mamba2(Mamba2Config(**SMALL | {"n_groups": 4}))
    with pytest.raises(ValueError, match="expected d_state to be at least 1"):
        Mamba2Config(**SMALL | {"d_state": 0})
    content = {"model_type": "mamba2", "hidden_size": 48, "num_hidden_layers": 1, "vocab_size": 9}
    with pytest.raises(ValueError, match=r"num_heads=3 times head_dim=16 is not expand \* hidden_size = 96"):
        Mamba2.official_config(content | {"num_heads": 3, "head_dim": 16})


@torch.no_grad()
def test_accepted_drafts_leave_the_state_of_the_accepted_text():
    model, ids = shaken(Mamba2(Mamba2Config(**SMALL))), torch.randint(93, (3, 12))
    cache = model.make_cache(3)
    model.prefill(ids[:, :5], cache)
    before = cache.snapshot()
    drafted = model.extend(ids[:, 5:9], cache)
    assert torch.equal(cache.ssm, before.ssm)
    cache.keep(torch.tensor([[0, 1, 2], [-1, -1, -1], [0, -1, -1]]))
    assert (drafted.logits - model(ids[:, :9])[:, 5:]).abs().max() <= 1e-5
    for row, count in enumerate((3, 0, 1)):
        again = model.make_cache(1)
        model.prefill(ids[row : row + 1, :5], again)
        again.ssm.copy_(before.ssm[:, row : row + 1])
        again.conv.copy_(before.conv[:, row : row + 1])
        # Only as many drafts as were accepted.
        if count:
            model.extend(ids[row : row + 1, 5 : 5 + count], again)
            again.commit(count)
        torch.testing.assert_close(again.ssm[:, 0], cache.ssm[:, row], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(again.conv[:, 0], cache.conv[:, row], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="a state has no branches"):
        model.extend(ids[:, :3], cache, parents=[-1, 0, 0])


def recurrence(w: dict[str, Tensor], config: Mamba2Config, u: Tensor) -> Tensor:
    """The mixer of the authors' code, token by token in float64, for `u` `[L, C]`."""
    whole = config.expand * config.d_model
    inner = config.d_ssm or whole
    heads, size, n, groups = inner // config.head_dim, config.head_dim, config.d_state, config.n_groups
    rest = whole - inner
    parts = u @ w["in_proj.weight"].T
    z0, x0, z, xbc, dt = parts.split([rest, rest, inner, inner + 2 * groups * n, heads], -1)
    taps = w["conv1d.weight"][:, 0]
    padded = torch.cat([xbc.new_zeros(taps.shape[1] - 1, xbc.shape[1]), xbc])
    conv = sum(padded[k : k + len(u)] * taps[:, k] for k in range(taps.shape[1])) + w["conv1d.bias"]
    conv = conv * torch.sigmoid(conv)
    x, b, c = conv.split([inner, groups * n, groups * n], -1)
    dt = torch.log1p(torch.exp(dt + w["dt_bias"]))
    state, out = torch.zeros(heads, size, n, dtype=u.dtype), []
    skip = w["D"].view(heads, -1)
    for t in range(len(u)):
        into = b[t].view(groups, n).repeat_interleave(heads // groups, 0)
        from_ = c[t].view(groups, n).repeat_interleave(heads // groups, 0)
        decay = torch.exp(-dt[t] * torch.exp(w["A_log"]))
        values = x[t].view(heads, size)
        state = decay[:, None, None] * state + dt[t][:, None, None] * values[:, :, None] * into[:, None, :]
        out.append((state @ from_[:, :, None])[..., 0] + skip * values)
    y = torch.stack(out).flatten(1)
    gate = z * torch.sigmoid(z)

    def norm(v: Tensor) -> Tensor:
        split = v.unflatten(-1, (groups, -1))
        return (split / (split.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * w["norm.weight"]

    if config.gated_norm:
        y, gate = (norm(y), gate) if config.norm_before_gate else (norm(y * gate), torch.ones(()))
    y = y * gate
    return torch.cat([z0 * torch.sigmoid(z0) * x0, y], -1) @ w["out_proj.weight"].T


@pytest.mark.parametrize(
    "layers",
    [
        {"d_ssm": 32},
        {"D_has_hdim": True},
        {"rmsnorm": False},
        {"norm_before_gate": True, "ngroups": 2},
        {"d_ssm": 32, "D_has_hdim": True, "rmsnorm": False},
    ],
)
@pytest.mark.parametrize("width", [0, 100])
@torch.no_grad()
def test_rarer_settings_of_the_authors_code(tmp_path: Path, layers: dict[str, Any], width: int):
    """Their config.json; against the recurrence, in one pass and token by token."""
    content = {
        "d_model": 32,
        "n_layer": 2,
        "vocab_size": 61,
        "d_intermediate": width,
        "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 16, **layers},
        "rms_norm": True,
        "pad_vocab_size_multiple": 16,
    }
    config = Mamba2.official_config(content)
    made = shaken(Mamba2(config)).eval()
    weights = {f"backbone.{key}": value for key, value in made.state_dict().items()}
    weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(content))
    model: Any = arcore.create_model("mamba2", weights=tmp_path).eval()
    assert model.config == config
    w = {key: value.double() for key, value in made.state_dict().items()}

    def rms(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]

    ids = torch.randint(61, (1, 13))
    x = w["embedding.weight"][ids[0]]
    for k in range(2):
        of_layer = {
            key.removeprefix(f"layers.{k}.mixer."): v for key, v in w.items() if f"layers.{k}.mixer." in key
        }
        x = x + recurrence(of_layer, config, rms(x, f"layers.{k}.norm"))
        if width:
            a, b = (rms(x, f"layers.{k}.norm2") @ w[f"layers.{k}.mlp.fc1.weight"].T).chunk(2, -1)
            assert a.shape[-1] == 128
            x = x + (a * b * torch.sigmoid(b)) @ w[f"layers.{k}.mlp.fc2.weight"].T
    expected = rms(x, "norm_f") @ w["embedding.weight"].T
    torch.testing.assert_close(model(ids)[0].double(), expected, rtol=0, atol=2e-5)
    cache = model.make_cache(1)
    last = [model.prefill(ids[:, :5], cache)]
    last += [model.step(ids[:, t], cache) for t in range(5, 13)]
    torch.testing.assert_close(torch.cat(last).double(), expected[4:], rtol=0, atol=2e-5)
    drafted = model.make_cache(1)
    model.prefill(ids[:, :5], drafted)
    torch.testing.assert_close(
        model.extend(ids[:, 5:], drafted).logits[0].double(), expected[5:], rtol=0, atol=2e-5
    )


def test_what_is_not_built_is_refused():
    content = {"d_model": 32, "n_layer": 2, "ssm_cfg": {"layer": "Mamba2", "headdim": 8}}
    with pytest.raises(ValueError, match="d_ssm from 1 to expand"):
        Mamba2(Mamba2.official_config({**content, "ssm_cfg": {**content["ssm_cfg"], "d_ssm": 128}}))
    with pytest.raises(ValueError, match="d_intermediate to be at least 0"):
        Mamba2.official_config({**content, "d_intermediate": -1})
