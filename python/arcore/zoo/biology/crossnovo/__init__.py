"""CrossNovo: peptide sequences from mass spectra, by a decoder that sees what another one sees (arXiv:2510.08169).

Two decoders read one spectrum encoder. The first writes all residues at once (NAT): slots that see each other in both
directions, trained by CTC, decoded so that the residues weigh what the precursor weighs. The second writes residue by
residue (AR) and attends to the spectrum and to the first one's hidden states, through which no gradient goes back. In
training the weight moves from the first loss to the second.

The authors' code was not published when this was written; where the paper leaves a choice, the comment says so. Left
out: modifications of the N terminus.

Legend: B spectra, P peaks, T slots, L residues, C width, V residues and the end.
"""

from __future__ import annotations

from typing import Any

from arcore.catalog import System

SYSTEM = System(
    name="crossnovo",
    title="CrossNovo",
    paper="arXiv:2510.08169",
    paper_title="Bidirectional Representations Augmented Autoregressive Biological Sequence Generation: "
    "Application in De Novo Peptide Sequencing",
    topic="biology",
    kind="model",
    model="CrossNovo",
    ops=("block_sparse_attention",),
    recipe="own",
    summary="De-novo peptide sequencing: a parallel and an autoregressive decoder, and CTC under a precursor mass.",
    claim=(
        "The autoregressive loss sends no gradient into the parallel decoder; mass-controlled CTC is what trying all "
        "paths gives; its features do not harm accuracy."
    ),
    checked_on="synthetic data",
)


def __getattr__(name: str) -> Any:
    # The recipe needs the packages for training; the network does not.
    if name == "RECIPE":
        from arcore.zoo.biology.crossnovo.recipe import RECIPE

        return RECIPE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
