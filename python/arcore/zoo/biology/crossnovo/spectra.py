"""Residues and their masses, MGF files, and spectra computed from sequences."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from arcore._files import check_file, read_lines
from arcore.nn.kinds import check_kinds

WATER, PROTON = 18.010565, 1.00727646688
# Monoisotopic masses in Da; cysteine carries carbamidomethyl. Isoleucine weighs what leucine does and is read as it.
MASSES = {
    "G": 57.021464, "A": 71.037114, "S": 87.032028, "P": 97.052764, "V": 99.068414, "T": 101.047670,
    "C": 160.030649, "L": 113.084064, "N": 114.042927, "D": 115.026943, "Q": 128.058578, "K": 128.094963,
    "E": 129.042593, "M": 131.040485, "H": 137.058912, "F": 147.068414, "R": 156.101111, "Y": 163.063329,
    "W": 186.079313, "M+15.995": 147.035400, "N+.984": 115.026943, "Q+.984": 129.042593,
}  # fmt: skip
RESIDUES = tuple(MASSES)
_TOKEN = re.compile(r"[A-Z](?:\+15\.995|\+\.984)?")


def tokens(peptide: str) -> list[int]:
    """Residues of a peptide, from 1.

    Raises:
        ValueError: it has an unknown residue.
    """
    found = _TOKEN.findall(peptide.replace("I", "L"))
    unknown = [residue for residue in found if residue not in MASSES]
    if "".join(found) != peptide.replace("I", "L") or unknown or not found:
        raise ValueError(f"{peptide!r} is no peptide of the residues {', '.join(RESIDUES)}")
    return [1 + RESIDUES.index(residue) for residue in found]


def text(ids: Sequence[int]) -> str:
    """The peptide of residues from 1."""
    return "".join(RESIDUES[i - 1] for i in ids)


def mass_of(ids: Sequence[int]) -> float:
    """Sum of the residues' masses in Da, without water."""
    return sum(MASSES[RESIDUES[i - 1]] for i in ids)


@dataclass(frozen=True)
class Spectrum:
    """Peaks of a peptide's fragments.

    Attributes:
        title: for people.
        mz: float32 `[P]`, increasing.
        intensity: float32 `[P]`.
        precursor: mass over charge of the peptide.
        charge: of it.
        peptide: residues where they are known.
    """

    title: str
    mz: Tensor
    intensity: Tensor
    precursor: float
    charge: int
    peptide: tuple[int, ...] = ()

    @property
    def mass(self) -> float:
        """Of the residues, without water, in Da."""
        return (self.precursor - PROTON) * self.charge - WATER


def read_mgf(path: str | Path) -> list[Spectrum]:
    """Spectra of an MGF file, also packed by gzip; `SEQ=` is the peptide where it is known.

    What stands before the first spectrum, such as `CHARGE=2+`, holds for those that do not say otherwise. Peaks are put
    in order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a spectrum lacks its precursor mass, its charge or its peaks, or a line cannot be read; names file
            and line.
    """
    path = check_file(path, "give an MGF file with --mgf")
    found: list[Spectrum] = []
    begin, fields, peaks, common = 0, dict[str, str](), list[tuple[float, float]](), dict[str, str]()
    for number, raw in read_lines(path):
        line = raw.strip()
        if not line or line[0] in "#;!/":
            continue
        if line == "BEGIN IONS":
            if begin:
                raise ValueError(
                    f"{path}:{number}: BEGIN IONS before the spectrum that begins in line {begin} has its END IONS"
                )
            begin, fields, peaks = number, dict(common), []
        elif line == "END IONS":
            if not begin:
                raise ValueError(f"{path}:{number}: END IONS without BEGIN IONS")
            found.append(_spectrum(path, begin, fields, peaks, len(found) + 1))
            begin = 0
        elif not begin:
            key, equals, value = line.partition("=")
            if not (equals and line[0].isalpha()):
                raise ValueError(
                    f"{path}:{number}: expected BEGIN IONS or NAME=VALUE between spectra but got {line!r}"
                )
            if not found:
                common[key.upper()] = value.strip()
        elif "=" in line and line[0].isalpha():
            key, _, value = line.partition("=")
            fields[key.upper()] = value.strip()
        else:
            try:
                place, size = map(float, line.split()[:2])
            except ValueError:
                place = math.nan
                size = math.nan
            if not (math.isfinite(place) and math.isfinite(size) and place > 0 and size >= 0):
                raise ValueError(
                    f"{path}:{number}: expected a peak as mass over charge and intensity but got {line!r}"
                )
            peaks.append((place, size))
    if begin:
        raise ValueError(f"{path}:{begin}: the spectrum that begins here has no END IONS")
    if not found:
        raise ValueError(f"{path} holds no spectrum: expected BEGIN IONS ... END IONS")
    return found


