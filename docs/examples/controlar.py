"""Draw codes that follow a control image, by a model with random weights."""

import torch

import arcore
from arcore.decoding import generate

model = arcore.create_model("controlar_tiny").eval()
size, codes = model.image_size, model.config.side**2
edges = -torch.ones(2, 1, size, size)  # 1 on edges, -1 elsewhere
edges[:, :, size // 2] = 1.0

steered = model.controlled(edges, strength=0.8)
prompt = steered.prompt(torch.tensor([3, 7]))
drawn = generate(steered.guided(1.5), prompt, max_new_tokens=codes, seed=0)
print("control:", tuple(edges.shape), "codes:", tuple(drawn.ids.shape))
