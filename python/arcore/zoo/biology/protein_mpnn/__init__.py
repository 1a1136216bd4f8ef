"""ProteinMPNN: amino-acid sequences for a given backbone, decoded in any order (Dauparas et al., Science 2022).

A protein is a graph: each residue has its 48 nearest ones by the distance of CA atoms as neighbours. Edges carry
distances of all pairs of N, CA, C, O and a virtual CB, and how far apart two residues stand in their chain. Three
layers of messages update residues and edges; three further ones predict the residues one after the other, in an order
drawn at random: a residue reads the letters and states of neighbours that come before it in that order, and of the
others what the encoder says. Trained on random orders, the model can fix any part of the sequence.

The order is a mask of queries and keys that are sorted by it, here an `IntervalMask` (`arcore.masks`): strictly causal
for decoding, empty for the law given the backbone alone, everything but itself for the law given all other letters.

The package proteinmpnn ships the published weights. Left out: models of CA atoms only, tied positions, PSSM biases.

Legend: B rows, L residues, K neighbours, C width.
"""

from __future__ import annotations

from typing import Any

from arcore.catalog import System

SYSTEM = System(
    name="protein_mpnn",
    title="ProteinMPNN",
    paper="doi:10.1126/science.add2187",
    paper_title="Robust deep learning-based protein sequence design using ProteinMPNN",
    topic="biology",
    kind="model",
    model="ProteinMPNN",
    ops=("sample",),
    recipe="own",
    summary="Designs sequences for a protein backbone, residue by residue in any order; loads the published weights.",
    claim="Published weights give the log-probabilities of the package's own code; decoding in steps equals one pass.",
    checked_on="published weights",
    reported="a recovery of 52.4 % of native sequences, Rosetta 32.9 %",
)


def __getattr__(name: str) -> Any:
    # The recipe needs the packages for training; the network does not.
    if name == "RECIPE":
        from arcore.zoo.biology.protein_mpnn.recipe import RECIPE

        return RECIPE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
