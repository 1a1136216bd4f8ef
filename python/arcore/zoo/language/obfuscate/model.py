"""The network, texts of training, naming again, what `arcore run obfuscate` does, and the check of the claim."""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore._files import atomic_path
from arcore.catalog import create_model, preset
from arcore.catalog.claims import Claim, Row, at_most, equals, steps
from arcore.catalog.running import Report
from arcore.data.text import TokenCrops
from arcore.decoding import Sampling
from arcore.decoding.draws import row_seeds
from arcore.nn.kinds import check_kinds
from arcore.zoo.language.llama import Llama, LlamaConfig
from arcore.zoo.language.obfuscate.files import (
    RESERVED,
    check_compiles,
    code_files,
    functions_of,
    obfuscate_file,
    restore,
)
from arcore.zoo.language.obfuscate.renamed import Obfuscated

END, SOURCE, OBFUSCATED = "\x00", "\x01", "\x02"
Mix = Literal["pairs", "source"]
_OURS = re.compile(r"\b(?:FUNC|CLASS|VAR|IMPORT)_\d+\b")
_LONGEST_NAME = 24


class ObscuraCoder(Llama):
    """The language model, on bytes. A `DraftableModel` (`arcore.nn.protocols`)."""


@preset
def obscura_tiny() -> LlamaConfig:
    """Bytes as tokens; trains on the standard library on a CPU in minutes."""
    return LlamaConfig(dim=96, num_layers=3, num_heads=4, num_kv_heads=4, hidden_dim=256, vocab_size=256)


@preset
def obscura_255m() -> LlamaConfig:
    """About the size of the paper's smallest model, for a tokenizer of 49,152 tokens."""
    return LlamaConfig(
        dim=1024,
        num_layers=16,
        num_heads=16,
        num_kv_heads=16,
        hidden_dim=2816,
        vocab_size=49152,
        tie_embeddings=True,
    )


def functions(files: Sequence[Path], longest: int) -> list[Obfuscated]:
    """Functions and methods of files, each obfuscated on its own, whose source has at most `longest` characters."""
    return [one for path in files for one in functions_of(path, longest)]


def documents(pairs: Sequence[Obfuscated], mix: Mix, generator: torch.Generator) -> str:
    """Texts of training behind each other: the four kinds in equal shares, or the source alone."""
    parts = []
    for index in torch.randperm(len(pairs), generator=generator).tolist():
        one = pairs[index]
        source, code = SOURCE + one.source, OBFUSCATED + one.code
        kinds = (source + code, code + source, source, code)
        kind = 2 if mix == "source" else int(torch.randint(4, (), generator=generator))
        parts.append(kinds[kind] + END)
    return "".join(parts)


def as_bytes(text: str) -> Tensor:
    """A text of ASCII as uint8 `[N]`."""
    return torch.tensor(list(text.encode("ascii", errors="replace")), dtype=torch.uint8)


@torch.no_grad()
@check_kinds
def name_again(model: Any, code: str, *, temperature: float = 0.0, seed: int = 0) -> dict[str, str]:
    """Names for the identifiers of obfuscated code.

    The model reads the code and then the source, whose text is forced except where a new identifier stands; there it
    writes a name byte by byte. Names are different from each other and from all other words of the code.

    Args:
        model: a language model on bytes, trained on pairs.
        code: obfuscated.
        temperature: 0 takes the likeliest bytes.
        seed: of the draws.

    Returns:
        From obfuscated to new names.

    Raises:
        ValueError: the code is longer than the model is made for, or has no obfuscated identifier.
    """
    found = list(_OURS.finditer(code))
    if not found:
        raise ValueError(
            "the code has no identifier such as VAR_1: obfuscate it first with `arcore run obfuscate`"
        )
    taken = set(re.findall(r"\w+", code)) | RESERVED
    room = 2 * len(code) + (_LONGEST_NAME + 8) * len({match[0] for match in found}) + 3
    # Names may be longer than what they stand for wherever they stand again.
    room += _LONGEST_NAME * len(found)
    cache = model.make_cache(1, min(room, model.max_length))
    sampling, seeds = Sampling(temperature=temperature), row_seeds(seed, 1)

    def feed(text: str) -> Tensor:
        if cache.length + len(text) + 1 > model.max_length:
            raise ValueError(
                f"the code and its source have more than the {model.max_length} bytes that the model is made for: give "
                "less code at once"
            )
        logits: Tensor = model.prefill(as_bytes(text).long()[None], cache)
        return logits

    logits = feed(OBFUSCATED + code + SOURCE)
    names: dict[str, str] = {}
    at = 0
    for match in found:
        if match.start() > at:
            logits = feed(code[at : match.start()])
        at = match.end()
        if match[0] not in names:
            stop = ord(code[at]) if at < len(code) else ord(END)
            name = ""
            while True:
                allowed = torch.full((256,), -torch.inf)
                letters = re.findall(r"[A-Za-z0-9_]" if name else "[a-z_]", bytes(range(128)).decode())
                allowed[[ord(letter) for letter in letters]] = 0
                if name and name not in taken:
                    allowed[stop] = 0
                drawn = sampling.draw(
                    (logits[:, :256] + allowed).float(), seeds, torch.tensor([cache.length])
                )
                assert isinstance(drawn, Tensor)
                if int(drawn) == stop or len(name) >= _LONGEST_NAME:
                    break
                name += chr(int(drawn))
                logits = model.step(drawn, cache)
            while name in taken:
                name += "_"
                logits = feed("_")
            names[match[0]] = name
            taken.add(name)
        else:
            logits = feed(names[match[0]])
    return names


