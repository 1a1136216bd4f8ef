"""What hidden states of free contexts come to: the spectrum of the output layer's
metric, and entropies of laws.
"""

import torch

from arcore.zoo.learning_theory.markov_categories.geometry import (
    categorical_entropy,
    head_metric,
    spectrum,
)

weight, hidden = torch.randn(40, 6).double(), torch.randn(30, 6).double()
logits = hidden @ weight.T
found = spectrum(head_metric(weight, logits.softmax(-1)))
print(f"effective rank of the metric: {found.effective_rank:.2f} of 6")
print(
    "categorical entropy of the first laws:",
    categorical_entropy(logits)[:3].tolist(),
)
