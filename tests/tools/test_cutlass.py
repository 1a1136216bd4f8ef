"""The CuTe headers come from one pinned wheel or not at all."""

from __future__ import annotations

import hashlib
import zipfile

import cutlass
import pytest


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    path = tmp_path / "wheel.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cutlass_library/source/include/cute/tensor.hpp", "// cute")
        archive.writestr("cutlass_library/generator.py", "")
    monkeypatch.setattr(cutlass, "TARGET", tmp_path / "third_party" / "cutlass")
    monkeypatch.setattr(cutlass, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_unpacks_the_headers_and_nothing_else(wheel):
    assert cutlass.include_folder() is None
    assert cutlass.main([str(wheel)]) == 0
    include = cutlass.include_folder()
    assert (include / "cute" / "tensor.hpp").read_text() == "// cute"
    assert sorted(path.name for path in include.parent.iterdir()) == ["VERSION", "include"]
    assert [path.name for path in include.parent.parent.iterdir()] == ["cutlass"]


def test_another_wheel_is_refused(wheel, monkeypatch, capsys):
    monkeypatch.setattr(cutlass, "SHA256", "0" * 64)
    assert cutlass.main([str(wheel)]) == 1
    assert "expected nvidia-cutlass" in capsys.readouterr().err
    assert cutlass.include_folder() is None


def test_headers_of_another_version_do_not_count(wheel):
    cutlass.unpack(wheel)
    (cutlass.TARGET / "VERSION").write_text("4.1.0.0")
    assert cutlass.include_folder() is None
    assert cutlass.main([str(wheel)]) == 0
    assert cutlass.include_folder() is not None
