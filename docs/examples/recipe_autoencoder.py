"""Images to continuous latents and back, by an autoencoder with random weights."""

import sys

import torch

import arcore

model = arcore.create_model(sys.argv[1]).eval()
size, channels = model.config.image_size, model.config.in_channels

images = torch.rand(2, channels, size, size) * 2 - 1
with torch.no_grad():
    latents = model.encode(images)
    pictures = model.decode(latents)
print(
    "images:",
    tuple(images.shape),
    "latents:",
    tuple(latents.shape),
    "back:",
    tuple(pictures.shape),
)
