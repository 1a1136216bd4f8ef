"""Mass-controlled CTC against brute force, CTC against torch, gradients, MGF files and spectra."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.cli import main
from arcore.data.proteins import write_fasta
from arcore.decoding.mass_ctc import mass_ctc
from arcore.zoo.biology.crossnovo.model import _ctc_by_steps, by_brute_force, ctc_loss
from arcore.zoo.biology.crossnovo.recipe import SpectrumOptions, SpectrumSampling
from arcore.zoo.biology.crossnovo.spectra import (
    MASSES,
    PROTON,
    WATER,
    Batch,
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


class Protocol:
    """Computed spectra."""

    def __init__(self, preset: str) -> None:
        self.config = arcore.models.get_config(preset)
        generator = torch.Generator().manual_seed(0)
        self.known = random_peptides(3, 5, 8, generator)
        spectra = [compute_spectrum(ids, generator) for ids in self.known]
        self.batch, self.peptides = batch_of(spectra, self.config.peaks), padded(self.known, 8)

    def forward(self, model: Any) -> Tensor:
        return model(self.batch, self.peptides).ar

    def expected_shape(self) -> tuple[int, ...]:
        return (3, 9, len(MASSES) + 2)

    def loss(self, model: Any) -> Tensor:
        ctc, ar = model.losses(self.batch, self.peptides)
        return ctc + ar

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        """Behind every prefix, against one pass."""
        memory, stops = model.encode(self.batch)
        latent = model.parallel(memory, stops)
        mass = self.batch.precursors[:, 0]
        steps = [model.residues(memory, stops, latent, self.peptides[:, :i], mass)[:, -1] for i in range(9)]
        return self.forward(model), torch.stack(steps, 1)

    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        batch = Batch(part[rows] for part in self.batch)
        found = [model.search(batch, i, beam=2)[0] for i in range(len(rows))]
        return [padded(found, self.config.slots)], model(batch, self.peptides[rows]).nat.exp()


@pytest.mark.parametrize("seed", range(6))
def test_paths_of_a_mass_are_those_of_brute_force(seed: int):
    generator = torch.Generator().manual_seed(seed)
    masses = [0.5, 0.7, 1.1, 1.3, 1.9, 2.3]
    logprobs = torch.randn(4, 7, generator=generator).log_softmax(-1)
    for target in (0.0, 0.3, 0.5, 1.4, 2.6, 5.0, 9.0):
        found = mass_ctc(logprobs, masses, target, tolerance=0.05, grid=0.1)
        expected = by_brute_force(logprobs.double(), masses, target, 0.05)
        if found is None:
            assert expected == -math.inf
        else:
            assert found.score == pytest.approx(expected, abs=1e-9)
            assert found.mass == pytest.approx(target, abs=0.05)
            assert found.mass == pytest.approx(sum(masses[v - 1] for v in found.labels))


def test_masses_between_the_bins_still_fit():
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        [ids] = random_peptides(1, 5, 9, generator)
        logprobs = torch.randn(14, 1 + len(MASSES), generator=generator).log_softmax(-1)
        found = mass_ctc(logprobs, list(MASSES.values()), mass_of(ids), tolerance=0.05, grid=0.02)
        assert found is not None
        assert abs(mass_of(found.labels) - mass_of(ids)) <= 0.05
    sure = torch.full((5, 1 + len(MASSES)), -20.0)
    for slot, label in enumerate((3, 3, 0, 3, 7)):
        sure[slot, label] = 0.0
    assert mass_ctc(sure, list(MASSES.values()), mass_of([3, 3, 7])).labels == [3, 3, 7]


def test_wrong_arguments_of_mass_ctc():
    logprobs = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"expected logprobs \[T, 4\]"):
        mass_ctc(logprobs, [1.0, 2.0, 3.0], 3.0)
    with pytest.raises(ValueError, match="expected tolerance > 0 but got 0"):
        mass_ctc(logprobs, [1.0, 2.0], 3.0, tolerance=0)
    with pytest.raises(ValueError, match="expected masses above the grid"):
        mass_ctc(logprobs, [1.0, 0.0], 3.0)
    with pytest.raises(ValueError, match="expected target >= 0"):
        mass_ctc(logprobs, [1.0, 2.0], -1.0)


def test_ctc_is_torchs():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, 6, generator=generator, dtype=torch.float64)
    peptides = torch.tensor([[1, 2, 3, 0], [1, 1, 0, 0], [5, 0, 0, 0], [2, 2, 2, 2], [3, 3, 3, 3]])
    lengths = torch.tensor([3, 2, 1, 4, 4])
    grads = []
    for ours in (ctc_loss, _ctc_by_steps, None):
        leaf = logits.clone().requires_grad_()
        logprobs = leaf.log_softmax(-1)
        if ours is not None:
            loss = ours(logprobs, peptides, lengths)
        else:
            each = F.ctc_loss(
                logprobs.transpose(0, 1),
                peptides,
                torch.full((5,), 7),
                lengths,
                reduction="none",
                zero_infinity=True,
            )
            loss = (each / lengths).mean()
        loss.backward()
        grads.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(grads[0], grads[2])
    torch.testing.assert_close(grads[1], grads[2])
    short = logits[:, :3].log_softmax(-1)
    torch.testing.assert_close(ctc_loss(short, peptides, lengths), _ctc_by_steps(short, peptides, lengths))


def test_no_gradient_goes_from_one_decoder_into_the_other():
    for features in (True, False):
        model: Any = arcore.create_model("crossnovo_tiny", features=features)
        adapter = Protocol("crossnovo_tiny")
        _, ar = model.losses(adapter.batch, adapter.peptides)
        ar.backward()
        for name, parameter in model.named_parameters():
            if name.split(".")[0] in ("slots", "nat", "nat_norm", "nat_head"):
                assert parameter.grad is None
            elif name.split(".")[0] in ("encoder", "ar", "peak", "precursor"):
                assert parameter.grad.any(), name
        memory, stops = model.encode(adapter.batch)
        latent = model.parallel(memory, stops)
        one, other = (
            model.residues(memory, stops, part, adapter.peptides, adapter.batch.precursors[:, 0])
            for part in (latent, latent + 1)
        )
        assert bool((one != other).any()) == features


@torch.no_grad()
def test_padding_and_batch_mates_change_nothing():
    model: Any = arcore.create_model("crossnovo_tiny").eval()
    adapter = Protocol("crossnovo_tiny")
    whole = model(adapter.batch, adapter.peptides)
    alone = model(Batch(part[1:2] for part in adapter.batch), adapter.peptides[1:2])
    torch.testing.assert_close(whole.ar[1:2], alone.ar, rtol=1e-5, atol=1e-5)
    count = int(adapter.batch.counts[1])
    peaks = adapter.batch.peaks.clone()
    peaks[1, count:] = 9.0
    strange = model(Batch((peaks, *adapter.batch[1:])), adapter.peptides)
    torch.testing.assert_close(strange.nat[1], whole.nat[1], rtol=1e-5, atol=1e-5)


def test_ions_and_peptides():
    ids = tokens("GASK")
    assert text(ids) == "GASK"
    one = compute_spectrum(ids, torch.Generator().manual_seed(0), dropout=0.0, noise=0.0, jitter=0.0)
    g, a, s, k = (MASSES[letter] for letter in "GASK")
    b = [g, g + a, g + a + s]
    expected = sorted(
        [*(mass + PROTON for mass in b), *(mass + WATER + PROTON for mass in (k, k + s, k + s + a))]
    )
    for ion in expected:
        assert (one.mz - ion).abs().min() < 1e-3
    assert one.mass == pytest.approx(g + a + s + k)
    assert text(tokens("MIM+15.995Q+.984")) == "MLM+15.995Q+.984"
    for wrong in ("", "GAX", "ga", "G+15.995"):
        with pytest.raises(ValueError, match="is no peptide"):
            tokens(wrong)
    assert digest("AAAAKGGGGRPGGKMMMMM", 5, 12) == ["AAAAK", "GGGGRPGGK", "MMMMM"]
    with pytest.raises(ValueError, match="longer than the 2"):
        padded([[1, 2, 3]], 2)


GOOD = "BEGIN IONS\nTITLE=one\nPEPMASS=301.2 1000\nCHARGE=2+\nSEQ=GASK\n150.1 3\n90.5 2.5\nEND IONS\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("PEPMASS=301.2 1000\n", ""), r"bad\.mgf:9: 'one' has no precursor mass: expected a line PEPMASS="),
        (("PEPMASS=301.2", "PEPMASS=-3"), r"bad\.mgf:9: 'one' has no precursor mass"),
        (("CHARGE=2+\n", ""), r"bad\.mgf:9: 'one' has no charge"),
        (("150.1 3\n90.5 2.5\n", ""), r"bad\.mgf:9: 'one' has no peaks"),
        (("90.5 2.5", "90.5 nan"), r"bad\.mgf:15: expected a peak"),
        (("90.5 2.5", "90.5"), r"bad\.mgf:15: expected a peak"),
        (("SEQ=GASK", "SEQ=GAXK"), r"bad\.mgf:9: SEQ=GAXK"),
        (("END IONS", "# END"), r"bad\.mgf:9: the spectrum that begins here has no END IONS"),
    ],
)
def test_bad_spectra(tmp_path: Path, change: tuple[str, str], message: str):
    path = tmp_path / "bad.mgf"
    path.write_text(GOOD + GOOD.replace(*change))
    with pytest.raises(ValueError, match=message):
        read_mgf(path)


def test_spectra_of_a_file(tmp_path: Path):
    path = tmp_path / "good.mgf"
    with pytest.raises(FileNotFoundError, match="give an MGF file with --mgf"):
        read_mgf(path)
    path.write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no spectrum"):
        read_mgf(path)
    path.write_text(GOOD)
    [one] = read_mgf(path)
    assert (one.title, one.precursor, one.charge, text(one.peptide)) == ("one", 301.2, 2, "GASK")
    assert one.mz.tolist() == pytest.approx([90.5, 150.1])
    assert one.intensity.tolist() == pytest.approx([2.5, 3.0])
    with pytest.raises(ValueError, match="--spectra must be at least 2"):
        SpectrumOptions(spectra=1)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        SpectrumOptions(nat_start=2.0)
    with pytest.raises(ValueError, match="--beam must be at least 1"):
        SpectrumSampling(beam=0)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    fasta, mgf, out = tmp_path / "some.fasta", tmp_path / "some.mgf", str(tmp_path / "run")
    write_fasta(fasta, [("p", "MKVLAGRAAGGSKLLEEVRPWWTKGASSSK")])
    small = ["--steps", "2", "--batch-size", "4"]
    assert (
        main(["train", "crossnovo_tiny", "--data", str(fasta), "--spectra", "20", *small, "--out", out]) == 0
    )
    mgf.write_text(GOOD.replace("301.2", f"{(mass_of(tokens('GASK')) + WATER) / 2 + PROTON:.4f}"))
    table = tmp_path / "found.csv"
    assert main(["sample", out, "--mgf", str(mgf), "--out", str(table)]) == 0
    [row] = csv.DictReader(table.read_text().splitlines())
    assert abs(mass_of(tokens(row["peptide"])) - mass_of(tokens("GASK"))) <= 0.1
    assert abs(float(row["mass_error_da"])) <= 0.1
    mgf.write_text(GOOD.replace("PEPMASS=301.2 1000\n", ""))
    assert main(["sample", out, "--mgf", str(mgf)]) == 2
    assert "some.mgf:1: 'one' has no precursor mass" in capsys.readouterr().err
    assert main(["sample", out]) == 2
    assert "with --mgf FILE" in capsys.readouterr().err
