"""Candles to a coarse and a fine token each, and back; random weights."""

import torch

import arcore

tokenizer = arcore.create_model("kronos_tokenizer_tiny").eval()
candles = torch.randn(2, 24, 6)
with torch.no_grad():
    coarse, fine = tokenizer.encode(candles)
    back = tokenizer.decode(coarse, fine)
print(
    "coarse:",
    coarse[0, :6].tolist(),
    "fine:",
    fine[0, :6].tolist(),
    "back:",
    tuple(back.shape),
)
