"""X-Omni: text and image codes in one language model, policy gradients on the pixels that a diffusion decoder draws
(arXiv:2507.22058).

The model reads and writes one sequence: a caption, then `<SOM>7 7<IMAGE>`, then the codes of a 7 x 7 map row by row,
then `<EOM>`; or the picture first and the caption behind it. Codes have an embedding and a head of their own, and a few
layers at both ends act at image positions only. A network trained by flow matching draws pixels from the codes'
vectors. The last stage rewards pictures: groups of drafts of one prompt are drawn, decoded and scored, and GRPO moves
the language model. Drafts of a group are decoded from the same noise, so that they differ by their codes alone.

Left out: the tokenizer of semantic features (SigLIP2 and a captioning model); codes are those of VQ-16, or of one that
`ett` tuned through captions. The decoder is a small convolutional network in place of FLUX.

Legend: B rows, L tokens, C width, V codes, S side of the code map, c width of a code's vector.
"""

from __future__ import annotations

from typing import Any

from arcore.catalog import System

SYSTEM = System(
    name="xomni",
    title="X-Omni",
    paper="arXiv:2507.22058",
    paper_title="X-Omni: Reinforcement Learning Makes Discrete Autoregressive Image Generative Models Great Again",
    topic="multimodal",
    kind="model",
    model="XOmni",
    builds_on=("llama", "vq16", "ett"),
    ops=("block_sparse_attention", "sample", "token_logprobs"),
    recipe="own",
    summary="Text and image codes in one language model with a diffusion decoder, tuned by rewards on its pictures.",
    claim="Rewards on decoded pixels rise by .03 within a small KL; text positions pass the image layers unchanged.",
    checked_on="real data",
)


def __getattr__(name: str) -> Any:
    # The recipe needs the packages for training; the model does not.
    if name == "RECIPE":
        from arcore.zoo.multimodal.xomni.recipe import RECIPE

        return RECIPE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
