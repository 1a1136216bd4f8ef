"""Classes of images, by a classifier with random weights."""

import sys

import torch

import arcore

model = arcore.create_model(sys.argv[1]).eval()
config = model.config
images = (
    torch.rand(2, config.in_channels, config.image_size, config.image_size) * 2 - 1
)
with torch.no_grad():
    print("probabilities:", tuple(model(images).softmax(-1).shape))
