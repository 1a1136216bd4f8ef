"""Diffusion Forcing: sequences whose frames are each noisy to a degree of their own (Chen et al., arXiv:2407.01392).

Every frame is one token with its own diffusion time, drawn independently in training. So one network denoises frames
one after the other, all at once, or in any order between (`arcore.decoding.generate_frames`): a frame that is known is
one with little noise, a frame that is unknown one with nothing else. This is the transformer of the authors' later code
("v1.5"): frame, time and condition side by side pass a small network, then causal attention over frames with the norms
after each branch. A frame's prediction depends on no later frame, whatever noise that has.

Finished frames are read at a small time, `context_time`, scaled like data of that time but without its noise: a network
that expects errors of that size in its context follows them less ("stabilisation"). The network never sees
time -1, clean.

Legend: B rows, N frames in a row, P values of a frame, C width, K classes.
"""

from arcore.catalog import System

SYSTEM = System(
    name="diffusion_forcing",
    title="Diffusion Forcing",
    paper="arXiv:2407.01392",
    paper_title="Diffusion Forcing: Next-token Prediction Meets Full-Sequence Diffusion",
    topic="dynamics",
    kind="model",
    model="DiffusionForcing",
    ops=("block_sparse_attention",),
    recipe="frame_diffusion",
    summary="Sequence generator whose frames are each noisy to a degree of their own.",
    claim=(
        "Trained with a time per frame, the network denoises a frame given clean ones before it better "
        "than when trained with one time for all frames."
    ),
    checked_on="real data",
)
