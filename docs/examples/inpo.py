"""The loss of pairs of responses, and self-play on a game that goes in circles."""

import numpy as np
import torch

from arcore.zoo.alignment.inpo import inpo_loss, self_play

policy = torch.tensor(
    [[-3.0, -4.0], [-2.0, -1.5]], requires_grad=True
)  # log-probabilities of both responses
reference, previous = policy.detach() - 0.2, policy.detach() + 0.1
loss = inpo_loss(
    policy, reference, previous, torch.tensor([1.0, 0.3]), tau=0.1, eta=0.3
)
loss.backward()
print(f"loss {loss.item():.3f}")

game = np.array(
    [[0.5, 0.9, 0.2], [0.1, 0.5, 0.9], [0.8, 0.1, 0.5]]
)  # row preferred to column
print(
    "equilibrium:",
    self_play(game, np.full(3, 1 / 3), tau=0.1, iterations=200)[-1].round(3),
)
