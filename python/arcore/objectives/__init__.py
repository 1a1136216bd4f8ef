"""Training objectives: pure functions of predictions and targets."""

from arcore.objectives.next_scale import next_scale_loss

__all__ = ["next_scale_loss"]
