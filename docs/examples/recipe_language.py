"""Logits of a text, and text that goes on from a prompt, by a model with random
weights.
"""

import sys

import torch

import arcore
from arcore.decoding import generate

model = arcore.create_model(sys.argv[1]).eval()
prompt = torch.tensor([list(b"In the")])
with torch.no_grad():
    print("logits:", tuple(model(prompt).shape))
new = generate(
    model, prompt, max_new_tokens=12, temperature=0.8, top_p=0.95, seed=0
)
print("tokens:", new.ids.tolist())
