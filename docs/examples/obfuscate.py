"""Rename the identifiers of Python code and bring them back; names by a model with
random weights.
"""

import arcore
from arcore.zoo.language.obfuscate.model import name_again
from arcore.zoo.language.obfuscate.rename import obfuscate, restore

found = obfuscate("def area(width, height):\n    return width * height\n")
print(found.code)
print(restore(found.code, found.names))
model = arcore.create_model("obscura_tiny").eval()
print("names by the model:", name_again(model, found.code))
