"""Sequence a peptide from its mass spectrum, by a model with random weights."""

import torch

import arcore
from arcore.zoo.biology.crossnovo.spectra import (
    batch_of,
    compute_spectrum,
    text,
    tokens,
)

model = arcore.create_model("crossnovo_tiny").eval()
spectrum = compute_spectrum(tokens("PEPTIDEK"), torch.Generator().manual_seed(0))
with torch.no_grad():
    residues, score, path = model.search(
        batch_of([spectrum], model.config.peaks), 0, beam=2
    )
print(
    f"{len(spectrum.mz)} peaks, mass {spectrum.mass:.3f} Da: "
    f"{text(residues)!r}, score {score:.2f}"
)
