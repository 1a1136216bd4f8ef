"""Hybrids of state spaces and attention: the layout of the authors' code, caches, packing, drafts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.decoding import generate
from arcore.models import Mamba, Mamba2
from arcore.nn.ssm import CausalConv1d

pytest.importorskip("safetensors")

LAYERS = {
    "mamba": {"d_state": 8},
    "mamba2": {"layer": "Mamba2", "headdim": 8, "d_state": 16, "ngroups": 2},
}
ATTENTION: list[dict[str, Any]] = [
    {"num_heads": 4},
    {
        "num_heads": 4,
        "num_heads_kv": 2,
        "head_dim": 6,
        "rotary_emb_dim": 4,
        "d_conv": 4,
        "out_proj_bias": False,
        "qkv_proj_bias": False,
    },
    {
        "num_heads": 4,
        "num_heads_kv": 1,
        "head_dim": 16,
        "rotary_emb_dim": 16,
        "rotary_emb_interleaved": True,
        "rotary_emb_base": 500.0,
        "d_conv": 2,
        "mlp_dim": 100,
        "softmax_scale": 0.3,
    },
]


def content(kind: str, attention: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {
        "d_model": 32,
        "n_layer": 4,
        "vocab_size": 61,
        "d_intermediate": 0,
        "ssm_cfg": LAYERS[kind],
        "attn_layer_idx": [1, 3],
        "attn_cfg": {"causal": True, **attention},
        "rms_norm": True,
        "pad_vocab_size_multiple": 8,
    } | others


def made(kind: str, attention: dict[str, Any], **others: Any) -> Any:
    torch.manual_seed(0)
    cls: Any = {"mamba": Mamba, "mamba2": Mamba2}[kind]
    model = cls(cls.official_config(content(kind, attention, **others)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def attention_layer(w: dict[str, Tensor], given: dict[str, Any], x: Tensor) -> Tensor:
    """The authors' attention over one sequence `[L, C]`, one query and head after the other."""
    heads = given["num_heads"]
    keys = given.get("num_heads_kv", heads)
    size = given.get("head_dim", x.shape[1] // heads)
    inner = -(-given.get("mlp_dim", 0) // 256) * 256
    projected = x @ w["in_proj.weight"].T + w.get("in_proj.bias", torch.zeros(1))
    qkv, beside = projected[:, : projected.shape[1] - inner], projected[:, projected.shape[1] - inner :]
    if taps := given.get("d_conv", 0):
        padded = torch.cat([qkv.new_zeros(taps - 1, qkv.shape[1]), qkv])
        qkv = sum(padded[k : k + len(qkv)] * w["conv1d.weight"][:, 0, k] for k in range(taps))
        qkv = qkv + w["conv1d.bias"]
    q, k, v = (
        part.unflatten(-1, (-1, size)) for part in qkv.split([heads * size, keys * size, keys * size], -1)
    )
    turned = given.get("rotary_emb_dim", 0)
    base, pairs = given.get("rotary_emb_base", 1e4), given.get("rotary_emb_interleaved", False)

    def turn(t: Tensor, at: int) -> Tensor:
        t = t.clone()
        for i in range(turned // 2):
            a, b = (2 * i, 2 * i + 1) if pairs else (i, i + turned // 2)
            angle = at * base ** (-2 * i / turned)
            first, second = t[a].clone(), t[b].clone()
            t[a] = first * math.cos(angle) - second * math.sin(angle)
            t[b] = first * math.sin(angle) + second * math.cos(angle)
        return t

    scale = given.get("softmax_scale", size**-0.5)
    rows = []
    for i in range(len(x)):
        row = []
        for h in range(heads):
            g = h // (heads // keys)
            scores = torch.stack([turn(q[i, h], i) @ turn(k[j, g], j) * scale for j in range(i + 1)])
            row.append(scores.softmax(0) @ v[: i + 1, g])
        rows.append(torch.cat(row))
    out = torch.stack(rows)
    if inner:
        up, gate = beside.chunk(2, -1)
        out = torch.cat([out, up * gate * torch.sigmoid(gate)], -1)
    mixed: Tensor = out @ w["out_proj.weight"].T + w.get("out_proj.bias", torch.zeros(1))
    return mixed


@pytest.mark.parametrize("given", ATTENTION)
@torch.no_grad()
def test_the_attention_layer_is_that_of_the_authors_code(given: dict[str, Any]):
    layer = made("mamba", given).layers[1].mixer
    x = torch.randn(9, 32)
    w = {name: value.double() for name, value in layer.state_dict().items()}
    expected = attention_layer(w, given, x.double())
    assert expected.std() > 0.1
    torch.testing.assert_close(layer(x[None])[0].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@pytest.mark.parametrize("given", ATTENTION)
@pytest.mark.parametrize("width", [0, 100])
@torch.no_grad()
def test_a_published_file_and_its_decoding(kind: str, given: dict[str, Any], width: int, tmp_path: Path):
    others: dict[str, Any] = {"d_intermediate": width, "rms_norm": not width, "tie_embeddings": not width}
    model = made(kind, given, **others)
    state = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    state["lm_head.weight"] = state.pop("backbone.lm_head.weight", state["backbone.embedding.weight"])
    if rotary := given.get("rotary_emb_dim"):  # files of some versions hold the rates as well
        rates = given.get("rotary_emb_base", 1e4) ** (-torch.arange(0, rotary, 2) / rotary)
        state["backbone.layers.1.mixer.rotary_emb.inv_freq"] = rates
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(content(kind, given, **others)))
    loaded: Any = arcore.create_model(kind, weights=tmp_path).eval()
    assert loaded.config == model.config
    ids = torch.randint(61, (2, 90))
    whole = loaded(ids)
    assert torch.equal(whole, model(ids))
    # One pass, pieces and single tokens, in a cache that has to grow.
    cache = loaded.make_cache(2)
    assert (loaded.prefill(ids[:, :5], cache) - whole[:, 4]).abs().max() <= 2e-5
    assert (loaded.prefill(ids[:, 5:60], cache) - whole[:, 59]).abs().max() <= 2e-5
    for t in range(60, 90):
        assert (loaded.step(ids[:, t], cache) - whole[:, t]).abs().max() <= 2e-5
    assert cache.length == 90
    arcore.models.save_checkpoint(tmp_path / "own", {"model": loaded})
    assert torch.equal(
        arcore.create_model(kind, weights=tmp_path / "own").eval()(ids[:, :7]), loaded(ids[:, :7])
    )


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@torch.no_grad()
def test_padding_packing_and_pieces(kind: str, monkeypatch: pytest.MonkeyPatch):
    model, ids = made(kind, ATTENTION[1]), torch.randint(61, (3, 150))
    starts = (70, 0, 149)
    mask = torch.stack([torch.arange(150) >= start for start in starts])
    whole = model(ids, mask=mask)
    for row, start in enumerate(starts):
        alone = model(ids[row : row + 1, start:])[0]
        assert (whole[row, start:] - alone).abs().max() <= 2e-5
    monkeypatch.setattr("arcore.zoo.state_space.mamba.model.PREFILL_TOKENS", 192)
    cache = model.make_cache(3)
    assert (model.prefill(ids, cache, mask) - whole[:, -1]).abs().max() <= 2e-5
    assert cache.lengths == (80, 150, 1)
    following = torch.randint(61, (3, 2))
    longer = model(torch.cat([ids, following], 1), mask=F.pad(mask, (0, 2), value=True))
    for t in range(2):
        assert (model.step(following[:, t], cache) - longer[:, 150 + t]).abs().max() <= 2e-5
    packed = model(ids[:1], cu_seqlens=torch.tensor([0, 4, 5, 150]))[0]
    for start, stop in ((0, 4), (4, 5), (5, 150)):
        assert (packed[start:stop] - model(ids[:1, start:stop])[0]).abs().max() <= 2e-5


@torch.no_grad()
def test_the_attention_layer_passes_over_padding_wherever_it_stands():
    layer, x = made("mamba", ATTENTION[2] | {"d_conv": 0}).layers[1].mixer, torch.randn(1, 12, 32)
    holes = torch.zeros(1, 12, dtype=torch.int32)
    holes[0, [0, 4, 5, 11]] = -1
    real = holes[0] >= 0
    assert (layer(x, seq_idx=holes)[0, real] - layer(x[:, real])[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@torch.no_grad()
def test_drafts_rows_and_snapshots(kind: str):
    model, ids = made(kind, ATTENTION[1]), torch.randint(61, (3, 12))
    whole = model(ids)
    cache = model.make_cache(3)
    model.prefill(ids[:, :5], cache)
    drafted = model.extend(ids[:, 5:9], cache)
    assert (drafted.logits - whole[:, 5:9]).abs().max() <= 2e-5
    cache.keep(torch.tensor([[0, 1, 2], [-1, -1, -1], [0, -1, -1]]))
    assert cache.lengths == (8, 5, 6)
    kept = cache.snapshot()
    for _ in range(2):
        nexts = torch.stack([ids[0, 8], ids[1, 5], ids[2, 6]])
        logits = model.step(nexts, cache)
        for row, t in enumerate((8, 5, 6)):
            assert (logits[row] - whole[row, t]).abs().max() <= 2e-5
        model.step(torch.randint(61, (3,)), cache)
        cache.restore(kept)
    cache.select([2, 0, 2])
    logits = model.step(torch.stack([ids[2, 6], ids[0, 8], ids[2, 6]]), cache)
    for row, (source, t) in enumerate(((2, 6), (0, 8), (2, 6))):
        assert (logits[row] - whole[source, t]).abs().max() <= 2e-5
    with pytest.raises(ValueError, match="expected a snapshot of HybridCache"):
        cache.restore(made(kind, ATTENTION[0]).make_cache(3).snapshot())
    greedy = generate(model, ids[:, :5], max_new_tokens=9, temperature=0.0, eos=()).ids
    text = ids[:, :5]
    for _ in range(9):
        text = torch.cat([text, model(text)[:, -1, :61].argmax(-1, keepdim=True)], 1)
    assert torch.equal(greedy, text[:, 5:])


def test_it_trains():
    model, ids = made("mamba2", ATTENTION[2], d_intermediate=64).train(), torch.randint(61, (2, 12))
    model(ids).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if ".in_proj." in name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_cfg": {"num_heads": 4}}, "attn_cfg has causal=false, also where it says nothing"),
        (
            {"attn_cfg": {"causal": True, "num_heads": 4, "window": 3}},
            "attn_cfg has unknown settings: window",
        ),
        ({"attn_cfg": {"causal": True}}, "expected attn_num_heads to be a multiple of attn_num_heads_kv"),
        ({"attn_cfg": {"causal": True, "num_heads": 5}}, "expected attn_num_heads to divide d_model=32"),
        ({"attn_cfg": {"causal": True, "num_heads": 4, "rotary_emb_dim": 10}}, "even and from 0 to 8"),
        ({"attn_cfg": {"causal": True, "num_heads": 4, "d_conv": 1}}, "attn_d_conv to be 0 or at least 2"),
        ({"attn_layer_idx": [4]}, "some of the layers 0 to 3, not all, but got"),
        ({"attn_layer_idx": [0, 1, 2, 3]}, "some of the layers 0 to 3, not all"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Mamba2.official_config(content("mamba2", {"num_heads": 4}) | change)


def test_other_rates_than_those_of_the_config_are_refused():
    model = made("mamba2", ATTENTION[1])
    state = dict(model.state_dict()) | {"layers.1.mixer.rotary_emb.inv_freq": torch.ones(2)}
    with pytest.raises(ValueError, match="are not the rates of attn_rotary_base"):
        model.from_official(state)


def test_a_convolution_without_activation():
    conv, x = CausalConv1d(3, 2, activation=None), torch.randn(1, 3, 5)
    plain = F.conv1d(F.pad(x, (1, 0)), conv.weight, conv.bias, groups=3)
    torch.testing.assert_close(conv(x), plain)
