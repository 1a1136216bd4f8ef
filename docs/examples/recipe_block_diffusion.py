"""One training loss over all blocks, and images block by block, by a model with
random weights.
"""

import sys

import torch

import arcore
from arcore.decoding import generate_blocks
from arcore.objectives import diffusion_loss
from arcore.schedules import add_noise

model = arcore.create_model(sys.argv[1]).eval()
labels = torch.tensor([3, 7])
clean = torch.randn(2, model.num_blocks, *model.block_shape)
noise, t = torch.randn_like(clean), torch.randint(1000, clean.shape[:2])
noisy = add_noise(model.schedule, clean, noise, t)
loss = diffusion_loss(
    model(clean, noisy, t, labels), clean, noise, t, model.schedule
)
print("loss:", round(loss.item(), 3))

blocks = generate_blocks(
    model, labels, times=model.schedule.grid(5, "linspace"), seed=0
)
print("images:", tuple(model.to_pixels(blocks).shape))
