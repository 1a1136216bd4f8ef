"""BICO: fine-tuning a causal language model in both directions (Lv et al., arXiv:2311.07468).

A model that has read "A is B" does not answer "B is". Here a part of the batches is masked: some tokens are replaced
and hidden from all others, attention runs in both directions, and the hidden state before a masked token predicts it.
For a key behind its query, queries and keys turn the other way round, so scores depend on |i - j| and the model meets
no distance that causal training had not shown. The other batches are ordinary ones, and inference is ordinary.

Both directions are one call of the attention op: each key stands twice, turned forwards and backwards, and the mask
gives a query the first copies up to itself and the second ones behind it.

Works on every `llama`, whole or through adapters (LoRA). Nearest neighbour here: `xtrimopglm`, which is bidirectional
by design and not by fine-tuning.

Legend: B rows, L tokens, C width, D width of a head.
"""

from __future__ import annotations

from typing import Any

from arcore.catalog import System

SYSTEM = System(
    name="bico",
    title="BICO",
    paper="arXiv:2311.07468",
    paper_title="Are We Falling in a Middle-Intelligence Trap? An Analysis and Mitigation of the Reversal Curse",
    topic="language",
    kind="objective",
    builds_on=("llama",),
    ops=("block_sparse_attention",),
    recipe="own",
    summary="Fine-tunes causal language models on masked tokens seen from both sides, against the reversal curse.",
    claim=(
        "Scores depend on the distance alone; without masks nothing changes; facts read in one order are answered in "
        "the other more often than after next-token training."
    ),
    checked_on="synthetic data",
    reported="about 70 % of reversed descriptions with Llama-7B on the data of the reversal curse, from about 0",
)


def __getattr__(name: str) -> Any:
    # The recipe needs the packages for training; the objective does not.
    if name == "RECIPE":
        from arcore.zoo.language.bico.recipe import RECIPE

        return RECIPE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
