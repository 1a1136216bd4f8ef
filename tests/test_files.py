"""Files and folders appear whole or not at all; missing packages are named."""

from __future__ import annotations

import os
import stat
from contextlib import nullcontext
from pathlib import Path

import pytest

from arcore._files import atomic_folder, atomic_path
from arcore._optional import require


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_appears_at_the_end(tmp_path: Path):
    target = tmp_path / "new" / "deep" / "picture.png"
    with atomic_path(target) as temporary:
        assert temporary.parent == target.parent
        assert temporary.suffix == ".png"
        assert temporary.read_bytes() == b""
        temporary.write_text("one")
        assert not target.exists()
    assert target.read_text() == "one"
    assert names(target.parent) == ["picture.png"]
    with atomic_path(str(target)) as temporary:
        temporary.write_text("two")
        assert target.read_text() == "one"
    assert target.read_text() == "two"
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_leaves_the_old_file(tmp_path: Path, error: type[BaseException]):
    target = tmp_path / "weights"
    target.write_text("old")
    with pytest.raises(error), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert names(tmp_path) == ["weights"]


def test_devices_pipes_and_links_stay_what_they_are(tmp_path: Path):
    target, link = tmp_path / "far" / "target.txt", tmp_path / "link.txt"
    link.symlink_to(target)
    for words in ("new", "newer"):
        with atomic_path(link) as temporary:
            temporary.write_text(words)
        assert link.is_symlink()
        assert target.read_text() == words
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with atomic_path(pipe) as temporary:
        temporary.write_bytes(b"through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert pipe.is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["far", "link.txt", "pipe"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may make devices")
@pytest.mark.parametrize(
    ("minor", "error"), [(3, None), (7, "No space left on device")], ids=["null", "full"]
)
def test_a_device_is_written_and_not_replaced(tmp_path: Path, minor: int, error: str | None):
    device = tmp_path / "device"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, minor))
        device.open("wb").close()
    except OSError:
        pytest.skip("no devices in this place")
    refused = pytest.raises(OSError, match=f"cannot write {device}: {error}; choose another place")
    with nullcontext() if error is None else refused, atomic_path(device) as temporary:
        temporary.write_text("words")
    assert device.is_char_device()


def test_folder_is_replaced_as_a_whole(tmp_path: Path):
    target = tmp_path / "run" / "last"
    for content in ("a", "b"):
        with atomic_folder(target) as temporary:
            (temporary / content).write_text(content)
        assert names(target) == [content]
        assert names(target.parent) == ["last"]
    with pytest.raises(RuntimeError, match="no"), atomic_folder(target) as temporary:
        (temporary / "c").write_text("c")
        raise RuntimeError("no")
    assert names(target) == ["b"]
    assert names(target.parent) == ["last"]


def test_places_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for writer in (atomic_path, atomic_folder):
        with (
            pytest.raises(OSError, match=r"cannot write .*/file/below: "),
            writer(tmp_path / "file" / "below"),
        ):
            pass
    with (
        pytest.raises(IsADirectoryError, match="there is a folder of that name"),
        atomic_path(tmp_path / "folder"),
    ):
        pass
    with (
        pytest.raises(NotADirectoryError, match="there is a file of that name"),
        atomic_folder(tmp_path / "file"),
    ):
        pass
    assert names(tmp_path) == ["file", "folder"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may write everywhere")
def test_folder_without_permission(tmp_path: Path):
    tmp_path.chmod(0o500)
    for writer in (atomic_path, atomic_folder):
        with (
            pytest.raises(PermissionError, match=r"cannot write .*/new: Permission denied"),
            writer(tmp_path / "new"),
        ):
            pass


def test_missing_package_names_the_extra():
    with pytest.raises(
        ImportError,
        match=r"needs the package 'not_there_at_all'.*`pip install not_there_at_all`.*\"\.\[zoo\]\"",
    ) as error:
        require("not_there_at_all.part", extra="zoo")
    assert error.value.name == "not_there_at_all"
    assert require("json.decoder", extra="zoo").JSONDecoder


def test_error_inside_a_package_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "half_there.py").write_text("import missing_dependency_of_it\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="missing_dependency_of_it"):
        require("half_there", extra="zoo")
