"""SequenceMatch: a language model that may take a token back, trained to match occupancies (arXiv:2306.05426).

The state is the text that is left after deletions, the action a token or a backspace. Logits are read as soft values of
actions, V(s) = logsumexp, and the reward that they imply, r = l(a|s) - gamma V(s'), is made large on the text's own
steps with a concave phi (chi-square mixture), while the values of states of the text and of the model are pulled
together. The backspace is learned from random tokens that are put into the text, each followed by its deletion.

One pass reads a whole history of edits: a deleted token is seen until it is deleted, positions go back with it, and at
a backspace the model stands where it stood before the deleted token, so its logits there are those of the edited text.
In decoding the cache is cut by one token.

The model's own steps are drawn from where stretches of the data begin, behind inserted errors too, and for as many
steps: else the values of both do not cancel and the objective grows without bound.

The paper's code was not to be found; settings that it does not give are marked as own choices. That the objective beats
maximum likelihood is not claimed here: in a tabular test with exact expectations it did not.

Legend: B rows, N steps, V actions (the backspace is the last one).
"""

from __future__ import annotations

from typing import Any

from arcore.catalog import System

SYSTEM = System(
    name="sequencematch",
    title="SequenceMatch",
    paper="arXiv:2306.05426",
    paper_title="SequenceMatch: Imitation Learning for Autoregressive Sequence Modelling with Backtracking",
    topic="language",
    kind="objective",
    builds_on=("llama",),
    ops=("block_sparse_attention", "sample"),
    recipe="own",
    summary="A backspace for language models: occupancy matching, edit histories in one pass, edits in decoding.",
    claim=(
        "Values telescope and small alpha is maximum likelihood; one masked pass is all edited contexts; wrong tokens "
        "are taken back, which raises the share of valid sentences."
    ),
    checked_on="synthetic data",
)


def __getattr__(name: str) -> Any:
    # The recipe needs the packages for training; the loss does not.
    if name == "RECIPE":
        from arcore.zoo.language.sequencematch.recipe import RECIPE

        return RECIPE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
