"""A Markov categorical framework for language modelling: what a hidden state knows beyond the next token
(Zhang, arXiv:2507.19247).

One step of a language model is a composition of Markov kernels: context to hidden state, hidden state to the law of the
next token. Three measurements follow, here for every language model of the zoo with layers and an embedding:

* The surplus: what the hidden state H_t says about the tokens behind the next one, given the tokens up to them,
  I(H_t; W_t..W_{t+K-1}) = I(H_t; W_t) + I(H_t; W_{t+1}..W_{t+K-1} | W_t). It is what draft heads live on. It is
  estimated, offset by offset, by the cross entropy of a probe without the hidden state less that of the same probe
  with it, on text that neither was fitted on. A probe that fails to use the state lowers the figure; one that fails to
  use the tokens in between raises it, so the claim compares that probe with counted pairs.
* The categorical entropy of a law of the next token: the divergence of (w, w), w ~ p, from two independent draws. For
  Kullback-Leibler it is Shannon's entropy; total variation, chi-square and Renyi have closed forms.
* The geometry: the Fisher-Rao metric that the output layer pulls back to hidden states, and how far the hidden states
  of a set of contexts span the leading eigenspace of the kernel of their laws.

The surplus explains when `hydra` beats `medusa`: its heads see the tokens in between, which the surplus conditions on.

Legend: P pieces of text, L tokens, C width, V vocabulary, K horizon, n contexts, r rank.
"""

from __future__ import annotations

from arcore.catalog import System

SYSTEM = System(
    name="markov_categories",
    title="Markov categorical framework",
    paper="arXiv:2507.19247",
    paper_title="A Markov Categorical Framework for Language Modeling",
    topic="learning_theory",
    kind="theory",
    builds_on=("llama",),
    summary="What hidden states of a language model say beyond the next token; entropies, spectrum, eigenspaces.",
    claim=(
        "Likelihood training turns hidden states into the leading eigenspace of the kernel of their laws; states of "
        "a trained model know more of later tokens than the tokens in between do."
    ),
    checked_on="real data",
)
