"""Multi-scale binary spherical quantiser, the image tokenizer of Infinity (arXiv:2412.04431, section 3.2).

Like `msvq`, it codes what is left of a latent scale by scale, coarse to fine. A code is no entry of a table but the
signs of a normalised vector: d bits, +-1 / sqrt(d) each (arXiv:2406.07548), so 2^64 codes cost nothing to hold. What a
scale adds is enlarged without a convolution.

Legend: B images, C latent channels (bits of a latent place), d bits of a token (4 C where places are taken two by two),
p_k side of scale k in tokens, p_K of the last, L = sum of p_k^2 tokens.

Weights bear the names of the published files (`infinity_vae_d32reg.pth`) but for the wrappers around convolutions and
norms, and load strictly.
"""

from arcore.catalog import System

SYSTEM = System(
    name="msbsq",
    title="Multi-scale BSQ",
    paper="arXiv:2412.04431",
    paper_title="Infinity: Scaling Bitwise AutoRegressive Modeling for High-Resolution Image Synthesis",
    topic="tokenizers",
    kind="model",
    model="MultiScaleBSQ",
    builds_on=("msvq",),
    recipe="tokenizer",
    summary="Image tokenizer that codes an image as token maps of bits, coarse to fine.",
    claim="Bits and codes are one to one, and the scales of a trained tokenizer bring held-out images closer.",
    checked_on="real data",
)
