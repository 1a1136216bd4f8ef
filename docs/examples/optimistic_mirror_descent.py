"""Two players learn a zero-sum game; with optimism the last policies come to the
equilibrium.
"""

import numpy as np

from arcore.zoo.learning_theory.optimistic_mirror_descent import play_game

rock_paper_scissors = np.array(
    [[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]
)
for optimism in (False, True):
    last = play_game(rock_paper_scissors, optimism=optimism, rounds=2000)[-1]
    print("with optimism:" if optimism else "without:", last.round(3))
