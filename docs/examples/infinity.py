"""Draw pictures of a text, scale by scale and bit by bit; random weights."""

import torch

import arcore
from arcore.zoo.next_scale.infinity.draw import draw_bits
from arcore.zoo.next_scale.infinity.text import Text, word_vectors

model = arcore.create_model("infinity_tiny").eval()
tokenizer = arcore.create_model("msbsq_tiny").eval()

text = word_vectors(["a 3 and a 7", "four"], model.config.text_dim)
null = model.null(text.lengths)  # for guidance
both = Text(torch.cat([text.vectors, null.vectors]), text.lengths.repeat(2))
with torch.no_grad():
    told = model.tell(both)
drawn = draw_bits(model, tokenizer, told, guidance=(3.0,), seed=0)
print("bits per scale:", [bits.shape[1] * bits.shape[2] for bits in drawn.bits])
print("images:", tuple(drawn.images.shape))
