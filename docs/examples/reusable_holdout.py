"""Ask a held-out set again and again without overfitting to it."""

import numpy as np

from arcore.zoo.statistics.reusable_holdout import Thresholdout

random = np.random.default_rng(0)
first = (
    random.random((2, 500)) < 0.7
)  # right answers of a classifier on training and on held-out rows
guard = Thresholdout().fit(*first)
print(
    f"both sets agree: {guard.answer_:.3f} to report, {guard.spent_} "
    "answers from the held-out rows"
)
for skill in (
    0.8,
    0.9,
):  # of later ones that have learned the training rows by heart
    right = random.random(500) < skill
    print(
        f"training rows say {right.mean():.3f}, to report: "
        f"{guard.answer(right, random.random(500) < 0.7):.3f}"
    )
print("answers that the held-out rows gave:", guard.spent_)
