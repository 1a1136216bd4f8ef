"""Obfuscation by syntax trees: programs do the same in their own compilers, names come back, and what is refused."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from arcore.zoo.language.obfuscate import files, trees
from arcore.zoo.language.obfuscate.files import code_files, functions_of, obfuscate_file, restore
from arcore.zoo.language.obfuscate.model import Options, run
from arcore.zoo.language.obfuscate.trees import GO, JAVA, JAVASCRIPT, C, Language, obfuscate

for package in (
    "tree_sitter",
    "tree_sitter_c",
    "tree_sitter_javascript",
    "tree_sitter_java",
    "tree_sitter_go",
):
    pytest.importorskip(package)

C_CODE = r"""
#include <stdio.h>
#define DOUBLE(x) ((x) * factor)
typedef struct point { int x, y; } point_t;
enum colour { RED, GREEN = 5 };
static const int factor = 2;  /* read by a macro */
extern int putchar(int);
int later(int n);
static int add(int left, int (*how)(int, int)) { return how(left, factor); }
int plus(int a, int b) { return a + b; }
int later(int n) { return n ? n * later(n - 1) : 1; }
int main(void) {
    point_t here = { .x = 3, .y = 4 };
    int total = 0, table[3] = {1, 2, 3};
    for (int i = 0; i < 3; i++) total += table[i] * DOUBLE(here.x);
    point_t *there = &here;
    goto end;
end:
    printf("%d %d %d %d\n", total, add(there->y, plus), later(5), GREEN);
    return 0;
}
"""
JAVASCRIPT_CODE = """
const path = require('path');
// a comment
class Counter { constructor(start) { this.count = start; } next(step = 1) { this.count += step; return this.count; } }
function outer(values, { scale, shift: offset = 1 }, ...rest) {
  let sum = 0;
  for (const value of values) { sum += value * scale + offset; }
  const inner = (extra) => sum + extra + rest.length;
  const short = 3;
  try { throw new Error('x'); } catch (problem) { sum += problem.message.length; }
  return { short, total: inner(10) };
}
const counter = new Counter(2);
console.log(counter.next(), counter.next(5), outer([1, 2], { scale: 3, shift: 4 }, 7, 8), path.basename('/a/b'));
"""
JAVA_CODE = """
import java.util.*;
public class Main {
    private int size = 4;
    private static int twice(int number) { int result = number * 2; return result; }
    public int grow(int size) { this.size += size; return this.size; }
    public static void main(String[] args) {
        List<Integer> items = new ArrayList<>();
        for (int index = 0; index < 3; index++) items.add(twice(index));
        int total = 0;
        for (int item : items) { total += item; }
        Comparator<Integer> order = (one, other) -> other - one;
        items.sort(order);
        try { throw new IllegalStateException("x"); } catch (IllegalStateException error) { total += 1; }
        System.out.println(total + " " + items + " " + new Main().grow(3));
    }
}
"""
GO_CODE = """package main

import (
	"fmt"
	"path"
)

type pair struct {
	left, right int
}

type wrapper struct {
	pair
}

func join(first pair, names ...string) (string, int) {
	total := first.left
	for index, name := range names {
		total += index + len(name)
	}
	path := path.Join("a", "b")
	return path, total
}

