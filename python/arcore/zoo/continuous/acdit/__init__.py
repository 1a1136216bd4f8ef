"""ACDiT: diffusion transformer that goes block by block (Hu et al., arXiv:2412.07720).

A sequence of latent tokens is cut into blocks. Each is denoised as a diffusion transformer does, given the clean blocks
before it: blocks of one token make an autoregressive model, one block makes a DiT. In training one pass holds a clean
and a noisy copy of all blocks under `masks.skip_causal`; in generation clean blocks lie in a cache.

Only noisy tokens are modulated by time and class, so what is cached depends on neither: the conditional and the
unconditional copy of guidance read one cache. Both stand in one sequence behind it, hidden from each other.

The last clean block of a training sequence influences nothing and is left out.

Legend: B rows, T blocks, n tokens per block, P values per token, C width, p patch side, F frames.
"""

from arcore.catalog import System

SYSTEM = System(
    name="acdit",
    title="ACDiT",
    paper="arXiv:2412.07720",
    paper_title="ACDiT: Interpolating Autoregressive Conditional Modeling and Diffusion Transformer",
    topic="continuous",
    kind="model",
    model="ACDiT",
    builds_on=("dit",),
    ops=("block_sparse_attention",),
    recipe="block_diffusion",
    summary="Class-conditional image and video generator that denoises block after block.",
    claim="One pass under the skip-causal mask predicts for each block what denoising it against the cache does.",
    checked_on="published layout, random weights",
)
