"""Proteins: sequences from FASTA files, and backbones from PDB files. Errors name the file and the line."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from arcore._files import atomic_path, check_file, read_lines
from arcore.nn.kinds import check_kinds

BACKBONE = ("N", "CA", "C", "O")
RESIDUES = {
    "ALA": "A", "CYS": "C", "ASP": "D", "GLU": "E", "PHE": "F", "GLY": "G", "HIS": "H", "ILE": "I", "LYS": "K",
    "LEU": "L", "MET": "M", "ASN": "N", "PRO": "P", "GLN": "Q", "ARG": "R", "SER": "S", "THR": "T", "VAL": "V",
    "TRP": "W", "TYR": "Y", "MSE": "M",
}  # fmt: skip
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"


@check_kinds
@dataclass(frozen=True)
class Chain:
    """A chain of a structure; residues that the file leaves out between others have no coordinates.

    Attributes:
        name: one character.
        sequence: one letter per residue, X where it is unknown or missing.
        coordinates: float64 `[L, 4, 3]`, N, CA, C, O in Å; NaN where an atom is missing.
        numbers: the residues' numbers in the file, with the insertion code, as they are written there.
    """

    name: str
    sequence: str
    coordinates: Tensor
    numbers: tuple[str, ...]


@check_kinds
def read_pdb(path: str | Path) -> list[Chain]:
    """The chains of the first model in a PDB file, in the order of their names.

    Of alternative locations the first is taken; selenomethionine counts as methionine.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line cannot be read, or there is no backbone.
    """
    path = check_file(path, "give a PDB file with --pdb")
    found: dict[str, dict[tuple[int, str], tuple[str, dict[str, list[float]]]]] = {}
    for number, line in read_lines(path):
        if line.startswith("data_"):
            raise ValueError(f"{path}:{number}: this is an mmCIF file; convert it to PDB format")
        if line.startswith("ENDMDL"):
            break
        selenomethionine = line.startswith("HETATM") and line[17:20] == "MSE"
        if not (line.startswith("ATOM") or selenomethionine):
            continue
        try:
            place = int(line[22:26]), line[26:27].strip()
            where = [float(line[i : i + 8]) for i in (30, 38, 46)]
        except ValueError:
            where, place = [math.nan], (0, "")
        if not all(map(math.isfinite, where)):
            raise ValueError(
                f"{path}:{number}: expected a residue number in columns 23-26 and coordinates in columns 31-54 but "
                f"got {line.rstrip()!r}"
            )
        name, kind = line[12:16].strip(), line[17:20]
        _, atoms = found.setdefault(line[21:22], {}).setdefault(place, (RESIDUES.get(kind, "X"), {}))
        atoms.setdefault(name, where)
    chains = [_chain(name, residues) for name, residues in sorted(found.items())]
    if not any(torch.isfinite(chain.coordinates).all(-1).all(-1).any() for chain in chains):
        raise ValueError(
            f"{path} has no residue with the atoms N, CA, C and O: it is no PDB file of a protein"
        )
    return chains


def _chain(name: str, residues: dict[tuple[int, str], tuple[str, dict[str, list[float]]]]) -> Chain:
    letters, rows, numbers = [], [], []
    before = None
    for (number, code), (letter, atoms) in sorted(residues.items()):
        for gap in range(0 if before is None else before + 1, number if before is not None else 0):
            letters.append("X")
            rows.append([[math.nan] * 3] * 4)
            numbers.append(str(gap))
        before = number
        letters.append(letter)
        rows.append([atoms.get(atom, [math.nan] * 3) for atom in BACKBONE])
        numbers.append(f"{number}{code}")
    return Chain(name, "".join(letters), torch.tensor(rows, dtype=torch.float64), tuple(numbers))


@check_kinds
def read_fasta(path: str | Path, letters: str = AMINO_ACIDS) -> list[tuple[str, str]]:
    """Names and sequences of a FASTA file, also packed by gzip.

    Lower case is read as upper case, a * at a sequence's end is dropped. Sequences keep their order, also those of one
    name.

    Args:
        path: the file.
        letters: those that may occur.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a letter that may not occur, a sequence without a header, an empty one, or none at all.
    """
    path = check_file(path, "give a FASTA file")
    found: list[tuple[str, list[str], int]] = []
    ended = False
    for number, raw in read_lines(path):
        line = raw.strip()
        if not line or line.startswith(";"):
            continue
        if line.startswith(">"):
            found.append((line[1:].strip(), [], number))
            ended = False
            continue
        if not found:
            raise ValueError(f"{path}:{number}: expected a header such as >name before the first sequence")
        if ended:
            raise ValueError(f"{path}:{number}: the sequence of {found[-1][0]!r} goes on behind its end, a *")
        text = line.upper().removesuffix("*")
        ended = line.endswith("*")
        wrong = sorted(set(text) - set(letters))
        if wrong:
            column = min(text.index(letter) for letter in wrong) + 1
            raise ValueError(
                f"{path}:{number}: column {column}: {text[column - 1]!r} is no letter of a sequence here; expected "
                f"letters of {letters}"
            )
        found[-1][1].append(text)
    for name, parts, number in found:
        if not any(parts):
            raise ValueError(f"{path}:{number}: the sequence of {name!r} is empty")
    if not found:
        raise ValueError(f"{path} holds no sequence")
    return [(name, "".join(parts)) for name, parts, _ in found]


@check_kinds
def write_fasta(path: str | Path, entries: Iterable[tuple[str, str]], width: int = 80) -> None:
    """Write names and sequences, `width` letters a line."""
    lines = []
    for name, text in entries:
        lines += [f">{name}", *(text[i : i + width] for i in range(0, len(text), width))]
    with atomic_path(Path(path)) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


@check_kinds
def ideal_backbone(angles: Sequence[tuple[float, float]]) -> Tensor:
    """A backbone with ideal bonds and planar peptides from its torsion angles.

    Args:
        angles: phi and psi of each residue in degrees; -57 and -47 make an alpha helix.

    Returns:
        float64 `[L, 4, 3]`, N, CA, C, O in Å.
    """
    # Bond lengths, and angles at the atom before, of N, CA and C.
    bonds = {"N": (1.329, 116.2), "CA": (1.458, 121.7), "C": (1.525, 111.0)}
    atoms = [torch.tensor([0.0, 0, 0]), torch.tensor([1.458, 0, 0]), torch.tensor([2.0, 1.42, 0])]
    atoms = [atom.double() for atom in atoms]
    for (_, psi), (phi, _) in itertools.pairwise(angles):
        for name, torsion in (("N", psi), ("CA", 180.0), ("C", phi)):
            length, angle = bonds[name]
            atoms.append(_place(atoms[-3:], length, angle, torsion))
    rows = []
    for i, (_, psi) in enumerate(angles):
        n, ca, c = atoms[3 * i : 3 * i + 3]
        rows.append(torch.stack([n, ca, c, _place([n, ca, c], 1.231, 120.1, psi + 180.0)]))
    return torch.stack(rows)


def _place(before: list[Tensor], length: float, angle: float, torsion: float) -> Tensor:
    """The atom at a bond length, bond angle and torsion angle behind three others."""
    a, b, c = before
    along = torch.nn.functional.normalize(c - b, dim=0)
    normal = torch.nn.functional.normalize(torch.linalg.cross(b - a, along), dim=0)
    across = torch.linalg.cross(normal, along)
    bend, turn = math.radians(180.0 - angle), math.radians(torsion)
    step = math.cos(bend) * along + math.sin(bend) * (math.cos(turn) * across + math.sin(turn) * normal)
    return c + length * step
