"""One training loss with some tokens hidden, and images in random order, by a
model with random weights.
"""

import sys

import torch

import arcore
from arcore.decoding import generate_masked
from arcore.objectives import diffusion_head_loss, draw_visible

model = arcore.create_model(sys.argv[1]).eval()
labels = torch.tensor([3, 7])
tokens = torch.randn(2, *model.token_shape)
visible, masked = draw_visible(*tokens.shape[:2])
rows = torch.arange(2)[:, None]
z = model(tokens, visible, labels)[rows, masked]
loss, _ = diffusion_head_loss(
    model.head, tokens[rows, masked].flatten(0, 1), z.flatten(0, 1)
)
print("loss:", round(loss.item(), 3))

times = model.head.schedule.grid(5, "linspace")
drawn = generate_masked(model, labels, iterations=4, times=times, seed=0)
print("images:", tuple(model.to_pixels(drawn).shape))
