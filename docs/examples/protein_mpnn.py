"""Design sequences for a backbone, by a model with random weights; the first
residues stay as they are.
"""

import torch

import arcore
from arcore.zoo.biology.protein_mpnn.claim import helices

model = arcore.create_model("protein_mpnn_tiny").eval()
backbone = helices(2, 10)  # two helices of ten residues
letters = torch.zeros(1, 20, dtype=torch.int64)
free = torch.ones(1, 20, dtype=torch.bool)
free[:, :5] = False

designed, logprobs = model.design(backbone, letters, free, temperature=0.5, seed=0)
print("residues:", designed[0].tolist())
