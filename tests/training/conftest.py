from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("pytorch_lightning")
pytest.importorskip("sklearn")


@pytest.fixture(scope="session")
def toy_task():
    """A small classifier with dropout, so that a resumed run needs the right random numbers too."""
    from arcore.training.task import Task

    class ToyTask(Task):
        saved = ("model",)

        def __init__(self, config, dropout=0.2, fail_at=None):
            super().__init__(config)
            torch.manual_seed(config.seed)
            self.model = nn.Sequential(
                nn.Flatten(), nn.Linear(64, 24), nn.Dropout(dropout), nn.GELU(), nn.Linear(24, 10)
            )
            self.fail_at = fail_at

        def loss(self, images, labels):
            if self.fail_at is not None and self.step == self.fail_at:
                raise RuntimeError("power cut")
            logits = self.model(images)
            accuracy = (logits.argmax(1) == labels).float().mean()
            return nn.functional.cross_entropy(logits, labels), {"accuracy": accuracy}

        def meta(self):
            return {"family": "toy"}

    return ToyTask
