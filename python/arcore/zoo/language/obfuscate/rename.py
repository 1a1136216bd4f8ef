"""Consistent renaming of the identifiers of a Python module, and back."""

from __future__ import annotations

import ast
import builtins
import keyword
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from arcore.nn.kinds import check_kinds
from arcore.zoo.language.obfuscate.renamed import Obfuscated, numbered

# Calls through which a program can look its own names up by text.
_LOOKUPS = frozenset(
    {"eval", "exec", "globals", "locals", "vars", "getattr", "setattr", "hasattr", "delattr", "dir"}
)
_KEPT = frozenset(dir(builtins)) | frozenset(keyword.kwlist) | {"self", "cls", "_"}
_WORD = re.compile(r"[^\W\d]\w*")


def parse(text: str, where: str = "<text>") -> ast.Module:
    """The module without docstrings.

    Raises:
        ValueError: it does not parse; names the place and the line.
    """
    try:
        with warnings.catch_warnings():
            # Old files have escapes such as \\d in plain strings.
            warnings.simplefilter("ignore", (SyntaxWarning, DeprecationWarning))
            tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        said = getattr(error, "msg", None) or str(error)
        raise ValueError(
            f"{where}:{line}: the code does not parse as Python {sys.version_info[0]}: {said}"
        ) from error
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and body:
            first = body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = body[1:] or [ast.Pass()]
    return tree


def read(path: Path) -> str:
    """The text of a Python file, in the encoding that it declares.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its bytes are no text in that encoding.
    """
    import tokenize

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give Python files or folders of them")
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}:1: the file cannot be read as text: {error}") from error


@check_kinds
def obfuscate(text: str, where: str = "<text>") -> Obfuscated:
    """Rename what a module binds: functions, classes, variables, arguments and imports.

    Kept are built-ins, names with two underscores in front, self and cls, attributes, what a class body binds, what
    is passed by keyword to a callable from elsewhere, packages imported as `a.b`, and names that the program might look
    up by text.

    Raises:
        ValueError: it does not parse; names the place and the line.
    """
    tree = parse(text, where)
    source = ast.unparse(tree)
    kinds = _bound(tree)
    kept = _kept(tree)
    free = {n: kind for n, kind in kinds.items() if n not in kept | _KEPT and not n.startswith("__")}
    names = numbered(free, source)
    return Obfuscated(source, ast.unparse(_renamed(tree, names)), names)


@check_kinds
def restore(code: str, names: Mapping[str, str]) -> str:
    """Obfuscated code under other names; `names` goes from those to the obfuscated ones, as in `Obfuscated`."""
    return ast.unparse(_renamed(parse(code), {new: old for old, new in names.items()}))


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes, in the order of the source."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        yield from _nodes(child)


_Function = (ast.FunctionDef, ast.AsyncFunctionDef)


def _bound(tree: ast.Module) -> dict[str, str]:
    """Names that the module binds and what they are, in the order of their first appearance."""
    kinds: dict[str, str] = {}
    for node in _nodes(tree):
        if isinstance(node, _Function):
            kinds.setdefault(node.name, "FUNC")
        elif isinstance(node, ast.ClassDef):
            kinds.setdefault(node.name, "CLASS")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            if getattr(node, "module", None) != "__future__":
                for alias in node.names:
                    if alias.asname or ("." not in alias.name and alias.name != "*"):
                        kinds.setdefault(alias.asname or alias.name, "IMPORT")
        elif isinstance(node, ast.arg):
            kinds.setdefault(node.arg, "VAR")
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            kinds.setdefault(node.id, "VAR")
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            kinds.setdefault(node.name, "VAR")
        elif isinstance(node, ast.MatchMapping) and node.rest:
            kinds.setdefault(node.rest, "VAR")
    return kinds


def _kept(tree: ast.Module) -> set[str]:
    """Names that other code, or a text, may rely on."""
    kept: set[str] = set()
    functions: dict[str, list[ast.FunctionDef | ast.AsyncFunctionDef]] = {}
    texts: list[str] = []
    exported: set[int] = set()
    looks_up = False
    for node in _nodes(tree):
        if isinstance(node, _Function):
            functions.setdefault(node.name, []).append(node)
        elif isinstance(node, ast.ClassDef):
            kept |= _bound_in_body(node.body)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                if alias.asname is None and "." in alias.name:
                    kept.add(alias.name.partition(".")[0])
                if alias.asname == alias.name or getattr(node, "module", None) == "__future__":
                    kept.add(alias.name)
        elif isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
                exported |= {id(part) for part in ast.walk(node.value)}
        elif isinstance(node, ast.Name) and node.id in _LOOKUPS:
            looks_up = True
    for node in _nodes(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in exported:
            texts.append(node.value)
        elif isinstance(node, ast.Call):
            called = functions.get(node.func.id, []) if isinstance(node.func, ast.Name) else []
            taken = {name for function in called for name in _arguments(function)}
            for word in node.keywords:
                own = called and not any(function.decorator_list for function in called)
                if word.arg is not None and not (own and word.arg in taken):
                    kept.add(word.arg)
    kept.update(texts)
    if looks_up:
        for text in texts:
            kept.update(_WORD.findall(text))
    return kept


def _arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    arguments = function.args
    return [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def _bound_in_body(body: list[ast.stmt]) -> set[str]:
    """What a class body binds, which is reached as attributes; nested functions have scopes of their own."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, (*_Function, ast.ClassDef)):
            found.add(node.name)
            return
        if isinstance(node, ast.Lambda):
            return
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    for statement in body:
        visit(statement)
    return found


def _renamed(tree: ast.Module, names: Mapping[str, str]) -> ast.Module:
    """A new module under other names."""
    copy = ast.parse(ast.unparse(tree))
    change: Callable[[str], str] = lambda name: names.get(name, name)  # noqa: E731
    functions = {node.name for node in ast.walk(copy) if isinstance(node, _Function)}
    for node in ast.walk(copy):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
            for word in node.keywords:
                word.arg = change(word.arg) if word.arg else None
    for node in ast.walk(copy):
        if isinstance(node, (*_Function, ast.ClassDef)) or (
            isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name
        ):
            node.name = change(node.name or "")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                bound = alias.asname or alias.name
                if alias.name != "*" and (alias.asname or "." not in alias.name) and bound in names:
                    alias.asname = change(bound) if change(bound) != alias.name else None
        elif isinstance(node, ast.arg):
            node.arg = change(node.arg)
        elif isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Store) and node.id == "__all__":
                continue
            node.id = change(node.id)
        elif isinstance(node, ast.Global | ast.Nonlocal):
            node.names = [change(name) for name in node.names]
        elif isinstance(node, ast.MatchMapping) and node.rest:
            node.rest = change(node.rest)
        if isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
                for part in ast.walk(node.value):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        part.value = change(part.value)
    return copy
