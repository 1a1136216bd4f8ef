"""Draw paths of candles that follow a window, by models with random weights."""

import torch

import arcore
from arcore.zoo.series.kronos.generating import generate_paths

model, tokenizer = (
    arcore.create_model("kronos_tiny").eval(),
    arcore.create_model("kronos_tokenizer_tiny").eval(),
)
candles = torch.randn(
    1, 20, 6
)  # open, high, low, close, volume, amount; normalised by the window
calendar = torch.ones(
    1, 24, 5, dtype=torch.int64
)  # minute, hour, weekday, day, month; of the future too
paths = generate_paths(model, tokenizer, candles, calendar, 4, paths=3, seed=0)
print("paths of candles:", tuple(paths.values.shape))
