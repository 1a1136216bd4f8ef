"""The claim of Mamba's section 3.1: without selection, content cannot be picked out by what it is."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog.claims import Claim, at_least, steps
from arcore.nn import MambaMixer
from arcore.ops import selective_scan
from arcore.zoo.state_space.mamba.config import MambaConfig
from arcore.zoo.state_space.mamba.model import Mamba


class _Task(NamedTuple):
    """Selective copying: how many places, symbols to copy, and different ones; the networks, and their training."""

    length: int
    items: int
    symbols: int
    width: int
    layers: int
    steps: int
    batch: int
    lr: float


FULL = _Task(24, 3, 16, width=32, layers=2, steps=300, batch=64, lr=1e-2)
QUICK = _Task(8, 3, 8, width=48, layers=1, steps=140, batch=48, lr=1.5e-2)


def claim(*, quick: bool) -> Claim:
    """Selective copying, learnt by Mamba and by the same network with time-invariant mixers, worst of some seeds."""
    seeds, task = ((1,), QUICK) if quick else (range(3), FULL)
    selective = [_accuracy(Mamba, seed, task) for seed in seeds]
    invariant = [_accuracy(_TimeInvariantMamba, seed, task) for seed in seeds]
    return Claim(
        (
            at_least("held-out accuracy of the copied tokens", min(selective), 0.9),
            at_least("lead over time-invariant mixers", min(selective) - max(invariant), 0.1),
        )
    )


class _TimeInvariantMixer(MambaMixer):
    """The same mixer with one step size per channel and one B and C per channel and state, whatever the token is.

    That is a diagonal S4 layer; B and C do not even have to be the same in all channels, as they are in Mamba.
    """

    def __init__(self, dim: int, d_state: int) -> None:
        super().__init__(dim, d_state=d_state)
        self.B = nn.Parameter(torch.randn(self.state_shape))
        self.C = nn.Parameter(torch.randn(self.state_shape))

    def scan(self, u: Tensor, z: Tensor, **_: object) -> Tensor:
        u = self.conv1d(u.transpose(1, 2))
        bias = self.dt_proj.bias
        y = selective_scan(
            u, torch.zeros_like(u), self.decay(), self.B, self.C, self.D, z.transpose(1, 2), bias, True
        )
        return y.transpose(1, 2)


class _TimeInvariantMamba(Mamba):
    def make_mixer(self) -> nn.Module:
        return _TimeInvariantMixer(self.config.d_model, d_state=self.config.d_state)


def _selective_copying(batch: int, task: _Task, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows with symbols at random places among noise, then as many marks; at those, the symbols in order."""
    noise, read = task.symbols, task.symbols + 1
    places = torch.rand(batch, task.length, generator=generator).argsort(1)[:, : task.items].sort(1).values
    symbols = torch.randint(task.symbols, (batch, task.items), generator=generator)
    text = torch.full((batch, task.length), noise).scatter_(1, places, symbols)
    return torch.cat([text, torch.full((batch, task.items), read)], dim=1), symbols


def _accuracy(kind: type[Mamba], seed: int, task: _Task) -> float:
    torch.manual_seed(seed)
    model = kind(MambaConfig(d_model=task.width, n_layer=task.layers, d_state=8, vocab_size=task.symbols + 2))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.lr, total_steps=task.steps, pct_start=0.1)
    for _ in steps(task.steps, f"training {kind.__name__.lstrip('_')}, seed {seed}"):
        ids, symbols = _selective_copying(task.batch, task, generator)
        loss = F.cross_entropy(model(ids)[:, -task.items :].flatten(0, 1), symbols.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    ids, symbols = _selective_copying(1000, task, torch.Generator().manual_seed(seed + 1000))
    with torch.no_grad():
        return float((model(ids)[:, -task.items :].argmax(-1) == symbols).float().mean())
