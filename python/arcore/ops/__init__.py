"""Public ops. Each has a `reference_<op>` of the same signature in plain PyTorch."""

from arcore.ops._linear_logprobs import linear_logprobs, reference_linear_logprobs
from arcore.ops.block_sparse_attention import block_sparse_attention, reference_block_sparse_attention
from arcore.ops.sample import (
    confidence_mask,
    filter_probs,
    reference_confidence_mask,
    reference_filter_probs,
    reference_sample,
    sample,
)
from arcore.ops.selective_scan import reference_selective_scan, selective_scan
from arcore.ops.token_logprobs import TokenLogprobs, reference_token_logprobs, token_logprobs

__all__ = [
    "TokenLogprobs",
    "block_sparse_attention",
    "confidence_mask",
    "filter_probs",
    "linear_logprobs",
    "reference_block_sparse_attention",
    "reference_confidence_mask",
    "reference_filter_probs",
    "reference_linear_logprobs",
    "reference_sample",
    "reference_selective_scan",
    "reference_token_logprobs",
    "sample",
    "selective_scan",
    "token_logprobs",
]
