"""Obfuscated code does what it did and comes back; texts of training; names written into forced code."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import arcore
from arcore.cli import main
from arcore.zoo.language.obfuscate.files import code_files, functions_of, obfuscate_file
from arcore.zoo.language.obfuscate.model import (
    END,
    OBFUSCATED,
    SOURCE,
    documents,
    functions,
    identifier_loss,
    name_again,
    renamed,
)
from arcore.zoo.language.obfuscate.recipe import CodeOptions
from arcore.zoo.language.obfuscate.rename import obfuscate, read, restore
from tests.zoo.protocol_language import Protocol as Protocol

MODULE = '''
"""A module."""
from __future__ import annotations
import os.path
import math, json as js
from collections import OrderedDict, defaultdict as dd

__all__ = ["Shape", "area", 'total']
LIMIT = 3

class Shape:
    """A shape."""
    sides = 4
    def __init__(self, width, *, height=2):
        self.width, self.height = width, height
    def area(self):
        return self.width * self.height

def total(shapes, *, start=0):
    """Sum."""
    global LIMIT
    for shape in shapes:
        start += shape.area()
    def inner(x):
        nonlocal start
        start = start + x
        return lambda y, z=1: x + y + z + start
    LIMIT += 1
    return inner(1)(2), LIMIT

def run(n):
    try:
        values = [Shape(i, height=n) for i in range(n) if (sq := i * i) >= 0]
        first, *rest = values
    except ValueError as problem:
        return str(problem)
    found = dd(list)
    found["a"].append(math.floor(2.5))
    match n:
        case {"k": v, **others}:
            return v
        case 3 | 4 as m:
            found["z"].append(m)
    return total(values, start=n), dict(found), f"{n=} {len(rest)}", js.dumps([n]), os.path.basename("a/b")

def total2(shapes): return total(shapes=shapes, start=1)[0]
'''


def result(code: str, name: str) -> Any:
    space: dict[str, Any] = {}
    exec(compile(code, "module", "exec"), space)
    return space[name](3)


def test_a_module_does_the_same_under_other_names():
    one = obfuscate(MODULE)
    assert len(set(one.names.values())) == len(one.names)
    assert result(one.code, one.names["run"]) == result(MODULE, "run")
    assert ast.dump(ast.parse(restore(one.code, one.names))) == ast.dump(ast.parse(one.source))
    for name in ("shapes", "start", "values", "LIMIT", "inner", "math", "js", "dd", "problem", "m", "others"):
        assert name in one.names, name
        assert not re.search(
            rf"(?<![.\w'\"]){name}\b(?!['\"])", one.code.replace("import math", "").replace("n=", "")
        ), name
    # Kept: attributes and class bodies, what is passed by keyword to a class, packages with a dot, built-ins.
    assert not {"sides", "area", "height", "os", "range", "self", "annotations"} & set(one.names)
    assert "import math as IMPORT_1" in one.code
    assert "Sum." not in one.code
    assert f"__all__ = ['{one.names['Shape']}', 'area', '{one.names['total']}']" in one.code


def test_names_that_a_text_may_look_up_are_kept():
    one = obfuscate("key = 1\nother = 2\nprint(globals()['key'], '%(other)s' % vars())\n")
    assert one.names == {}
    one = obfuscate("VAR_1 = 1\nname = VAR_1\n")
    assert one.names["name"] != one.names["VAR_1"]
    assert ast.dump(ast.parse(restore(one.code, one.names))) == ast.dump(ast.parse(one.source))
    one = obfuscate("def f(a, b=1):\n    return a\nf(a=1)\nprint(f(1, b=2), end='')\n")
    assert set(one.names) == {"f", "a", "b"}
    assert "end=''" in one.code


@pytest.mark.parametrize("module", ["bisect", "keyword", "stat", "colorsys", "heapq"])
def test_modules_of_the_standard_library(module: str):
    [path] = [path for path in code_files(["stdlib"]) if path.stem == module]
    one = obfuscate(read(path), str(path))
    space: dict[str, Any] = {"__name__": "obfuscated"}
    exec(compile(one.code, module, "exec"), space)
    if module == "colorsys":
        import colorsys

        convert = space[one.names["rgb_to_hls"]]
        assert convert(0.2, 0.4, 0.4) == colorsys.rgb_to_hls(0.2, 0.4, 0.4)
    if module == "bisect":
        assert space[one.names.get("insort_right", "insort_right")] is not None
    assert ast.dump(ast.parse(restore(one.code, one.names))) == ast.dump(ast.parse(one.source))


def test_texts_of_training(tmp_path: Path):
    path = tmp_path / "some.py"
    path.write_text(
        "def add(left, right):\n    return left + right\n\nclass A:\n    def get(self):\n        return 1\n"
    )
    pairs = functions([path], 300)
    assert [one.code for one in pairs] == [
        "def FUNC_1(VAR_1, VAR_2):\n    return VAR_1 + VAR_2",
        "def FUNC_1(self):\n    return 1",
    ]
    text = documents(pairs * 200, "pairs", torch.Generator().manual_seed(0))
    kinds = {re.sub(r"[^\x01\x02]", "", part) for part in text.split(END)[:-1]}
    assert kinds == {SOURCE + OBFUSCATED, OBFUSCATED + SOURCE, SOURCE, OBFUSCATED}
    assert OBFUSCATED not in documents(pairs, "source", torch.Generator().manual_seed(0))


def test_names_are_written_into_the_given_code():
    torch.manual_seed(0)
    model = arcore.create_model("obscura_tiny").eval()
    code = "def FUNC_1(VAR_1, VAR_2=3):\n    return VAR_1 + len(VAR_2)"
    names = name_again(model, code, temperature=1.0, seed=3)
    assert set(names) == {"FUNC_1", "VAR_1", "VAR_2"}
    assert len(set(names.values())) == 3
    assert all(name.isidentifier() for name in names.values())
    again = renamed(code, names)
    assert re.sub("|".join(sorted(names.values(), key=len, reverse=True)), "#", again) == re.sub(
        r"[A-Z]+_\d", "#", code
    )
    assert names == name_again(model, code, temperature=1.0, seed=3)
    with pytest.raises(ValueError, match="no identifier such as VAR_1"):
        name_again(model, "print(1)")
    with pytest.raises(ValueError, match="more than the 2048 bytes"):
        name_again(model, code + "\n" + "pass\n" * 500)


def test_identifier_loss_reads_names_only():
    class Uniform:
        def __call__(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*ids.shape, 256)

    pairs = [obfuscate("def add(left):\n    return left")]
    for mix in ("pairs", "source"):
        assert identifier_loss(Uniform(), pairs, mix) == pytest.approx(torch.tensor(256.0).log().item())


def test_bad_input(tmp_path: Path):
    path = tmp_path / "bad.py"
    path.write_text("x = 1\ndef f(:\n")
    with pytest.raises(ValueError, match=r"bad\.py:2: the code does not parse as Python 3"):
        obfuscate(read(path), str(path))
    path.write_bytes(b"x = '\xff'\n")
    with pytest.raises(ValueError, match=r"bad\.py:1: the file cannot be read as text"):
        read(path)
    for text in ("x = " + "+".join(["1"] * 20_000), "x = " + "-" * 50_000 + "1"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"bad\.py: an expression in it is nested too deeply"):
            obfuscate_file(path)
        # How deep is too deep for the parser depends on the Python; there is no function to be found.
        try:
            assert functions_of(path, 400) == []
        except ValueError as error:
            assert "bad.py: an expression in it is nested too deeply" in str(error)
    with pytest.raises(FileNotFoundError, match="folders of them, or stdlib"):
        code_files([str(tmp_path / "none")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there is no file of code"):
        code_files([str(tmp_path / "empty")])
    with pytest.raises(ValueError, match="choose pairs or source"):
        CodeOptions(mix="both")  # type: ignore[arg-type]


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "code").mkdir()
    for name in ("one", "two"):
        (tmp_path / "code" / f"{name}.py").write_text(MODULE)
    out = tmp_path / "out"
    assert main(["run", "obfuscate", str(tmp_path / "code"), "--out", str(out)]) == 0
    assert "2 files" in capsys.readouterr().out
    entry = json.loads((out / "pairs.jsonl").read_text().splitlines()[0])
    assert (out / "one.py").read_text().strip() == entry["code"]
    (tmp_path / "code" / "bad.py").write_text("def f(:\n")
    assert main(["run", "obfuscate", str(tmp_path / "code" / "bad.py")]) == 2
    assert "bad.py:1: the code does not parse" in capsys.readouterr().err
    (tmp_path / "code" / "bad.py").unlink()
    run = str(tmp_path / "run")
    words = ["train", "obscura_tiny", "--data", str(tmp_path / "code"), "--context", "64"]
    assert main([*words, "--steps", "2", "--batch-size", "2", "--out", run]) == 0
    small = tmp_path / "small.py"
    small.write_text("def add(left, right):\n    return left + right\n")
    named = tmp_path / "named.py"
    assert main(["sample", run, "--file", str(small), "--out", str(named)]) == 0, capsys.readouterr().err
    compile(named.read_text(), "named", "exec")
