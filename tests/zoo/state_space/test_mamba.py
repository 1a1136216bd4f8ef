"""Mamba: parity with transformers, published files, padding, packing, and the constant-size state."""

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
from arcore.models import Mamba, MambaConfig, load_weights

pytest.importorskip("safetensors")

SMALL: dict[str, Any] = {"d_model": 48, "n_layer": 3, "vocab_size": 93}


def small(**settings: Any) -> Mamba:
    """A model away from initialisation, so that biases, skips and norms count."""
    model = Mamba(MambaConfig(**SMALL | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def transformers_model(**settings: Any) -> Any:
    """A model of transformers with random weights, biases and norms included."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 3, "state_size": 8}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def published(model: Mamba) -> dict[str, Tensor]:
    """The weights under the names of the authors' code."""
    state = {f"backbone.{name}": value.clone() for name, value in model.state_dict().items()}
    if model.lm_head is None:
        state["lm_head.weight"] = state["backbone.embedding.weight"]
    else:
        state["lm_head.weight"] = state.pop("backbone.lm_head.weight")
    return state


def published_config(model: Mamba) -> dict[str, Any]:
    """config.json in the form of the authors' code."""
    config = model.config
    return {
        "d_model": config.d_model,
        "n_layer": config.n_layer,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {"d_state": config.d_state},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    }


def write_published(folder: Path, model: Mamba) -> None:
    torch.save(published(model), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(published_config(model)))


@torch.no_grad()
def test_a_constant_state_continues_any_text():
    """Each prefix length, down to one token, and chunks shorter than the convolution."""
    model, ids = small(), torch.randint(93, (2, 40))
    whole = model(ids)
    sizes, errors = set(), []
    for n in range(1, 40):
        cache = model.make_cache(2)
        errors.append((model.prefill(ids[:, :n], cache) - whole[:, n - 1]).abs().max())
        sizes.add(cache.conv.numel() + cache.ssm.numel())
        for t in range(n, min(n + 4, 40)):
            errors.append((model.step(ids[:, t], cache) - whole[:, t]).abs().max())
    cache = model.make_cache(2)
    for start, stop in [(0, 2), (2, 3), (3, 5), (5, 21), (21, 40)]:
        errors.append((model.prefill(ids[:, start:stop], cache) - whole[:, stop - 1]).abs().max())
    assert len(sizes) == 1
    assert cache.length == 40
    assert max(errors) <= 1e-5, max(errors)
    # The comparison can fail: without what the state carries, logits differ by far more than that.
    cache.ssm.zero_()
    assert (model.step(ids[:, 0], cache) - model(torch.cat([ids, ids[:, :1]], 1))[:, -1]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_bias": True, "use_conv_bias": False, "state_size": 16}, {"time_step_rank": 5, "expand": 3}],
)
@torch.no_grad()
def test_parity_with_transformers(settings: dict[str, Any], tmp_path: Path):
    theirs = transformers_model(**settings)
    theirs.save_pretrained(tmp_path)
    ours = arcore.create_model("mamba", weights=tmp_path).eval()
    ids = torch.randint(96, (2, 33))
    expected = theirs(ids).logits
    assert expected.std() > 0.5
    assert (ours(ids) - expected).abs().max() <= 1e-5
    continued = theirs.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None)[:, 33:]
    endless = generate(ours, ids, max_new_tokens=40, temperature=0.0, eos=())
    assert torch.equal(endless.ids, continued)
    # The token that ends a text comes from the config beside the weights, there and here.
    ended = theirs.generate(ids, max_new_tokens=40, do_sample=False)[:, 33:]
    assert ours.eos_ids == (theirs.config.eos_token_id,)
    assert torch.equal(generate(ours, ids, max_new_tokens=40, temperature=0.0).ids, ended)


def test_gradients_equal_those_of_transformers(tmp_path: Path):
    theirs = transformers_model()
    theirs.save_pretrained(tmp_path)
    ours = arcore.create_model("mamba", weights=tmp_path)
    ids = torch.randint(96, (2, 21))
    theirs(ids, labels=ids).loss.backward()
    F.cross_entropy(ours(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    renamed = ours.from_official({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, renamed[name], rtol=1e-4, atol=1e-6, msg=name)


@torch.no_grad()
def test_published_names_and_config(tmp_path: Path):
    model, ids = small(d_state=8), torch.randint(93, (2, 9))
    write_published(tmp_path, model)
    loaded = arcore.create_model("mamba", weights=tmp_path).eval()
    assert loaded.config == model.config
    # The vocabulary is padded: 93 tokens, 96 rows; what stands in the last three is never drawn.
    assert loaded.vocab_size == 93
    assert loaded(ids).shape == (2, 9, 96)
    assert torch.equal(loaded(ids), model(ids))
    loaded.embedding.weight[93:] = 100 * loaded.norm_f(loaded.embedding.weight[:1])
    assert generate(loaded, ids, max_new_tokens=20).ids.max() < 93
    # The file alone, or the folder for a preset with the same sizes.
    for weights in (tmp_path, tmp_path / "pytorch_model.bin"):
        same = arcore.create_model("mamba_tiny", weights=weights, d_state=8, **SMALL)
        assert torch.equal(same.eval()(ids), model(ids))


@torch.no_grad()
def test_last_layer_tied_missing_or_its_own(tmp_path: Path):
    model, ids = small(), torch.randint(93, (1, 5))
    state = published(model)
    del state["lm_head.weight"]
    torch.save(state, tmp_path / "tied.pt")
    assert torch.equal(
        arcore.create_model("mamba_tiny", weights=tmp_path / "tied.pt", **SMALL)(ids), model(ids)
    )
    own = small(tie_embeddings=False)
    torch.save(published(own), tmp_path / "own.pt")
    with pytest.raises(ValueError, match=r"own\.pt do not fit: lm_head\.weight is not the embedding"):
        arcore.create_model("mamba_tiny", weights=tmp_path / "own.pt", **SMALL)
    loaded = arcore.create_model("mamba_tiny", weights=tmp_path / "own.pt", tie_embeddings=False, **SMALL)
    assert torch.equal(loaded(ids), own(ids))


@torch.no_grad()
def test_weights_in_several_files(tmp_path: Path):
    from safetensors.torch import save_file

    model, ids = small(), torch.randint(93, (1, 5))
    (tmp_path / "config.json").write_text(json.dumps(published_config(model)))
    state = {name: value.clone() for name, value in published(model).items()}
    table = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(state)}
    for file in set(table.values()):
        save_file({name: state[name] for name in state if table[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    assert torch.equal(arcore.create_model("mamba", weights=tmp_path)(ids), model(ids))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        arcore.create_model("mamba", weights=tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has no table 'weight_map'"):
        arcore.create_model("mamba", weights=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2", "d_model": None}, r"expected d_model .* but got model_type='gpt2'"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "expected layers of kind Mamba1 but ssm_cfg has Mamba2"),
        ({"ssm_cfg": {"d_statte": 4}}, "ssm_cfg has unknown settings: d_statte"),
        ({"attn_layer_idx": [3]}, "attn_cfg has causal=false"),
        ({"n_layer": 0}, "expected n_layer to be at least 1 but got 0"),
        ({"n_layer": 2}, r"do not fit the model: \d+ unexpected \(layers\.2\.norm\.weight"),
        ({"d_model": 64}, r"\d+ of another shape \(embedding\.weight is \(96, 48\) instead of \(96, 64\)"),
    ],
)
def test_configs_that_do_not_fit(change: dict[str, Any], message: str, tmp_path: Path):
    model = small()
    write_published(tmp_path, model)
    content = {k: v for k, v in (published_config(model) | change).items() if v is not None}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        arcore.create_model("mamba", weights=tmp_path)


def test_damaged_files(tmp_path: Path):
    model = small()
    write_published(tmp_path, model)
    whole = (tmp_path / "pytorch_model.bin").read_bytes()
    for part in (whole[:100], whole[: len(whole) // 2], b""):
        (tmp_path / "pytorch_model.bin").write_bytes(part)
        with pytest.raises(ValueError, match=r"pytorch_model\.bin are damaged"):
            arcore.create_model("mamba", weights=tmp_path)
    (tmp_path / "config.json").write_text('{"d_model": 48')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        arcore.create_model("mamba", weights=tmp_path)
    (tmp_path / "config.json").write_text('{"d_model": 48}')
    with pytest.raises(ValueError, match=r"config\.json does not fit: .*n_layer"):
        arcore.create_model("mamba", weights=tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        arcore.create_model("mamba", weights=tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere do not exist"):
        arcore.create_model("mamba", weights=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="'mamba' is a system, not a preset"):
        arcore.create_model("mamba")


def test_our_own_checkpoint_by_the_name_of_the_system(tmp_path: Path):
    model = small()
    arcore.models.save_checkpoint(tmp_path / "run", {"model": model})
    loaded = arcore.create_model("mamba", weights=tmp_path / "run")
    assert loaded.config == model.config
    assert torch.equal(loaded.embedding.weight, model.embedding.weight)
    with pytest.raises(ValueError, match="expected one module of the system 'var'"):
        arcore.create_model("var", weights=tmp_path / "run")
    load_weights(Mamba(model.config), tmp_path / "run")


@torch.no_grad()
def test_left_padding_changes_nothing():
    """Rows of 1, 2, 7 and 20 tokens in one batch; what stands under the padding does not matter."""
    model, ids = small(bias=True), torch.randint(93, (4, 20))
    lengths = [1, 2, 7, 20]
    mask = torch.stack([torch.arange(20) >= 20 - n for n in lengths])
    logits, cache = model(ids, mask=mask), model.make_cache(4)
    last = model.prefill(ids, cache, mask)
    before = cache.snapshot()
    following = torch.randint(93, (4,))
    stepped = model.step(following, cache)
    for row, n in enumerate(lengths):
        alone, own = ids[row : row + 1, 20 - n :], model.make_cache(1)
        expected = model(alone)
        assert (logits[row, 20 - n :] - expected[0]).abs().max() <= 1e-5
        assert (last[row] - expected[0, -1]).abs().max() <= 1e-5
        model.prefill(alone, own)
        assert (before.conv[:, row] - own.conv[:, 0]).abs().max() <= 1e-5
        assert (before.ssm[:, row] - own.ssm[:, 0]).abs().max() <= 1e-5
        assert (stepped[row] - model.step(following[row : row + 1], own)[0]).abs().max() <= 1e-5
    other = torch.where(mask, ids, (ids + 1) % 93)
    assert torch.equal(model(other, mask=mask)[mask], logits[mask])


def test_left_padding_gives_the_same_gradients():
    model, ids = small(bias=True), torch.randint(93, (2, 12))
    mask = torch.stack([torch.arange(12) >= 5, torch.ones(12, dtype=torch.bool)])
    model(ids, mask=mask)[mask].square().sum().backward()
    padded = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (model(ids[:1, 5:]).square().sum() + model(ids[1:]).square().sum()).backward()
    for (name, p), grad in zip(model.named_parameters(), padded, strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-4 * float(p.grad.abs().max()), msg=name)


@torch.no_grad()
def test_a_long_prompt_is_read_in_pieces_with_the_same_result(monkeypatch: pytest.MonkeyPatch):
    """Of 64 tokens here; the first row is padding throughout the first piece."""
    model, ids = small(), torch.randint(93, (3, 150))
    mask = torch.stack([torch.arange(150) >= start for start in (70, 0, 149)])
    whole = model(ids, mask=mask)[:, -1]
    lengths = []
    mixer: Any = model.layers[0].mixer
    mixer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    monkeypatch.setattr("arcore.zoo.state_space.mamba.model.PREFILL_TOKENS", 192)
    cache = model.make_cache(3)
    assert (model.prefill(ids, cache, mask) - whole).abs().max() <= 1e-5
    assert lengths == [64, 64, 22]
    assert cache.length == 150
    following = torch.randint(93, (3, 1))
    longer = model(torch.cat([ids, following], 1), mask=F.pad(mask, (0, 1), value=True))
    assert (model.step(following[:, 0], cache) - longer[:, -1]).abs().max() <= 1e-5


@torch.no_grad()
def test_packed_rows_do_not_see_each_other():
    model = small()
    lengths = [5, 1, 2, 13, 3]
    parts = [torch.randint(93, (1, n)) for n in lengths]
    bounds = [sum(lengths[:i]) for i in range(6)]
    expected = torch.cat([model(part) for part in parts], dim=1)
    row = torch.cat(parts, dim=1)
    by_bounds = model(row, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    ids = torch.repeat_interleave(torch.arange(5, dtype=torch.int32), torch.tensor(lengths)).unsqueeze(0)
    assert (by_bounds - expected).abs().max() <= 1e-5
    # Packing several rows, with padding at the end.
    rows = F.pad(torch.cat([row, row.roll(3, 1)]), (0, 4))
    packed = torch.cat([F.pad(ids, (0, 4), value=-1), F.pad(ids * 0, (0, 4), value=-1)])
    logits = model(rows, seq_idx=packed)
    assert (logits[0, :-4] - expected[0]).abs().max() <= 1e-5
    assert (logits[1, :-4] - model(row.roll(3, 1))[0]).abs().max() <= 1e-5
    # It matters: without the boundaries, the second sequence sees the first.
    assert (model(row) - expected)[:, 5:].abs().max() > 1e-2


@torch.no_grad()
def test_low_precision_keeps_the_residual_stream_in_float32():
    ids = torch.randint(93, (2, 17))
    model = small(n_layer=6)
    exact, errors = model(ids), {}
    for kept in (True, False):
        low = Mamba(MambaConfig(**SMALL | {"n_layer": 6, "residual_in_fp32": kept})).eval()
        low.load_state_dict(model.state_dict())
        out = low.bfloat16()(ids)
        assert out.dtype == torch.float32
        errors[kept] = (out - exact).square().mean().sqrt()
        cache = low.make_cache(2)
        assert cache.ssm.dtype == torch.float32
        stepped = [low.prefill(ids[:, :16], cache), low.step(ids[:, 16], cache)]
        assert (stepped[1] - out[:, 16]).abs().max() <= 0.1 * exact.std()
    assert errors[True] < errors[False]
    assert errors[True] <= 0.02 * exact.std()


@torch.no_grad()
def test_initial_weights():
    torch.manual_seed(3)
    model = Mamba(MambaConfig(d_model=64, n_layer=9, vocab_size=500, bias=True))
    mixer: Any = model.layers[4].mixer
    assert model.embedding.weight.shape == (504, 64)
    assert abs(model.embedding.weight.std() - 0.02) < 1e-3
    assert mixer.dt_rank == 4
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(128, 16))
    assert torch.equal(mixer.D, torch.ones(128))
    dt = F.softplus(mixer.dt_proj.bias)
    assert dt.min() >= 1e-3 - 1e-6
    assert dt.max() <= 0.1 + 1e-6
    # Log-uniform: as many below the middle, 1e-2, as above.
    assert 40 <= (dt < 1e-2).sum() <= 88
    assert mixer.dt_proj.weight.abs().max() <= 0.5
    assert mixer.dt_proj.weight.abs().max() > 0.45
    # Kaiming uniform over sqrt(number of layers).
    bound = 1 / math.sqrt(128) / 3
    assert 0.95 * bound < mixer.out_proj.weight.abs().max() <= bound
    assert not mixer.in_proj.bias.any()
    assert not mixer.out_proj.bias.any()


def test_decay_and_skip_are_trained_without_weight_decay():
    task = pytest.importorskip("arcore.training.task")
    config = pytest.importorskip("arcore.training.config").TrainConfig(weight_decay=0.1)
    model = small()
    groups = task.parameter_groups(model, config.weight_decay)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert not any(name.endswith((".A_log", ".D", "norm.weight", "bias")) for name in names)
    assert {"embedding.weight", "layers.0.mixer.in_proj.weight"} <= names


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(torch.zeros(3, dtype=torch.int64)), ValueError, r"expected token ids of shape \[B, L\]"),
        (lambda m: m(torch.full((1, 3), 96)), ValueError, "expected token ids from 0 to 95 but got 96"),
        (
            lambda m: m(torch.zeros(1, 3, dtype=torch.int32)),
            TypeError,
            "token ids of dtype int64 but got int32",
        ),
        (
            lambda m: m(torch.ones(1, 3, dtype=torch.int64), mask=torch.ones(1, 3)),
            TypeError,
            "expected mask of dtype bool but got float32",
        ),
        (
            lambda m: m(torch.ones(1, 3, dtype=torch.int64), mask=torch.ones(1, 4, dtype=torch.bool)),
            ValueError,
            r"expected mask of shape \(1, 3\) but got \(1, 4\)",
        ),
        (
            lambda m: m(torch.ones(2, 3, dtype=torch.int64), cu_seqlens=torch.tensor([0, 3])),
            ValueError,
            "expected cu_seqlens of shape .* use seq_idx",
        ),
        (
            lambda m: m(
                torch.ones(1, 3, dtype=torch.int64),
                cu_seqlens=torch.tensor([0, 3]),
                seq_idx=torch.zeros(1, 3, dtype=torch.int32),
            ),
            ValueError,
            "expected seq_idx or cu_seqlens, not both",
        ),
        (
            lambda m: m(torch.ones(1, 3, dtype=torch.int64), cu_seqlens=torch.tensor([0, 4])),
            ValueError,
            r"expected cu_seqlens to rise from 0 to 3 but got \[0, 4\]",
        ),
        (
            lambda m: m.prefill(torch.ones(1, 0, dtype=torch.int64), m.make_cache(1)),
            ValueError,
            "expected at least one token per row",
        ),
        (
            lambda m: m.prefill(
                torch.ones(1, 3, dtype=torch.int64), m.make_cache(1), torch.tensor([[True, False, True]])
            ),
            ValueError,
            "expected padding only before the tokens of a row",
        ),
    ],
)
def test_errors(call: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call(small())


def test_padding_only_in_the_first_tokens_of_a_cache():
    model, ids = small(), torch.zeros(2, 3, dtype=torch.int64)
    cache = model.make_cache(2)
    model.prefill(ids, cache)
    with pytest.raises(ValueError, match="only in the first tokens that a cache receives"):
        model.prefill(ids, cache, torch.tensor([[False, True, True], [True, True, True]]))
    model.prefill(ids, cache, torch.ones(2, 3, dtype=torch.bool))
    assert cache.length == 6
