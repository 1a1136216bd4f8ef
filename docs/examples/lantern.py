"""Draw codes with drafts that are accepted for their neighbours in the codebook
too; random weights.
"""

import torch

import arcore
from arcore.decoding import LookupDrafter
from arcore.zoo.acceleration.lantern.relax import decode_image

model = arcore.create_model("llamagen_tiny").eval()
codebook = torch.randn(model.config.vocab_size, 8)
prompt = model.prompt(torch.tensor([3]))
for delta in (0.0, 0.3):
    drawn = decode_image(
        model,
        LookupDrafter(),
        codebook,
        prompt,
        side=model.config.side,
        delta=delta,
        seed=0,
    )
    print(f"delta {delta}: {drawn.tokens_per_round:.2f} codes per call")
