"""One step of GRPO on a language model, with rewards of its own texts; random
weights.

`arcore run align --prompts prompts.txt --reward reward.py` does the whole of it.
"""

import torch

import arcore
from arcore.decoding import Sampling, draw_rollout
from arcore.objectives import group_advantages, grpo_loss, score_rollout
from arcore.zoo.alignment.align.rewards import vowels

model = arcore.create_model("llama_tiny")
prompts = ["The sea is", "In the beginning"]
rollout = draw_rollout(
    model,
    [list(prompt.encode()) for prompt in prompts],
    count=4,
    max_new_tokens=12,
    sampling=Sampling(),
    seed=0,
)
texts = [
    bytes(ids[own].tolist()).decode(errors="replace")
    for ids, own in zip(rollout.tokens, rollout.mask, strict=True)
]
rewards = torch.tensor([vowels("", text) for text in texts])

stats = score_rollout(model, rollout)
loss = grpo_loss(
    stats.logp,
    stats.logp.detach(),
    group_advantages(rewards, rollout.groups),
    rollout.mask,
)
loss.backward()
print(f"mean reward {rewards.mean():.3f}, loss {loss.item():.4f}")
