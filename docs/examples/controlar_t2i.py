"""Draw codes that follow a caption and a control image; random weights."""

import torch

import arcore
from arcore.decoding import generate

model = arcore.create_model("controlar_t2i_tiny").eval()
config, size = model.config, model.image_size
captions = torch.randn(
    1, config.caption_tokens, config.caption_dim
)  # of a text encoder
control = torch.rand(1, 3, size, size) * 2 - 1

bound = model.captioned(captions).controlled(control)
drawn = generate(
    bound.guided(1.5),
    bound.prompt(torch.zeros(1)),
    max_new_tokens=config.side**2,
    seed=0,
)
print("codes:", tuple(drawn.ids.shape))
