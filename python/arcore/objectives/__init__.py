"""Training objectives: pure functions of logits or predictions."""

from arcore.objectives.next_scale import next_scale_loss

__all__ = ["next_scale_loss"]
