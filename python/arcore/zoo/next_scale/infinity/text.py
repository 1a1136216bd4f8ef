"""Texts as the vectors that the model reads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arcore._optional import require

MOST_TOKENS = 512


class Text(NamedTuple):
    """Texts of a batch.

    Attributes:
        vectors: `[B, T, c]`; those behind a text's end are not read.
        lengths: int64 `[B]`, from 1 to T.
    """

    vectors: Tensor
    lengths: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Text:
        """The same elsewhere."""
        return Text(self.vectors.to(device, dtype), self.lengths.to(device))


def word_vectors(prompts: Sequence[str], dim: int) -> Text:
    """Texts as frozen vectors of their words, for models that are trained without a text encoder.

    The vector of a word is drawn from a normal law by a generator that its letters seed, so every word has one and no
    table is stored; to it the sine and cosine of its place are added.

    Args:
        prompts: at least one; an empty one is read as one empty word.
        dim: c, even.
    """
    rows = [prompt.lower().split() or [""] for prompt in prompts]
    longest = max(map(len, rows))
    rates = 100.0 ** -(torch.arange(dim // 2) / (dim // 2))
    angles = torch.arange(longest).unsqueeze(1) * rates
    places = torch.cat([angles.sin(), angles.cos()], 1)
    vectors = torch.zeros(len(rows), longest, dim)
    for row, words in enumerate(rows):
        for place, word in enumerate(words):
            seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=7).digest(), "big")
            drawn = torch.randn(dim, generator=torch.Generator().manual_seed(seed))
            vectors[row, place] = drawn + places[place]
    return Text(vectors, torch.tensor([len(words) for words in rows]))


def t5_vectors(prompts: Sequence[str], folder: Path, dim: int) -> Text:
    """Texts through the encoder of T5, as the published models read them: at most 512 tokens.

    Args:
        prompts: at least one.
        folder: with tokenizer and weights in transformers' layout, such as that of flan-t5-xl.
        dim: c, which must be the encoder's width.

    Raises:
        ImportError: transformers is missing.
        FileNotFoundError: there is no such folder.
        ValueError: the encoder has another width.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"--text-encoder {folder}: expected a folder with T5's weights, such as flan-t5-xl"
        )
    transformers: Any = require("transformers", extra="images")
    config = transformers.AutoConfig.from_pretrained(folder)
    if getattr(config, "d_model", None) != dim:
        raise ValueError(
            f"--text-encoder {folder}: expected vectors of width {dim} but its width is "
            f"{getattr(config, 'd_model', None)}"
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = transformers.T5EncoderModel.from_pretrained(folder).eval()
    found = tokenizer(
        list(prompts), max_length=MOST_TOKENS, padding=True, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        out = encoder(input_ids=found.input_ids, attention_mask=found.attention_mask)
    return Text(out.last_hidden_state.float(), found.attention_mask.sum(1))
