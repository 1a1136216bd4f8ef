"""The loops that `arcore sample --decoder` offers for text, and how a system of the zoo adds one.

A system that writes text in a way of its own has in its file

    def text_decoder() -> TextDecoder:
        return TextDecoder(write, takes=("heads",))

and `write(request)` gives the new tokens. The name of the system is the name of the decoder. Options that some decoders
take and others do not stand in `TextSampling`; one that the chosen decoder does not take is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arcore.catalog import catalog
from arcore.catalog.lookup import load
from arcore.data.text import load_text
from arcore.data.text_tokenizers import TextStream, TextTokenizer
from arcore.decoding import (
    Draft,
    Drafter,
    LookupDrafter,
    MixedModel,
    ModelDrafter,
    NGramDrafter,
    Sampling,
    SpeculativeOutput,
    exact,
    jacobi,
    relaxed,
    speculative_tree,
    stream,
    typical,
)
from arcore.decoding.speculative import Verify
from arcore.nn.checks import check_choice
from arcore.ops.speculative import Verified

# N-grams are counted in so many tokens at most, which takes a few seconds.
COUNTED = 300_000
ORDER = 4
FUNCTION = "text_decoder"
# Two tokenizers that read this alike are taken for the same.
_PROBE = "In the beginning, 1234 words: don't (stop) x_y\n\tnow."
VERIFIED = ("verify", "epsilon", "delta", "neighbours")


@dataclass(frozen=True)
class TextRequest:
    """Texts to write, side by side.

    Attributes:
        model: what counts: a `DraftableModel`, with the guides mixed in.
        base: the model without guides.
        words: its tokenizer.
        prompts: tokens of each prompt, at least one.
        seeds: of the texts.
        options: as chosen, a `TextSampling`.
        open_model: gives a model and its tokenizer by run folder or preset.
        show: receives the text of the only prompt while it grows; None for nobody.
    """

    model: Any
    base: Any
    words: TextTokenizer
    prompts: list[list[int]]
    seeds: list[int]
    options: Any
    open_model: Callable[[str], tuple[Any, TextTokenizer]]
    show: Callable[[str], None] | None = None

    @property
    def device(self) -> torch.device:
        """Of the model."""
        found: torch.device = next(self.base.parameters()).device
        return found

    @property
    def padded(self) -> tuple[Tensor, Tensor]:
        """Prompts behind padding, int64 `[B, L]`, and the mask of their tokens, on the model's device."""
        longest = max(map(len, self.prompts))
        ids = [[0] * (longest - len(row)) + row for row in self.prompts]
        mask = [[False] * (longest - len(row)) + [True] * len(row) for row in self.prompts]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments that all loops take."""
        chosen = self.options
        return {
            "max_new_tokens": chosen.max_new_tokens,
            "seed": self.seeds,
            "temperature": chosen.temperature,
            "top_k": chosen.top_k,
            "top_p": chosen.top_p,
        }

    def open_same(self, source: str, flag: str) -> Any:
        """Another model of the same tokens, on the device and in the precision of the base.

        Raises:
            ValueError: its tokens are others.
        """
        model, words = self.open_model(source)
        if model.vocab_size != self.base.vocab_size or words.encode(_PROBE) != self.words.encode(_PROBE):
            raise ValueError(
                f"{flag} {source}: its vocabulary of {model.vocab_size} tokens is not that of the model, which has "
                f"{self.base.vocab_size}; give a model of the same tokenizer"
            )
        return model.to(next(self.base.parameters()))


@dataclass(frozen=True)
class Written:
    """What a decoder wrote.

    Attributes:
        rows: new tokens of each text.
        calls: calls of the model, each for all texts at once; 0 where they were not counted.
        tokens_per_call: new tokens of a text for each call that it took part in: the acceptance length.
        note: what people may want to know of how the texts came about.
        shown: whether the text was shown while it grew.
    """

    rows: list[list[int]]
    calls: int = 0
    tokens_per_call: float = 1.0
    note: str = ""
    shown: bool = False


@dataclass(frozen=True)
class TextDecoder:
    """A way to write text.

    Attributes:
        write: writes the texts of a request.
        takes: options of `TextSampling` that it takes beside the common ones.
    """

    write: Callable[[TextRequest], Written]
    takes: Sequence[str] = ()


def decoder_names() -> list[str]:
    """All that `--decoder` takes."""
    return [*_OWN, *(name for name, entry in catalog().items() if FUNCTION in entry.functions)]


def text_decoder(name: str) -> TextDecoder:
    """A decoder by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if name in _OWN:
        return _OWN[name]
    entry = catalog().get(name) or next((e for e in catalog().values() if name in e.system.aliases), None)
    if entry is None or FUNCTION not in entry.functions:
        check_choice("--decoder", name, decoder_names())
    assert entry is not None
    found = load(entry.functions[FUNCTION], FUNCTION)()
    if not isinstance(found, TextDecoder):
        raise TypeError(f"expected text_decoder() of {name} to return a TextDecoder but got {found!r}")
    return found


