"""Text and image codes in one sequence: draw codes for captions, pixels for codes;
random weights.
"""

import arcore

model, tokenizer = (
    arcore.create_model("xomni_tiny").eval(),
    arcore.create_model("vq16_tiny").eval(),
)
codes = model.draw(["three", "seven"], seed=0)
print(
    "codes:",
    tuple(codes.shape),
    "characters of their captions:",
    [len(text) for text in model.describe(codes)],
)
loss = model.loss(model.sequences(["three", "seven"], codes))
print(f"loss of captions and codes: {loss.item():.2f}")
