"""The part of `arcore sample` for language models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from arcore._files import atomic_path
from arcore.cli._output import check_file
from arcore.data.text_tokenizers import TextStream, TextTokenizer


def sample_text(
    model: Any,
    tokenizer: TextTokenizer,
    *,
    prompt: str,
    count: int,
    max_new_tokens: int,
    out: Path | None,
    device: Any,
    **settings: Any,
) -> None:
    """Continue a prompt `count` times and print each continuation while it grows; `out` receives all of them."""
    from arcore.decoding import stream

    if not prompt:
        raise ValueError("--prompt is empty: give a few words to go on from")
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1 but got {max_new_tokens}")
    if out is not None:
        check_file(out)
    ids = tokenizer.encode(prompt)
    if not ids or max(ids) >= model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model knows {model.vocab_size}: they do not "
            "belong together"
        )
    import torch

    seed = settings.pop("seed")
    texts = []
    for number in range(count):
        if count > 1:
            print(f"--- {number + 1} of {count}")
        row = torch.tensor([ids], device=device)
        # Sample n of a seed is the same whatever the count is.
        steps = stream(model, row, max_new_tokens=max_new_tokens, seed=seed + number, **settings)
        text = prompt
        _show(prompt)
        shown = TextStream(tokenizer)
        for token in steps:
            text += (piece := shown.add(int(token)))
            _show(piece)
        text += (piece := shown.rest())
        _show(f"{piece}\n")
        texts.append(text)
    if out is not None:
        with atomic_path(out) as temporary:
            temporary.write_text("\n\n".join(texts) + "\n", encoding="utf-8")


def _show(text: str) -> None:
    """Print at once, with ? for characters that the terminal cannot show."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, errors="replace").decode(encoding), end="", flush=True)
