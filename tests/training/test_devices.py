"""Several processes: the same images, hence the same weights, as one process with a larger batch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = """
import sys, warnings
import torch
from torch import nn
from arcore.data import load_digits
from arcore.training import Task, TrainConfig, fit

class Linear(Task):
    saved = ("model",)

    def __init__(self, config):
        super().__init__(config)
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def loss(self, images, labels):
        return nn.functional.cross_entropy(self.model(images), labels), {}

    def meta(self):
        return {}

out, devices, batch_size = sys.argv[1:]
config = TrainConfig(steps=8, batch_size=int(batch_size), accelerator="cpu", devices=devices,
                     strategy="ddp" if devices != "1" else "auto", checkpoint_every=0)
result = fit(Linear(config), load_digits("train"), out, show_progress=False)
assert result.rank == int(__import__("os").environ.get("LOCAL_RANK", 0))
"""


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    results = []
    for devices, batch_size in (("1", "16"), ("2", "8")):
        out = tmp_path / devices
        subprocess.run(
            [sys.executable, str(script), str(out), devices, batch_size],
            check=True,
            timeout=120,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        results.append(load_file(out / "step-00000008" / "model.safetensors"))
    for key in results[0]:
        torch.testing.assert_close(results[0][key], results[1][key], rtol=0, atol=1e-6)