func main() {
	value := pair{left: 1, right: 2}
	text, count := join(value, "x", "yy")
	fmt.Println(text, count)
}
"""


def same_output(commands: list[list[str]], folder: Path, name: str, codes: tuple[str, str]) -> None:
    said = []
    for turn, code in enumerate(codes):
        place = folder / str(turn)
        place.mkdir()
        (place / name).write_text(code)
        for command in commands:
            done = subprocess.run(command, cwd=place, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[0] == said[1] != ""


@pytest.mark.parametrize(
    ("language", "code", "name", "commands"),
    [
        (C, C_CODE, "a.c", [["gcc", "-Wall", "a.c", "-o", "a.out"], ["./a.out"]]),
        (JAVASCRIPT, JAVASCRIPT_CODE, "a.js", [["node", "a.js"]]),
        pytest.param(
            JAVA, JAVA_CODE, "Main.java", [["javac", "Main.java"], ["java", "-cp", ".", "Main"]],
            marks=pytest.mark.slow,
        ),
        (GO, GO_CODE, "a.go", [["go", "run", "a.go"]]),
    ],
    ids=["c", "javascript", "java", "go"],
)  # fmt: skip
def test_programs_do_the_same(
    language: Language, code: str, name: str, commands: list[list[str]], tmp_path: Path
) -> None:
    one = obfuscate(code, language)
    if any(shutil.which(command[0]) is None for command in commands if command[0] != "./a.out"):
        pytest.skip(f"there is no {commands[0][0]} here")
    same_output(commands, tmp_path, name, (code, one.code))


@pytest.mark.parametrize(
    ("language", "code", "renamed", "kept"),
    [
        (
            C, C_CODE,
            {"add": "FUNC", "plus": "FUNC", "later": "FUNC", "point_t": "CLASS", "total": "VAR", "how": "VAR",
             "GREEN": "VAR", "there": "VAR", "colour": "CLASS"},
            {"main", "printf", "factor", "putchar", "x", "y", "DOUBLE", "end"},
        ),
        (
            JAVASCRIPT, JAVASCRIPT_CODE,
            {"Counter": "CLASS", "outer": "FUNC", "values": "VAR", "offset": "VAR", "inner": "VAR", "counter": "VAR",
             "problem": "VAR", "rest": "VAR", "path": "VAR", "step": "VAR"},
            {"short", "scale", "next", "count", "console", "require", "total", "shift", "Error"},
        ),
        (
            JAVA, JAVA_CODE,
            {"twice": "FUNC", "number": "VAR", "result": "VAR", "items": "VAR", "index": "VAR", "one": "VAR",
             "order": "VAR", "error": "VAR", "args": "VAR"},
            {"Main", "grow", "size", "main", "String", "System", "List", "add", "sort", "IllegalStateException"},
        ),
        (
            GO, GO_CODE,
            {"join": "FUNC", "names": "VAR", "total": "VAR", "index": "VAR", "value": "VAR", "text": "VAR"},
            {"main", "fmt", "path", "pair", "left", "right", "len", "string", "int"},
        ),
    ],
    ids=["c", "javascript", "java", "go"],
)  # fmt: skip
def test_what_is_renamed_and_what_is_kept(
    language: Language, code: str, renamed: dict[str, str], kept: set[str]
) -> None:
    one = obfuscate(code, language)
    assert {name: one.names.get(name, "").split("_")[0] for name in renamed} == renamed
    assert not kept & set(one.names)
    words = set(re.findall(r"\w+", re.sub(r"'[^']*'", "", one.code)))  # a text names a package
    assert not words & set(renamed)
    assert len(set(one.names.values())) == len(one.names)
    assert restore(one.code, one.names, one.language) == one.source
    assert "comment" not in one.source


def test_functions_of_a_file_come_as_pairs(tmp_path: Path) -> None:
    path = tmp_path / "a.c"
    path.write_text(C_CODE)
    found = functions_of(path, 120)
    assert [one.source.split("(")[0] for one in found] == ["static int add", "int plus", "int later"]
    assert found[1].code == "int FUNC_1(int VAR_1, int VAR_2) { return VAR_1 + VAR_2; }"
    assert found[0].language == "c"


def test_the_command_takes_folders_of_several_languages(tmp_path: Path) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    texts = {
        "a.c": C_CODE,
        "b.js": JAVASCRIPT_CODE,
        "C.java": JAVA_CODE,
        "d.go": GO_CODE,
        "e.py": "total = 1\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "notes.txt").write_text("no code")
    report = run(Options(files=(str(folder),), out=tmp_path / "out"))
    assert report.values["files"] == 5
    assert "VAR_1" in (tmp_path / "out/b.js").read_text()
    assert files.language_name(folder / "e.py") == "python"
    assert obfuscate_file(folder / "d.go").language == "go"


def test_bad_code_is_refused_with_file_and_line(tmp_path: Path) -> None:
    for name, text, told in (
        ("a.c", "int f(void) {\n  return 1 +;\n}\n", r"a\.c:2: the code does not parse as c"),
        ("a.js", "let a = 1;\nfunction (\n", r"a\.js:2: the code does not parse as javascript"),
        ("a.java", "class A {\n  void f( { }\n}\n", r"a\.java:2: the code does not parse as java"),
    ):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(ValueError, match=told):
            obfuscate_file(path)
    (tmp_path / "b.c").write_bytes(b"int a; // \xff\n")
    with pytest.raises(ValueError, match=r"b\.c:1: the file cannot be read as text"):
        obfuscate_file(tmp_path / "b.c")
    (tmp_path / "c.txt").write_text("x")
    with pytest.raises(
        ValueError, match=r"c\.txt: expected a file of code, whose name ends in one of \.py, \.c"
    ):
        code_files([str(tmp_path / "c.txt")])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        files.read(tmp_path / "none.c")


def test_without_the_grammar_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    trees._parser.cache_clear()
    monkeypatch.setitem(sys.modules, "tree_sitter_c", None)
    with pytest.raises(ImportError, match="code"):
        obfuscate("int a;", C)
    trees._parser.cache_clear()
