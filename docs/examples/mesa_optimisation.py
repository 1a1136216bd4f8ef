"""Train a linear layer on sequences of linear dynamics, briefly, and compare it
with the optimum.
"""

from arcore.zoo.learning_theory.mesa_optimisation import Options, run

print(run(Options(dim=2, length=15, sequences=200, steps=300)).text)
