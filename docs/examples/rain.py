"""A search that judges its own continuations and rewinds; a random model, and a
judge that likes even tokens.
"""

import arcore
from arcore.zoo.alignment.rain import Rain, RainConfig

model = arcore.create_model("llama_tiny").eval()
search = Rain(
    model,
    list(b"In the"),
    lambda tokens: (
        1.0 - 2.0 * sum(token % 2 for token in tokens) / len(tokens)
    ),  # from -1 to 1
    max_new_tokens=6,
    config=RainConfig(simulations=16, fewest=8, rollout=4),
)
print("written:", search.run(), "judged:", search.evaluations, "texts")
