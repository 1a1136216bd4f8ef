"""All codes of an image in one call, and the losses that distil a raster model
into it.
"""

import torch

import arcore
from arcore.zoo.raster.dd2.model import distil_losses, nearest, raster_teacher

teacher = arcore.create_model("llamagen_tiny").eval()
generator, guidance = (
    arcore.create_model("dd2_tiny"),
    arcore.create_model("dd2_tiny"),
)
codebook = torch.randn(teacher.config.vocab_size, generator.config.code_channels)
labels = torch.tensor([3, 7])

losses = distil_losses(
    generator, guidance, raster_teacher(teacher, codebook, 2.0), codebook, labels
)
losses.generator.backward()
losses.guidance.backward()
with torch.no_grad():
    vectors = generator.eval().generate(labels, seed=0)
print("codes of two images:", tuple(nearest(vectors, codebook).shape))
