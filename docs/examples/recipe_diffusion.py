"""One training loss, and images from noise, by a model with random weights."""

import sys

import torch

import arcore
from arcore.decoding import generate_blocks
from arcore.objectives import diffusion_loss
from arcore.schedules import add_noise

model = arcore.create_model(sys.argv[1]).eval()
labels = torch.tensor([3, 7])
images, noise, t = (
    torch.randn(2, *model.block_shape),
    torch.randn(2, *model.block_shape),
    torch.tensor([20, 700]),
)
noisy = add_noise(model.schedule, images, noise, t)
loss = diffusion_loss(model(noisy, t, labels), images, noise, t, model.schedule)
print("loss:", round(loss.item(), 3))

drawn = model.to_pixels(
    generate_blocks(model, labels, times=model.schedule.grid(5, "linspace"), seed=0)
)
print("images:", tuple(drawn.shape))
