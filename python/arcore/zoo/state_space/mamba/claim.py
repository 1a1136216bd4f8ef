"""The claim of Mamba's section 3.1: without selection, content cannot be picked out by what it is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog.claims import Claim, at_least, steps
from arcore.nn import MambaMixer
from arcore.ops import selective_scan
from arcore.zoo.state_space.mamba.model import Mamba, MambaConfig

LENGTH, ITEMS, SYMBOLS = 24, 3, 16
NOISE, READ = SYMBOLS, SYMBOLS + 1


def claim(*, quick: bool) -> Claim:
    """Selective copying, learnt by Mamba and by the same network with time-invariant mixers, worst of some seeds."""
    seeds = range(1 if quick else 3)
    selective = [_accuracy(Mamba, seed) for seed in seeds]
    invariant = [_accuracy(_TimeInvariantMamba, seed) for seed in seeds]
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


def _selective_copying(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows with `ITEMS` symbols at random places among noise, then as many marks; at those, the symbols in order."""
    places = torch.rand(batch, LENGTH, generator=generator).argsort(1)[:, :ITEMS].sort(1).values
    symbols = torch.randint(SYMBOLS, (batch, ITEMS), generator=generator)
    text = torch.full((batch, LENGTH), NOISE).scatter_(1, places, symbols)
    return torch.cat([text, torch.full((batch, ITEMS), READ)], dim=1), symbols


def _accuracy(kind: type[Mamba], seed: int, count: int = 300) -> float:
    torch.manual_seed(seed)
    model = kind(MambaConfig(d_model=32, n_layer=2, d_state=8, vocab_size=SYMBOLS + 2))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=count, pct_start=0.1)
    for _ in steps(count, f"training {kind.__name__.lstrip('_')}, seed {seed}"):
        ids, symbols = _selective_copying(64, generator)
        loss = F.cross_entropy(model(ids)[:, -ITEMS:].flatten(0, 1), symbols.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    ids, symbols = _selective_copying(1000, torch.Generator().manual_seed(seed + 1000))
    with torch.no_grad():
        return float((model(ids)[:, -ITEMS:].argmax(-1) == symbols).float().mean())
