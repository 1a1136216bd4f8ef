"""Draw icons as drawing commands from words, by a model with random weights, and
write one as SVG.
"""

import arcore

model = arcore.create_model("iconshop_tiny", words=("arrow", "left")).eval()
icons = model.draw(
    [model.prompt(["arrow"]), model.prompt(["arrow", "left"])], seed=0, top_p=0.9
)
for icon in icons:
    print(icon.svg()[:120])
