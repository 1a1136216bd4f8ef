"""Forecast the rows that follow a window, by a model with random weights."""

import sys

import torch

import arcore

model = arcore.create_model(sys.argv[1]).eval()
config = model.config
context, horizon, channels = (
    config.context,
    config.horizon,
    getattr(config, "channels", 2),
)

rows = torch.arange(context + horizon)
values = torch.sin(rows[:context, None] / 6 + torch.arange(channels)).unsqueeze(0)
# Minute, hour, weekday, day and month of every row, of the future ones too.
hours = torch.stack(
    [0 * rows, rows % 24, rows // 24 % 7, 1 + rows // 24 % 28, 1 + 0 * rows], -1
).unsqueeze(0)
with torch.no_grad():
    forecast = model.forecast(values, hours, horizon)
print("window:", tuple(values.shape), "forecast:", tuple(forecast.shape))
