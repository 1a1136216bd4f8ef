"""Files of records, icons and graphs as they come: packed, marked, cut off, in other encodings, or hostile."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arcore._files import read_lines, read_text
from arcore.data.proteins import read_fasta
from arcore.data.svg import load_icons, read_icon
from arcore.zoo.biology.crossnovo.spectra import read_mgf
from arcore.zoo.language.bico.recipe import read_facts
from arcore.zoo.language.ernie3.tasks import read_triples
from arcore.zoo.learning_theory._graphs import blocksworld, read_graph

READERS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "fasta": (read_fasta, "x.fasta", ">a\nACD\n>b\nEF\n"),
    "mgf": (read_mgf, "x.mgf", "BEGIN IONS\nPEPMASS=500.2\nCHARGE=2+\n100.1 5\n90 7\nEND IONS\n"),
    "graph": (lambda path: read_graph(path).names, "x.txt", "a b\nb c\n"),
    "triples": (lambda path: read_triples(path, ""), "x.tsv", "a\tr\tb\nc\tr\td\n"),
    "facts": (read_facts, "x.jsonl", '{"text": "a"}\n{"prompt": "b", "completion": "c"}\n'),
}


def said(found: Any) -> str:
    """Tensors compare one by one, their text as a whole."""
    return repr(found)


@pytest.mark.parametrize("kind", READERS)
def test_marks_line_ends_and_gzip_change_nothing(kind: str, tmp_path: Path):
    read, name, text = READERS[kind]
    path = tmp_path / name
    path.write_text(text)
    expected = said(read(path))
    for data in (
        b"\xef\xbb\xbf" + text.encode(),
        text.replace("\n", "\r\n").encode(),
        text.replace("\n", "\r").encode(),
        gzip.compress(text.encode()),
    ):
        path.write_bytes(data)
        assert said(read(path)) == expected


@pytest.mark.parametrize("kind", READERS)
def test_other_encodings_are_named_with_file_and_line(kind: str, tmp_path: Path):
    read, name, text = READERS[kind]
    path = tmp_path / name
    for data, says in (
        (text.encode("utf-16"), r":1: the file is not UTF-8 text \(it looks like UTF-16\)"),
        (text.encode() + b"caf\xe9\n", r":\d+: the file is not UTF-8 text: byte 0xe9 at offset"),
        (text.encode() + b"\0", r":\d+: the file is not UTF-8 text: a zero byte"),
        (gzip.compress(text.encode())[:-9], "the gzip file is damaged"),
    ):
        path.write_bytes(data)
        with pytest.raises(
            ValueError, match=rf"{name}:? ?{says}" if says.startswith("the") else rf"{name}{says}"
        ):
            read(path)


def test_lines_end_at_line_ends_alone(tmp_path: Path):
    path = tmp_path / "x.txt"
    path.write_bytes("a\u2028b\x0cc\r\n\nd".encode())
    assert read_lines(path) == [(1, "a\u2028b\x0cc"), (2, ""), (3, "d")]
    path.write_bytes(b"\xef\xbb\xbfa\n\n")
    assert read_text(path) == "a\n\n"


SPECTRUM = "BEGIN IONS\nTITLE=t\nPEPMASS=500.2\nCHARGE=2+\n100.1 5\n90 7\nEND IONS\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            SPECTRUM.replace("END IONS\n", "") + SPECTRUM,
            ":7: BEGIN IONS before the spectrum that begins in line 1",
        ),
        (SPECTRUM.replace("END IONS\n", ""), ":1: the spectrum that begins here has no END IONS"),
        (SPECTRUM + "END IONS\n", ":8: END IONS without BEGIN IONS"),
        (SPECTRUM + "100 5\n", ":8: expected BEGIN IONS or NAME=VALUE between spectra but got '100 5'"),
        (SPECTRUM.replace("PEPMASS=500.2\n", ""), ":1: 't' has no precursor mass"),
        (SPECTRUM.replace("500.2", "1e300"), ":1: 't' has no precursor mass"),
        (SPECTRUM.replace("500.2", "5").replace("2+", "1+"), ":1: 't' is lighter than water"),
        (SPECTRUM.replace("CHARGE=2+\n", ""), ":1: 't' has no charge"),
        (SPECTRUM.replace("100.1 5", "nan 5"), ":5: expected a peak"),
        (SPECTRUM.replace("100.1 5", "100.1 -5"), ":5: expected a peak"),
        (SPECTRUM.replace("100.1 5", "100.1 1e38"), ":1: 't' has peaks beyond"),
    ],
)
def test_spectra_that_are_no_spectra(text: str, says: str, tmp_path: Path):
    path = tmp_path / "x.mgf"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"x\.mgf{says}"):
        read_mgf(path)


def test_what_stands_before_spectra_holds_for_them(tmp_path: Path):
    path = tmp_path / "x.mgf"
    path.write_text("CHARGE=3+\n" + SPECTRUM.replace("CHARGE=2+\n", "") + SPECTRUM)
    assert [one.charge for one in read_mgf(path)] == [3, 2]
    assert read_mgf(path)[0].mz.tolist() == pytest.approx([90.0, 100.1])


def test_sequences_end_where_they_say(tmp_path: Path):
    path = tmp_path / "x.fasta"
    path.write_text(">a\nAC*\n>a\nDE\n")
    assert read_fasta(path) == [("a", "AC"), ("a", "DE")]
    path.write_text(">a\nAC*\nDE\n")
    with pytest.raises(ValueError, match=r":3: the sequence of 'a' goes on behind its end"):
        read_fasta(path)


ICON = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24">{}</svg>'
LINE = '<path d="M0 0L5 5L9 1Z"/>'


@pytest.mark.parametrize(
    ("inside", "says"),
    [
        ('<path d="M0 0L1e300 5Z"/>', "no numbers or beyond"),
        ('<path d="M0 0 foo"/>', "has 'f' at character 6"),
        ('<path d="M0 0A0 5 0 0 1 9 9Z"/>', "an arc of radius 0"),
        ('<path d="M0 0A5 0 0 0 1 9 9Z"/>', "an arc of radius 0"),
        (f'<rect width="2" height="2"/>{LINE}', "has an element 'rect'"),
        (f'<g transform="scale(2)">{LINE}</g>', "moves an element 'g' by transform"),
        (f'<g style="fill:red; transform: scale(2)">{LINE}</g>', "moves an element 'g' by transform"),
        (f"<defs>{LINE}</defs>", "has no path"),
        (f"<title>&amp;</title>{LINE}".replace("&amp;", "&x;"), "is no SVG file"),
    ],
)
def test_icons_that_would_be_drawn_wrongly_are_refused(inside: str, says: str, tmp_path: Path):
    path = tmp_path / "x.svg"
    path.write_text(ICON.format(inside))
    with pytest.raises(ValueError, match=says):
        read_icon(path)


def test_entities_of_other_files_are_not_read_and_bombs_do_not_go_off(tmp_path: Path):
    (tmp_path / "secret").write_text("M0 0L1 1")
    path = tmp_path / "x.svg"
    path.write_text(
        f'<!DOCTYPE svg [<!ENTITY x SYSTEM "{(tmp_path / "secret").as_uri()}">]>'
        + ICON.format('<path d="&x;"/>')
    )
    with pytest.raises(ValueError, match="external entity"):
        read_icon(path)
    entities = "".join(f'<!ENTITY e{i + 1} "{f"&e{i};" * 10}">' for i in range(12))
    path.write_text(f'<!DOCTYPE svg [<!ENTITY e0 "aaaa">{entities}]>' + ICON.format("<title>&e12;</title>"))
    with pytest.raises(ValueError, match="is no SVG file"):
        read_icon(path)


@pytest.mark.parametrize("frame", ["0 0 nan 24", "0 0 inf 24", "nan 0 24 24", "0 0 -4 24"])
def test_frames_are_finite(frame: str, tmp_path: Path):
    path = tmp_path / "x.svg"
    path.write_text(ICON.replace("0 0 24 24", frame).format(LINE))
    with pytest.raises(ValueError, match="frame"):
        read_icon(path)


def test_deep_icons_other_encodings_and_folders_with_links(tmp_path: Path):
    expected = ICON.format(LINE)
    (tmp_path / "a.SVG").write_text(ICON.format("<g>" * 20000 + LINE + "</g>" * 20000))
    (tmp_path / "b.svg").write_bytes(expected.encode("utf-16"))
    (tmp_path / "c.svg").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=r"c\.svg"):
        load_icons(tmp_path)
    with pytest.warns(UserWarning, match=r"1 bad icons are left out: c\.svg"):
        found = load_icons(tmp_path, skip_bad=True)
    assert [one.name for one in found] == ["a", "b"]
    assert found[0].commands == found[1].commands


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ("(ontable a) (on b a) (on a b)", "into one place"),
        ("(ontable a) (on b)", r"expected 2 of the blocks in a fact \(on ...\) but got \(on b\)"),
        ("(ontable a) (on b a) (on c a)", "into one place"),
    ],
)
def test_towers_that_cannot_stand(facts: str, says: str, tmp_path: Path):
    path = tmp_path / "x.pddl"
    path.write_text(f"(define (:objects a b c) (:init {facts}) (:goal (on a b)))")
    with pytest.raises(ValueError, match=says):
        blocksworld(path)


def test_deep_tables_are_no_tables(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(ValueError, match=r"x\.jsonl:1: expected a JSON table"):
        read_facts(path)


def test_a_folder_with_the_name_of_a_data_set_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from arcore.data import load_kjv, load_text, open_dataset

    monkeypatch.chdir(tmp_path)
    for name in ("digits", "kjv"):
        (tmp_path / name).mkdir()
    (tmp_path / "kjv" / "a.txt").write_text("a text of one's own " * 40)
    with pytest.warns(
        UserWarning, match=f"'digits' is the data set of that name.*write {tmp_path / 'digits'}"
    ):
        assert len(open_dataset("digits", image_size=8, channels=1)) > 1000
    with pytest.warns(UserWarning, match="'kjv' is the data set"):
        assert load_text("kjv").train[:60] == load_kjv()[:60]
    assert load_text(tmp_path / "kjv").train.startswith("a text of one's own")
