"""What judges responses: a Python file with one function, or a rule that is named on the command line."""

from __future__ import annotations

import difflib
import importlib.util
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from arcore._files import read_lines
from arcore._optional import require
from arcore.nn.kinds import check_kinds

Kind = Literal["reward", "rewards", "prefer"]
FUNCTIONS = ("reward", "rewards", "prefer")
GYM = "reasoning_gym"
# Problems where the command line gives no number.
GYM_COUNT = 64


class RewardFailure(RuntimeError):
    """A judge raised, or returned something that is no reward; says for which response."""


@dataclass(frozen=True)
class Judge:
    """A function that judges texts.

    Attributes:
        kind: "reward" (prompt, response) to a number; "rewards" to several numbers, in a mapping or a sequence;
            "prefer" (prompt, first, second) to the probability that the first is preferred.
        function: the function.
        names: of the rewards, once they are known.
    """

    kind: Kind
    function: Callable[..., Any]
    names: list[str]

    def rewards(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """float32 `[B, M]`.

        Raises:
            RewardFailure: a value is missing, no number or not finite, or the function raised or ended the program.
        """
        rows = []
        for prompt, response in zip(prompts, responses, strict=True):
            found = self._call(prompt, response)
            if self.kind == "reward":
                names, values = ["reward"], [found]
            elif isinstance(found, Mapping):
                names, values = [str(name) for name in found], list(found.values())
            elif isinstance(found, Sequence) and not isinstance(found, str | bytes):
                names, values = [f"reward_{i}" for i in range(len(found))], list(found)
            else:
                raise RewardFailure(
                    f"expected rewards() to return a mapping or a list of numbers but got {found!r} for {response!r}"
                )
            if not names:
                raise RewardFailure(
                    f"expected at least one reward of rewards() but got {found!r} for {response!r}"
                )
            if not self.names:
                self.names.extend(names)
            if isinstance(found, Mapping) and set(names) == set(self.names):
                # The same rewards in another order.
                by_name = dict(zip(names, values, strict=True))
                names, values = list(self.names), [by_name[name] for name in self.names]
            if names != self.names:
                raise RewardFailure(
                    f"expected {len(self.names)} rewards ({', '.join(self.names)}) for every response but got "
                    f"{len(names)} ({', '.join(names)}) for {response!r}"
                )
            rows.append([self._number(value, response) for value in values])
        return torch.tensor(rows, dtype=torch.float32).view(len(rows), -1)

    def preferences(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Tensor:
        """float32 `[P]`, probability that each first response is preferred.

        Raises:
            RewardFailure: see `rewards`; or a value is out of [0, 1].
        """
        found = []
        for prompt, one, other in zip(prompts, first, second, strict=True):
            value = self._number(self._call(prompt, one, other), one)
            if not 0 <= value <= 1:
                raise RewardFailure(f"expected prefer() to return a probability but got {value} for {one!r}")
            found.append(value)
        return torch.tensor(found, dtype=torch.float32)

    def _call(self, *texts: str) -> Any:
        try:
            return self.function(*texts)
        # A function that calls sys.exit() must not end the run.
        except (Exception, SystemExit) as error:
            raise RewardFailure(
                f"{self.kind}() raised {type(error).__name__}: {error} for {texts[1]!r}"
            ) from error

    def _number(self, value: Any, response: str) -> float:
        try:
            number = float(value)
        # Whatever a type of its own may raise.
        except Exception:
            raise RewardFailure(
                f"expected {self.kind}() to return a number but got {value!r} for {response!r}"
            ) from None
        if not math.isfinite(number) or abs(number) > torch.finfo(torch.float32).max:
            raise RewardFailure(f"expected {self.kind}() to be finite but got {number} for {response!r}")
        return number


@check_kinds
def load_judge(source: str, problems: Problems | None = None) -> Judge:
    """A judge from FILE.py, `regex:PATTERN`, `words:N`, `vowels` or `reasoning_gym`.

    Args:
        source: what the command line named.
        problems: those that the prompts are, for `reasoning_gym`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has none or several of the functions, or the rule is unknown or without its problems.
    """
    rule, _, rest = source.partition(":")
    if rule == GYM:
        if rest or problems is None:
            raise ValueError(
                f"--reward {source}: {GYM} judges answers to its own problems; give --reward {GYM} and "
                f"--prompts {GYM}:TASK"
            )
        return Judge("reward", problems.score, [])
    if rule == "regex" and rest:
        try:
            pattern = re.compile(rest, re.DOTALL)
        except re.error as error:
            raise ValueError(f"--reward {source}: this is no regular expression: {error}") from error
        return Judge("reward", lambda prompt, response: float(pattern.search(response) is not None), [])
    if rule == "words" and rest.isdigit():
        count = int(rest)

        def words(prompt: str, response: str) -> float:
            """1 for exactly so many words, falling by a word's share on either side."""
            return max(0.0, 1 - abs(len(response.split()) - count) / max(count, 1))

        return Judge("reward", words, [])
    if source == "vowels":
        return Judge("reward", vowels, [])
    path = Path(source)
    if path.suffix != ".py":
        raise ValueError(
            f"--reward {source}: expected a Python file with reward(), rewards() or prefer(), or one of the rules "
            f"regex:PATTERN, words:N, vowels and {GYM}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"--reward: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"arcore_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"--reward {path}: the file raised {type(error).__name__}: {error}") from error
    found = [name for name in FUNCTIONS if callable(getattr(module, name, None))]
    if len(found) != 1:
        raise ValueError(
            f"--reward {path}: expected one function of reward(prompt, response), rewards(prompt, response) and "
            f"prefer(prompt, first, second) but it has {', '.join(found) or 'none'}"
        )
    kind: Any = found[0]
    return Judge(kind, getattr(module, kind), [])


def vowels(prompt: str, response: str) -> float:
    """Share of vowels among the letters, 0 where there are none."""
    letters = [letter for letter in response.lower() if letter.isalpha()]
    return sum(letter in "aeiou" for letter in letters) / len(letters) if letters else 0.0


@dataclass(frozen=True)
class Problems:
    """Problems of one task of reasoning-gym, which come with a check of answers.

    Attributes:
        dataset: the package's own object.
        entries: its problems by their question.
    """

    dataset: Any
    entries: Mapping[str, Any]

    @property
    def prompts(self) -> list[str]:
        """The questions."""
        return list(self.entries)

    def score(self, prompt: str, response: str) -> float:
        """The package's score from 0 to 1; of the part in <answer> tags where there are some, else of all."""
        tagged = re.findall(r"<answer>(.*?)</answer>", response, re.DOTALL)
        answer = (tagged[-1] if tagged else response).strip()
        return float(self.dataset.score_answer(answer, self.entries[prompt]))


def load_problems(source: str, seed: int) -> Problems | None:
    """The problems that `reasoning_gym:TASK` or `reasoning_gym:TASK:COUNT` names; None for another source.

    Raises:
        ImportError: the package is missing.
        ValueError: there is no such task, or the number is none.
    """
    rule, _, rest = source.partition(":")
    if rule != GYM:
        return None
    gym = require(GYM, extra="reasoning")
    task, _, number = rest.partition(":")
    if number and (not number.isdigit() or int(number) < 1):
        raise ValueError(f"--prompts {source}: expected a number of problems but got {number!r}")
    known = sorted(require(f"{GYM}.factory", extra="reasoning").DATASETS)
    if task not in known:
        near = difflib.get_close_matches(task, known, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(known[:8])}, ..."
        raise ValueError(f"--prompts {source}: {GYM} has no task {task!r}; {hint}")
    dataset = gym.create_dataset(task, size=int(number or GYM_COUNT), seed=seed)
    return Problems(dataset, {entry["question"]: entry for entry in dataset})


@check_kinds
def load_prompts(path: Path) -> list[str]:
    """Prompts of a file: one a line, or JSON lines with a "prompt".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty or no UTF-8, or a line has no prompt; names the line.
    """
    import json

    if not path.is_file():
        raise FileNotFoundError(f"--prompts: there is no file {path}; give one with a prompt per line")
    found = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            found.append(line.replace("\\n", "\n"))
            continue
        try:
            text = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str) or not text:
            raise ValueError(
                f'{path}:{number}: expected an object with a text "prompt" but got {line[:60]!r}'
            )
        found.append(text)
    if not found:
        raise ValueError(f"{path}: expected at least one prompt but the file is empty")
    return found
