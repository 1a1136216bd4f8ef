"""Multi-scale residual vector quantiser, the image tokenizer of VAR (arXiv:2404.02905, section 3.1, algorithms 1, 2).

An encoder turns the image into a latent map f. Scale by scale, coarse to fine, what is left of f is shrunk to p x p,
each of the p * p vectors is replaced by its nearest code, and the codes, enlarged again and smoothed by a convolution
phi, are taken off f. All scales share one codebook. The sum of what was taken off, f_hat, is decoded to an image, so
the first scales alone already give a blurred one: that is what lets VAR generate by scales.

Legend: B images, C latent channels (`z_channels`), p_k side of scale k, p_K of the last and of f, V codes,
L = sum of p_k^2 tokens.

Parameters and buffers bear the names of the published checkpoint (`vae_ch160v4096z32.pth`), which loads strictly.
Its training code was never published. The restart of dead codes, and with it the initialisation of the codebook
from data, is ours.
"""

from arcore.catalog import System

SYSTEM = System(
    name="msvq",
    title="Multi-scale VQ",
    paper="arXiv:2404.02905",
    paper_title="Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction",
    topic="tokenizers",
    kind="model",
    model="MultiScaleVQ",
    recipe="tokenizer",
    summary="Image tokenizer that codes an image as a sequence of token maps, coarse to fine.",
    claim=(
        "After training, what is left of the latent after the last scale is at most 0.2 times what is "
        "left after the first."
    ),
    checked_on="real data",
)
