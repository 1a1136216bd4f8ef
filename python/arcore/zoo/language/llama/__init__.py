"""Llama: the decoder-only language model that most others are compared with (Touvron et al., arXiv:2302.13971).

Pre-norm layers of grouped-query attention with rotary positions and a gated feed-forward network, RMS norms, no
biases. Qwen2 (biases of queries, keys and values), Mistral (a sliding window), SmolLM2 and Llama 3 (stretched rotary
rates) are settings of it, and weights in the layout of transformers load strictly. It serves the decoders of the zoo
as their language model: besides `prefill` and `step` it reads several drafted tokens, a chain or a tree, in one call
(`extend`), and its cache keeps those that were accepted.

Left out: pipeline and tensor parallelism, and rotary rates stretched as in YaRN or LongRoPE.

Legend: B rows, L tokens, N drafted tokens, C width, V vocabulary.
"""

from arcore.catalog import System
from arcore.zoo.language.llama.model import Llama, LlamaConfig

__all__ = ["SYSTEM", "Llama", "LlamaConfig"]

SYSTEM = System(
    name="llama",
    title="Llama",
    paper="arXiv:2302.13971",
    paper_title="LLaMA: Open and Efficient Foundation Language Models",
    topic="language",
    kind="model",
    model="Llama",
    ops=("block_sparse_attention", "sample"),
    recipe="language",
    summary="Decoder-only language model; loads Llama, Qwen2, Mistral and SmolLM2 weights.",
    claim="Logits and greedy text are those of transformers on the same random weights.",
    checked_on="published layout, random weights",
    aliases=("smollm2", "qwen2_5", "mistral", "tinyllama"),
)
