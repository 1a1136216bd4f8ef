"""Forecast a network of sensors, told how far the present is from its history;
random weights.
"""

import torch

import arcore

model = arcore.create_model("st_ssdl_tiny").eval()
config = model.config
values = torch.rand(1, config.context, config.channels)
calendar = torch.ones(1, config.context + config.horizon, 5, dtype=torch.int64)
with torch.no_grad():
    forecast = model.forecast(values, calendar, config.horizon)
print("nodes:", config.channels, "forecast:", tuple(forecast.shape))
