"""A reader follows a preset from `train` to its first loss through at most seven files, without coming back to one."""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

import pytest

import arcore
from arcore.catalog import find
from arcore.recipes import ZooTask, train

ROOT = Path(arcore.__file__).parent


def files_on_the_stack() -> list[str]:
    """Files of arcore whose functions are being run, outermost first, a run of the same file once.

    Without the guard of arguments, of which a reader of the source sees nothing.
    """
    frame, found = sys._getframe(1), []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if ROOT in path.parents and path.name != "_kinds.py":
            found.append(path.relative_to(ROOT).as_posix())
        frame = frame.f_back
    return [name for name, _ in groupby(reversed(found))]


class Reached(Exception):
    pass


@pytest.mark.parametrize("preset", ["dit_tiny", "msvq_tiny", "roma_tiny", "mar_tiny"])
def test_the_way_to_the_first_loss(preset: str, tmp_path, monkeypatch):
    ways: list[list[str]] = []
    make = ZooTask.__init__

    def made(task, *args, **kwargs):
        ways.append(files_on_the_stack())
        make(task, *args, **kwargs)

    def step(task, batch, index):
        ways.append(files_on_the_stack())
        raise Reached

    monkeypatch.setattr(ZooTask, "__init__", made)
    monkeypatch.setattr(ZooTask, "training_step", step)
    with pytest.raises(Reached):
        train(preset, out=tmp_path / "run", settings={"steps": 1, "accelerator": "cpu"}, show_progress=False)
    for way in ways:
        assert len(way) == len(set(way)), f"it comes back: {way}"
    passed = {name for way in ways for name in way}
    # The step itself, which was replaced here, and the network.
    passed |= {"training/task.py", find(preset).entry.source.path.relative_to(ROOT).as_posix()}
    assert len(passed) <= 7, sorted(passed)
