"""Weights of several rewards: by what widens the front of what was found, and by
the rewards' gradients.
"""

import torch

from arcore.zoo.alignment.dynamic_reward_weighting import (
    HypervolumeWeight,
    gradient_weights,
    weighted_reward_loss,
)

keeper = HypervolumeWeight([0.0, 0.0])
for point in (
    [0.2, 0.5],
    [0.2, 0.4],
    [0.5, 0.6],
):  # mean rewards of three validations
    print(
        f"validation {point}: the next rewards count {keeper.update(point):.2f} "
        "times"
    )

weights = gradient_weights(torch.tensor([0.5, 0.5]), torch.randn(2, 100), lr=0.1)
logprobs = torch.rand(4, 6).log().requires_grad_()
loss = weighted_reward_loss(
    logprobs,
    logprobs.detach(),
    rewards=torch.rand(4, 2),
    weights=weights,
    groups=torch.tensor([0, 0, 1, 1]),
    mask=torch.ones(4, 6, dtype=torch.bool),
)
loss.backward()
print("weights:", [round(weight, 3) for weight in weights.tolist()])
