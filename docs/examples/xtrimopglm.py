"""Fill a blank in a protein from both of its sides, by a model with random
weights.
"""

import arcore
from arcore.decoding import Sampling

model = arcore.create_model("xtrimopglm_tiny").eval()
words = model.vocabulary
protein = [
    *words.encode("MKTAYIAK"),
    words.specials.span_mask,
    *words.encode("QRQISF"),
]
for filled in model.infill(
    protein, max_new_tokens=6, sampling=Sampling(temperature=0.8), seed=0
):
    print("filled in:", filled)
