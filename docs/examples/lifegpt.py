"""States of Conway's Game of Life, and a language model that is asked for the next
one; random weights.
"""

import torch

import arcore
from arcore.decoding import generate
from arcore.zoo.dynamics.lifegpt.model import next_state, prompts, random_states

states = random_states(2, 4, 4, torch.Generator().manual_seed(0))
print("after a step of the rule:", next_state(states, "life")[0].tolist())

model = arcore.create_model("lifegpt_tiny").eval()
asked = prompts(states)
told = generate(model, asked, max_new_tokens=16, temperature=0.0)
print("tokens of the model's answer:", told.ids[0].tolist())
