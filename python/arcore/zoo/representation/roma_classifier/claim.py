"""The claim of RoMA's classifier: four scans in place are four scans of flipped and transposed copies."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore.catalog.claims import Claim, at_least, at_most, shaken
from arcore.zoo.representation.roma_classifier.model import FourDirectionMixer, column_order


def claim(*, quick: bool) -> Claim:
    """Even and odd grids: outputs and gradients against float64 scans of copies, relative to the largest value."""
    outputs, gradients, size, swapped = 0.0, 0.0, math.inf, math.inf
    for side in (4, 5) if quick else (4, 5, 8, 13):
        mixer = shaken(FourDirectionMixer(32, d_state=8))
        x = torch.randn(2, side * side + 1, 32, requires_grad=True)
        weight = torch.randn_like(x)
        out = mixer(x, column_order(side))
        (out * weight).sum().backward()
        double = {name: value.detach().double().requires_grad_() for name, value in mixer.named_parameters()}
        directions = [
            {name.split(".", 2)[2]: value for name, value in double.items() if f"directions.{k}." in name}
            for k in range(4)
        ]
        y = x.detach().double().requires_grad_()
        expected = textbook_mixer(y, double, directions)
        (expected * weight).sum().backward()
        outputs = max(outputs, _relative(out, expected))
        for ours, theirs in [(x, y), *((value, double[name]) for name, value in mixer.named_parameters())]:
            gradients = max(gradients, _relative(ours.grad, theirs.grad))
        size = min(size, expected.std().item())
        with torch.no_grad():
            other = textbook_mixer(y, double, directions[::-1])
        swapped = min(swapped, (other - expected).abs().max().item())
    return Claim(
        (
            at_most("outputs, largest difference", outputs, 1e-5),
            at_most("gradients, largest difference", gradients, 2e-5),
            at_least("standard deviation of the outputs, smallest", size, 0.05),
            # Directions have weights of their own, so mixing them up would show.
            at_least("outputs when directions are swapped, difference", swapped, 0.05),
        )
    )


def _relative(ours: Tensor | None, theirs: Tensor | None) -> float:
    if ours is None or theirs is None:
        return math.nan
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def textbook_scan(u: Tensor, z: Tensor, w: dict[str, Tensor]) -> Tensor:
    """Convolution and scan of `[B, L, D]` forwards, token by token."""
    taps = w["conv1d.weight"][:, 0]
    early = F.pad(u, (0, 0, 3, 0))
    u = F.silu(sum(early[:, k : k + u.shape[1]] * taps[:, k] for k in range(4)) + w["conv1d.bias"])
    a = -w["A_log"].exp()
    rank, states = w["dt_proj.weight"].shape[1], a.shape[1]
    low, b, c = (u @ w["x_proj.weight"].T).split([rank, states, states], -1)
    delta = F.softplus(low @ w["dt_proj.weight"].T + w["dt_proj.bias"])
    state, out = torch.zeros(len(u), *a.shape, dtype=u.dtype), []
    for t in range(u.shape[1]):
        step = delta[:, t, :, None]
        state = (step * a).exp() * state + step * b[:, t, None] * u[:, t, :, None]
        out.append((state * c[:, t, None]).sum(-1) + w["D"] * u[:, t])
    return torch.stack(out, 1) * F.silu(z)


def textbook_mixer(x: Tensor, w: dict[str, Tensor], directions: list[dict[str, Tensor]]) -> Tensor:
    """Four scans of copies: as they are, flipped, and both with the grid of patches transposed."""
    side = math.isqrt(x.shape[1] - 1)
    middle = side * side // 2

    def transposed(x: Tensor) -> Tensor:
        patches = torch.cat([x[:, :middle], x[:, middle + 1 :]], 1).unflatten(1, (side, side))
        patches = patches.transpose(1, 2).flatten(1, 2)
        return torch.cat([patches[:, :middle], x[:, middle : middle + 1], patches[:, middle:]], 1)

    u, z = (x @ w["in_proj.weight"].T).chunk(2, -1)
    rows = textbook_scan(u, z, directions[0])
    rows = rows + textbook_scan(u.flip(1), z.flip(1), directions[1]).flip(1)
    u, z = transposed(u), transposed(z)
    columns = textbook_scan(u, z, directions[2])
    columns = columns + textbook_scan(u.flip(1), z.flip(1), directions[3]).flip(1)
    return (rows + transposed(columns)) / 4 @ w["out_proj.weight"].T
