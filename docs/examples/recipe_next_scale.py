"""Draw images scale by scale, by a model and tokenizer with random weights."""

import sys

import torch

import arcore
from arcore.decoding import generate_next_scale

preset = sys.argv[1]
info = next(
    info for info in arcore.model_info(preset).presets if info.name == preset
)
model, tokenizer = arcore.create_model(preset), arcore.create_model(info.tokenizer)

classes = torch.tensor([3, 7])
drawn = generate_next_scale(
    model.eval(), tokenizer.eval(), classes, cfg_scale=1.5, top_k=50, seed=0
)
print("tokens per scale:", [codes.shape[1] for codes in drawn.indices])
print("images:", tuple(drawn.images.shape))
