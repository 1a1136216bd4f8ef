"""One training loss with a time per frame, and a video frame by frame, by a model
with random weights.
"""

import sys

import torch

import arcore
from arcore.decoding import generate_frames
from arcore.objectives import diffusion_loss
from arcore.schedules import add_noise

model = arcore.create_model(sys.argv[1]).eval()
labels = torch.tensor([0, 0])
clean = torch.randn(2, model.num_frames, *model.frame_shape)
noise, t = torch.randn_like(clean), model.training_times(2)
noisy = add_noise(model.schedule, clean, noise, t)
loss = diffusion_loss(
    model(noisy, t, labels),
    clean,
    noise,
    t,
    model.schedule,
    prediction=model.prediction,
)
print("loss:", round(loss.item(), 3))

frames = generate_frames(
    model, labels, times=model.schedule.grid(5, "linspace"), lag=1, seed=0
)
print("video:", tuple(model.to_pixels(frames).shape))
