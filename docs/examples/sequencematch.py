"""A language model with one more token that takes the last one back; random
weights.
"""

import torch

import arcore
from arcore.decoding import Sampling
from arcore.zoo.language.sequencematch.edits import (
    contexts,
    noisy,
    with_backspace,
    write_with_backspace,
)

model = with_backspace(arcore.create_model("llama_tiny")).eval()
backspace = model.vocab_size - 1

history = noisy(
    torch.tensor([list(b"In the beginning")]),
    backspace,
    0.3,
    torch.Generator().manual_seed(0),
)
print("with deletions:", history.raw[0].tolist())
print(
    "what is left:",
    bytes(contexts(history.raw[0].tolist(), backspace)[-1]).decode(),
)

written = write_with_backspace(
    model, list(b"In the"), backspace, max_new_tokens=8, sampling=Sampling(), seed=0
)
print("text:", written.text, "with deletions:", written.raw)
