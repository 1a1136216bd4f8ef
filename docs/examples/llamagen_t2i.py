"""Draw the codes of images behind the embeddings of captions; random weights."""

import torch

import arcore
from arcore.decoding import generate

model = arcore.create_model("llamagen_t2i_tiny").eval()
config = model.config
captions = torch.randn(
    2, config.caption_tokens, config.caption_dim
)  # of a text encoder
# The second caption has two tokens less; tokens stand at the end.
mask = torch.arange(config.caption_tokens) >= torch.tensor([[0], [2]])

bound = model.captioned(captions, mask)
drawn = generate(
    bound.guided(1.5),
    bound.prompt(torch.zeros(2)),
    mask=mask,
    max_new_tokens=config.side**2,
    seed=0,
)
print("codes:", tuple(drawn.ids.shape))
