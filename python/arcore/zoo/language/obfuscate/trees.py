"""Consistent renaming in C, JavaScript, Java and Go, by the syntax trees of tree-sitter.

A name is renamed where the file binds it and nothing outside of the identifiers can mean it: a name that also stands
where a field, a package or a macro stands is kept, and so is what other files reach. Every rule below says where names
are bound or kept; the rest is the same for all languages.

Source: tree-sitter's grammars, whose types of nodes and fields the tables name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from arcore._optional import require
from arcore.zoo.language.obfuscate.renamed import KINDS, Obfuscated, numbered

_WORD = re.compile(r"[^\W\d]\w*")


@dataclass(frozen=True)
class Language:
    """What is known of a language.

    Attributes:
        name: of it, and of the grammar's package behind `tree_sitter_`.
        identifiers: types of nodes that are names.
        binds: from (type of node, field) to a kind; names in that child, patterns included, are bound.
        keeps: (type of node, field) whose names are kept; an empty field stands for all of the node.
        functions: types of nodes that are functions, for training.
        exported: whether a name, bound by a node, is reached from other files.
        fixed: names that are never renamed.
        texts: types of nodes whose words are kept, whatever they are.
        also_keeps: from a node to further nodes whose names are kept.
        comments: types of nodes that are left out.
    """

    name: str
    identifiers: frozenset[str]
    binds: Mapping[tuple[str, str], str]
    keeps: frozenset[tuple[str, str]]
    functions: frozenset[str]
    exported: Callable[[str, Any], bool] = lambda name, node: False
    fixed: frozenset[str] = frozenset()
    texts: frozenset[str] = frozenset()
    also_keeps: Callable[[Any], list[Any]] = lambda node: []
    comments: frozenset[str] = field(default=frozenset({"comment", "line_comment", "block_comment"}))


def _java_public(name: str, node: Any) -> bool:
    """Only what is private to the file is renamed: locals, and types and methods that are marked so."""
    if node.type in ("class_declaration", "interface_declaration", "enum_declaration", "method_declaration"):
        words = [
            w for child in node.children if child.type == "modifiers" for w in child.text.decode().split()
        ]
        return "private" not in words
    return False


def _js_exported(name: str, node: Any) -> bool:
    while node is not None:
        if node.type == "export_statement":
            return True
        if node.type in ("statement_block", "program", "arrow_function", "function_expression"):
            return False
        node = node.parent
    return False


def _java_elsewhere(node: Any) -> list[Any]:
    """Methods of other objects, and what a method reference names."""
    if node.type == "method_reference":
        return [node]
    if node.type == "method_invocation":
        on = node.child_by_field_name("object")
        if on is not None and on.text != b"this":
            return list(node.children_by_field_name("name"))
    return []


def _go_elsewhere(node: Any) -> list[Any]:
    """Keys of literals, which may be fields, and types that a struct embeds."""
    if node.type == "keyed_element":
        return list(node.named_children[:1])
    if node.type == "field_declaration" and node.child_by_field_name("name") is None:
        return [node]
    return []


C = Language(
    name="c",
    identifiers=frozenset({"identifier", "type_identifier"}),
    binds={
        ("function_definition", "declarator"): "FUNC",
        ("parameter_declaration", "declarator"): "VAR",
        ("declaration", "declarator"): "VAR",
        ("struct_specifier", "name"): "CLASS",
        ("union_specifier", "name"): "CLASS",
        ("enum_specifier", "name"): "CLASS",
        ("type_definition", "declarator"): "CLASS",
        ("enumerator", "name"): "VAR",
    },
    keeps=frozenset(
        {
            ("preproc_def", ""), ("preproc_function_def", ""), ("preproc_ifdef", "name"), ("preproc_if", "condition"),
            ("preproc_elif", "condition"), ("preproc_call", ""), ("preproc_defined", ""),
            ("attribute_specifier", ""), ("gnu_asm_expression", ""),
        }
    ),
    functions=frozenset({"function_definition"}),
    fixed=frozenset({"main"}),
    texts=frozenset({"preproc_arg", "preproc_def", "preproc_function_def"}),
)  # fmt: skip

JAVASCRIPT = Language(
    name="javascript",
    identifiers=frozenset({"identifier"}),
    binds={
        ("function_declaration", "name"): "FUNC",
        ("generator_function_declaration", "name"): "FUNC",
        ("function_expression", "name"): "FUNC",
        ("class_declaration", "name"): "CLASS",
        ("variable_declarator", "name"): "VAR",
        ("formal_parameters", ""): "VAR",
        ("arrow_function", "parameter"): "VAR",
        ("catch_clause", "parameter"): "VAR",
        ("for_in_statement", "left"): "VAR",
        ("import_clause", ""): "IMPORT",
    },
    keeps=frozenset({("export_specifier", ""), ("import_specifier", "name"), ("jsx_opening_element", "name"),
                     ("jsx_closing_element", "name"), ("jsx_self_closing_element", "name")}),
    functions=frozenset({"function_declaration", "method_definition"}),
    exported=_js_exported,
    fixed=frozenset({"undefined", "arguments", "module", "exports", "require", "NaN", "Infinity"}),
    texts=frozenset({"shorthand_property_identifier", "shorthand_property_identifier_pattern", "with_statement"}),
)  # fmt: skip

JAVA = Language(
    name="java",
    identifiers=frozenset({"identifier", "type_identifier"}),
    binds={
        ("class_declaration", "name"): "CLASS",
        ("interface_declaration", "name"): "CLASS",
        ("enum_declaration", "name"): "CLASS",
        ("method_declaration", "name"): "FUNC",
        ("formal_parameter", "name"): "VAR",
        ("catch_formal_parameter", "name"): "VAR",
        ("local_variable_declaration", "declarator"): "VAR",
        ("enhanced_for_statement", "name"): "VAR",
        ("inferred_parameters", ""): "VAR",
        ("lambda_expression", "parameters"): "VAR",
        ("resource", "name"): "VAR",
    },
    keeps=frozenset(
        {
            ("field_access", "field"), ("field_declaration", "declarator"), ("package_declaration", ""),
            ("import_declaration", ""), ("scoped_identifier", ""), ("scoped_type_identifier", ""),
            ("annotation", "name"), ("marker_annotation", "name"), ("enum_constant", "name"),
            ("element_value_pair", "key"), ("labeled_statement", ""), ("break_statement", ""),
            ("continue_statement", ""), ("record_declaration", ""), ("constructor_declaration", "name"),
            ("type_parameter", ""),
        }
    ),
    functions=frozenset({"method_declaration"}),
    exported=_java_public,
    also_keeps=_java_elsewhere,
)  # fmt: skip

GO = Language(
    name="go",
    identifiers=frozenset({"identifier", "type_identifier"}),
    binds={
        ("function_declaration", "name"): "FUNC",
        ("parameter_declaration", "name"): "VAR",
        ("variadic_parameter_declaration", "name"): "VAR",
        ("short_var_declaration", "left"): "VAR",
        ("range_clause", "left"): "VAR",
        ("var_spec", "name"): "VAR",
        ("const_spec", "name"): "VAR",
        ("type_spec", "name"): "CLASS",
    },
    keeps=frozenset(),
    functions=frozenset({"function_declaration", "method_declaration"}),
    # Names that begin with a capital are for other packages.
    exported=lambda name, node: name[:1].isupper(),
    fixed=frozenset({"main", "init", "_", "nil", "true", "false", "iota"}),
    # A variable may be called like a package, whose name then cannot be told from it.
    texts=frozenset({"import_spec"}),
    also_keeps=_go_elsewhere,
)

LANGUAGES: Mapping[str, Language] = {
    ".c": C, ".js": JAVASCRIPT, ".mjs": JAVASCRIPT, ".java": JAVA, ".go": GO,
}  # fmt: skip


@cache
def _parser(name: str) -> Any:
    """A parser of a language.

    Raises:
        ImportError: its grammar is missing.
    """
    core = require("tree_sitter", extra="code")
    return core.Parser(core.Language(require(f"tree_sitter_{name}", extra="code").language()))


def _tree(text: str, language: Language, where: str) -> Any:
    """The root of the syntax tree.

    Raises:
        ValueError: the code does not parse; names the place and the line.
    """
    root = _parser(language.name).parse(text.encode()).root_node
    if root.has_error:
        wrong = next(node for node in _nodes(root) if node.is_error or node.is_missing)
        near = text.encode()[wrong.start_byte : wrong.start_byte + 40].decode(errors="replace")
        raise ValueError(
            f"{where}:{wrong.start_point[0] + 1}: the code does not parse as {language.name}: near {near!r}"
        )
    return root


def _nodes(node: Any) -> Iterator[Any]:
    """A node and all below it, in the order of the source."""
    stack = [node]
    while stack:
        one = stack.pop()
        yield one
        stack.extend(reversed(one.children))


def _children(node: Any, name: str) -> list[Any]:
    return list(node.children_by_field_name(name)) if name else [node]


# What a pattern holds that is no name of it: values, types, sizes of arrays, parameters of a function.
_ASIDE = (
    "value",
    "type",
    "size",
    "parameters",
    "right",
    "body",
    "default",
    "superclass",
    "key",
    "trailing_return_type",
)


def _pattern(node: Any, language: Language) -> Iterator[Any]:
    """The names that a pattern or declarator binds."""
    if node.type in language.identifiers:
        yield node
        return
    names = ("key",) if node.type == "pair_pattern" else _ASIDE
    aside = {child.id for name in names for child in node.children_by_field_name(name)}
    for child in node.children:
        if child.id not in aside:
            yield from _pattern(child, language)


def obfuscate(text: str, language: Language, where: str = "<text>") -> Obfuscated:
    """Rename what a file binds, and drop its comments.

    Raises:
        ValueError: it does not parse; names the place and the line.
        ImportError: the grammar is missing.
    """
    source = _plain(text, language, where)
    root = _tree(source, language, where)
    kinds: dict[str, str] = {}
    kept = set(language.fixed)
    for node in _nodes(root):
        for (kind_of_node, name), kind in language.binds.items():
            if node.type != kind_of_node:
                continue
            for child in _children(node, name):
                called = kind == "VAR" and _is_function(child)
                for found in _pattern(child, language):
                    word = found.text.decode()
                    kinds.setdefault(word, "FUNC" if called else kind)
                    if language.exported(word, node):
                        kept.add(word)
        for kind_of_node, name in language.keeps:
            if node.type == kind_of_node:
                for child in _children(node, name):
                    kept |= {n.text.decode() for n in _nodes(child) if n.type in language.identifiers}
        for child in language.also_keeps(node):
            kept |= {n.text.decode() for n in _nodes(child) if n.type in language.identifiers}
        if node.type in language.texts:
            kept |= set(_WORD.findall(node.text.decode()))
    kept |= _declared_only(root, language)
    names = numbered({name: kind for name, kind in kinds.items() if name not in kept}, source)
    return Obfuscated(source, rename(source, names, language), names, language.name)


def _is_function(declarator: Any) -> bool:
    """Whether a declarator of C is that of a function, and not of a pointer to one."""
    while declarator.type == "pointer_declarator":
        declarator = declarator.child_by_field_name("declarator")
    if declarator.type != "function_declarator":
        return False
    inner = declarator.child_by_field_name("declarator")
    return bool(inner.type == "identifier")


def _declared_only(root: Any, language: Language) -> set[str]:
    """Functions of C that the file declares and others define, and what is `extern`."""
    if language.name != "c":
        return set()
    defined, declared = set[str](), set[str]()
    for node in _nodes(root):
        if node.type == "function_definition":
            defined |= {n.text.decode() for n in _pattern(node.child_by_field_name("declarator"), language)}
        elif node.type == "declaration":
            outside = any(c.type == "storage_class_specifier" and c.text == b"extern" for c in node.children)
            for one in node.children_by_field_name("declarator"):
                if outside or _is_function(one):
                    declared |= {n.text.decode() for n in _pattern(one, language)}
    return declared - defined


def _plain(text: str, language: Language, where: str) -> str:
    """Code without comments and without lines that are empty then."""
    data = text.encode()
    comments = [node for node in _nodes(_tree(text, language, where)) if node.type in language.comments]
    for node in reversed(comments):
        data = data[: node.start_byte] + b" " + data[node.end_byte :]
    lines = [line.rstrip() for line in data.decode().splitlines()]
    return "\n".join(line for line in lines if line)


def rename(text: str, names: Mapping[str, str], language: Language, where: str = "<text>") -> str:
    """Code whose identifiers have other names."""
    data = text.encode()
    found = [
        node
        for node in _nodes(_tree(text, language, where))
        if node.type in language.identifiers and node.text.decode() in names
    ]
    for node in reversed(found):
        data = data[: node.start_byte] + names[node.text.decode()].encode() + data[node.end_byte :]
    return data.decode()


def functions(text: str, language: Language, longest: int, where: str) -> list[Obfuscated]:
    """Functions of a file of at most `longest` characters, with the names that the whole file gives them."""
    whole = obfuscate(text, language, where)
    found = []
    for node in _nodes(_tree(whole.source, language, where)):
        if node.type not in language.functions:
            continue
        source = node.text.decode()
        if len(source) > longest or not source.isascii():
            continue
        inside = set(_WORD.findall(source))
        names = numbered({n: new.split("_")[0] for n, new in whole.names.items() if n in inside}, source)
        spots = [n for n in _nodes(node) if n.type in language.identifiers and n.text.decode() in names]
        code = source.encode()
        for spot in reversed(spots):
            begin, end = spot.start_byte - node.start_byte, spot.end_byte - node.start_byte
            code = code[:begin] + names[spot.text.decode()].encode() + code[end:]
        found.append(Obfuscated(source, code.decode(), names, language.name))
    return found


def language_of(path: Path) -> Language | None:
    """By the file's ending; None for another one."""
    return LANGUAGES.get(path.suffix.lower())


assert {kind for one in LANGUAGES.values() for kind in one.binds.values()} <= set(KINDS)
