"""HMAR: next-scale prediction without a cache, and masked refinement inside a scale (arXiv:2506.04421).

VAR reads all coarser scales, though what it reads for a scale, the reconstruction so far, already holds what they say.
HMAR makes the scales a Markov chain: a token sees the tokens of its own scale only. The mask of training is
block-diagonal, generation is one independent pass per scale, and nothing is kept between them. A second branch, copied
from the last blocks and trained with all else frozen, draws the least certain tokens of a scale anew, given the others.

Legend: B rows, K scales, p_k side of scale k, n_k = p_k^2, L = sum of n_k tokens, C width, z code width, V codes.

From the command line: `arcore train hmar_tiny` is the first stage, with `--init-from` weights of VAR to convert;
`--refine RUN` is the second; `arcore sample RUN --edit PICTURE` edits without training, `--redraw` by both branches.
"""

from arcore.catalog import System

SYSTEM = System(
    name="hmar",
    title="HMAR",
    paper="arXiv:2506.04421",
    paper_title="HMAR: Efficient Hierarchical Masked Auto-Regressive Image Generation",
    topic="next_scale",
    kind="model",
    model="HMAR",
    builds_on=("var", "msvq"),
    ops=("block_sparse_attention", "sample", "token_logprobs"),
    recipe="next_scale",
    summary="Image generator whose scales see no coarser tokens, so it needs no cache; uncertain tokens are redrawn.",
    claim="One block-diagonal pass gives the logits of independent scales; the cache is empty.",
    checked_on="published layout, random weights",
)
