"""Training on spectra, and sequencing those of an MGF file."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from arcore._files import atomic_path
from arcore.data.identity import place
from arcore.data.proteins import read_fasta
from arcore.nn.kinds import check_kinds
from arcore.recipes._recipe import Recipe, Start, Work, ZooTask
from arcore.training.config import TrainConfig
from arcore.training.stream import derive_seed
from arcore.zoo.biology.crossnovo.spectra import (
    Batch,
    Spectrum,
    batch_of,
    compute_spectrum,
    digest,
    mass_of,
    padded,
    random_peptides,
    read_mgf,
    text,
    tokens,
)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class SpectrumOptions:
    """Spectra and their peptides.

    Attributes:
        data: random (peptides drawn at random), a FASTA file of proteins, whose tryptic peptides are taken, both with
            computed spectra; or an MGF file with SEQ= lines.
        spectra: how many spectra are computed.
        nat_start: weight of the parallel decoder's loss at the first step; the other's is what is left to 1.
        nat_end: at the last step (own choice: a straight line between).
    """

    data: str = "random"
    spectra: int = 5000
    nat_start: float = 1.0
    nat_end: float = 0.0

    def __post_init__(self) -> None:
        if self.spectra < 2:
            raise ValueError(f"--spectra must be at least 2 but got {self.spectra}")
        if not (0 <= self.nat_start <= 1 and 0 <= self.nat_end <= 1):
            raise ValueError(
                f"--nat-start and --nat-end must lie in [0, 1] but got {self.nat_start} and {self.nat_end}"
            )


@check_kinds
@dataclass(frozen=True, kw_only=True)
class SpectrumSampling:
    """Peptides of spectra.

    Attributes:
        mgf: the spectra.
        out: CSV file of what was found.
        beam: prefixes that are kept.
        tolerance: by how many Da a peptide's mass may differ from the precursor's.
        seed: decides nothing here.
    """

    mgf: Path | None = None
    out: Path = Path("peptides.csv")
    beam: int = 5
    tolerance: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.beam < 1 or not self.tolerance > 0:
            raise ValueError(
                f"--beam must be at least 1 and --tolerance above 0 but got {self.beam} and {self.tolerance}"
            )


class Spectra(Dataset[tuple[Tensor, Tensor]]):
    """Spectra in rows: an item is `[P + 1, 2]`, the precursor's mass and charge before the peaks, and residues."""

    def __init__(self, spectra: list[Spectrum], peaks: int, longest: int) -> None:
        self.batch = batch_of(spectra, peaks)
        self.peptides = padded([one.peptide for one in spectra], longest)

    def __len__(self) -> int:
        return len(self.peptides)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        peaks, _, precursors = self.batch
        return torch.cat([precursors[index : index + 1], peaks[index]]), self.peptides[index]


class SpectrumTask(ZooTask):
    """The losses of both decoders, weighted by the step."""

    model: Any

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        peaks = images[:, 1:]
        batch = Batch((peaks, (peaks[..., 0] > 0).sum(1), images[:, 0]))
        ctc, ar = self.model.losses(batch, labels)
        done = min(1.0, self.step / max(1, self.config.steps))
        weight = self.facts["nat_start"] + done * (self.facts["nat_end"] - self.facts["nat_start"])
        if not self.training:
            weight = 0.5
        return weight * ctc + (1 - weight) * ar, {"ctc": ctc.detach(), "ar": ar.detach()}


class SpectrumRecipe(Recipe):
    """Spectra and peptides."""

    defaults: ClassVar[TrainConfig] = TrainConfig(
        steps=2000, batch_size=32, lr=1e-3, weight_decay=8e-5, clip=2.5
    )
    options: ClassVar[type] = SpectrumOptions
    sampling: ClassVar[type | None] = SpectrumSampling

    def prepare(self, start: Start, options: Any) -> Work:
        model: Any = start.networks["model"] if start.networks else start.fresh()
        config = model.config
        spectra = self._spectra(options, config.slots, start.config.seed)
        digest_of = hashlib.sha256("\n".join(text(one.peptide) for one in spectra).encode()).hexdigest()[:16]
        if start.networks and digest_of != start.facts.get("spectra"):
            raise ValueError(
                f"the spectra of {options.data!r} are no longer those of the run in {start.source}"
            )
        held_out = max(1, len(spectra) // 10)
        facts = {
            "preset": start.preset,
            "data": place(options.data),
            "spectra": digest_of,
            "nat_start": options.nat_start,
            "nat_end": options.nat_end,
        }
        parts = (
            Spectra(part, config.peaks, config.slots) for part in (spectra[:-held_out], spectra[-held_out:])
        )
        return Work(SpectrumTask(start.config, {"model": model}, facts), *parts)

    @staticmethod
    def _spectra(options: Any, longest: int, seed: int) -> list[Spectrum]:
        """Spectra with known peptides."""
        generator = torch.Generator().manual_seed(derive_seed(seed, "spectra"))
        path = Path(options.data)
        if path.suffix.lower() == ".mgf":
            found = [one for one in read_mgf(path) if one.peptide]
            if len(found) < 2:
                raise ValueError(
                    f"{path} has {len(found)} spectra with a SEQ= line; training needs at least 2"
                )
            if long := [one.title for one in found if len(one.peptide) > longest]:
                raise ValueError(
                    f"{path}: the peptide of {long[0]!r} is longer than the model's {longest} slots"
                )
            return found
        if options.data == "random":
            peptides = random_peptides(options.spectra, 5, min(8, longest), generator)
        else:
            proteins = [sequence for _, sequence in read_fasta(path)]
            known = sorted({part for one in proteins for part in digest(one, longest=longest)})
            if len(known) < 2:
                raise ValueError(
                    f"{path} has {len(known)} tryptic peptides of 5 to {longest} residues: give more proteins"
                )
            order = torch.randint(len(known), (options.spectra,), generator=generator).tolist()
            peptides = [tokens(known[i]) for i in order]
        return [compute_spectrum(ids, generator) for ids in peptides]

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        return [f"sequence spectra: arcore sample {out} --mgf FILE"]

    def check_sampling(self, options: Any) -> None:
        if options.mgf is None:
            raise ValueError("say which spectra to sequence with --mgf FILE")

    def sample(
        self, networks: Mapping[str, Any], facts: Mapping[str, Any], options: Any, show: Callable[[str], None]
    ) -> Peptides:
        model = networks["model"]
        spectra = read_mgf(options.mgf)
        device = model.slots.device
        rows = []
        for one in spectra:
            batch = Batch(part.to(device) for part in batch_of([one], model.config.peaks))
            ids, score, path = model.search(batch, 0, beam=options.beam, tolerance=options.tolerance)
            found, parallel = text(ids), text(path.labels) if path else ""
            error = f"{mass_of(ids) - one.mass:.4f}" if ids else ""
            rows.append(
                [one.title, f"{one.precursor:.5f}", str(one.charge), found, f"{score:.4f}", parallel, error]
            )
            show(f"{one.title}: {found or 'no peptide has this mass'}\n")
        return Peptides(rows)


@dataclass(frozen=True)
class Peptides:
    """A table of what was found."""

    rows: list[list[str]]

    def save(self, path: Path) -> list[str]:
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(
            ["title", "precursor_mz", "charge", "peptide", "score", "parallel_decoder", "mass_error_da"]
        )
        writer.writerows(self.rows)
        with atomic_path(path) as temporary:
            temporary.write_text(table.getvalue(), encoding="utf-8")
        return [f"{path}: {len(self.rows)} spectra"]


RECIPE = SpectrumRecipe()
