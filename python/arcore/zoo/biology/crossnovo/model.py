"""The network, its losses, decoding, presets, and the check of the claim."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import create_model, preset
from arcore.catalog.claims import Claim, at_least, at_most, equals, steps
from arcore.decoding.mass_ctc import MassPath, mass_ctc
from arcore.masks import IntervalMask
from arcore.nn import MLP, CrossAttention, SelfAttention
from arcore.nn.checks import check_ids
from arcore.nn.kinds import check_kinds
from arcore.zoo.biology.crossnovo.spectra import (
    MASSES,
    RESIDUES,
    Batch,
    batch_of,
    compute_spectrum,
    mass_of,
    padded,
    random_peptides,
)

END = 1 + len(RESIDUES)
# By residue; padding and the end weigh nothing.
_WEIGHTS = torch.tensor([0.0, *MASSES.values(), 0.0], dtype=torch.float64)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class CrossNovoConfig:
    """Settings of `CrossNovo`.

    Attributes:
        dim: width C.
        num_heads: heads.
        encoder_layers, nat_layers, ar_layers: layers of the three parts.
        slots: T, of the parallel decoder; also the longest peptide.
        peaks: most peaks of a spectrum.
        features: the autoregressive decoder reads the parallel one.

    Raises:
        ValueError: a size is below 1, or heads do not fit.
    """

    dim: int = 400
    num_heads: int = 8
    encoder_layers: int = 9
    nat_layers: int = 9
    ar_layers: int = 9
    slots: int = 40
    peaks: int = 800
    features: bool = True

    def __post_init__(self) -> None:
        for name in ("dim", "num_heads", "encoder_layers", "nat_layers", "ar_layers", "slots", "peaks"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        if self.dim % (2 * self.num_heads):
            raise ValueError(
                f"expected dim to be a multiple of twice num_heads but got {self.dim} and {self.num_heads}"
            )


class Outputs(NamedTuple):
    """What the model says.

    Attributes:
        nat: log-probabilities of the slots, `[B, T, V]`, blank first.
        ar: logits of each residue and of the end, `[B, L + 1, V + 1]`.
    """

    nat: Tensor
    ar: Tensor


def ranges(stops: Tensor, queries: int, keys: int) -> IntervalMask:
    """Each row's queries see its keys from 0 to its stop, int64 `[B]`; or their own, `[queries]` for all rows."""
    check_ids("stops", stops, keys + 1)
    stop = stops.view(-1, 1, 1).expand(-1, 1, queries) if stops.dim() == 1 else stops
    stop = stop.to(torch.int32)
    return IntervalMask.trusted(torch.stack([torch.zeros_like(stop), stop], -1).contiguous(), keys)


