"""Forecast counts of people in regions, by a model with random weights; its
training is private.

`arcore train dp_mobility_tiny --help` shows the options of differential privacy.
"""

import torch

import arcore

model = arcore.create_model("dp_mobility_tiny").eval()
config = model.config
counts = torch.rand(1, config.context, config.channels) * 20
calendar = torch.ones(1, config.context + config.horizon, 5, dtype=torch.int64)
with torch.no_grad():
    print(
        "next counts:",
        [
            f"{count:.2f}"
            for count in model.forecast(counts, calendar, config.horizon)[
                0, 0
            ].tolist()
        ],
    )
