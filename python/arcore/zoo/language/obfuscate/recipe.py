"""Training on code and its obfuscated form, and naming obfuscated code."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from arcore._files import atomic_path
from arcore.data.identity import place
from arcore.data.text import TokenCrops
from arcore.data.text_tokenizers import ByteTokenizer
from arcore.nn.kinds import check_kinds
from arcore.recipes._recipe import Recipe, Start, Work
from arcore.recipes.language import LanguageTask
from arcore.training.config import TrainConfig
from arcore.training.stream import derive_seed
from arcore.zoo.language.obfuscate.files import code_files, obfuscate_file
from arcore.zoo.language.obfuscate.model import (
    Mix,
    as_bytes,
    documents,
    functions,
    halves,
    name_again,
    renamed,
)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class CodeOptions:
    """Code and how it is read.

    Attributes:
        data: stdlib (Python's own), a file of Python, C, JavaScript, Java or Go, or a folder of them.
        mix: pairs (source and obfuscated code, both ways and alone) or source (alone).
        longest: functions of more characters are left out.
        context: bytes of a piece.
    """

    data: str = "stdlib"
    mix: Mix = "pairs"
    longest: int = 400
    context: int = 384

    def __post_init__(self) -> None:
        if self.mix not in ("pairs", "source"):
            raise ValueError(f"--mix {self.mix}: choose pairs or source")
        for name in ("longest", "context"):
            if getattr(self, name) < 8:
                raise ValueError(f"--{name} must be at least 8 but got {getattr(self, name)}")


@check_kinds
@dataclass(frozen=True, kw_only=True)
class CodeSampling:
    """Obfuscated code that gets names.

    Attributes:
        file: file of code; what is not obfuscated yet is obfuscated first.
        out: file for the code under its new names. Default: none, it is printed.
        seed: decides all random draws.
        temperature: 0 takes the likeliest names.
    """

    file: Path | None = None
    out: Path | None = None
    seed: int = 0
    temperature: float = 0.0


@dataclass(frozen=True)
class Named:
    """Code under new names."""

    code: str

    def save(self, path: Path | None) -> list[str]:
        if path is None:
            return []
        with atomic_path(path) as temporary:
            temporary.write_text(self.code + "\n", encoding="utf-8")
        return [f"{path}: the code under its new names"]


class CodeRecipe(Recipe):
    """Code and its obfuscated form."""

    defaults: ClassVar[TrainConfig] = TrainConfig(
        steps=1000, batch_size=8, lr=3e-3, weight_decay=0.1, clip=1.0
    )
    options: ClassVar[type] = CodeOptions
    sampling: ClassVar[type | None] = CodeSampling

    def prepare(self, start: Start, options: Any) -> Work:
        files = code_files([options.data])
        parts = [functions(part, options.longest) for part in halves(files)]
        if not parts[0]:
            raise ValueError(f"{options.data} has no function of at most {options.longest} characters")
        generator = torch.Generator().manual_seed(derive_seed(start.config.seed, "texts"))
        train, test = (documents(part, options.mix, generator) for part in parts)
        digest = hashlib.sha256("".join(one.source for part in parts for one in part).encode()).hexdigest()[
            :16
        ]
        if start.networks and digest != start.facts.get("text"):
            raise ValueError(f"the code in {options.data!r} is no longer that of the run in {start.source}")
        model: Any = start.networks["model"] if start.networks else start.fresh()
        if model.vocab_size < 256:
            raise ValueError(f"the model needs a token for each of 256 bytes but has {model.vocab_size}")
        start.say(f"{len(parts[0])} functions to train on, {len(parts[1])} held out")
        facts = {
            "preset": start.preset,
            "data": place(options.data),
            "text": digest,
            "text_tokenizer": "bytes",
        }
        task = LanguageTask(start.config, {"model": model}, facts, ByteTokenizer())
        held_out = as_bytes(test)
        pieces = (
            TokenCrops(held_out, options.context, options.context)
            if len(held_out) > options.context
            else None
        )
        return Work(task, TokenCrops(as_bytes(train), options.context), pieces)

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        return [f"name obfuscated code: arcore sample {out} --file FILE.py"]

    def check_sampling(self, options: Any) -> None:
        if options.file is None:
            raise ValueError("say which code to name with --file FILE.py")

    def sample(
        self, networks: Mapping[str, Any], facts: Mapping[str, Any], options: Any, show: Callable[[str], None]
    ) -> Named:
        one = obfuscate_file(options.file)
        # A file that is obfuscated already binds such names only, and keeps its numbers.
        code = one.source if all(map(_OURS.fullmatch, one.names)) else one.code
        names = name_again(networks["model"], code, temperature=options.temperature, seed=options.seed)
        named = renamed(code, names, one.language)
        show(named + "\n")
        return Named(named)


_OURS = re.compile(r"(FUNC|CLASS|VAR|IMPORT)_\d+")

RECIPE = CodeRecipe()
