"""Mamba: a language model of selective state spaces, without attention (Gu and Dao, arXiv:2312.00752).

Each layer adds a mixer (`arcore.nn.MambaMixer`) of the normalised residual stream to the stream; there is no
feed-forward network and no position embedding. The state of a layer is a matrix per row whose step sizes, inputs and
outputs depend on the token, so the model can choose what to keep. Training scans whole sequences; generation carries
the state along, whose size does not grow. Published hybrids, with layers of attention between those of state spaces
(`attn_layer_idx`) and feed-forward networks behind both (`d_intermediate`), are this model too.

Legend: B rows, L tokens, C width, V vocabulary, rounded up.
"""

from arcore.catalog import System

SYSTEM = System(
    name="mamba",
    title="Mamba",
    paper="arXiv:2312.00752",
    paper_title="Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
    topic="state_space",
    kind="model",
    model="Mamba",
    ops=("selective_scan", "block_sparse_attention"),
    recipe="language",
    summary="Language model on selective state spaces, with a state of constant size.",
    claim="Selection copies marked tokens out of noise; the same model with time-invariant parameters does not.",
    checked_on="synthetic data",
)
