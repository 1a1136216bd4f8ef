"""A language model read in both directions for masked tokens, so that facts can be
reversed; random weights.
"""

import torch

import arcore
from arcore.zoo.language.bico.objective import bico_loss, read_both_ways

model = arcore.create_model("llama_tiny")
ids = torch.tensor([list(b"Paris is the capital of France")])
hidden = torch.zeros_like(ids, dtype=torch.bool)
hidden[:, 13:20] = True
print("logits:", tuple(read_both_ways(model, ids, hidden).shape))

loss = bico_loss(model, ids, torch.ones_like(ids, dtype=torch.bool), both=True)
loss.backward()
print(f"loss of masked tokens: {loss.item():.2f}")
