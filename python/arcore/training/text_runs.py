"""Training a language model of the zoo on a text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from arcore.data.text import Text, TokenCrops, load_text
from arcore.data.text_tokenizers import FILE, BPETokenizer, ByteTokenizer, TextTokenizer, make_tokenizer
from arcore.models import load_checkpoint
from arcore.training.config import TrainConfig
from arcore.training.engine import FitResult, fit
from arcore.training.start import fresh, resumed
from arcore.training.zoo_tasks import LanguageTask


def train_text(
    preset: str,
    config: TrainConfig,
    out: Path,
    data: str | None,
    tokenizer: str | Path | None,
    show_progress: bool,
) -> FitResult:
    """`arcore.training.train` for a preset that reads text."""
    data = data or "kjv"
    text = load_text(data)
    words = make_tokenizer(str(tokenizer or "bytes"), text.train)
    model = fresh(preset, config, vocab_size=words.vocab_size)
    facts = {"preset": preset, "data": data, "text": text.digest, "text_tokenizer": _name(words)}
    return _fit(config, model, facts, text, words, out, None, show_progress)


def continue_text(
    preset: str, source: Path, out: Path, data: str | None, settings: Mapping[str, Any], show_progress: bool
) -> FitResult:
    """The same for a run that goes on."""
    networks, meta = load_checkpoint(source)
    facts, config = resumed(
        source, meta, preset, data, settings, ("preset", "data", "text", "text_tokenizer")
    )
    text = load_text(facts["data"])
    if text.digest != facts["text"]:
        raise ValueError(f"the text in {facts['data']!r} is no longer that of the run in {source}")
    words = tokenizer_of(source, meta)
    return _fit(config, networks["model"], facts, text, words, out, source, show_progress)


def tokenizer_of(folder: Path, meta: Mapping[str, Any]) -> TextTokenizer:
    """The tokenizer of a language model's checkpoint.

    Raises:
        FileNotFoundError: its file is missing.
        ValueError: its file is damaged.
    """
    return ByteTokenizer() if meta.get("text_tokenizer") == "bytes" else BPETokenizer.load(folder / FILE)


def _name(tokenizer: TextTokenizer) -> str:
    return "bytes" if isinstance(tokenizer, ByteTokenizer) else FILE


def _fit(
    config: TrainConfig,
    model: nn.Module,
    facts: Mapping[str, Any],
    text: Text,
    tokenizer: TextTokenizer,
    out: Path,
    source: Path | None,
    show_progress: bool,
) -> FitResult:
    train, test = (text.tokens(split, tokenizer) for split in ("train", "test"))
    ratios = (
        len(text.train.encode()) / max(len(train), 1),
        len(text.test.encode()) / max(len(test), 1),
    )
    pieces = TokenCrops(train, config.context)
    # A held-out part shorter than one piece says too little to be worth a figure.
    held_out = TokenCrops(test, config.context, config.context) if len(test) > config.context else None
    task = LanguageTask(config, {"model": model}, facts, tokenizer, ratios)
    return fit(
        task,
        pieces,
        out,
        test=held_out,
        resume=source,
        title=str(facts["preset"]),
        show_progress=show_progress,
    )
