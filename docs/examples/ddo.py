"""A likelihood model as a discriminator: the loss on data and on the model's own
samples, and where it leads.
"""

import torch

from arcore.zoo.alignment.ddo import ddo_loss, optimum

logp, own = torch.randn(8).requires_grad_(), torch.randn(8).requires_grad_()
loss = ddo_loss(
    logp, logp.detach() - 0.1, own, own.detach() + 0.1, alpha=1.0, beta=0.5
)
loss.backward()

data, reference = (
    torch.tensor([0.6, 0.3, 0.1]).double(),
    torch.full((3,), 1 / 3).double(),
)
law, alpha = optimum(data, reference, 1.0)
print(
    f"loss {loss.item():.3f}; at beta 1 and alpha {alpha:.2f} the law "
    f"becomes {law.tolist()}"
)
