"""Erase a class from an image model, and take the patch off; random weights."""

import torch

import arcore
from arcore.zoo.raster.ear.erasing import Erasing, erase, patched

model = arcore.create_model("llamagen_tiny").eval()
codes, labels = (
    torch.randint(model.config.vocab_size, (1, model.config.side**2)),
    torch.tensor([3]),
)
patch = erase(
    model, 3, 8, Erasing(updates=2, pairs=2, lr=0.01, threshold=0.0, keep=0.0)
)
with torch.no_grad():
    before = model(codes, labels)
    with patched(model, patch):
        moved = (model(codes, labels) - before).abs().max().item()
    left = (model(codes, labels) - before).abs().max().item()
print(
    f"{len(patch)} weights move logits by up to {moved:.4f}; without the "
    f"patch by {left}"
)
