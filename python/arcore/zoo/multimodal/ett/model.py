"""ETT: the language model that reads vectors of codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import preset
from arcore.nn.checks import check_floating, check_ids
from arcore.nn.kinds import check_kinds
from arcore.zoo.language.llama import Llama, LlamaConfig

BEGIN, END = 256, 257
IGNORED = -100


@check_kinds
@dataclass(frozen=True, kw_only=True)
class ETTConfig:
    """Settings of `ETT`.

    Attributes:
        code_channels: width c of a code.
        num_codes: codes N of an image.
        dim: width C of the language model.
        num_layers: its layers.
        num_heads: its heads.
        max_caption: most bytes T of a caption, its end included.

    Raises:
        ValueError: a size is below 1, or heads do not divide the width.
    """

    code_channels: int = 8
    num_codes: int = 49
    dim: int = 64
    num_layers: int = 2
    num_heads: int = 4
    max_caption: int = 64

    def __post_init__(self) -> None:
        for name in ("code_channels", "num_codes", "dim", "num_layers", "num_heads", "max_caption"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        if self.dim % (2 * self.num_heads):
            raise ValueError(
                f"expected heads of an even width but got dim={self.dim} and num_heads={self.num_heads}"
            )


@check_kinds
class ETT(nn.Module):
    """The model: projector and language model; the tokenizer stands beside it.

    Args:
        config: settings.
    """

    def __init__(self, config: ETTConfig) -> None:
        super().__init__()
        self.config = config
        # Section 3.2: two layers with GELU between code vectors and the language model.
        self.projector = nn.Sequential(
            nn.Linear(config.code_channels, config.dim), nn.GELU(), nn.Linear(config.dim, config.dim)
        )
        self.language = Llama(
            LlamaConfig(
                dim=config.dim,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                num_kv_heads=config.num_heads,
                hidden_dim=4 * config.dim,
                vocab_size=END + 1,
                max_length=config.num_codes + config.max_caption + 1,
            )
        )

    @check_kinds
    def forward(self, vectors: Tensor, captions: Tensor) -> Tensor:
        """Logits of every byte of the captions, each given the image and the bytes before it.

        Args:
            vectors: `[B, N, c]`, of codes, with a straight-through gradient while training.
            captions: int64 `[B, T]`, from `encode`; padding behind the end counts as any byte.

        Returns:
            float32 `[B, T, 258]`.

        Raises:
            TypeError, ValueError: a shape, a dtype or a byte does not fit.
        """
        self._check(vectors)
        if captions.dim() != 2 or captions.shape[0] != len(vectors) or captions.shape[1] < 1:
            raise ValueError(
                f"expected captions of shape [{len(vectors)}, T] but got {tuple(captions.shape)}"
            )
        begin = captions.new_full((len(captions), 1), BEGIN)
        read = torch.cat([begin, captions[:, :-1].clamp(min=0)], dim=1)
        check_ids("captions", read, END + 1)
        x = torch.cat([self.projector(vectors), self.language.embed(read)], dim=1)
        mask, angles = self.language.behind((0,), x.shape[1], x.device)
        hidden = self.language.run(x, angles, mask)
        return self.language.logits(hidden[:, self.config.num_codes :])

    @torch.no_grad()
    @check_kinds
    def captions(self, vectors: Tensor) -> list[bytes]:
        """The likeliest captions, byte by byte, with a cache.

        Args:
            vectors: `[B, N, c]`.
        """
        self._check(vectors)
        batch, most = len(vectors), self.config.max_caption
        cache = self.language.make_cache(batch, self.config.num_codes + 1 + most)
        begin = torch.full((batch, 1), BEGIN, device=vectors.device)
        x = torch.cat([self.projector(vectors), self.language.embed(begin)], dim=1)
        mask, angles = self.language.behind((0,), x.shape[1], x.device)
        hidden = self.language.run(x, angles, mask, cache)
        cache.commit(x.shape[1])
        drawn: list[Tensor] = []
        logits = self.language.logits(hidden[:, -1])
        ended = torch.zeros(batch, dtype=torch.bool, device=vectors.device)
        while len(drawn) < most and not bool(ended.all()):
            token = torch.where(ended, END, logits.argmax(-1))
            ended = ended | (token == END)
            drawn.append(token)
            logits = self.language.step(token, cache)
        rows = torch.stack(drawn, 1).tolist() if drawn else [[]] * batch
        return [bytes(byte for byte in row if byte < BEGIN) for row in rows]

    @check_kinds
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Captions as bytes with their end, int64 `[B, T]`; -100, which losses ignore, behind it.

        Raises:
            ValueError: a text is longer than the model takes.
        """
        rows = [[*text.encode(), END] for text in texts]
        longest = max(map(len, rows), default=1)
        if longest > self.config.max_caption:
            raise ValueError(
                f"expected captions of at most {self.config.max_caption - 1} bytes but one has {longest - 1}: shorten "
                "it, or set max_caption"
            )
        return torch.tensor([row + [IGNORED] * (longest - len(row)) for row in rows])

    def _check(self, vectors: Tensor) -> None:
        expected = (self.config.num_codes, self.config.code_channels)
        if vectors.dim() != 3 or tuple(vectors.shape[1:]) != expected:
            raise ValueError(f"expected vectors of shape {('B', *expected)} but got {tuple(vectors.shape)}")
        check_floating("vectors", vectors, next(self.projector.parameters()), "take them from the tokenizer")


@check_kinds
def read_codes(tokenizer: Any, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a tokenizer makes of images, differentiable.

    Args:
        tokenizer: an `ImageVQ`.
        images: `[B, C, H, W]` in [-1, 1].

    Returns:
        Vectors of the codes `[B, N, c]` with a straight-through gradient to the encoder; reconstructions; the
        quantiser's loss.
    """
    through, loss, _ = tokenizer.quantize(tokenizer.quant_conv(tokenizer.encoder(images)))
    drawn = tokenizer.decoder(tokenizer.post_quant_conv(through))
    return through.flatten(2).transpose(1, 2), drawn, loss


@check_kinds
def caption_loss(model: ETT, vectors: Tensor, captions: Tensor) -> Tensor:
    """Mean negative log-likelihood of the captions' bytes; arguments as for `ETT.forward`."""
    logits = model(vectors, captions)
    return F.cross_entropy(logits.flatten(0, 1), captions.flatten(), ignore_index=IGNORED)


@preset(tokenizer="vq16_tiny")
def ett_tiny() -> ETTConfig:
    """Names of digits from 7 x 7 codes; trains on a CPU in minutes."""
    return ETTConfig()
