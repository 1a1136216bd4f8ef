"""`arcore bench decoding MODEL`: plain decoding beside the loops that draft, on one language model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from arcore.cli._parse import PlainParser

DESCRIPTION = """\
Decode prompts with each loop and print calls per token, tokens per second of processor time, and whether the text is
that of plain decoding. On one thread.

Example: arcore bench decoding smollm2_135m --tokens 64

Example: arcore bench decoding out/llama_tiny --heads out/hydra_tiny --batch 4"""
PROMPTS = (
    "In the beginning God created the heaven and the earth.",
    "The capital of France is",
    "One, two, three, four, one, two, three,",
    "And the LORD said unto Moses,",
    "def add(a, b):\n    return",
    "Once upon a time there was a",
    "The three primary colours are red,",
    "A list of animals: dog, cat,",
)


def main(argv: Sequence[str]) -> int:
    parser = PlainParser("bench decoding", DESCRIPTION)
    parser.usage = "arcore bench decoding [-h] MODEL [options]"
    parser.add_argument(
        "model", metavar="MODEL", help="run folder, or a preset that a package ships (smollm2_135m)"
    )
    parser.add_argument("--heads", metavar="FOLDER", help="run folder of hydra heads for the model")
    parser.add_argument(
        "--tokens", metavar="N", type=int, default=64, help="new tokens of a text (default: 64)"
    )
    parser.add_argument("--batch", metavar="B", type=int, default=1, help="texts at a time (default: 1)")
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=0.0, help="0 takes the likeliest (default)"
    )
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        return 0
    options = parser.parse_args(list(argv))
    if options.tokens < 1 or not 1 <= options.batch <= len(PROMPTS):
        raise ValueError(
            f"expected --tokens of at least 1 and --batch from 1 to {len(PROMPTS)} but got {options.tokens} and "
            f"{options.batch}"
        )
    import torch

    from arcore.recipes.language import language_model

    torch.set_num_threads(1)
    model, words = language_model(options.model)
    prompts = [words.encode(text) for text in PROMPTS]
    groups = [prompts[i : i + options.batch] for i in range(0, len(prompts), options.batch)]
    settings = {"max_new_tokens": options.tokens, "temperature": options.temperature}
    print(f"{options.model}, {len(prompts)} texts of {options.tokens} tokens, {options.batch} at a time")
    print(f"{'loop':26}{'calls/token':>12}{'tokens/s':>10}{'gain':>7}  text")
    plain: Any = None
    for name, run in _loops(model, options.heads).items():
        run(groups[0], {**settings, "max_new_tokens": 2})
        start = time.process_time()
        found = [run(group, settings) for group in groups]
        seconds = time.process_time() - start
        texts = [row for rows, _ in found for row in rows]
        calls = sum(count for _, count in found) / (len(groups) * options.tokens)
        speed = sum(map(len, texts)) / seconds
        plain = plain or (texts, speed)
        same = sum(a == b for a, b in zip(texts, plain[0], strict=True))
        print(
            f"{name:26}{calls:12.3f}{speed:10.1f}{speed / plain[1]:7.2f}  {same} of {len(texts)} the same",
            flush=True,
        )
    return 0


Loop = Callable[[Any, dict[str, Any]], tuple[list[list[int]], int]]


def _loops(model: Any, heads: str | None) -> dict[str, Loop]:
    """Each gives texts, and how often the model was called."""
    from arcore.decoding import LookupDrafter, generate, jacobi, speculative_chain, speculative_tree

    def plain(prompts: Any, settings: dict[str, Any]) -> tuple[list[list[int]], int]:
        rows = generate(model, prompts, **settings).rows()
        return rows, max(map(len, rows))

    def drafted(make: Callable[[Any, dict[str, Any]], Any]) -> Loop:
        def run(prompts: Any, settings: dict[str, Any]) -> tuple[list[list[int]], int]:
            out = make(prompts, settings)
            return out.rows(), out.calls

        return run

    loops: dict[str, Loop] = {
        "plain": plain,
        "lookup, 4 drafts": drafted(lambda p, s: speculative_chain(model, LookupDrafter(count=4), p, **s)),
        "lookup, 8 drafts": drafted(lambda p, s: speculative_chain(model, LookupDrafter(count=8), p, **s)),
        "jacobi, window 8": drafted(lambda p, s: jacobi(model, p, window=8, coupling="common", **s)),
    }
    if heads is not None:
        from arcore.catalog import load_checkpoint
        from arcore.training import checkpoint
        from arcore.zoo.acceleration.hydra.heads import HydraDrafter

        networks, _ = load_checkpoint(checkpoint.find(heads))
        drafts: Any = networks["model"].eval()
        drafter = HydraDrafter(drafts)
        loops["hydra heads"] = drafted(lambda p, s: speculative_tree(model, drafter, p, **s))
    return loops
