"""Llama against transformers' Llama, Qwen2 and Mistral with the same random weights, and its ways to read tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from arcore.decoding import generate
from arcore.zoo.language.llama import Llama, LlamaConfig
from arcore.zoo.language.llama.presets import llama_tiny

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 97,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
PEERS = {
    "llama": ("Llama", {}),
    "tied, rope llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "rope linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "wide heads": ("Llama", {"head_dim": 24}),
    "qwen2": ("Qwen2", {}),
    "mistral": ("Mistral", {"sliding_window": 9}),
}
PARENTS = [-1, 0, 0, 1, 1, 2, 5]


def pair(name: str) -> tuple[Any, Llama]:
    """A model of transformers away from its initial weights, and ours with the same ones."""
    torch.manual_seed(0)
    kind, settings = PEERS[name]
    config = getattr(transformers, f"{kind}Config")(**SIZES | settings)
    peer = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    ours = Llama(Llama.official_config(config.to_dict())).eval()
    ours.load_state_dict(ours.from_official(peer.state_dict()))
    return peer, ours


@torch.no_grad()
@pytest.mark.parametrize("name", PEERS)
def test_logits_and_greedy_text_are_those_of_transformers(name: str) -> None:
    peer, ours = pair(name)
    ids = torch.randint(0, 97, (2, 40))
    expected = peer(ids).logits
    assert (ours(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = ids[:, :12]
    text = peer.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, **settings)
    assert torch.equal(generate(ours, prompt, max_new_tokens=20, temperature=0.0).ids, text[:, 12:])


def row_logits(model: Llama, row: Tensor) -> Tensor:
    return model(row.unsqueeze(0))[0, -1]


@torch.no_grad()
@pytest.mark.parametrize("name", ["rope linear", "mistral"])
def test_rows_of_different_lengths_are_read_as_if_alone(name: str) -> None:
    _, model = pair(name)
    ids = torch.randint(0, 97, (3, 30))
    counts = [23, 30, 9]
    mask = torch.arange(30) >= 30 - torch.tensor(counts).unsqueeze(1)
    cache = model.make_cache(3, 64)
    logits = model.prefill(ids, cache, mask)
    assert cache.lengths == tuple(counts)
    rows = [ids[r, 30 - n :] for r, n in enumerate(counts)]
    torch.testing.assert_close(logits, torch.stack([row_logits(model, row) for row in rows]))
    # Reading everything at once gives the same, wherever the padding is.
    torch.testing.assert_close(model(ids, mask=mask)[:, -1], logits)
    for token in ([1, 2, 3], [4, 5, 6]):
        logits = model.step(torch.tensor(token), cache)
        rows = [torch.cat([row, torch.tensor([t])]) for row, t in zip(rows, token, strict=True)]
        torch.testing.assert_close(logits, torch.stack([row_logits(model, row) for row in rows]))
    with pytest.raises(ValueError, match="first tokens that a cache"):
        model.prefill(ids, cache, mask)


@torch.no_grad()
def test_a_tree_of_drafts_is_read_as_its_paths_and_an_accepted_path_stays() -> None:
    _, model = pair("rope linear")
    ids, drafts = torch.randint(0, 97, (2, 10)), torch.randint(0, 97, (2, len(PARENTS)))
    mask = torch.tensor([[True] * 10, [False] * 4 + [True] * 6])
    texts = [ids[0], ids[1, 4:]]
    cache = model.make_cache(2, 40)
    model.prefill(ids, cache, mask)
    out = model.extend(drafts, cache, PARENTS)
    torch.testing.assert_close(model.logits(out.hidden), out.logits)
    for row, text in enumerate(texts):
        for node in range(len(PARENTS)):
            path, at = [], node
            while at >= 0:
                path, at = [at, *path], PARENTS[at]
            torch.testing.assert_close(
                out.logits[row, node], row_logits(model, torch.cat([text, drafts[row, path]]))
            )
    cache.keep([[0, 2, 5, 6], [0]])
    kept = [torch.cat([texts[0], drafts[0, [0, 2, 5, 6]]]), torch.cat([texts[1], drafts[1, :1]])]
    chain = torch.randint(0, 97, (2, 3))
    out = model.extend(chain, cache)
    for row in range(2):
        full = torch.cat([kept[row], chain[row]])
        torch.testing.assert_close(out.logits[row], model(full.unsqueeze(0))[0, -3:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["rope linear", "wide heads", "biases"])
@torch.no_grad()
def test_tokens_read_together_have_the_bits_of_one_after_the_other(name: str, dtype: torch.dtype) -> None:
    model = pair(name)[1].to(dtype)
    ids, drafts = torch.randint(0, 97, (3, 10)), torch.randint(0, 97, (3, len(PARENTS)))
    for parents, path in ((PARENTS, [0, 2, 5, 6]), (PARENTS, [0, 1, 4]), (None, range(len(PARENTS)))):
        cache, other = model.make_cache(3, 40), model.make_cache(3, 40)
        model.prefill(ids, cache)
        together = model.extend(drafts, cache, parents).logits
        model.prefill(ids, other)
        for node in path:
            assert torch.equal(model.step(drafts[:, node], other), together[:, node])


@torch.no_grad()
def test_packed_sequences_do_not_see_each_other() -> None:
    _, model = pair("qwen2")
    a, b = torch.randint(0, 97, (5,)), torch.randint(0, 97, (7,))
    ids = torch.cat([a, b]).unsqueeze(0)
    expected = torch.cat([model(a.unsqueeze(0)), model(b.unsqueeze(0))], dim=1)
    torch.testing.assert_close(model(ids, cu_seqlens=torch.tensor([0, 5, 12])), expected)
    torch.testing.assert_close(model(ids, seq_idx=torch.tensor([[0] * 5 + [1] * 7]).int()), expected)


def test_gradients_reach_every_parameter() -> None:
    model = Llama(llama_tiny())
    model(torch.randint(0, 256, (2, 9))).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_refuses_what_does_not_fit() -> None:
    _, model = pair("mistral")
    with pytest.raises(ValueError, match="made for texts of 128 tokens but 129"):
        generate(model, torch.zeros(1, 100, dtype=torch.int64), max_new_tokens=29)
    cache = model.make_cache(1, 16)
    with pytest.raises(ValueError, match="from 0 to 96"):
        model.prefill(torch.tensor([[97]]), cache)
    with pytest.raises(ValueError, match="at least one token"):
        model.prefill(torch.zeros(1, 0, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="tree of drafts cannot be read under a sliding window"):
        model.extend(torch.tensor([[1, 2]]), cache, [-1, -1])
    with pytest.raises(ValueError, match="padding only before"):
        model.prefill(torch.tensor([[1, 2]]), cache, torch.tensor([[True, False]]))
    config = transformers.LlamaConfig(**SIZES).to_dict()
    for change, message in (
        ({"model_type": "gpt2"}, "expected model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "stretched by 'yarn'"),
    ):
        with pytest.raises(ValueError, match=message):
            Llama.official_config(config | change)
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        Llama(LlamaConfig(dim=64, num_layers=1, num_heads=4, num_kv_heads=3, hidden_dim=8, vocab_size=4))
    with pytest.raises(ValueError, match="divide dim=65"):
        LlamaConfig(dim=65, num_layers=1, num_heads=4, num_kv_heads=4, hidden_dim=8, vocab_size=4)
    tied = Llama(LlamaConfig(**{**llama_tiny().__dict__, "tie_embeddings": True}))
    with pytest.raises(ValueError, match="set tie_embeddings=False"):
        tied.from_official(
            {"model.embed_tokens.weight": torch.zeros(2, 2), "lm_head.weight": torch.ones(2, 2)}
        )