def check_options(options: Any, special: Sequence[str]) -> None:
    """Refuse options that the chosen decoder does not take.

    Args:
        options: a `TextSampling`.
        special: its fields that not every decoder takes.

    Raises:
        ValueError: unknown decoder, or an option of another one.
    """
    chosen = text_decoder(options.decoder)
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    for name in special:
        if getattr(options, name) != defaults[name] and name not in chosen.takes:
            others = [other for other in decoder_names() if name in text_decoder(other).takes]
            raise ValueError(
                f"--{name} is for --decoder {' or '.join(others)}, not {options.decoder}: leave one of them out"
            )
    if "verify" in chosen.takes:
        if options.verify not in ("exact", "typical", "relaxed"):
            raise ValueError(f"--verify {options.verify}: choose exact, typical or relaxed")
        for name, kinds in (
            ("epsilon", ("typical",)),
            ("delta", ("typical", "relaxed")),
            ("neighbours", ("relaxed",)),
        ):
            if getattr(options, name) != defaults[name] and options.verify not in kinds:
                raise ValueError(f"--{name} is for --verify {' or '.join(kinds)}, not {options.verify}")


def guided(model: Any, guides: Sequence[str], request: Callable[[Any], TextRequest]) -> TextRequest:
    """A request whose model is mixed with guides: log p = log base + sum of alpha log guide, renormalised.

    Args:
        model: the base.
        guides: `MODEL:ALPHA` each.
        request: makes a request of a model.

    Raises:
        ValueError: a guide is written otherwise, its weight is not finite, or its vocabulary is another one.
    """
    plain = request(model)
    if not guides:
        return plain
    others, alphas = [], []
    for guide in guides:
        source, colon, number = guide.rpartition(":")
        try:
            alpha = float(number)
        except ValueError:
            alpha = float("nan")
        if not colon or not source or not torch.tensor(alpha).isfinite():
            raise ValueError(f"--guide expects MODEL:ALPHA such as out/reward:0.5 but got {guide!r}")
        others.append(plain.open_same(source, "--guide"))
        alphas.append(alpha)
    return dataclasses.replace(plain, model=MixedModel([model, *others], [1.0, *alphas]))


def verification(options: Any, model: Any) -> Verify:
    """How drafts are verified: `--verify` with `--epsilon`, `--delta` and `--neighbours`.

    Relaxed verification takes the tokens whose embeddings are nearest as those that a draft may stand for.
    """
    if options.verify == "exact":
        return exact()
    if options.verify == "typical":
        return typical(
            epsilon=0.09 if options.epsilon is None else options.epsilon,
            delta=0.3 if options.delta is None else options.delta,
            bonus="greedy" if options.temperature == 0 else "sample",
        )
    table = model.embedding.weight[: model.vocab_size].detach().float()
    return near_relaxed(table, options.neighbours, 0.1 if options.delta is None else options.delta)


