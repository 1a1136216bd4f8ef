"""Models of transformers with random weights in our loops, and with our attention op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from arcore.decoding import (
    LookupDrafter,
    ModelDrafter,
    Sampling,
    TreeShape,
    generate,
    jacobi,
    speculative_tree,
)
from arcore.integrations.transformers import TransformersModel, register_attention

SMALL: dict[str, Any] = {"vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 2}
ATTENTION: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, Any] = {
    "Llama": SMALL | ATTENTION,
    "Qwen2": SMALL | ATTENTION,
    "GPT2": {"vocab_size": 31, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "Mamba": SMALL | {"state_size": 4},
    "Mamba2": SMALL | {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
}
DRAFTABLE = ["Llama", "Qwen2", "GPT2"]
PROMPTS = [[1, 2, 3, 1, 2], [4], [5, 6, 5, 6, 5, 6, 5]]


def peer(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**CONFIGS[name])
    kind = f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_of_any_length_get_the_greedy_text_of_transformers(name: str) -> None:
    model = peer(name)
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0,
            eos_token_id=None, bos_token_id=None,
        )  # fmt: skip
        expected.append(out[0, len(prompt) :].tolist())
    assert generate(TransformersModel(model), PROMPTS, max_new_tokens=12, temperature=0.0).rows() == expected


@pytest.mark.parametrize("name", DRAFTABLE)
def test_drafts_do_not_change_the_text(name: str) -> None:
    model, small = TransformersModel(peer(name)), TransformersModel(peer(name, seed=1))
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0.8, "seed": 3}
    plain = generate(model, PROMPTS, **options).rows()
    shape = TreeShape.from_paths([(0,), (1,), (0, 0), (0, 1), (1, 0)])
    for drafter in (
        LookupDrafter(count=4),
        ModelDrafter(small, shape=shape),
        ModelDrafter(small, sampling=Sampling(temperature=0.0)),
    ):
        assert speculative_tree(model, drafter, PROMPTS, **options).rows() == plain
    assert jacobi(model, PROMPTS, window=5, coupling="common", **options).rows() == plain


@torch.no_grad()
@pytest.mark.parametrize("name", DRAFTABLE)
def test_our_attention_gives_transformers_its_own_numbers(name: str) -> None:
    model = peer(name)
    ids = torch.randint(31, (3, 11))
    padded = torch.ones_like(ids)
    padded[0, :4] = 0
    expected = [model(ids).logits, model(ids, attention_mask=padded).logits[:, 4:]]
    model.set_attn_implementation(register_attention())
    found = [model(ids).logits, model(ids, attention_mask=padded).logits[:, 4:]]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
    text = model.generate(ids, attention_mask=padded, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert text.shape == (3, 17)


@pytest.mark.parametrize("name", ["Mamba", "Mamba2"])
def test_a_state_comes_back_and_rows_are_selected(name: str) -> None:
    model = TransformersModel(peer(name))
    ids = torch.randint(31, (3, 6))
    cache = model.make_cache(3, 20)
    model.prefill(ids, cache)
    before = cache.snapshot()
    one = model.step(torch.tensor([1, 2, 3]), cache)
    cache.restore(before)
    torch.testing.assert_close(model.step(torch.tensor([1, 2, 3]), cache), one)
    cache.restore(before)
    cache.select([2, 0])
    torch.testing.assert_close(model.step(torch.tensor([3, 1]), cache), one[[2, 0]])


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(TypeError, match="it has no `extend`"):
        speculative_tree(TransformersModel(peer("Mamba")), LookupDrafter(), PROMPTS, max_new_tokens=2)
    with pytest.raises(ValueError, match="made for texts of 64 tokens"):
        generate(TransformersModel(peer("Llama")), PROMPTS, max_new_tokens=60)
    config = transformers.LlamaConfig(**CONFIGS["Llama"])
    with pytest.raises(TypeError, match="expected a causal language model"):
        TransformersModel(transformers.LlamaModel(config))
    config = transformers.MistralConfig(**CONFIGS["Llama"], sliding_window=4)
    with pytest.raises(TypeError, match="sliding window"):
        TransformersModel(transformers.MistralForCausalLM(config))
