"""Evaluation mode for the time of a decoding loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(*modules: object) -> Iterator[None]:
    """Switch what is left of dropout off, and back on as it was."""
    networks = [part for module in modules if isinstance(module, nn.Module) for part in module.modules()]
    modes = [network.training for network in networks]
    for network in networks:
        network.training = False
    try:
        yield
    finally:
        for network, mode in zip(networks, modes, strict=True):
            network.training = mode