def near_relaxed(vectors: Tensor, count: int, delta: float) -> Verify:
    """Relaxed verification with the nearest tokens of those that are drafted, found when they are.

    The neighbours of all of a language model's tokens would be billions of distances.

    Args:
        vectors: `[V, C]`, of the tokens.
        count: nearest tokens that a draft may stand for; at most V - 1 are taken.
        delta: as for `arcore.ops.verify_relaxed`.
    """
    size, count = len(vectors), min(count, len(vectors) - 1)
    # Numbers outside of the vocabulary are no neighbours.
    near = torch.full((size, count), -1, dtype=torch.int32, device=vectors.device)
    known = torch.zeros(size, dtype=torch.bool, device=vectors.device)

    def verify(probs: Tensor, draft: Draft, seeds: Tensor, offsets: Tensor) -> Verified:
        asked = draft.tokens[draft.tokens >= 0].unique()
        asked = asked[~known[asked]]
        if len(asked):
            apart = torch.cdist(vectors[asked], vectors, compute_mode="donot_use_mm_for_euclid_dist")
            apart[torch.arange(len(asked)), asked] = torch.inf
            near[asked] = apart.sort(dim=1, stable=True).indices[:, :count].int()
            known[asked] = True
        return relaxed(near, delta=delta)(probs, draft, seeds, offsets)

    return verify


def draft_with(request: TextRequest, drafter: Drafter) -> Written:
    """Write with a drafter."""
    ids, mask = request.padded
    verify = verification(request.options, request.base)
    return _counted(
        speculative_tree(request.model, drafter, ids, mask=mask, verify=verify, **request.settings)
    )


def _counted(out: SpeculativeOutput) -> Written:
    rate = out.tokens_per_round
    return Written(out.rows(), out.calls, rate, f"({rate:.2f} tokens per call of the model)")


def _plain(request: TextRequest) -> Written:
    ids, mask = request.padded
    tokens = stream(request.model, ids, mask=mask, **request.settings)
    if request.show is None or len(request.prompts) > 1:
        table = torch.stack(list(tokens), dim=1).tolist()
        return Written([[token for token in row if token >= 0] for row in table], len(table[0]))
    shown, new = TextStream(request.words), []
    request.show(request.options.prompt)
    for token in tokens:
        new.append(int(token))
        request.show(shown.add(new[-1]))
    request.show(f"{shown.rest()}\n")
    return Written([new], len(new), shown=True)


def _jacobi(request: TextRequest) -> Written:
    ids, mask = request.padded
    window = request.options.window
    return _counted(
        jacobi(request.model, ids, mask=mask, window=window, coupling="common", **request.settings)
    )


def _lookup(request: TextRequest) -> Written:
    return draft_with(request, LookupDrafter(count=request.options.window - 1))


# The last counts and what they are of, so that a second text neither reads nor counts again.
_COUNTS: dict[tuple[Any, ...], dict[tuple[int, ...], list[int]]] = {}


def _ngram(request: TextRequest) -> Written:
    corpus = request.options.corpus
    key = (corpus, _changed(corpus), str(request.words.encode(_PROBE)))
    if key not in _COUNTS:
        text = load_text(corpus)
        counted = request.words.tensor(text.train[: 8 * COUNTED])[:COUNTED].tolist()
        _COUNTS.clear()
        _COUNTS[key] = NGramDrafter.fit([counted], order=ORDER).table
    return draft_with(request, NGramDrafter(_COUNTS[key], ORDER, request.options.window - 1))


def _changed(corpus: str) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the files of a corpus; none of one that a package ships."""
    root = Path(corpus)
    files = sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else [root]
    states = [(str(path), path.stat()) for path in files if path.is_file()]
    return tuple((name, state.st_size, state.st_mtime_ns) for name, state in states)


def _draft(request: TextRequest) -> Written:
    if request.options.draft is None:
        raise ValueError("--decoder draft needs the model that drafts: --draft FOLDER")
    drafter = request.open_same(request.options.draft, "--draft")
    chosen = {name: request.settings[name] for name in ("temperature", "top_k", "top_p")}
    sampling = Sampling(**chosen)
    return draft_with(request, ModelDrafter(drafter, count=request.options.window - 1, sampling=sampling))


_OWN: dict[str, TextDecoder] = {
    "plain": TextDecoder(_plain),
    "suffix": TextDecoder(_lookup, ("window", *VERIFIED)),
    "lookup": TextDecoder(_lookup, ("window", *VERIFIED)),
    "ngram": TextDecoder(_ngram, ("window", "corpus", *VERIFIED)),
    "draft": TextDecoder(_draft, ("window", "draft", *VERIFIED)),
    "jacobi": TextDecoder(_jacobi, ("window",)),
}
