"""xTrimoPGLM: one transformer that understands and writes proteins, by blank infilling (Chen et al., arXiv:2401.06199).

It is GLM's objective (Du et al., arXiv:2103.10360) on amino acids. A text has two parts. Part A is the text with spans
replaced by one mask each, and sees itself in both directions; part B holds the spans, each behind a start token, sees
A and what came before it, and is predicted token by token. Tokens have two positions: where they, or the mask that
they belong to, stand in A; and where they stand in their span, 0 in A. Three tasks share the weights: single masked
tokens predicted where they stand (understanding), short spans, and a long span at the end (generation).

Positions are two learned tables, as in GLM, whose published weights fit, or rotary ones in two dimensions. Layers are
pre-norm, or DeepNorm with GEGLU and a head of its own as in xTrimoPGLM's released code, whose layout of weights loads;
these weights are on the model hub and were not tried, and their tokens are numbered by a vocabulary beside them.

Nearest neighbour here: `llama`, which reads to the left only.

Legend: B rows, L tokens, C width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from arcore.catalog import System

SYSTEM = System(
    name="xtrimopglm",
    title="xTrimoPGLM",
    paper="arXiv:2401.06199",
    paper_title="xTrimoPGLM: Unified 100B-Scale Pre-trained Transformer for Deciphering the Language of Protein",
    topic="biology",
    kind="model",
    model="GLM",
    ops=("block_sparse_attention", "sample"),
    recipe="own",
    summary="Blank infilling with two positions per token: understands, infills and writes proteins or text.",
    claim=(
        "Texts, targets and positions are GLM's; part A does not see part B; blanks of a bracket language are filled "
        "better than from the left alone."
    ),
    checked_on="synthetic data",
    reported="better than the other models compared in 18 benchmarks of understanding proteins, with 100 B parameters",
    aliases=("glm",),
)


def __getattr__(name: str) -> Any:
    # The recipe needs the packages for training; the network does not.
    if name == "RECIPE":
        from arcore.zoo.biology.xtrimopglm.recipe import RECIPE

        return RECIPE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
