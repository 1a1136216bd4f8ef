"""Draw the subject of a reference picture where a text says; random weights."""

import torch

import arcore
from arcore.zoo.next_scale.echogen.references import small_encoders
from arcore.zoo.next_scale.infinity.draw import draw_bits
from arcore.zoo.next_scale.infinity.text import word_vectors

model = arcore.create_model("echogen_tiny").eval()
tokenizer = arcore.create_model("msbsq_tiny").eval()

text = word_vectors(["the digit on the left"], model.config.text_dim)
picture = torch.rand(1, 1, 24, 24) * 2 - 1
with torch.no_grad():
    told = model.guided(text, small_encoders(picture, tokenizer))
# Strengths: the reference against the text alone, and the text against nothing.
drawn = draw_bits(model, tokenizer, told, guidance=(2.5, 2.5), seed=0)
print("images:", tuple(drawn.images.shape))
