"""Draw the codes of images in raster order, guided towards a class, by a model
with random weights.
"""

import sys

import torch

import arcore
from arcore.decoding import generate, jacobi

model = arcore.create_model(sys.argv[1]).eval()
side = model.config.side
prompt = model.prompt(torch.tensor([3, 7]))

drawn = generate(
    model.guided(1.5), prompt, max_new_tokens=side * side, top_k=50, seed=0
)
print("codes:", tuple(drawn.ids.view(2, side, side).shape))
# The same law in fewer calls: a window of guesses (speculative Jacobi decoding).
window = jacobi(model, prompt, max_new_tokens=side * side, window=9, seed=0)
print(f"codes per call in a Jacobi window: {window.tokens_per_round:.2f}")
