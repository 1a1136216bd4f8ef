"""Train a small transformer on paths of a random graph, briefly, and count valid
paths by kind of pair.
"""

from arcore.zoo.learning_theory.alpine import Options, run

print(run(Options(nodes=15, density=0.2, dim=32, steps=60, batch=64)).text)
