"""Architecture and objective of language models, compared (Wang et al., arXiv:2204.05832).

Three architectures: CD, a causal decoder; ND, the same weights with a prefix that sees itself in both directions; ED,
an encoder and a decoder, of twice the parameters at about the same cost. Three objectives: FLM, all tokens in order;
PLM, a text cut at random, its second part predicted from the first; MLM, spans of about three tokens, 15 % of a text,
predicted from what stands around them. All are pairs of inputs and targets, so one loop trains them; CD reads
`[inputs; targets]` causally, ND with the inputs as prefix, ED the inputs by its encoder. ND with FLM has no inputs and
is CD with FLM.

`run` trains all of them for equal steps on a text and measures what can be done with each: the loss of next tokens, the
choice among four continuations before and after a stage of several tasks in prompts, and how soon a causal model
trained on FLM becomes one for MLM.

Legend: B rows, N inputs, M targets, C width.
"""

from __future__ import annotations

from arcore.catalog import System

SYSTEM = System(
    name="compare_objectives",
    title="Architecture and objective",
    paper="arXiv:2204.05832",
    paper_title="What Language Model Architecture and Pretraining Objective Work Best for Zero-Shot Generalization?",
    topic="language",
    kind="theory",
    summary="Causal, prefix and encoder-decoder models under three objectives: losses, zero-shot choices, adaptation.",
    claim="A prefix of nothing is the causal model exactly; the causal model trained on all tokens predicts them best.",
    checked_on="real data",
    builds_on=("reusable_holdout",),
)
