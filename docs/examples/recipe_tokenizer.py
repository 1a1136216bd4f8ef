"""An image to tokens, one map or several from coarse to fine, and back."""

import sys

import torch

import arcore

model = arcore.create_model(sys.argv[1]).eval()
config = model.config
images = (
    torch.rand(2, config.in_channels, config.image_size, config.image_size) * 2 - 1
)
with torch.no_grad():
    codes = model.encode(images)
    again = model.decode(codes)
maps = [codes] if isinstance(codes, torch.Tensor) else codes
print("tokens per map:", [tokens.shape[1] for tokens in maps])
print("images:", tuple(again.shape))
