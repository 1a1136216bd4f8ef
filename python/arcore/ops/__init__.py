"""Public ops. Each has a `reference_<op>` of the same signature in plain PyTorch."""

from arcore.ops.block_sparse_attention import block_sparse_attention, reference_block_sparse_attention
from arcore.ops.selective_scan import reference_selective_scan, selective_scan

__all__ = [
    "block_sparse_attention",
    "reference_block_sparse_attention",
    "reference_selective_scan",
    "selective_scan",
]
