"""What judges a text: a function in a user's file, or a language model's own verdict."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from arcore.data.text_tokenizers import TextTokenizer

TextEvaluator = Callable[[str], float]


def from_file(path: str | Path) -> TextEvaluator:
    """`evaluate` of a Python file: takes a text and gives a value from -1 to 1.

    The file is run. What it raises later is named by who calls it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be run, or has no function `evaluate`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--evaluator {path}: there is no such file")
    spec = importlib.util.spec_from_file_location("arcore_evaluator", path)
    if path.suffix != ".py" or spec is None or spec.loader is None:
        raise ValueError(f"--evaluator {path}: expected a Python file, named *.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"--evaluator {path}: it does not run ({type(error).__name__}: {error})") from error
    found = getattr(module, "evaluate", None)
    if not callable(found):
        raise ValueError(f"--evaluator {path}: expected a function evaluate(text) in it but there is none")
    evaluate: TextEvaluator = found
    return evaluate


def own_verdict(model: Any, words: TextTokenizer, question: str) -> TextEvaluator:
    """A language model's own verdict: it is asked twice, with the answers yes and no in either order.

    Each time the likelier letter counts, so the value is -1, 0 or 1; 0 says that the order decided.

    Args:
        model: gives logits `[1, L, V]` of ids.
        words: its tokenizer.
        question: what it is asked about a text.
    """
    letters = [words.encode(letter)[-1] for letter in (" A", " B")]

    @torch.no_grad()
    def evaluate(text: str) -> float:
        votes = []
        for yes in (0, 1):
            answers = ("Yes", "No") if yes == 0 else ("No", "Yes")
            asked = f"Text: {text.strip()}\n\nQuestion: {question}\nA. {answers[0]}\nB. {answers[1]}\nAnswer:"
            ids = torch.tensor([words.encode(asked)], device=next(model.parameters()).device)
            logits = model(ids)[0, -1]
            votes.append(int(logits[letters].argmax()) == yes)
        return float(sum(votes) - 1)

    return evaluate
