"""Training objectives: pure functions of logits or predictions."""

from arcore.objectives.diffusion import diffusion_loss, variance_bound
from arcore.objectives.fused_snr import fused_snr_weights, min_snr_weights
from arcore.objectives.masked_autoregressive import diffusion_head_loss, draw_visible
from arcore.objectives.next_cluster import NextClusterLoss, next_cluster_loss, next_cluster_targets
from arcore.objectives.next_scale import next_scale_loss
from arcore.objectives.policy import (
    GroupStatistics,
    group_advantages,
    group_statistics,
    grpo_loss,
    log_ratio,
    reduce,
    sequence_logprob,
)
from arcore.objectives.ppo import ppo_loss, turn_logprobs, value_loss
from arcore.objectives.preference import kto_loss, preference_loss
from arcore.objectives.returns import Advantages, discounted_returns, gae
from arcore.objectives.scoring import score, score_rollout

__all__ = [
    "Advantages",
    "GroupStatistics",
    "NextClusterLoss",
    "diffusion_head_loss",
    "diffusion_loss",
    "discounted_returns",
    "draw_visible",
    "fused_snr_weights",
    "gae",
    "group_advantages",
    "group_statistics",
    "grpo_loss",
    "kto_loss",
    "log_ratio",
    "min_snr_weights",
    "next_cluster_loss",
    "next_cluster_targets",
    "next_scale_loss",
    "ppo_loss",
    "preference_loss",
    "reduce",
    "score",
    "score_rollout",
    "sequence_logprob",
    "turn_logprobs",
    "value_loss",
    "variance_bound",
]
