from __future__ import annotations

import json
from pathlib import Path

import pytest

from arcore.catalog.claims import Claim, at_most


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch):
    """Claims that are given by the test, by system."""
    given: dict[str, object] = {}

    def load(place, name):
        return given[place.module.split(".")[3]]

    monkeypatch.setattr("arcore.catalog.claims.load", load)
    return given


def draw(figure) -> None:
    figure.add_subplot().plot([1, 2])


def test_prints_a_table_writes_figure_and_record(arcore, claims, tmp_path: Path):
    claims["var"] = lambda *, quick: Claim(
        (at_most("error", 0.5, 1), at_most("longer name", 0, 1e-5)), draw=draw
    )
    record = tmp_path / "claims.json"
    record.write_text('{"other": {"holds": true}}')
    outcome = arcore("check", "var_tiny", "--quick", "--json", record, "--out", tmp_path / "figures")
    assert outcome.code == 0
    assert "holds   error        0.5  <= 1" in outcome.out
    assert "1 claim checked; all hold" in outcome.out
    assert (tmp_path / "figures/var.png").read_bytes()[:4] == b"\x89PNG"
    content = json.loads(record.read_text())
    assert content["other"] == {"holds": True}
    assert content["var"]["rows"][0] == {"what": "error", "measured": 0.5, "required": "<= 1", "holds": True}
    assert content["var"]["quick"] is True
    assert content["var"]["error"] is None
    assert {"machine", "commit", "seconds", "torch", "date"} <= content["var"].keys()


def test_what_does_not_hold_or_raises_is_code_1(arcore, claims, tmp_path: Path):
    def broken(*, quick: bool) -> Claim:
        raise ValueError("no data")

    claims["var"] = lambda *, quick: Claim((at_most("error", 2, 1),))
    claims["dit"] = broken
    record = tmp_path / "claims.json"
    outcome = arcore("check", "var", "dit", "--json", record, "--out", tmp_path)
    assert outcome.code == 1
    assert "FAILS   error" in outcome.out
    assert "FAILED after" in outcome.out
    assert "ValueError: no data (test_check_command.py:" in outcome.out
    assert "2 claims checked; 2 do not hold: var, dit" in outcome.out
    content = json.loads(record.read_text())
    assert content["dit"]["holds"] is False
    assert "no data" in content["dit"]["error"]


def test_a_figure_that_cannot_be_drawn_is_a_failure(arcore, claims, tmp_path: Path):
    claims["var"] = lambda *, quick: Claim((at_most("error", 0, 1),), draw=lambda figure: figure.nonsense())
    outcome = arcore("check", "var", "--out", tmp_path)
    assert outcome.code == 1
    assert "FAILED after" in outcome.out
    assert "the figure: AttributeError" in outcome.out


def test_bad_requests_are_one_line(fails, tmp_path: Path):
    assert "name the systems to check, or give --all" in fails("check")
    assert "name the systems to check, or give --all" in fails("check", "var", "--all")
    assert "did you mean var" in fails("check", "varr")
    (tmp_path / "bad.json").write_text("{")
    assert "bad.json is damaged" in fails("check", "var", "--json", tmp_path / "bad.json")
    assert "is a folder but --json must name a file" in fails("check", "var", "--json", tmp_path)


def test_a_real_claim(arcore, tmp_path: Path):
    outcome = arcore("check", "ar_diffusion", "--quick", "--out", tmp_path)
    assert outcome.code == 0
    assert "0.0628" in outcome.out
    assert (tmp_path / "ar_diffusion.png").stat().st_size > 5000


def test_checks_side_by_side_keep_each_others_records(arcore, tmp_path, monkeypatch):
    """A check that ends while another runs stays in the file that both write to."""
    import arcore.cli.check as check

    record = tmp_path / "claims.json"
    run_claim = check.run_claim

    def slow(name, **options):
        outcome = run_claim(name, **options)
        record.write_text(json.dumps({"other": {"holds": True}}))
        return outcome

    monkeypatch.setattr(check, "run_claim", slow)
    assert arcore("check", "ddo", "--quick", "--json", record, "--out", tmp_path).code == 0
    assert set(json.loads(record.read_text())) == {"other", "ddo"}
