"""GenARM: a language model is aligned while it writes, by the token probabilities of a reward model (arXiv:2410.08193).

The reward model is a language model too: it is trained so that the log-probability of a whole preferred answer is above
that of a rejected one, and so gives every next token a reward. Decoding multiplies the two models' distributions,
log p = log base + sum of alpha_k log reward_k + const, with one weight for each of several objectives.

The mix is `arcore.decoding.MixedModel`, which every loop decodes (`--guide MODEL:ALPHA` on the command line, several
times); here are the training loss, a recipe that trains a reward model on pairs of the base model's own texts
(`arcore train genarm`), and the check of the claim. Normalising token by token is not the exact optimum of reward minus
KL over whole texts; the check states by how much it differs.

Left out: prompts with a template of their own for each model.
"""

from __future__ import annotations

from typing import Any

from arcore.catalog import System

SYSTEM = System(
    name="genarm",
    title="GenARM",
    paper="arXiv:2410.08193",
    paper_title="GenARM: Reward Guided Generation with Autoregressive Reward Model for Test-time Alignment",
    topic="alignment",
    kind="decoder",
    builds_on=("llama",),
    ops=("sample",),
    recipe="own",
    summary="Test-time alignment: a frozen language model times an autoregressive reward model, token by token.",
    claim="Weight 0 changes nothing; reward rises with the weight, near the optimum; held-out pairs are ranked.",
    checked_on="synthetic data",
)


def __getattr__(name: str) -> Any:
    # The recipe needs the packages for training; the loss does not.
    if name == "RECIPE":
        from arcore.zoo.alignment.genarm.recipe import RECIPE

        return RECIPE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
