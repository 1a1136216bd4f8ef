"""Backbones, features of their edges, and messages between residues."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N, CA, C, OXYGEN, CB = range(5)


# The order in which the weights expect the distances.
PAIRS = (
    (CA, CA), (N, N), (C, C), (OXYGEN, OXYGEN), (CB, CB), (CA, N), (CA, C), (CA, OXYGEN), (CA, CB), (N, C),
    (N, OXYGEN), (N, CB), (CB, C), (CB, OXYGEN), (OXYGEN, C), (N, CA), (C, CA), (OXYGEN, CA), (CB, CA), (C, N),
    (OXYGEN, N), (CB, N), (C, CB), (OXYGEN, CB), (C, OXYGEN),
)  # fmt: skip


class Backbones(NamedTuple):
    """Proteins without their letters.

    Attributes:
        coordinates: `[B, L, 4, 3]`, N, CA, C, O in Å; 0 where unknown.
        known: bool `[B, L]`, False at residues without coordinates and at padding.
        places: int64 `[B, L]`, places in the chains, those of different chains far apart.
        chains: int64 `[B, L]`, one number per chain.
    """

    coordinates: Tensor
    known: Tensor
    places: Tensor
    chains: Tensor


def gather(values: Tensor, index: Tensor) -> Tensor:
    """Values `[B, L, C]` of neighbours `[B, M, K]`: `[B, M, K, C]`."""
    flat = index.flatten(1).unsqueeze(-1).expand(-1, -1, values.shape[-1])
    return values.gather(1, flat).unflatten(1, index.shape[1:])


class _Dense(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.W_in, self.W_out = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.W_out(F.gelu(self.W_in(x)))
        return out


class MessageLayer(nn.Module):
    """Adds to each residue the sum of its neighbours' messages over 30, then what a small network makes of it.

    Args:
        dim: width C of residues.
        context: width of what is known of a neighbour and the edge to it.
        dropout: rate in training.
        edges: update the edges too.
    """

    SCALE = 30.0

    def __init__(self, dim: int, context: int, dropout: float, *, edges: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.W1, self.W2, self.W3 = nn.Linear(dim + context, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        if edges:
            self.norm3 = nn.LayerNorm(dim)
            self.W11, self.W12, self.W13 = (
                nn.Linear(dim + context, dim),
                nn.Linear(dim, dim),
                nn.Linear(dim, dim),
            )
        self.dense = _Dense(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Tensor, known: Tensor, pairs: Tensor | None = None) -> Tensor:
        """Residues `[B, M, C]` and context `[B, M, K, D]` to residues; `known` `[B, M]`, `pairs` `[B, M, K]` or all."""
        message = self.W3(F.gelu(self.W2(F.gelu(self.W1(_beside(x, context))))))
        if pairs is not None:
            message = pairs.unsqueeze(-1) * message
        x = self.norm1(x + self.dropout(message.sum(-2) / self.SCALE))
        out: Tensor = self.norm2(x + self.dropout(self.dense(x))) * known.unsqueeze(-1)
        return out

    def update_edges(self, edges: Tensor, x: Tensor, context: Tensor) -> Tensor:
        """Edges `[B, L, K, C]` after the residues have changed."""
        change = self.W13(F.gelu(self.W12(F.gelu(self.W11(_beside(x, context))))))
        out: Tensor = self.norm3(edges + self.dropout(change))
        return out


def _beside(x: Tensor, context: Tensor) -> Tensor:
    return torch.cat([x.unsqueeze(-2).expand(*context.shape[:-1], x.shape[-1]), context], -1)


class EdgeFeatures(nn.Module):
    """Features of the edges from each residue to its nearest ones.

    Args:
        dim: width C.
        neighbours: K.
    """

    FARTHEST, PLACES, CENTRES = 32, 16, 16

    def __init__(self, dim: int, neighbours: int) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.embeddings = nn.Module()
        self.embeddings.linear = nn.Linear(2 * self.FARTHEST + 2, self.PLACES)
        self.edge_embedding = nn.Linear(self.PLACES + self.CENTRES * len(PAIRS), dim, bias=False)
        self.norm_edges = nn.LayerNorm(dim)

    def forward(self, backbones: Backbones) -> tuple[Tensor, Tensor]:
        """Edges `[B, L, K, C]` and neighbours `[B, L, K]`, nearest first, a residue itself among its own."""
        x = backbones.coordinates
        b, c = x[:, :, CA] - x[:, :, N], x[:, :, C] - x[:, :, CA]
        a = torch.linalg.cross(b, c)
        virtual = -0.58273431 * a + 0.56802827 * b - 0.54067466 * c + x[:, :, CA]
        atoms = [*x.unbind(2), virtual]
        known = backbones.known.to(x.dtype)
        both = known.unsqueeze(1) * known.unsqueeze(2)
        far = both * _distances(atoms[CA].unsqueeze(2), atoms[CA].unsqueeze(1))
        far = far + (1 - both) * far.amax(-1, keepdim=True)
        nearest, index = far.topk(min(self.neighbours, x.shape[1]), -1, largest=False)
        rows = [nearest]
        rows += [_distances(atoms[i].unsqueeze(2), gather(atoms[j], index)) for i, j in PAIRS[1:]]
        centres = torch.linspace(2.0, 22.0, self.CENTRES, dtype=x.dtype, device=x.device)
        width = 20.0 / self.CENTRES
        radial = (-((torch.stack(rows, -1).unsqueeze(-1) - centres) / width).square()).exp().flatten(-2)
        apart = backbones.places.unsqueeze(2) - gathered(backbones.places, index)
        same = backbones.chains.unsqueeze(2) == gathered(backbones.chains, index)
        step = (apart + self.FARTHEST).clamp(0, 2 * self.FARTHEST)
        step = torch.where(same, step, 2 * self.FARTHEST + 1)
        linear: Any = self.embeddings.linear
        places = linear(F.one_hot(step, 2 * self.FARTHEST + 2).to(x.dtype))
        return self.norm_edges(self.edge_embedding(torch.cat([places, radial], -1))), index


def gathered(values: Tensor, index: Tensor) -> Tensor:
    return gather(values.unsqueeze(-1), index).squeeze(-1)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b).square().sum(-1) + 1e-6).sqrt()
