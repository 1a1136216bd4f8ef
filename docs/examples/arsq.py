"""Soft values of action tokens, coarse to fine, and actions drawn by them."""

import torch

from arcore.zoo.agents.arsq.values import (
    ActionValues,
    normalisation_error,
    to_actions,
)

values = ActionValues(3, dims=1, levels=3, bins=5, alpha=0.1)
states = torch.randn(4, 3)
drawn = values.act(states, torch.Generator().manual_seed(0))
print(
    "tokens:",
    drawn.tolist(),
    "actions:",
    to_actions(drawn, dims=1, levels=3, bins=5).flatten().tolist(),
)
print(
    "exp((Q - V) / alpha) sums to 1 over all actions, up to "
    f"{normalisation_error(values, states):.1e}"
)
