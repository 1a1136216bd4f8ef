"""What the build backend says before pip downloads or compiles anything."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import build_backend
import build_tools
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def versions(monkeypatch):
    """Set which versions of packages are installed; None: absent."""
    real, known = importlib.metadata.version, {}

    def version(name: str) -> str:
        if name in known and known[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return known.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.delenv("ARCORE_ISOLATED", raising=False)
    monkeypatch.setattr(build_backend, "_see_installed_packages", lambda: None)
    return known


@pytest.fixture(params=["get_requires_for_build_wheel", "get_requires_for_build_editable"])
def requires(request):
    return getattr(build_backend, request.param)


def test_nothing_is_asked_for_where_all_is_there(versions, requires, capsys):
    versions |= {"torch": "2.13.0+cpu", "setuptools": "80.1", "cmake": "4.0", "ninja": "1.13"}
    assert requires() == []


@pytest.mark.parametrize(
    ("torch", "message"),
    [
        (None, "torch>=2.11 must be installed before arcore is built.*run `pip install torch`"),
        ("2.10.1", "torch 2.10.1 is installed but arcore needs torch>=2.11; run `pip install 'torch>=2.11'`"),
    ],
)
def test_without_torch_it_stops_before_pip_downloads_one(versions, requires, torch, message):
    versions["torch"] = torch
    with pytest.raises(SystemExit, match=f"^arcore: {message}"):
        requires()
    with pytest.raises(SystemExit, match=f"^arcore: {message}"):
        build_backend.build_wheel("nowhere")


def test_isolated_builds_let_pip_download(versions, requires, monkeypatch):
    monkeypatch.setenv("ARCORE_ISOLATED", "1")
    versions |= {"torch": None}
    assert "torch>=2.11" in requires()


def test_without_a_compiler(versions, requires, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SystemExit, match=r"^arcore: no C\+\+ compiler was found; install g\+\+ >= 11"):
        requires()
    monkeypatch.setenv("CXX", "not-a-compiler -m64")
    with pytest.raises(SystemExit, match="the compiler CXX=not-a-compiler -m64 was not found"):
        requires()


@pytest.mark.parametrize(
    ("setuptools", "message"),
    [("68.0.1", "setuptools 68.0.1 is installed"), (None, "no setuptools is installed")],
)
def test_old_setuptools(versions, setuptools, message):
    versions |= {"torch": "2.13.0", "setuptools": setuptools}
    for build in (build_backend.build_wheel, build_backend.build_editable, build_backend.build_sdist):
        with pytest.raises(
            SystemExit, match=f"{message} but the build needs setuptools>=77; run `pip install"
        ):
            build("nowhere")


def test_missing_build_tools_are_asked_for(versions, requires, monkeypatch, tmp_path):
    (tmp_path / "c++").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    versions |= {"torch": "2.13.0", "setuptools": "70.0", "cmake": None, "ninja": None}
    assert requires() == ["setuptools>=77.0", "cmake>=3.24", "ninja"]


def old_cmake(folder: Path) -> None:
    """A cmake of 2020 on the path, as some systems have it."""
    path = folder / "cmake"
    path.write_text("#!/bin/sh\necho cmake version 3.18.4\n")
    path.chmod(0o755)


def test_an_old_cmake_is_replaced(versions, requires, monkeypatch, tmp_path):
    old_cmake(tmp_path)
    (tmp_path / "c++").symlink_to(sys.executable)
    (tmp_path / "ninja").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    versions |= {"torch": "2.13.0", "setuptools": "80.0", "cmake": None}
    assert requires() == ["cmake>=3.24"]


@pytest.mark.parametrize("old", [False, True])
def test_without_isolation_a_missing_or_old_cmake_is_one_sentence(versions, monkeypatch, tmp_path, old):
    (tmp_path / "c++").symlink_to(sys.executable)
    said = "cmake was not found"
    if old:
        old_cmake(tmp_path)
        said = f"{tmp_path}/cmake is cmake 3.18.4 but the build needs cmake>=3.24"
    monkeypatch.setenv("PATH", str(tmp_path) + (f"{os.pathsep}/bin" if old else ""))
    monkeypatch.delenv("CXX", raising=False)
    versions |= {"torch": "2.13.0", "setuptools": "80.0", "cmake": None}
    for build in (build_backend.build_wheel, build_backend.prepare_metadata_for_build_editable):
        with pytest.raises(
            SystemExit, match=f"^arcore: {said}; run `pip install 'cmake>=3.24'`, or leave out"
        ):
            build("nowhere")


def test_a_package_of_cmake_serves_where_that_on_the_path_is_old(monkeypatch, tmp_path):
    pytest.importorskip("cmake", reason="the package cmake is not installed")
    old_cmake(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    assert Path(build_tools.find("cmake")).parent != tmp_path


def test_setup_names_the_tool_that_is_missing():
    """Under --no-build-isolation nobody brings cmake."""
    code = (
        "import sys, setuptools, importlib.metadata as m, shutil\n"
        "shutil.which = lambda name: None\n"
        "def absent(name): raise m.PackageNotFoundError(name)\n"
        "m.version = absent\n"
        "setuptools.setup = lambda **kw: kw['cmdclass']['build_ext'](setuptools.Distribution()).run()\n"
        "exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__file__': 'setup.py', '__name__': 'x'})\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env=os.environ | {"ARCORE_CUDA": "off"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    wanted = "arcore: ninja was not found; run `pip install ninja`, then the same command again"
    assert run.stderr.strip().splitlines()[-1] == wanted