def renamed(code: str, names: dict[str, str], language: str = "python") -> str:
    """Obfuscated code under the names that `name_again` found."""
    return restore(code, {name: ours for ours, name in names.items()}, language)


@torch.no_grad()
def identifier_loss(model: Any, pairs: Sequence[Obfuscated], mix: Mix) -> float:
    """Cross entropy per byte of renamed identifiers in sources, after the obfuscated code where `mix` is `pairs`."""
    total, count = 0.0, 0
    for one in pairs:
        before = (OBFUSCATED + one.code if mix == "pairs" else "") + SOURCE
        text = as_bytes(before + one.source + END).long()
        words = re.compile(rf"\b(?:{'|'.join(map(re.escape, one.names))})\b") if one.names else None
        which = torch.zeros(len(text), dtype=torch.bool)
        for match in words.finditer(one.source) if words else ():
            which[len(before) + match.start() : len(before) + match.end()] = True
        losses = F.cross_entropy(model(text[None, :-1])[0], text[1:], reduction="none")
        total += float(losses[which[1:]].sum())
        count += int(which.sum())
    return total / max(count, 1)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class Options:
    """Files of code and where their obfuscated forms go.

    Attributes:
        files: Python, C, JavaScript, Java or Go files (.py, .c, .js, .mjs, .java, .go), folders of them, or stdlib
            (Python's own). Other languages than Python need the extra code.
        out: folder for the obfuscated files, and for pairs.jsonl with source, code and names of each.
    """

    files: tuple[str, ...] = field(metadata={"positional": True, "metavar": "FILE"})
    out: Path = Path("out/obfuscated")


def run(options: Options) -> Report:
    """Obfuscate files."""
    paths = code_files(list(options.files))
    found = [obfuscate_file(path) for path in paths]
    for path, one in zip(paths, found, strict=True):
        check_compiles(one, path)
    root = Path(os.path.commonpath([path.resolve().parent for path in paths]))
    options.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for path, one in zip(paths, found, strict=True):
        place = path.resolve().relative_to(root)
        target = options.out / place
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as temporary:
            temporary.write_text(one.code + "\n", encoding="utf-8")
        entry = {"file": str(place), "source": one.source, "code": one.code, "names": dict(one.names)}
        lines.append(json.dumps(entry))
    with atomic_path(options.out / "pairs.jsonl") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    count = sum(len(one.names) for one in found)
    text = (
        f"{options.out}: {len(found)} files, {count} identifiers renamed; all parse; names are in pairs.jsonl"
    )
    return Report(text, {"files": len(found), "identifiers": count})


def round_trips(paths: Sequence[Path]) -> tuple[int, int]:
    """Of Python files, how many compile after obfuscation, and how many come back by the inverse map."""
    compiled, back = 0, 0
    for path in paths:
        one = obfuscate_file(path)
        try:
            check_compiles(one, path)
        except SyntaxError:
            continue
        compiled += 1
        back += ast.dump(ast.parse(restore(one.code, one.names))) == ast.dump(ast.parse(one.source))
    return compiled, back


def trained(pairs: Sequence[Obfuscated], mix: Mix, *, count: int, context: int = 256, seed: int = 0) -> Any:
    """A small model trained on functions."""
    torch.manual_seed(seed)
    model: Any = create_model("obscura_tiny")
    generator = torch.Generator().manual_seed(seed)
    crops = TokenCrops(as_bytes("".join(documents(pairs, mix, generator) for _ in range(2))), context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=count, pct_start=0.1)
    for _ in steps(count, f"training on {mix}"):
        picked = torch.randint(len(crops), (8,), generator=generator).tolist()
        ids, labels = map(torch.stack, zip(*(crops[i] for i in picked), strict=True))
        loss = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
    return model.eval()


def claim(*, quick: bool) -> Claim:
    """Modules of the standard library after obfuscation; in full all of them, and training on both kinds of text."""
    paths = code_files(["stdlib"])
    if quick:
        paths = [path for path in paths if path.stem in ("bisect", "keyword", "stat", "sched")]
    compiled, back = round_trips(paths)
    rows: list[Row] = [
        equals(
            "modules of the standard library that compile after obfuscation, share",
            compiled / len(paths),
            1.0,
        ),
        equals("of these, that the inverse map gives back, share", back / len(paths), 1.0),
    ]
    if not quick:
        train, test = (functions(part, 200) for part in halves(paths[::2]))
        both = sum(len(one.source) + len(one.code) for one in train)
        share = sum(len(one.source) for one in train) / both
        # Of the mix half of the kinds hold both forms, so about `share` of its bytes are source.
        source = trained(train, "source", count=150)
        pairs = trained(train, "pairs", count=round(150 / share))
        losses = [
            identifier_loss(source, test[:80], "source"),
            identifier_loss(pairs, test[:80], "pairs"),
        ]
        rows.append(
            at_most("names of held-out functions: loss after training on pairs less that of source alone",
                    losses[1] - losses[0], 0.0)
        )  # fmt: skip
    return Claim(tuple(rows))


def halves(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Files to train on, and every tenth to hold out; a single one serves as both."""
    test = list(paths[4::10]) or list(paths)
    return [path for path in paths if path not in test] or list(paths), test
