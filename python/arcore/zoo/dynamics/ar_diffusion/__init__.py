"""AR-Diffusion: a video whose frames are denoised at times of their own (Sun et al., CVPR 2025, arXiv:2503.07418).

A frame is a handful of tokens, and its time modulates its tokens alone. Times never fall from frame to frame: what
came before is never noisier, so attention needs to look back only. In training, rows of such times are drawn so that
every frame sees every time (`arcore.schedules.fopp_times`); in sampling, each frame starts a lag after the one before,
from all together to one after the other (`arcore.decoding.generate_frames`).

The class stands before the video as a few learned context tokens. Under the released mask they see all frames and all
frames see them, so the future leaks into the past; with `temporal_causal` they see only themselves, and frames that are
finished lie in a cache.

Legend: B rows, F frames, n tokens per frame, P values per token, C width.
"""

from arcore.catalog import System

SYSTEM = System(
    name="ar_diffusion",
    title="AR-Diffusion",
    paper="arXiv:2503.07418",
    paper_title="AR-Diffusion: Asynchronous Video Generation with Auto-Regressive Diffusion",
    topic="dynamics",
    kind="model",
    model="ARDiffusion",
    builds_on=("diffusion_forcing",),
    ops=("block_sparse_attention",),
    recipe="frame_diffusion",
    summary="Video generator that denoises each frame at a time of its own, earlier frames first.",
    claim=(
        "Training times never fall from frame to frame, and each frame sees each time at least 1/F as "
        "often as evenly."
    ),
    checked_on="closed form",
)
