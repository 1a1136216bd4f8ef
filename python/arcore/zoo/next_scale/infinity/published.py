"""The names of the published weights of Infinity."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

OFFICIAL_NAMES = (
    (r"^cfg_uncond$", "null_text"),
    (r"^text_proj_for_sos\.ca\.mat_q$", "text_pool.query"),
    (r"^text_proj_for_sos\.ca\.", "text_pool."),
    (r"^text_proj_for_ca\.", "text_proj."),
    (r"^lvl_embed\.", "level_embed."),
    (r"^shared_ada_lin\.1\.", "modulation.linear."),
    (r"^head\.", "head.linear."),
    (r"^head_nm\.ada_lin\.1\.", "head.modulation.linear."),
    (r"^(blocks\.\d+)\.sa\.", r"\1.attn."),
    (r"^(blocks\.\d+)\.ca\.", r"\1.cross."),
    (r"^(blocks\.\d+)\.ca_norm\.", r"\1.cross_norm."),
    (r"^(blocks\.\d+)\.ada_gss$", r"\1.modulation.table"),
    (r"\.attn\.mat_qkv\.", ".attn.qkv."),
    (r"\.attn\.scale_mul_1H11$", ".attn.log_scale"),
    (r"\.mat_q\.", ".q."),
    (r"\.mat_kv\.", ".kv."),
)


def our_names(state: Mapping[str, Tensor], names: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Weights of a published file under our names.

    Args:
        state: the file's; where it holds blocks in chunks, they are counted through.
        names: patterns and what takes their place, applied one after the other.

    Raises:
        ValueError: a bias on keys is not zero.
    """
    ours: dict[str, Tensor] = {}
    per_chunk = 1 + max(
        (
            int(found[1])
            for name in state
            if (found := re.match(r"^block_chunks\.\d+\.module\.(\d+)\.", name))
        ),
        default=0,
    )
    for key, value in state.items():
        if key.endswith("zero_k_bias"):
            if value.any():
                raise ValueError(f"{key} is not zero, but the model has no bias on keys")
            continue
        name = re.sub(
            r"^block_chunks\.(\d+)\.module\.(\d+)\.",
            lambda found: f"blocks.{int(found[1]) * per_chunk + int(found[2])}.",
            key,
        )
        for pattern, new in names:
            name = re.sub(pattern, new, name)
        if value.dim() == 4 and name.endswith("log_scale"):
            value = value.reshape(1, -1, 1, 1)
        ours[name] = value
    return ours
