"""Draw codes by a window of guesses: the law of plain sampling, in fewer calls;
random weights.
"""

import torch

import arcore
from arcore.zoo.acceleration.sjd import decode_image

model = arcore.create_model("llamagen_tiny").eval()
drawn = decode_image(
    model, model.prompt(torch.tensor([3, 7])), side=model.config.side, seed=0
)
print("codes:", tuple(drawn.ids.shape), f"{drawn.tokens_per_round:.2f} per call")
