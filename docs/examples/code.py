"""One image from two next-scale models: the coarse scales by one, the fine ones by
the other; random weights.
"""

import torch

import arcore
from arcore.zoo.next_scale.code import decode_together, small_pair

drafter, refiner = small_pair()
tokenizer = arcore.create_model("msvq_tiny").eval()
drawn = decode_together(
    drafter,
    refiner,
    tokenizer,
    torch.tensor([3, 4]),
    draft_scales=2,
    top_k=20,
    seed=0,
)
print("images:", tuple(drawn.images.shape), "calls of each model:", drawn.calls)
