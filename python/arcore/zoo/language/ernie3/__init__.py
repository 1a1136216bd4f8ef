"""ERNIE 3.0: one trunk for understanding and writing, and knowledge beside text (Sun et al., arXiv:2107.02137).

All tasks share a large trunk. On it stand two small networks: one for understanding (NLU), whose tokens see each other
in both directions, trunk included, and one for writing (NLG), causal in both; the same weights of the trunk under two
masks. Five tasks train them together: whole words hidden (NLU), the next token of a document that goes on from the
segment before (NLG), the order of shuffled pieces, how far two pieces are apart, and a triple of knowledge beside a
sentence that says it, with the relation or words of the sentence hidden.

Segments reach further by memory: a layer reads its own inputs of the segment before, as in Transformer-XL, or its own
outputs (`enhanced`, ERNIE-Doc, arXiv:2012.15688). Positions are rotary here in place of Transformer-XL's (own choice);
both depend on distances alone, which is what memory needs. Tokens are bytes, so a word is hidden as its bytes.

Left out: growing batches and lengths during the warm-up, and the published weights, which are for another framework.

Legend: B rows, L tokens, M tokens of memory, C width.
"""

from __future__ import annotations

from typing import Any

from arcore.catalog import System

SYSTEM = System(
    name="ernie3",
    title="ERNIE 3.0",
    paper="arXiv:2107.02137",
    paper_title="ERNIE 3.0: Large-scale Knowledge Enhanced Pre-training for Language Understanding and Generation",
    topic="language",
    kind="model",
    model="Ernie3",
    ops=("block_sparse_attention",),
    recipe="own",
    summary="A trunk under two masks with small networks for understanding and for writing; triples beside text.",
    claim=(
        "One call with both masks is two calls; memory is a longer context; relations are told better from triple and "
        "text than from the triple alone."
    ),
    checked_on="real data",
    reported="90.6 on SuperGLUE, people 89.8",
)


def __getattr__(name: str) -> Any:
    # The recipe needs the packages for training; the network does not.
    if name == "RECIPE":
        from arcore.zoo.language.ernie3.recipe import RECIPE

        return RECIPE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
