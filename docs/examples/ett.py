"""Name pictures from their codes, with a loss that reaches the tokenizer; random
weights.
"""

import torch

import arcore
from arcore.zoo.multimodal.ett.model import caption_loss, read_codes

model, tokenizer = arcore.create_model("ett_tiny"), arcore.create_model("vq16_tiny")
size = 4 * int(model.config.num_codes**0.5)
images = torch.rand(2, 1, size, size) * 2 - 1

vectors, _, _ = read_codes(tokenizer, images)
loss = caption_loss(model, vectors, model.encode(["three", "seven"]))
loss.backward()
reached = sum(
    int(p.grad is not None and bool(p.grad.any())) for p in tokenizer.parameters()
)
print(f"loss {loss.item():.2f}, tensors of the tokenizer that it moves: {reached}")
print(
    "bytes of captions:",
    [len(text) for text in model.eval().captions(vectors.detach())],
)
