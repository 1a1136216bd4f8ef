"""Non-autoregressive generation: the families of a survey on one encoder-decoder (Xiao et al., arXiv:2204.09269).

A source becomes a target in few calls of a decoder that reads all places at once, not in one call per token. What such
a decoder cannot do in one call is choose: where several targets are right, places that are filled independently mix
them. Every method here is an answer to that, in a file of its own below `methods/`:

| file | method | answer |
|---|---|---|
| `at.py` | autoregressive teacher | none needed: one token per call |
| `cmlm.py` | mask-predict | fill masked places again, given the sure ones |
| `glat.py` | glancing | learn to fill with parts of the target in sight, as many as are wrong |
| `ctc.py` | connectionist temporal classification | sum over alignments with more places than tokens |
| `insertion.py` | Insertion Transformer | grow the target from its middle, in all gaps at once |
| `levenshtein.py` | Levenshtein Transformer | delete, make room, fill, until nothing changes |
| `dag.py` | directed acyclic graph | sum over paths through more vertices than tokens |

Distillation (`--kd`) replaces the targets by an autoregressive teacher's, which leaves less to choose from. The table
of all groups of the survey and where the zoo has them is `registry.taxonomy()`, shown in the documentation.

Here words are spelled as sources and spoken as targets, by the CMU dictionary; a table of pairs of your own does too.

Legend: B rows, S source tokens, N target tokens or places, C width, V target vocabulary, T iterations.
"""

from __future__ import annotations

from typing import Any

from arcore.catalog import System

SYSTEM = System(
    name="nar",
    title="Non-autoregressive generation (survey)",
    paper="arXiv:2204.09269",
    paper_title="A Survey on Non-Autoregressive Generation for Neural Machine Translation and Beyond",
    topic="language",
    kind="model",
    model="Nar",
    ops=("block_sparse_attention",),
    recipe="own",
    summary="Eight ways to write a target in few calls, on one encoder-decoder: masked, glancing, CTC, edits, graphs.",
    claim=(
        "On a law of two targets one call is right 1/8 of the time, two calls half, four and a distilled one always; "
        "sums over alignments and paths are enumerations; four calls of mask-predict spell more words right than one."
    ),
    checked_on="real data",
)


def __getattr__(name: str) -> Any:
    # The recipe needs the packages for training; the networks do not.
    if name == "RECIPE":
        from arcore.zoo.language.nar.recipe import RECIPE

        return RECIPE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
