"""Routers decide from the prompt which layers a text skips; random weights."""

import torch

import arcore
from arcore.decoding import generate
from arcore.zoo.acceleration.first.routing import (
    Routers,
    SkippingModel,
    routed_loss,
)

model = arcore.create_model("llama_tiny", num_layers=5).eval().requires_grad_(False)
routers = Routers(model.config.dim, 5)
loss, kept = routed_loss(model, routers, torch.randint(256, (2, 16)), price=0.1)
loss.backward()
print(f"loss {loss.item():.2f}, layers kept while training {kept.item():.2f}")

skipping = SkippingModel(model, routers)
prompt = torch.tensor([list(b"In the")])
print("skipped for this prompt:", skipping.decide(prompt))
print(generate(skipping, prompt, max_new_tokens=6, seed=0).ids.tolist())
