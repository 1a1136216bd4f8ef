"""A frozen language model steered by a reward model while it writes; random
weights.
"""

import torch

import arcore
from arcore.decoding import generate
from arcore.zoo.alignment.genarm.loss import arm_loss, guided_by

base = arcore.create_model("llama_tiny").eval()
torch.manual_seed(1)
reward = arcore.create_model("llama_tiny")

better, worse = (
    torch.tensor([list(b"Yes, of course.")]),
    torch.tensor([list(b"No, not at all.")]),
)
answer = torch.arange(better.shape[1]).unsqueeze(0) >= 4  # what follows the prompt
loss, ranked = arm_loss(reward, (better, answer), (worse, answer))
loss.backward()
for weight in (0.0, 1.0):
    text = generate(
        guided_by(base, [reward.eval()], [weight]),
        [list(b"In the")],
        max_new_tokens=8,
        seed=0,
    )
    print(f"weight {weight}:", text.ids[0].tolist())
