"""Which process of a run this is, before the training engine knows."""

from __future__ import annotations

import os

# As launchers set them: torchrun, SLURM, and Lightning's own, which starts a process per device.
_VARIABLES = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")


def is_first() -> bool:
    """Whether this process writes files and speaks; True without a launcher."""
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    return all(os.environ.get(name, "0") == "0" for name in _VARIABLES)
