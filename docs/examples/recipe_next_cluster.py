"""One step of pretraining: images rotated in part, the next cluster of patches
predicted.
"""

import sys

import torch

import arcore
from arcore.data import adaptive_rotation
from arcore.objectives import next_cluster_loss

model = arcore.create_model(sys.argv[1])
config = model.config
images = (
    torch.rand(2, config.in_channels, config.image_size, config.image_size) * 2 - 1
)
seen = adaptive_rotation(images, config.patch_size)
predictions = model(seen.images, seen.windows)
loss = next_cluster_loss(predictions, images, patch_size=config.patch_size).loss
loss.backward()
print("predictions:", tuple(predictions.shape), "loss:", round(loss.item(), 3))
