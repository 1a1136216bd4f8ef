"""transformers' Mamba models on our kernels give what they give without, and go back to it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

import arcore.integrations.transformers as kernels  # noqa: E402

SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def _afterwards_disabled() -> Iterator[None]:
    yield
    kernels.disable()


HYBRID: dict[str, Any] = SIZES | {
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 6,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
    "mamba_expand": 2,
}


def hybrid(name: str) -> Any:
    """A tiny model of a family that mixes scans with attention."""
    if name == "bamba":
        config = transformers.BambaConfig(**HYBRID, **MAMBA2, attn_layer_indices=[1])
        return transformers.BambaForCausalLM(config)
    if name == "falcon_h1":
        return transformers.FalconH1ForCausalLM(
            transformers.FalconH1Config(**HYBRID, **MAMBA2, mamba_d_ssm=96, head_dim=12)
        )
    if name == "granitemoehybrid":
        config = transformers.GraniteMoeHybridConfig(
            **HYBRID,
            **MAMBA2,
            layer_types=["mamba", "attention"],
            num_local_experts=2,
            num_experts_per_tok=1,
            shared_intermediate_size=32,
        )
        return transformers.GraniteMoeHybridForCausalLM(config)
    if name == "nemotron_h":
        config = transformers.NemotronHConfig(
            **HYBRID | {"num_hidden_layers": 3},
            layers_block_type=["mamba", "attention", "mlp"],
            head_dim=12,
            mamba_num_heads=6,
            mamba_head_dim=16,
            ssm_state_size=8,
            n_groups=2,
            chunk_size=8,
        )
        return transformers.NemotronHForCausalLM(config)
    if name == "zamba2":
        config = transformers.Zamba2Config(
            **HYBRID | {"num_key_value_heads": 4},
            layers_block_type=["mamba", "hybrid"],
            mamba_d_state=8,
            mamba_ngroups=2,
            n_mamba_heads=6,
            mamba_headdim=16,
            chunk_size=8,
            mamba_expand=2,
            num_mem_blocks=1,
        )
        return transformers.Zamba2ForCausalLM(config)
    config = transformers.ZambaConfig(
        **HYBRID | {"num_key_value_heads": 4, "num_hidden_layers": 3},
        layers_block_type=["mamba", "hybrid", "hybrid"],
        mamba_d_state=8,
        n_mamba_heads=2,
    )
    return transformers.ZambaForCausalLM(config)


FAMILIES = ["mamba", "mamba2", "falcon_mamba", "jamba"]
HYBRIDS = ["bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba", "zamba2"]


@pytest.fixture(params=[*FAMILIES, *HYBRIDS])
def model(request: pytest.FixtureRequest) -> Any:
    if request.param == "mamba":
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES, state_size=8, use_bias=True))
    elif request.param == "mamba2":
        config = transformers.Mamba2Config(
            **SIZES, state_size=8, num_heads=6, head_dim=16, n_groups=2, chunk_size=8
        )
        model = transformers.Mamba2ForCausalLM(config)
    elif request.param == "falcon_mamba":
        model = transformers.FalconMambaForCausalLM(transformers.FalconMambaConfig(**SIZES, state_size=8))
    elif request.param in HYBRIDS:
        model = hybrid(request.param)
    else:
        config = transformers.JambaConfig(
            **SIZES | {"num_hidden_layers": 3},
            intermediate_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_layer_period=3,
            attn_layer_offset=2,
            num_experts=2,
            mamba_d_state=8,
            pad_token_id=0,
        )
        model = transformers.JambaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def functions() -> list[Any]:
    return [
        getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)
        for model, names in kernels._MODELS.items()
        for name in names
    ]


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, 96, (2, 23))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    return ids, mask


@torch.no_grad()
def test_logits_and_generation_are_the_same(model: Any):
    ids, mask = padded()
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    plain = model(ids, attention_mask=mask).logits
    tokens = model.generate(ids, attention_mask=mask, **settings)
    with kernels.enable():
        ours = model(ids, attention_mask=mask).logits
        assert torch.equal(model.generate(ids, attention_mask=mask, **settings), tokens)
    assert plain[mask.bool()].std() > 0.3
    assert (ours - plain)[mask.bool()].abs().max() <= 1e-5 * plain.abs().max()


def test_gradients_are_the_same(model: Any):
    ids, mask = padded()
    model.train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    with kernels.enable():
        ours = gradients()
    assert ours.keys() == plain.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()), msg=name)


def test_enabling_changes_the_functions_and_disabling_brings_them_back():
    before = functions()
    handle = kernels.enable()
    assert kernels.is_enabled()
    assert all(new is not old for new, old in zip(functions(), before, strict=True))
    enabled = functions()
    with kernels.enable():
        assert functions() == enabled
    # The inner block found it enabled and leaves it so.
    assert functions() == enabled
    with handle:
        pass
    assert functions() == before
    assert not kernels.is_enabled()
    kernels.disable()
    assert functions() == before
    with pytest.raises(KeyError, match="x"), kernels.enable():
        raise KeyError("x")
    assert functions() == before


@torch.no_grad()
def test_our_ops_are_what_runs(monkeypatch: pytest.MonkeyPatch):
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES)).eval()
    calls: list[tuple[str, int]] = []

    def count(name: str) -> None:
        op = getattr(kernels, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, args[0].shape[-1]))
            return op(*args, **kwargs)

        monkeypatch.setattr(kernels, name, counting)

    for name in ("causal_conv1d", "causal_conv1d_update", "selective_scan", "selective_state_update"):
        count(name)
    with kernels.enable():
        model.generate(torch.randint(96, (1, 9)), max_new_tokens=3, do_sample=False, eos_token_id=None)
    # Two layers; one pass over the prompt and two steps, whose state has 16 entries per channel.
    prompt = [("causal_conv1d", 9), ("selective_scan", 9)] * 2
    assert calls == prompt + [("causal_conv1d_update", 1), ("selective_state_update", 16)] * 4
    model(torch.randint(96, (1, 9)))
    assert len(calls) == 12


def test_packed_sequences_and_other_activations_are_not_ours():
    from transformers.models.mamba import modeling_mamba as module

    x, weight, ids = torch.randn(1, 6, 9), torch.randn(6, 4), torch.zeros(1, 9, dtype=torch.int32)
    plain = module.causal_conv1d_fn(x, weight, activation="gelu")
    with kernels.enable():
        assert torch.equal(module.causal_conv1d_fn(x, weight, activation="gelu"), plain)
        with pytest.raises(ValueError, match="can't keep packed sequences apart"):
            module.causal_conv1d_fn(x, weight, activation="silu", seq_idx=ids)


@torch.no_grad()
def test_what_we_cannot_serve_goes_to_the_functions_from_before():
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES)).eval().double()
    ids = torch.randint(96, (2, 11))
    plain = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    logits = model(ids).logits
    with kernels.enable():
        assert torch.equal(model(ids).logits, logits)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None), plain)


@torch.no_grad()
def test_bfloat16_is_at_least_as_close_to_float32():
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES)).eval()
    ids = torch.randint(96, (2, 40))
    exact = model(ids).logits
    low = model.bfloat16()
    plain = low(ids).logits
    with kernels.enable():
        ours = low(ids).logits
    error = lambda logits: (logits - exact).square().mean().sqrt()  # noqa: E731
    assert error(ours) <= 1.1 * error(plain)


def test_another_layout_of_transformers_is_refused(monkeypatch: pytest.MonkeyPatch):
    from transformers.models.jamba import modeling_jamba

    before = functions()
    original = modeling_jamba.mamba_selective_scan
    monkeypatch.delattr(modeling_jamba, "mamba_selective_scan")
    with pytest.raises(RuntimeError, match=r"functions for jamba elsewhere .* install transformers 5\.23"):
        kernels.enable()
    monkeypatch.setattr(modeling_jamba, "mamba_selective_scan", original, raising=False)
    assert functions() == before
    assert not kernels.is_enabled()


def test_it_says_what_it_left_alone():
    enabled = kernels.enable()
    assert set(HYBRIDS) <= set(enabled.models)
    assert not set(enabled.models) & set(enabled.left_alone)
    assert "causal_conv1d_fn" in enabled.left_alone["lfm2"]
    assert "left alone: " in repr(enabled)
