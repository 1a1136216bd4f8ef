"""Public ops. Each has a `reference_<op>` of the same signature in plain PyTorch."""

from arcore._extension import built_from_these_sources

with built_from_these_sources():
    from arcore.ops._block_values import block_values, quantise_blocks, reference_block_values
    from arcore.ops._cross_entropy import (
        CrossEntropy,
        linear_cross_entropy,
        reference_linear_cross_entropy,
        reference_token_cross_entropy,
        token_cross_entropy,
    )
    from arcore.ops._linear_logprobs import linear_logprobs, reference_linear_logprobs
    from arcore.ops._linear_scan import linear_scan, reference_linear_scan
    from arcore.ops.block_sparse_attention import (
        alibi_bias,
        block_sparse_attention,
        reference_block_sparse_attention,
    )
    from arcore.ops.causal_conv1d import (
        causal_conv1d,
        causal_conv1d_update,
        reference_causal_conv1d,
        reference_causal_conv1d_update,
    )
    from arcore.ops.decoder_step import decoder_step, reference_decoder_step
    from arcore.ops.mamba3_scan import Mamba3State, mamba3_scan, mamba3_update, reference_mamba3_scan
    from arcore.ops.mamba_step import mamba_step, reference_mamba_step
    from arcore.ops.sample import (
        confidence_mask,
        filter_probs,
        logits_from_probs,
        reference_confidence_mask,
        reference_filter_probs,
        reference_sample,
        sample,
    )
    from arcore.ops.selective_scan import reference_selective_scan, selective_scan
    from arcore.ops.selective_state_update import reference_selective_state_update, selective_state_update
    from arcore.ops.speculative import (
        Verified,
        VerifiedWindow,
        codebook_neighbours,
        reference_verify_chain,
        reference_verify_jacobi,
        reference_verify_relaxed,
        reference_verify_tree,
        reference_verify_typical,
        verify_chain,
        verify_jacobi,
        verify_relaxed,
        verify_tree,
        verify_typical,
    )
    from arcore.ops.ssd import reference_ssd, ssd
    from arcore.ops.token_logprobs import TokenLogprobs, reference_token_logprobs, token_logprobs

__all__ = [
    "CrossEntropy",
    "Mamba3State",
    "TokenLogprobs",
    "Verified",
    "VerifiedWindow",
    "alibi_bias",
    "block_sparse_attention",
    "block_values",
    "causal_conv1d",
    "causal_conv1d_update",
    "codebook_neighbours",
    "confidence_mask",
    "decoder_step",
    "filter_probs",
    "linear_cross_entropy",
    "linear_logprobs",
    "linear_scan",
    "logits_from_probs",
    "mamba3_scan",
    "mamba3_update",
    "mamba_step",
    "quantise_blocks",
    "reference_block_sparse_attention",
    "reference_block_values",
    "reference_causal_conv1d",
    "reference_causal_conv1d_update",
    "reference_confidence_mask",
    "reference_decoder_step",
    "reference_filter_probs",
    "reference_linear_cross_entropy",
    "reference_linear_logprobs",
    "reference_linear_scan",
    "reference_mamba3_scan",
    "reference_mamba_step",
    "reference_sample",
    "reference_selective_scan",
    "reference_selective_state_update",
    "reference_ssd",
    "reference_token_cross_entropy",
    "reference_token_logprobs",
    "reference_verify_chain",
    "reference_verify_jacobi",
    "reference_verify_relaxed",
    "reference_verify_tree",
    "reference_verify_typical",
    "sample",
    "selective_scan",
    "selective_state_update",
    "ssd",
    "token_cross_entropy",
    "token_logprobs",
    "verify_chain",
    "verify_jacobi",
    "verify_relaxed",
    "verify_tree",
    "verify_typical",
]
