"""A layer of linear attention predicts what a step of gradient descent on the
examples would.
"""

import torch

from arcore.zoo.learning_theory.icl_gradient_descent import (
    LinearAttention,
    draw_tasks,
    gradient_descent,
)

tasks = draw_tasks(5, dim=4, context=10, generator=torch.Generator().manual_seed(0))
layer = LinearAttention([0.1, 0.1])
with torch.no_grad():
    print("two layers:", layer(tasks.x, tasks.y[:, :-1]).tolist())
print(
    "two steps: ", gradient_descent(tasks.x, tasks.y[:, :-1], [0.1, 0.1]).tolist()
)
