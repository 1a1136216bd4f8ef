"""Draft heads on a frozen language model: the text of plain decoding in fewer
calls; random weights.
"""

import torch

import arcore
from arcore.decoding import TreeShape, generate, speculative_tree
from arcore.zoo.acceleration.hydra.drafter import HydraDrafter
from arcore.zoo.acceleration.hydra.heads import hydra_loss

model = arcore.create_model("llama_tiny").eval()
heads = arcore.create_model(
    "hydra_tiny", dim=model.config.dim, vocab_size=model.vocab_size
).start_from(model)
text = torch.tensor([list(b"In the beginning God created the heaven")])
print(f"loss of the heads: {hydra_loss(heads, model, text).item():.2f}")

prompt = [list(b"In the")]
drafted = speculative_tree(
    model,
    HydraDrafter(heads, TreeShape.full(2, 2, 1)),
    prompt,
    max_new_tokens=16,
    temperature=0.0,
)
plain = generate(model, prompt, max_new_tokens=16, temperature=0.0)
print(
    f"same text: {bool((drafted.ids == plain.ids).all())}, "
    f"{drafted.tokens_per_round:.2f} tokens per call"
)
