"""Classes of pixels, of one picture or of two, by a network with random weights."""

import sys

import torch

import arcore

model = arcore.create_model(sys.argv[1]).eval()
config = model.config
pictures = (2,) if model.pictures == 2 else ()
shape = (1, *pictures, config.in_channels, config.image_size, config.image_size)
with torch.no_grad():
    logits = model(torch.rand(shape) * 2 - 1)
print("classes of pixels:", tuple(logits.argmax(1).shape))
