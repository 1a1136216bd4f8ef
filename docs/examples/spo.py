"""Win rates within a group as rewards, and the policy that no response beats more
often than half of the time.
"""

import torch

from arcore.zoo.alignment.spo import minimax_winner, spo_loss, win_rate_rewards

wins = torch.tensor(
    [[0.5, 1.0, 0.0], [0.0, 0.5, 0.7], [1.0, 0.3, 0.5]]
)  # row against column, three responses
print("rewards:", win_rate_rewards(wins).tolist())

logprobs = torch.rand(1, 3, 5).log().requires_grad_()
loss = spo_loss(
    logprobs,
    logprobs.detach(),
    wins.unsqueeze(0),
    torch.ones(1, 3, 5, dtype=torch.bool),
)
loss.backward()
print(
    "minimax winner:",
    minimax_winner([[0.5, 0.9, 0.4], [0.1, 0.5, 0.7], [0.6, 0.3, 0.5]]).round(3),
)
