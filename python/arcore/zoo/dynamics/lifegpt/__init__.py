"""LifeGPT: a causal transformer that predicts the next state of a cellular automaton (Berkovich and Buehler,
arXiv:2409.12182).

A state is a text of 0 and 1, row by row, on a torus whose size the model is not told. The prompt is
`@PredictNextState<STATE> [`, and the model writes `NEXT STATE]$`. What it wrote is the next prompt, so it runs the
automaton. Rotary positions matter: a cell's neighbours stand at fixed distances in the prompt, and learned absolute
positions find them much later. In training a share of the tokens is hidden from all later ones (forgetful causal
masking, arXiv:2210.13432).

It is a `llama` with its own data and decoding; the original has GELU in place of the gated network. The loss here reads
the answer only, because the prompt is random (own choice).

Legend: B rows, L tokens, H x W cells.
"""

from __future__ import annotations

from typing import Any

from arcore.catalog import System

SYSTEM = System(
    name="lifegpt",
    title="LifeGPT",
    paper="arXiv:2409.12182",
    paper_title="LifeGPT: Topology-Agnostic Generative Pretrained Transformer Model for Cellular Automata",
    topic="dynamics",
    kind="model",
    model="LifeGPT",
    builds_on=("llama",),
    ops=("block_sparse_attention", "sample"),
    recipe="own",
    summary="Runs a cellular automaton as text: the next state is written cell by cell from the state before.",
    claim=(
        "With rotary positions rule 110 on a ring is learned, with absolute ones it is not in the same time; tokens "
        "that training hides are seen by themselves alone."
    ),
    checked_on="synthetic data",
)


def __getattr__(name: str) -> Any:
    # The recipe needs the packages for training; the network does not.
    if name == "RECIPE":
        from arcore.zoo.dynamics.lifegpt.recipe import RECIPE

        return RECIPE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
