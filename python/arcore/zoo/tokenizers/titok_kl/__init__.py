"""TiTok with continuous tokens: an image as a short sequence without places (Yu et al., arXiv:2406.07550).

A transformer reads the patches of an image and K learned tokens, and gives each of those a mean and a variance; the
decoder's transformer reads K latent tokens and a mask token for every patch, and convolutions make pixels of what
becomes of those. This is the variant by which AR-Diffusion (arXiv:2503.07418) codes frames: continuous tokens of
length 1 in place of a codebook.

Of the released code two turns are kept because weights depend on them: the K outputs of the encoder are laid out as if
channels came first before the last linear layer, and a block of the pixel decoder that changes its width adds its own
output once more through a 1x1 convolution in place of its input.

Legend: B images, K tokens, c values per token, D width, p patch side, G = side / p.
"""

from arcore.catalog import System

SYSTEM = System(
    name="titok_kl",
    title="TiTok",
    paper="arXiv:2406.07550",
    paper_title="An Image is Worth 32 Tokens for Reconstruction and Generation",
    topic="tokenizers",
    kind="model",
    model="TiTokKL",
    recipe="autoencoder",
    summary="Autoencoder of images as a short sequence of continuous tokens, those of AR-Diffusion's frames.",
    claim="Tokens have no places: each token changes pixels all over the image.",
    checked_on="random weights",
)
