"""Supervised learning from right and wrong answers of the last policy."""

import torch

from arcore.zoo.alignment.nft import nft_loss

old = torch.rand(8, 6).log()  # log-probabilities of 8 answers' tokens
logprobs = old.clone().requires_grad_()
loss = nft_loss(
    logprobs,
    old,
    correct=torch.tensor([1, 0, 0, 1, 1, 1, 0, 1]),
    groups=torch.tensor(
        [0, 0, 0, 0, 1, 1, 1, 1]
    ),  # four answers for each of two questions
    mask=torch.ones(8, 6, dtype=torch.bool),
)
loss.backward()
print(
    "gradient of a right and of a wrong answer's token:",
    logprobs.grad[0, 0].item(),
    logprobs.grad[1, 0].item(),
)
