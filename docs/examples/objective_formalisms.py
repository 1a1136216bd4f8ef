"""Can a reward rank policies like this? XOR of two choices: not without a memory
of the last action.
"""

from arcore.zoo.learning_theory.objective_formalisms import (
    deterministic,
    express,
    two_states,
)

environment = two_states()
policies = deterministic(environment)  # 00, 01, 10, 11
for formalism in ("markov", "machine"):
    found = express(environment, policies, [[1, 2], [0, 3]], formalism=formalism)
    print(
        formalism,
        "can" if found.possible else "cannot",
        "prefer 01 and 10 to 00 and 11",
    )
