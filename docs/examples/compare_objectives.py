"""Inputs and targets of three objectives for one text, read by three architectures
with random weights.
"""

import torch
import torch.nn.functional as F

from arcore.zoo.language.compare_objectives.model import Model, make_pair

texts = torch.tensor(
    [list(b"In the beginning God created the heaven and the earth.")]
)
for objective in ("FLM", "PLM", "MLM"):
    pair = make_pair(objective, texts, torch.Generator().manual_seed(0))
    print(
        f"{objective}: {pair.inputs.shape[1]} bytes given, "
        f"{pair.targets.shape[1]} to predict"
    )
    for architecture in ("CD", "ND", "ED"):
        model = Model(architecture, dim=32, layers=1, heads=2)
        loss = F.cross_entropy(model(pair).flatten(0, 1), pair.targets.flatten())
        print(f"  {architecture}: {loss.item():.2f} nats per byte")
