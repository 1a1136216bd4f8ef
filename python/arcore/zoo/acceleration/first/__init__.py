"""FiRST: routers decide from the prompt which layers a text skips (arXiv:2410.12513).

Each layer has a router, a linear map of the hidden state in front of it. Its probabilities, averaged over the prompt,
decide once for the whole text, so the keys and values of the layers that stay are complete and those that are skipped
have none. Phase 1 trains the routers on the frozen model, with the layer's output mixed softly with its input and a
price on layers that are kept. Then the threshold is set so that the wanted share of layers is skipped. Phase 2 keeps
the routers and adapts the model to what they skip, by low-rank matrices beside its linear layers (LoRA).

It differs from dropping layers once and for all in that texts of different kinds skip different ones. The paper's code
was not to be found; defaults that it does not give are marked as own choices.

Legend: B rows, N tokens, C width, l layer.
"""

from __future__ import annotations

from typing import Any

from arcore.catalog import System

SYSTEM = System(
    name="first",
    title="FiRST",
    paper="arXiv:2410.12513",
    paper_title="FiRST: Finetuning Router-Selective Transformers for Input-Adaptive Latency Reduction",
    topic="acceleration",
    kind="decoder",
    model="FirstPatch",
    builds_on=("llama",),
    ops=("block_sparse_attention", "sample"),
    recipe="own",
    summary="Routers choose from the prompt which layers a whole text skips; the cache holds none of their keys.",
    claim="Keeping all is the base model; routing is no worse than the best fixed drop; skipped layers cost nothing.",
    checked_on="synthetic data",
)


def __getattr__(name: str) -> Any:
    # The recipe needs the packages for training; the routers do not.
    if name == "RECIPE":
        from arcore.zoo.acceleration.first.recipe import RECIPE

        return RECIPE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
