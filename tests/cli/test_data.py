from __future__ import annotations

from pathlib import Path

import pytest

from arcore.cli import main

Image = pytest.importorskip("PIL.Image")


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (200, 0, 0)).save(path)
    return path


def test_a_good_folder(tmp_path: Path, capsys):
    write(tmp_path / "a" / "1.png")
    write(tmp_path / "b" / "1.png")
    assert main(["data", "check", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "2 images in 2 classes" in out
    assert "all of it can be read" in out


def test_every_bad_file_is_named(tmp_path: Path, capsys):
    write(tmp_path / "a" / "1.png")
    for number in range(2, 5):
        path = write(tmp_path / "a" / f"{number}.png")
        path.write_bytes(path.read_bytes()[:40])
    (tmp_path / "a" / "gone.png").symlink_to("/nowhere")
    assert main(["data", "check", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert all(f"{number}.png" in out for number in range(2, 5))
    assert "gone.png: the target of the link does not exist" in out
    assert "4 bad entries" in out


def test_classes_in_classes(tmp_path: Path, capsys):
    write(tmp_path / "a" / "b" / "1.png")
    write(tmp_path / "a" / "c" / "1.png")
    assert main(["data", "check", str(tmp_path)]) == 2
    assert "say --nested outer" in capsys.readouterr().err
    assert main(["data", "check", str(tmp_path), "--nested", "inner"]) == 0
    assert "a/b: 1" in capsys.readouterr().out


def test_a_path_that_is_none(tmp_path: Path, capsys):
    assert main(["data", "check", str(tmp_path / "gone")]) == 2
    assert "gone does not exist: expected a folder or a file" in capsys.readouterr().err


def test_text(tmp_path: Path, capsys):
    (tmp_path / "a.txt").write_text("some words " * 20)
    assert main(["data", "check", str(tmp_path)]) == 0
    assert "198 characters to train on, 22 held out" in capsys.readouterr().out
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    assert main(["data", "check", str(tmp_path)]) == 1
    assert "b.txt: is not UTF-8 text" in capsys.readouterr().out


def test_neither(tmp_path: Path, capsys):
    (tmp_path / "a.doc").write_text("words")
    assert main(["data", "check", str(tmp_path)]) == 2
    assert "say --kind" in capsys.readouterr().err


def test_tables(tmp_path: Path, capsys):
    pytest.importorskip("pandas")
    rows = [f"2024-01-{day:02},{name},{day}" for name in "AB" for day in range(1, 11)]
    (tmp_path / "a.csv").write_text("\n".join(["date,ticker,close", *rows, "2024-01-11,A,"]))
    assert main(["data", "check", str(tmp_path / "a.csv"), "--group", "ticker"]) == 0
    out = capsys.readouterr().out
    assert "the column 'date' orders the rows" in out
    assert "2 series of close" in out
    assert "a/A: 11 rows, missing values: 1 of 'close'" in out
    assert main(["data", "check", str(tmp_path / "a.csv")]) == 1
    assert "holds no numbers but for example 'A' on line 2" in capsys.readouterr().out
    (tmp_path / "b.csv").write_text("date,ticker,close\n2024-01-01,A,1\n2024-01-01,A,2\n")
    (tmp_path / "c.csv").write_text("date,ticker,open\n2024-01-01,A,x\n")
    (tmp_path / "notes.txt").write_text("")
    words = ["data", "check", str(tmp_path), "--kind", "series", "--group", "ticker"]
    assert main(words) == 1
    out = capsys.readouterr().out
    assert "b.csv: the time 2024-01-01 comes twice in the column 'date'" in out
    assert "c.csv: the column 'open' holds no numbers" in out
    assert "notes.txt: no table" in out
    assert "3 bad entries" in out


def test_columns_of_a_table(tmp_path: Path, capsys):
    pytest.importorskip("pandas")
    path = tmp_path / "t.csv"
    path.write_text(
        "date,a,b,note\n" + "".join(f"2024-01-{day:02},{day},{-day},dry\n" for day in range(1, 9))
    )
    assert main(["data", "check", str(path)]) == 1
    assert "'dry' on line 2; leave the column out with --columns (columns=[...])" in capsys.readouterr().out
    assert main(["data", "check", str(path), "--columns", "b", "a"]) == 0
    assert "1 series of b, a" in capsys.readouterr().out


def test_videos_that_may_be_images(tmp_path: Path, capsys):
    frames = [Image.new("L", (8, 8), level) for level in (0, 99, 200)]
    (tmp_path / "a").mkdir()
    frames[0].save(tmp_path / "a" / "1.gif", save_all=True, append_images=frames[1:])
    assert main(["data", "check", str(tmp_path)]) == 0
    assert "taken as images: --kind videos looks at them as videos" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path), "--kind", "videos"]) == 0
    out = capsys.readouterr().out
    assert "3 frames of videos in 1 classes" in out
    assert "taken as" not in out