def _spectrum(
    path: Path, line: int, fields: dict[str, str], peaks: list[tuple[float, float]], number: int
) -> Spectrum:
    title = fields.get("TITLE", f"spectrum {number}")
    try:
        precursor = float(fields["PEPMASS"].split()[0])
    except (KeyError, IndexError, ValueError):
        precursor = math.nan
    if not 0 < precursor < 1e6:
        raise ValueError(
            f"{path}:{line}: {title!r} has no precursor mass: expected a line PEPMASS=, mass over charge above 0 and "
            "below a million"
        )
    charge = re.fullmatch(r"(\d+)\+?", fields.get("CHARGE", ""))
    if charge is None or int(charge[1]) < 1:
        raise ValueError(f"{path}:{line}: {title!r} has no charge: expected a line such as CHARGE=2+")
    if not peaks:
        raise ValueError(f"{path}:{line}: {title!r} has no peaks")
    try:
        peptide = tuple(tokens(fields["SEQ"])) if fields.get("SEQ") else ()
    except ValueError as error:
        raise ValueError(f"{path}:{line}: SEQ={fields['SEQ']}: {error}") from error
    if (precursor - PROTON) * int(charge[1]) <= WATER:
        raise ValueError(f"{path}:{line}: {title!r} is lighter than water: see PEPMASS= and CHARGE=")
    mz, intensity = torch.tensor(sorted(peaks)).T
    if not bool((mz < 1e6).all() and (intensity < 1e30).all()):
        raise ValueError(
            f"{path}:{line}: {title!r} has peaks beyond a million m/z or intensities beyond 1e30"
        )
    return Spectrum(title, mz.contiguous(), intensity.contiguous(), precursor, int(charge[1]), peptide)


def digest(protein: str, shortest: int = 5, longest: int = 12) -> list[str]:
    """Tryptic peptides: cut behind K and R, but not before P."""
    parts = re.split(r"(?<=[KR])(?!P)", protein)
    return [
        part
        for part in parts
        if shortest <= len(part) <= longest and not set(part) - set("ACDEFGHIKLMNPQRSTVWY")
    ]


@check_kinds
def compute_spectrum(
    ids: Sequence[int],
    generator: torch.Generator,
    *,
    dropout: float = 0.3,
    noise: float = 0.2,
    jitter: float = 0.005,
) -> Spectrum:
    """A spectrum of b and y ions of charge 1, for training and checks.

    Args:
        ids: residues.
        generator: of the draws.
        dropout: share of ions that are missing.
        noise: peaks of noise, as a share of the ions.
        jitter: deviation of m/z in Da.
    """
    masses = torch.tensor([MASSES[RESIDUES[i - 1]] for i in ids], dtype=torch.float64)
    total = float(masses.sum())
    b = masses.cumsum(0)[:-1]
    ions = torch.cat([b + PROTON, total - b + WATER + PROTON])
    kept = ions[torch.rand(len(ions), generator=generator) >= dropout]
    strange = torch.rand(max(1, round(noise * len(ions))), generator=generator, dtype=torch.float64) * (
        total + WATER
    )
    mz = torch.cat([kept + jitter * torch.randn(len(kept), generator=generator), strange + 1.0])
    sizes = torch.rand(len(mz), generator=generator)
    sizes[len(kept) :] *= 0.3
    order = mz.argsort()
    charge = 2
    precursor = (total + WATER) / charge + PROTON
    return Spectrum(text(ids), mz[order].float(), sizes[order] + 0.01, precursor, charge, tuple(ids))


def random_peptides(count: int, shortest: int, longest: int, generator: torch.Generator) -> list[list[int]]:
    """Residues at random, the last one K or R, without modifications."""
    plain = [i for i, name in enumerate(RESIDUES, 1) if len(name) == 1]
    ends = [1 + RESIDUES.index("K"), 1 + RESIDUES.index("R")]
    found = []
    for _ in range(count):
        length = int(torch.randint(shortest, longest + 1, (), generator=generator))
        body = torch.randint(len(plain), (length - 1,), generator=generator).tolist()
        found.append([*(plain[i] for i in body), ends[int(torch.randint(2, (), generator=generator))]])
    return found


class Batch(tuple[Tensor, ...]):
    """Spectra side by side.

    Attributes:
        peaks: float32 `[B, P, 2]`, m/z and normalised intensity, padded at the end.
        counts: int64 `[B]`, peaks of each.
        precursors: float32 `[B, 2]`, mass of the residues and charge.
    """

    __slots__ = ()

    @property
    def peaks(self) -> Tensor:
        return self[0]

    @property
    def counts(self) -> Tensor:
        return self[1]

    @property
    def precursors(self) -> Tensor:
        return self[2]


@check_kinds
def batch_of(spectra: Sequence[Spectrum], most: int) -> Batch:
    """Spectra as the model reads them: the `most` largest peaks, their root intensities of unit norm."""
    peaks = torch.zeros(len(spectra), most, 2)
    counts = torch.zeros(len(spectra), dtype=torch.int64)
    for i, one in enumerate(spectra):
        kept = one.intensity.topk(min(most, len(one.mz))).indices.sort().values
        size = one.intensity[kept].sqrt()
        peaks[i, : len(kept)] = torch.stack([one.mz[kept], size / size.norm().clamp(min=1e-9)], 1)
        counts[i] = len(kept)
    precursors = torch.tensor([[one.mass, float(one.charge)] for one in spectra])
    return Batch((peaks, counts, precursors))


def padded(peptides: Sequence[Sequence[int]], length: int) -> Tensor:
    """Residues `[B, length]`, 0 behind them."""
    found = torch.zeros(len(peptides), length, dtype=torch.int64)
    for i, ids in enumerate(peptides):
        if len(ids) > length:
            raise ValueError(
                f"a peptide of {len(ids)} residues is longer than the {length} that the model is made for"
            )
        found[i, : len(ids)] = torch.tensor(list(ids))
    return found
