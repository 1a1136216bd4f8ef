"""Hydra: draft heads on a frozen language model that know what was drafted before them (arXiv:2402.05109).

A head proposes the token some places ahead from the model's last hidden state. Medusa's heads (arXiv:2401.10774) see
nothing else, so the tokens of a path are guessed independently; Hydra's head i also sees the embeddings of the tokens
on the path so far. The proposals form a static tree that the model reads in one call (`arcore.decoding.speculative`),
so at temperature 0 the text is that of plain decoding, token by token, and any number of rows can be decoded together.

Differs from its neighbour, a draft model (`arcore.decoding.ModelDrafter`), in that the heads are trained on the hidden
states of the model they serve and have no cache of their own.

Hydra++ is a setting: a prefix layer of the model's kind, with a cache of its own, between the model's hidden states and
the heads, more layers per head, and the model's own distributions as targets (`arcore train hydra --kind hydra++`).

Left out: noise on embeddings.

Legend: B rows, L tokens, C width of the model, V vocabulary, i head from 0.
"""

from __future__ import annotations

from typing import Any

from arcore.catalog import System

SYSTEM = System(
    name="hydra",
    title="Hydra",
    paper="arXiv:2402.05109",
    paper_title="Hydra: Sequentially-Dependent Draft Heads for Medusa Decoding",
    topic="acceleration",
    kind="model",
    model="HydraHeads",
    builds_on=("llama",),
    ops=("speculative", "sample", "block_sparse_attention"),
    recipe="own",
    summary="Draft heads that see the drafted path, with Medusa's heads as a setting; tree verification in batches.",
    claim="Greedy text is that of plain decoding, and Hydra's heads get more tokens per call than Medusa's.",
    checked_on="real data",
    aliases=("medusa",),
)


def __getattr__(name: str) -> Any:
    # The recipe needs the packages for training; the heads do not.
    if name == "RECIPE":
        from arcore.zoo.acceleration.hydra.recipe import RECIPE

        return RECIPE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
