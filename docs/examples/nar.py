"""Write targets in parallel with the methods of the survey, by models with random
weights.
"""

import arcore
from arcore.zoo.language.nar.registry import METHODS, translate

sources = [[3, 5, 7, 2], [9, 1]]
for method in METHODS:
    model = arcore.create_model("nar_tiny", method=method).eval()
    targets, calls = translate(model, sources)
    print(
        f"{method:12} {calls} calls of the decoder, targets of "
        f"{[len(row) for row in targets]} tokens"
    )
