"""One trunk, two networks on it: vectors that see both sides, and text that goes
on; random weights.
"""

import torch

import arcore

model = arcore.create_model("ernie3_tiny").eval()
ids = torch.tensor([list(b"In the beginning")])
with torch.no_grad():
    print(
        "for writing:",
        tuple(model(ids).shape),
        "for understanding:",
        tuple(model(ids, "understand").shape),
    )
    print("written:", model.write(ids, 8, seed=0).tolist())
