"""`arcore bench decoding MODEL`: plain decoding beside the other loops, on one language model."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcore._files import atomic_path, read_lines
from arcore.cli._output import check_file
from arcore.cli._parse import PlainParser
from arcore.env import cpu_model

if TYPE_CHECKING:
    from arcore.recipes.language import TextSampling

DESCRIPTION = """\
Decode prompts with each loop and print, beside plain decoding: the acceptance length (tokens of a text per call of the
model), calls per token, tokens per second of processor time, what that gains, and whether the texts are the same. On
one thread. With --law N also the law: N texts of three tokens, of the three likeliest each, by each loop, against
the enumerated law of the model (p-value of a G-test).

Example: arcore bench decoding smollm2_135m --tokens 48 --limit 60

Example: arcore bench decoding smollm2 --batch 1 8 --row "hydra heads=out/hydra" --row "medusa heads=out/medusa"

Example: arcore bench decoding smollm2 --row "draft draft=out/small window=5" --law 400 --temperature 1 """
ROWS = ("suffix window=5", "suffix window=9", "ngram window=5", "jacobi window=8")
PROMPTS = (
    "In the beginning God created the heaven and the earth.",
    "And the LORD said unto Moses,",
    "Now these are the names of the children of Israel,",
    "And it came to pass in those days, that",
    "Blessed are the poor in spirit:",
    "The LORD is my shepherd;",
    "And the king said unto the woman,",
    "Then answered Peter and said,",
    "Hear, O Israel:",
    "And there was a famine in the land:",
    "The capital of France is",
    "One, two, three, four, one, two, three,",
    "def add(a, b):\n    return",
    "Once upon a time there was a",
    "The three primary colours are red,",
    "A list of animals: dog, cat,",
    "Water boils at a temperature of",
    "To make bread, you need flour,",
    "My favourite season is winter because",
    "The sun rises in the east and",
)
WORDS, LENGTH = 3, 3


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    if options is None:
        return 0
    import torch

    from arcore.nn import quantise
    from arcore.ops._block_values import KINDS
    from arcore.recipes.language import language_model
    from arcore.recipes.text_decoders import TextRequest, text_decoder

    torch.set_num_threads(1)
    rows = [_row(text, options) for text in ("plain", *(options.row or ROWS))]
    model, words = language_model(options.model, stored=options.precision == "stored")
    if options.precision in KINDS:
        quantise(model, options.precision)
    elif options.precision == "bfloat16":
        model.to(torch.bfloat16)
    lines = PROMPTS if options.prompts is None else _lines(options.prompts)
    prompts = [words.encode(text) for text in lines[: options.count]]
    limit = "" if options.limit is None else f", up to {options.limit:g} s a row"
    table = []
    for batch in options.batch:
        groups = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
        print(
            f"{options.model}, {len(prompts)} texts of {options.tokens} tokens, {batch} at a time, temperature "
            f"{options.temperature:g}, {options.precision}{limit}"
        )
        law = " law (p)" if options.law else ""
        print(
            f"{'loop':34}{'accepted':>9}{'calls/token':>12}{'tokens/s':>10}{'gain':>6}{'of saved':>9}{law}  text"
        )
        plain: _Measured | None = None
        for name, chosen in rows:
            write = text_decoder(chosen.decoder).write

            def request(ids: list[list[int]], settings: Any, seed: int = 0) -> Any:
                seeds = [seed + i for i in range(len(ids))]
                return TextRequest(model, model, words, ids, seeds, settings, language_model)

            found = _measure(write, request, groups, chosen, options.limit)
            plain = plain or found
            p_value = _law(model, prompts[0], chosen, write, request, options.law) if options.law else None
            table.append({"batch": batch, "loop": name, **found.beside(plain), "law": p_value})
            print(_line(table[-1]), flush=True)
    print("of saved: the gain over what it would be if a call with drafts took as long as a plain one")
    if options.json is not None:
        about = {"model": options.model, "texts": len(prompts), "tokens": options.tokens}
        about |= {"temperature": options.temperature, "precision": options.precision}
        about |= {"torch": torch.__version__, "machine": cpu_model()}
        with atomic_path(Path(options.json)) as temporary:
            temporary.write_text(json.dumps({**about, "rows": table}, indent=1) + "\n", encoding="utf-8")
    return 0


@dataclasses.dataclass(frozen=True)
class _Measured:
    """What a loop wrote and took.

    Attributes:
        texts: tokens of each text.
        seconds: of processor time of each group of texts.
        calls: of the model, for each group.
        rate: tokens of a text per call that it took part in, summed over texts.
    """

    texts: list[list[int]]
    seconds: list[float]
    calls: list[int]
    rate: float

    def beside(self, plain: _Measured) -> dict[str, Any]:
        """The figures of a row of the table."""
        # Prompts that both rows came to.
        done = min(len(self.seconds), len(plain.seconds))
        gain = sum(plain.seconds[:done]) / sum(self.seconds[:done])
        # Plain decoding takes a call per token of the longest text of a group.
        saved = sum(self.calls[:done]) / sum(plain.calls[:done])
        same = sum(a == b for a, b in zip(self.texts, plain.texts, strict=False))
        return {
            "accepted": self.rate / len(self.texts),
            "calls_per_token": saved,
            "tokens_per_second": sum(map(len, self.texts)) / sum(self.seconds),
            "gain": gain,
            "of_saved": gain * saved,
            "same": same,
            "texts": min(len(self.texts), len(plain.texts)),
        }


def _measure(
    write: Any, request: Any, groups: list[list[list[int]]], chosen: TextSampling, limit: float | None
) -> _Measured:
    """Let a loop write all groups of texts, or as many as it comes to."""
    write(request(groups[0], dataclasses.replace(chosen, max_new_tokens=2)))
    texts: list[list[int]] = []
    seconds: list[float] = []
    calls: list[int] = []
    rates = 0.0
    for group in groups:
        start = time.process_time()
        found = write(request(group, chosen))
        seconds.append(time.process_time() - start)
        texts += found.rows
        calls.append(found.calls)
        rates += found.tokens_per_call * len(group)
        if limit is not None and sum(seconds) >= limit:
            break
    return _Measured(texts, seconds, calls, rates)


def _line(row: dict[str, Any]) -> str:
    p_value = "" if row["law"] is None else f"{row['law']:8.3f}"
    return (
        f"{row['loop']:34}{row['accepted']:9.2f}{row['calls_per_token']:12.3f}{row['tokens_per_second']:10.1f}"
        f"{row['gain']:6.2f}{row['of_saved']:9.2f}{p_value}  {row['same']} of {row['texts']} the same"
    )


def _options(argv: Sequence[str]) -> Any:
    parser = PlainParser("bench decoding", DESCRIPTION)
    parser.usage = "arcore bench decoding [-h] MODEL [options]"
    parser.add_argument(
        "model", metavar="MODEL", help="run folder, or a preset that a package ships (smollm2_135m)"
    )
    parser.add_argument(
        "--row",
        metavar="DECODER [NAME=VALUE ...]",
        action="append",
        help=f"a loop as `arcore sample` has it, with its options; several (default: {', '.join(ROWS)})",
    )
    parser.add_argument(
        "--tokens", metavar="N", type=int, default=64, help="new tokens of a text (default: 64)"
    )
    parser.add_argument(
        "--batch",
        metavar="B",
        type=int,
        nargs="+",
        default=[1],
        help="texts at a time; several numbers give several tables (default: 1)",
    )
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=0.0, help="0 takes the likeliest (default)"
    )
    parser.add_argument(
        "--precision",
        choices=["float32", "bfloat16", "stored", "q8_0", "q4_1", "q4_0"],
        default="float32",
        help="of the weights and the arithmetic (default: float32); stored and q...: weights in blocks of 8 or 4 bits, "
        "as `arcore sample` has them",
    )
    parser.add_argument("--prompts", metavar="FILE", help="one prompt a line (default: 20 built-in ones)")
    parser.add_argument("--count", metavar="N", type=int, help="only the first N prompts")
    parser.add_argument("--json", metavar="FILE", help="write the table to this file too")
    parser.add_argument(
        "--limit", metavar="SECONDS", type=float, help="of processor time after which a row ends early"
    )
    parser.add_argument("--law", metavar="N", type=int, default=0, help="texts for the test of the law")
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        return None
    options = parser.parse_args(list(argv))
    if min(options.tokens, *options.batch, options.count or 1) < 1 or options.law < 0:
        raise ValueError(
            "expected --tokens, --count and --batch of at least 1 and --law of at least 0 but got "
            f"{options.tokens}, {options.count}, {options.batch} and {options.law}"
        )
    if options.json is not None:
        check_file(Path(options.json))
    return options


def _lines(path: str) -> list[str]:
    lines = [line for _, line in read_lines(path) if line.strip()]
    if not lines:
        raise ValueError(f"--prompts {path}: the file has no line of text")
    return lines


def _row(text: str, options: Any) -> tuple[str, TextSampling]:
    """`hydra heads=out/hydra` as a name and options."""
    from arcore.recipes.language import TextSampling

    decoder, *settings = text.split()
    kinds = {field.name: field.default for field in dataclasses.fields(TextSampling)}
    chosen: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in kinds:
            raise ValueError(
                f"--row {text!r}: expected NAME=VALUE with an option of `arcore sample` but got {setting!r}"
            )
        try:
            chosen[name] = _value(name, value, kinds[name])
        except ValueError:
            raise ValueError(f"--row {text!r}: expected a number for {name} but got {value!r}") from None
    common = {"max_new_tokens": options.tokens, "temperature": options.temperature}
    return text, TextSampling(prompt="x", decoder=decoder, **common, **chosen)


def _value(name: str, value: str, default: Any) -> Any:
    if isinstance(default, int) and not isinstance(default, bool):
        return int(value)
    if isinstance(default, float) or name in ("epsilon", "delta", "top_p"):
        return float(value)
    return Path(value) if name == "heads" else value


def _law(model: Any, prompt: list[int], chosen: Any, write: Any, request: Any, draws: int) -> float:
    """p-value of `draws` texts of a loop under the enumerated law of the model on few tokens."""
    import torch

    from arcore.decoding import Sampling
    from arcore.decoding.laws import g_test

    settings = dataclasses.replace(chosen, max_new_tokens=LENGTH, temperature=1.0, top_k=WORDS)
    sampling = Sampling(top_k=WORDS)
    outcomes: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        ids = torch.tensor([[*prompt, *text] for text in outcomes])
        with torch.no_grad():
            probs = sampling.probs(model(ids)[:, -1, : model.vocab_size])
        best = probs.topk(WORDS)
        outcomes = {
            (*text, int(token)): chance * float(p)
            for row, (text, chance) in enumerate(outcomes.items())
            for token, p in zip(best.indices[row], best.values[row], strict=True)
        }
    places = {text: i for i, text in enumerate(outcomes)}
    found = []
    for start in range(0, draws, 50):
        count = min(50, draws - start)
        out = write(request([prompt] * count, settings, seed=1_000 + start))
        found += [places.get(tuple(row), len(places)) for row in out.rows]
    law = torch.tensor([*outcomes.values(), 0.0], dtype=torch.float64)
    return g_test(torch.tensor(found), law / law.sum())
