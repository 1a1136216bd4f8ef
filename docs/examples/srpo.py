"""The loss of a policy and of its own reviser, and the closed form that it leads
to.
"""

import numpy as np
import torch

from arcore.zoo.alignment.srpo import revisions, solution, srpo_loss

policy = torch.randn(
    4, 2
).requires_grad_()  # log-probabilities of both responses to four prompts
reviser = torch.randn(
    4, 2, 2
).requires_grad_()  # of response b with response a in the prompt
preference = torch.tensor([1.0, 0.0, 0.8, 0.5])
loss = srpo_loss(
    policy,
    reviser,
    policy.detach() + 0.1,
    reviser.detach() - 0.1,
    preference,
    beta=0.2,
)
loss.backward()

game = np.array([[0.5, 0.8, 0.9], [0.2, 0.5, 0.7], [0.1, 0.3, 0.5]])
uniform = np.full(3, 1 / 3)
best, revise = solution(game, uniform, np.full((3, 3), 1 / 3), beta=0.5)
print(
    f"loss {loss.item():.3f}; win rate of the policy:",
    revisions(game, best, revise, uniform, count=0).round(3),
)
print(
    "of the reference, and after its revisions:",
    revisions(game, uniform, revise, uniform, count=3).round(3),
)
