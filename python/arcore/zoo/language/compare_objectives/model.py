"""The three architectures and the three objectives."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from arcore.masks import causal, full, prefix_lm
from arcore.nn.kinds import check_kinds
from arcore.nn.t5 import T5Stack

Architecture = Literal["CD", "ND", "ED"]
Objective = Literal["FLM", "PLM", "MLM"]
START, SENTINEL, VOCAB = 256, 257, 320


class Pair(NamedTuple):
    """What is given and what is predicted.

    Attributes:
        inputs: int64 `[B, N]`, the start token first.
        targets: int64 `[B, M]`.
    """

    inputs: Tensor
    targets: Tensor


class Model(nn.Module):
    """One of the three architectures, of T5's layers.

    Args:
        architecture: CD and ND have the same weights.
        dim: width C.
        layers: of the decoder, and of the encoder of ED.
        heads: of the attention.
    """

    def __init__(self, architecture: Architecture, *, dim: int, layers: int, heads: int) -> None:
        super().__init__()
        if architecture not in get_args(Architecture):
            raise ValueError(f"expected CD, ND or ED but got {architecture!r}")
        self.architecture = architecture
        self.embedding = nn.Embedding(VOCAB, dim)
        self.encoder = T5Stack(dim, layers, heads, 2 * dim) if architecture == "ED" else None
        self.decoder = T5Stack(dim, layers, heads, 2 * dim, cross=architecture == "ED")
        self.head = nn.Linear(dim, VOCAB, bias=False)

    def forward(self, pair: Pair) -> Tensor:
        """Logits of the targets, `[B, M, V]`."""
        inputs, targets = pair
        if self.encoder is not None:
            memory = self.encoder(self.embedding(inputs), full(inputs.shape[1], inputs.shape[1]))
            before = torch.cat([torch.full_like(targets[:, :1], START), targets[:, :-1]], 1)
            hidden = self.decoder(self.embedding(before), causal(before.shape[1]), memory)
            return self.head(hidden)
        ids = torch.cat([inputs, targets[:, :-1]], 1)
        # The last input predicts the first target; with the start token alone nothing is bidirectional.
        prefix = inputs.shape[1] if self.architecture == "ND" else 0
        hidden = self.decoder(self.embedding(ids), prefix_lm(ids.shape[1], prefix))
        return self.head(hidden[:, inputs.shape[1] - 1 :])


@check_kinds
def make_pair(objective: Objective, texts: Tensor, generator: torch.Generator) -> Pair:
    """Inputs and targets of texts, int64 bytes `[B, L]`; cuts and spans are shared by the rows.

    Raises:
        ValueError: unknown objective, or texts too short for it.
    """
    length = texts.shape[1]
    start = torch.full_like(texts[:, :1], START)
    if objective == "FLM":
        return Pair(start, texts)
    if length < 4:
        raise ValueError(f"expected texts of at least 4 tokens but got {length}")
    if objective == "PLM":
        cut = int(torch.randint(1, length, (), generator=generator))
        return Pair(torch.cat([start, texts[:, :cut]], 1), texts[:, cut:])
    if objective != "MLM":
        raise ValueError(f"expected FLM, PLM or MLM but got {objective!r}")
    noise = max(1, round(0.15 * length))
    count = max(1, round(noise / 3))
    sizes, gaps = _parts(noise, count, generator), _parts(length - noise, count + 1, generator)
    inputs, targets, place = [start], [], 0
    for number, (gap, size) in enumerate(zip(gaps, sizes, strict=False)):
        sentinel = torch.full_like(start, SENTINEL + number)
        inputs += [texts[:, place : place + gap], sentinel]
        targets += [sentinel, texts[:, place + gap : place + gap + size]]
        place += gap + size
    inputs.append(texts[:, place:])
    targets.append(torch.full_like(start, SENTINEL + count))
    return Pair(torch.cat(inputs, 1), torch.cat(targets, 1))


def _parts(total: int, count: int, generator: torch.Generator) -> list[int]:
    """A number as a sum of so many numbers of at least 1, at random; fewer where it is too small."""
    count = min(count, total)
    cuts = (torch.randperm(total - 1, generator=generator)[: count - 1] + 1).sort().values.tolist()
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