class Layer(nn.Module):
    """Pre-norm self-attention, attention to a context, and a network.

    Args:
        dim: width C.
        num_heads: heads.
        cross: there is a context.
    """

    def __init__(self, dim: int, num_heads: int, *, cross: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mixer = SelfAttention(dim, num_heads)
        self.mlp = MLP(dim, 2 * dim, approximate="none")
        self.cross = CrossAttention(dim, num_heads) if cross else None
        self.norm_cross = nn.LayerNorm(dim) if cross else None

    def forward(
        self, x: Tensor, mask: IntervalMask, context: Tensor | None = None, seen: IntervalMask | None = None
    ) -> Tensor:
        """`[B, N, C]` to `[B, N, C]`."""
        x = x + self.mixer(self.norm1(x), mask)
        if self.cross is not None and self.norm_cross is not None:
            assert context is not None
            assert seen is not None
            x = x + self.cross(self.norm_cross(x), context, seen)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


def waves(values: Tensor, dim: int, shortest: float = 0.001, longest: float = 10000.0) -> Tensor:
    """Sines and cosines of a number at wavelengths between two bounds: `[...]` to `[..., dim]`."""
    ends = (math.log10(shortest), math.log10(longest))
    lengths = torch.logspace(*ends, dim // 2, dtype=torch.float64, device=values.device)
    angles = (values.double().unsqueeze(-1) * (2 * torch.pi / lengths)).remainder(2 * torch.pi).float()
    return torch.cat([angles.sin(), angles.cos()], -1)


@check_kinds
class CrossNovo(nn.Module):
    """The model.

    Args:
        config: settings.
    """

    def __init__(self, config: CrossNovoConfig) -> None:
        super().__init__()
        self.config = config
        dim, heads = config.dim, config.num_heads
        self.peak, self.precursor = nn.Linear(dim + 1, dim), nn.Linear(dim + 1, dim)
        self.encoder = nn.ModuleList(Layer(dim, heads, cross=False) for _ in range(config.encoder_layers))
        self.encoder_norm = nn.LayerNorm(dim)
        self.slots = nn.Parameter(0.02 * torch.randn(config.slots, dim))
        self.nat = nn.ModuleList(Layer(dim, heads, cross=True) for _ in range(config.nat_layers))
        self.nat_norm, self.nat_head = nn.LayerNorm(dim), nn.Linear(dim, 1 + len(RESIDUES))
        self.residue = nn.Embedding(END + 1, dim)
        self.left = nn.Linear(dim, dim)
        self.places = nn.Parameter(0.02 * torch.randn(config.slots + 1, dim))
        self.ar = nn.ModuleList(Layer(dim, heads, cross=True) for _ in range(config.ar_layers))
        self.ar_norm, self.ar_head = nn.LayerNorm(dim), nn.Linear(dim, END + 1)

    @check_kinds
    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The spectrum `[B, 1 + P, C]` behind its precursor, and how many tokens of it each row has."""
        peaks, counts, precursors = batch
        first = self.precursor(
            torch.cat([waves(precursors[:, 0], self.config.dim), precursors[:, 1:] / 10], -1)
        )
        x = self.peak(torch.cat([waves(peaks[..., 0], self.config.dim), peaks[..., 1:]], -1))
        x = torch.cat([first.unsqueeze(1), x], 1)
        stops = counts + 1
        mask = ranges(stops, x.shape[1], x.shape[1])
        for layer in self.encoder:
            x = layer(x, mask)
        return self.encoder_norm(x), stops

    def parallel(self, memory: Tensor, stops: Tensor) -> Tensor:
        """States of the slots, `[B, T, C]`."""
        size = self.config.slots
        x = self.slots + memory[:, :1]
        every = ranges(torch.full((1,), size, device=x.device), size, size)
        seen = ranges(stops, size, memory.shape[1])
        for layer in self.nat:
            x = layer(x, every, memory, seen)
        out: Tensor = self.nat_norm(x)
        return out

    def residues(self, memory: Tensor, stops: Tensor, latent: Tensor, prefix: Tensor, mass: Tensor) -> Tensor:
        """Logits `[B, L + 1, V + 1]` behind a start and residues `[B, L]`.

        The decoder is told the mass that is left at each place. Through `latent` no gradient goes back.
        """
        ids = F.pad(prefix, (1, 0), value=END)
        left = mass.unsqueeze(1) - _WEIGHTS.to(ids.device)[ids].cumsum(1)
        x = self.residue(ids) + self.places[: ids.shape[1]] + self.left(waves(left, self.config.dim))
        length = x.shape[1]
        causal = ranges(torch.arange(1, length + 1, device=x.device).view(1, 1, -1), length, length)
        context, ends = memory, stops
        if self.config.features:
            context, ends = torch.cat([latent.detach(), memory], 1), stops + latent.shape[1]
        seen = ranges(ends, length, context.shape[1])
        for layer in self.ar:
            x = layer(x, causal, context, seen)
        out: Tensor = self.ar_head(self.ar_norm(x))
        return out

    @check_kinds
    def forward(self, batch: Batch, peptides: Tensor) -> Outputs:
        """What both decoders say.

        Args:
            batch: spectra.
            peptides: int64 `[B, L]`, residues from 1, 0 behind them.
        """
        memory, stops = self.encode(batch)
        latent = self.parallel(memory, stops)
        nat = self.nat_head(latent).float().log_softmax(-1)
        ar = self.residues(memory, stops, latent, peptides, batch.precursors[:, 0]).float()
        return Outputs(nat, ar)

    def losses(self, batch: Batch, peptides: Tensor) -> tuple[Tensor, Tensor]:
        """CTC of the parallel decoder, and cross entropy of the other; means over residues."""
        nat, ar = self(batch, peptides)
        lengths = (peptides > 0).sum(1)
        ctc = ctc_loss(nat, peptides, lengths)
        place = torch.arange(peptides.shape[1] + 1, device=peptides.device)
        targets = F.pad(peptides, (0, 1))
        targets = torch.where(place == lengths.unsqueeze(1), END, targets)
        targets = targets.masked_fill(place > lengths.unsqueeze(1), -100)
        return ctc, F.cross_entropy(ar.flatten(0, 1), targets.flatten(), ignore_index=-100)

    @torch.no_grad()
    @check_kinds
    def search(
        self, batch: Batch, row: int, *, beam: int = 5, tolerance: float = 0.1
    ) -> tuple[list[int], float, MassPath | None]:
        """The peptide of a spectrum by both decoders.

        The autoregressive decoder keeps the `beam` best prefixes that are not too heavy, and ends where the mass fits;
        the peptide of the parallel decoder competes at the end (own choice: by the former's mean log-probability).

        Returns:
            Residues, their mean log-probability (minus infinity where nothing fits), and what the parallel decoder
            found.
        """
        one = Batch(part[row : row + 1] for part in batch)
        memory, stops = self.encode(one)
        latent = self.parallel(memory, stops)
        target = float(one.precursors[0, 0])
        nat = self.nat_head(latent)[0].float().log_softmax(-1)
        path = mass_ctc(nat, list(MASSES.values()), target, tolerance=tolerance)

        def logprobs(prefixes: list[list[int]]) -> Tensor:
            ids = torch.tensor(prefixes, dtype=torch.int64, device=memory.device).view(len(prefixes), -1)
            many = len(prefixes)
            mass = one.precursors[:, 0].expand(many)
            logits = self.residues(
                memory.expand(many, -1, -1), stops.expand(many), latent.expand(many, -1, -1), ids, mass
            )
            return logits.float().log_softmax(-1)

        alive: list[tuple[float, list[int]]] = [(0.0, [])]
        ended: list[tuple[float, list[int]]] = []
        for _ in range(self.config.slots + 1):
            found = logprobs([ids for _, ids in alive])[:, -1]
            grown = []
            for (score, ids), values in zip(alive, found.tolist(), strict=True):
                mass = mass_of(ids)
                if ids and abs(mass - target) <= tolerance:
                    ended.append(((score + values[END]) / (len(ids) + 1), ids))
                if len(ids) < self.config.slots:
                    grown += [
                        (score + values[v], [*ids, v])
                        for v in range(1, END)
                        if mass + MASSES[RESIDUES[v - 1]] <= target + tolerance
                    ]
            alive = sorted(grown, key=lambda entry: -entry[0])[:beam]
            if not alive:
                break
        if path is not None and path.labels:
            values = logprobs([path.labels])[0]
            score = sum(float(values[i, v]) for i, v in enumerate([*path.labels, END]))
            ended.append((score / (len(path.labels) + 1), path.labels))
        best = max(ended, default=(-math.inf, list[int]()))
        return best[1], best[0], path


def ctc_loss(logprobs: Tensor, peptides: Tensor, lengths: Tensor) -> Tensor:
    """Connectionist temporal classification, mean over residues; 0 for a peptide that its slots cannot hold.

    `torch.nn.functional.ctc_loss(..., zero_infinity=True)`, and in compiled graphs the same in operations that a graph
    can hold; the gradient is right behind a `log_softmax`, as that function's is.

    Args:
        logprobs: `[B, T, V]`, blank 0.
        peptides: int64 `[B, L]`, 0 behind the residues.
        lengths: int64 `[B]`.
    """
    check_ids("peptides", peptides, logprobs.shape[2])
    check_ids("lengths", lengths, peptides.shape[1] + 1)
    if torch.compiler.is_compiling():
        return _ctc_by_steps(logprobs, peptides, lengths)
    slots = torch.full_like(lengths, logprobs.shape[1])
    first = logprobs.transpose(0, 1)
    losses = F.ctc_loss(first, peptides, slots, lengths, reduction="none", zero_infinity=True)
    return (losses / lengths.clamp(min=1)).mean()


def _ctc_by_steps(logprobs: Tensor, peptides: Tensor, lengths: Tensor) -> Tensor:
    """`ctc_loss` slot by slot; arguments are the same."""
    labels = torch.stack([torch.zeros_like(peptides), peptides], -1).flatten(1)
    labels = F.pad(labels, (0, 1))  # blank, first, blank, second, ..., blank
    size = labels.shape[1]
    low = torch.finfo(logprobs.dtype).min / 4
    emitted = logprobs.gather(2, labels.unsqueeze(1).expand(-1, logprobs.shape[1], -1))
    skip = (labels != 0) & (labels != F.pad(labels, (2, 0))[:, :size])
    skip = skip & (torch.arange(size, device=labels.device) >= 2)
    start = torch.arange(size, device=labels.device) < 2
    alpha = torch.where(start, emitted[:, 0], low)
    for t in range(1, logprobs.shape[1]):
        one = F.pad(alpha, (1, 0), value=low)[:, :size]
        two = torch.where(skip, F.pad(alpha, (2, 0), value=low)[:, :size], low)
        alpha = torch.stack([alpha, one, two]).logsumexp(0) + emitted[:, t]
    ends = torch.stack([2 * lengths, (2 * lengths - 1).clamp(min=0)], 1)
    total = alpha.gather(1, ends)
    total = torch.where(lengths > 0, total.logsumexp(1), total[:, 0])
    fits = total > low / 2
    return -(torch.where(fits, total, 0.0) / lengths.clamp(min=1)).mean()


@preset
def crossnovo_tiny() -> CrossNovoConfig:
    """Two layers of width 64 each, peptides of up to 16 residues."""
    return CrossNovoConfig(
        dim=64, num_heads=4, encoder_layers=2, nat_layers=2, ar_layers=2, slots=16, peaks=64
    )


@preset
def crossnovo_base() -> CrossNovoConfig:
    """The paper's size: nine layers of width 400 each."""
    return CrossNovoConfig()


def by_brute_force(logprobs: Tensor, masses: Sequence[float], target: float, tolerance: float) -> float:
    """The best log-probability of all paths whose merged symbols have the mass; minus infinity if there is none."""
    best = -math.inf
    for path in itertools.product(range(len(masses) + 1), repeat=len(logprobs)):
        labels = [v for v, _ in itertools.groupby(path) if v]
        if abs(sum(masses[v - 1] for v in labels) - target) <= tolerance:
            best = max(best, float(sum(logprobs[t, v] for t, v in enumerate(path))))
    return best


def learned(features: bool, *, count: int, seed: int = 0) -> float:
    """Share of residues that the autoregressive decoder gets right, alone or with the parallel one's states."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model: Any = create_model("crossnovo_tiny", slots=10, peaks=32, features=features)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=count, pct_start=0.1)

    def draw(size: int) -> tuple[Batch, Tensor]:
        peptides = random_peptides(size, 4, 6, generator)
        spectra = [compute_spectrum(ids, generator) for ids in peptides]
        return batch_of(spectra, 32), padded(peptides, 6)

    known = [draw(32) for _ in range(60)]
    for step in steps(
        count, "training with both decoders" if features else "training the autoregressive decoder"
    ):
        ctc, ar = model.losses(*known[step % len(known)])
        weight = 1 - step / count if features else 0.0
        optimizer.zero_grad()
        (weight * ctc + ar if features else ar).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.5)
        optimizer.step()
        rate.step()
    batch, peptides = draw(200)
    with torch.no_grad():
        _, ar = model.eval()(batch, peptides)
    right = (ar[:, :-1].argmax(-1) == peptides)[peptides > 0]
    return float(right.float().mean())


def claim(*, quick: bool) -> Claim:
    """Gradients between the decoders, and paths of a given mass; in full, accuracy with and without features."""
    model: Any = create_model("crossnovo_tiny")
    generator = torch.Generator().manual_seed(0)
    peptides = random_peptides(3, 5, 7, generator)
    batch = batch_of([compute_spectrum(ids, generator) for ids in peptides], 64)
    _, ar = model.losses(batch, padded(peptides, 7))
    ar.backward()
    parts = [model.slots, *model.nat.parameters(), *model.nat_norm.parameters(), *model.nat_head.parameters()]
    leak = sum(0.0 if part.grad is None else float(part.grad.abs().max()) for part in parts)
    reached = min(
        float(part.grad.abs().max()) for part in model.encoder.parameters() if part.grad is not None
    )
    masses = [0.5, 0.7, 1.1, 1.3, 1.9, 2.3]
    apart, missing = 0.0, 0
    for turn in range(3 if quick else 20):
        logprobs = torch.randn(4 if quick else 5, 7, generator=generator).log_softmax(-1)
        target = (1.2, 3.1, 2.6, 0.3, 4.4)[turn % 5]
        found = mass_ctc(logprobs, masses, target, tolerance=0.1, grid=0.1)
        expected = by_brute_force(logprobs.double(), masses, target, 0.1)
        missing += (found is None) != (expected == -math.inf)
        if found is not None:
            apart = max(apart, abs(found.score - expected), abs(found.mass - target) - 0.1)
    rows = [
        equals("gradient of the autoregressive loss in the parallel decoder", leak, 0),
        at_least("the same in the encoder, least of its parameters", reached, 1e-12),
        at_most("best path of a mass against trying all paths, in log-probability", apart, 1e-9),
        equals("masses that only one of the two finds a path for", missing, 0),
    ]
    if not quick:
        # Settings were chosen on seeds below 20.
        accuracies = [
            [learned(features, count=500, seed=seed) for features in (True, False)] for seed in range(21, 24)
        ]
        gains = [both - alone for both, alone in accuracies]
        told = ", ".join(f"{gain:+.3f}" for gain in gains)
        rows.append(
            at_least(
                f"right residues with the parallel decoder's states less those without ({told} by seed), mean",
                sum(gains) / len(gains),
                0.0,
            )
        )
    return Claim(tuple(rows))
