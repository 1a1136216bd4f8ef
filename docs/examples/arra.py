"""Pull the hidden states of an image model towards an encoder's features while it
learns codes.
"""

import torch
import torch.nn.functional as F

import arcore
from arcore.zoo.raster.arra.model import Adaptor, alignment_loss

model = arcore.create_model("arra_tiny")
config = model.config
codes = torch.randint(config.vocab_size, (4, config.side**2))
labels = torch.tensor([0, 1, 2, 3])
features = torch.randn(4, 16)  # what a frozen encoder says of each picture

adaptor = Adaptor(config.dim, 16)
logits, states = model.tapped(codes, labels, 1)
loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten()) + alignment_loss(
    adaptor(states), features
)
loss.backward()
print("logits:", tuple(logits.shape), f"loss: {loss.item():.2f}")
