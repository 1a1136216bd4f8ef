"""X-Omni: the language model with layers for images, the sequence, and drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import preset
from arcore.decoding import row_seeds
from arcore.nn import (
    DecoderLayer,
    GatedMLP,
    GroupedAttention,
    RMSNorm,
    RotaryTable,
    TokenCache,
    linear,
)
from arcore.nn.causal import CausalDecoder
from arcore.nn.checks import check_ids
from arcore.nn.kinds import check_kinds
from arcore.ops import sample
from arcore.ops.sample import Sampled
from arcore.zoo.multimodal.xomni.decoder import FlowDecoder

# Bytes, then marks; image codes stand behind them.
BEGIN, END, SOM, IMAGE, EOM = range(256, 261)
TEXT = 261
IGNORED = -100


@check_kinds
@dataclass(frozen=True, kw_only=True)
class XOmniConfig:
    """Settings of `XOmni`.

    Attributes:
        dim: width C.
        num_layers: layers for text and images.
        image_layers: layers before them, and as many behind them, that act at image positions only.
        num_heads: attention heads.
        vocab_size: codes V.
        side: codes S along a picture's side.
        factor: pixels per code along a side.
        in_channels: of the pictures.
        code_channels: width c of a code's vector.
        max_caption: most bytes of a caption.
        decoder_channels: width of the network that draws pixels.

    Raises:
        ValueError: a size is below 1 (`image_layers`: below 0), or heads do not divide the width.
    """

    dim: int = 64
    num_layers: int = 2
    image_layers: int = 1
    num_heads: int = 4
    vocab_size: int = 256
    side: int = 7
    factor: int = 4
    in_channels: int = 1
    code_channels: int = 8
    max_caption: int = 48
    decoder_channels: int = 32

    def __post_init__(self) -> None:
        for name in (
            *(
                "dim",
                "num_layers",
                "num_heads",
                "vocab_size",
                "side",
                "factor",
                "in_channels",
                "code_channels",
            ),
            *("max_caption", "decoder_channels"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        if self.image_layers < 0:
            raise ValueError(f"expected image_layers to be at least 0 but got {self.image_layers}")
        if self.dim % (2 * self.num_heads):
            raise ValueError(
                f"expected heads of an even width but got dim={self.dim} and num_heads={self.num_heads}"
            )

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return self.max_caption + self.side**2 + len(f"{self.side} {self.side}") + 5


class XOmniLanguage(CausalDecoder):
    """The language model.

    Args:
        config: settings.
    """

    def __init__(self, config: XOmniConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = TEXT + config.vocab_size
        self.max_length = config.max_length
        head_dim = config.dim // config.num_heads
        self.embedding = nn.Embedding(TEXT, config.dim)
        self.image_embedding = nn.Embedding(config.vocab_size, config.dim)
        ends = config.image_layers
        self.layers = nn.ModuleList(
            DecoderLayer(
                config.dim,
                attention=GroupedAttention(
                    config.dim, num_heads=config.num_heads, num_kv_heads=config.num_heads, head_dim=head_dim
                ),
                mlp=GatedMLP(config.dim, 4 * config.dim),
                norm_eps=1e-6,
            )
            for _ in range(config.num_layers + 2 * ends)
        )
        self.of_images = {*range(ends), *range(len(self.layers) - ends, len(self.layers))}
        self.norm = RMSNorm(config.dim, eps=1e-6)
        self.lm_head = nn.Linear(config.dim, TEXT, bias=False)
        self.image_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.rotary = RotaryTable(head_dim, theta=10000.0)
        for parameter in self.parameters():
            if parameter.dim() > 1 and not parameter.is_meta:
                nn.init.normal_(parameter, std=0.02)

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings of bytes, marks and codes: int64 `[B, L]` to `[B, L, C]`."""
        if ids.dim() != 2:
            raise ValueError(f"expected ids of shape [B, L] but got {tuple(ids.shape)}")
        check_ids("ids", ids, self.vocab_size)
        return torch.where(
            (ids < TEXT).unsqueeze(-1),
            self.embedding(ids.clamp(max=TEXT - 1)),
            self.image_embedding((ids - TEXT).clamp(min=0)),
        )

    def hidden(self, ids: Tensor) -> Tensor:
        """What the heads read: `[B, L]` to `[B, L, C]`."""
        mask, angles = self.behind((0,), ids.shape[1], ids.device)
        return self.mixed(self.embed(ids), ids >= TEXT, angles, mask)

    def mixed(
        self, x: Tensor, image: Tensor, angles: Any, mask: Any, cache: TokenCache | None = None
    ) -> Tensor:
        """All layers and the last norm; those of images leave text positions as they are.

        Args:
            x: `[B, N, C]`.
            image: bool `[B, N]`, where codes stand.
            angles, mask, cache: as for `run`.
        """
        for i, layer in enumerate(self.layers):
            y = layer(x, angles, mask, cache, i)
            x = torch.where(image.unsqueeze(-1), y, x) if i in self.of_images else y
        out: Tensor = self.norm(x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of bytes and marks, and those of codes behind them: `[..., C]` to float32 `[..., 261 + V]`."""
        both = [linear(hidden, self.lm_head.weight), linear(hidden, self.image_head.weight)]
        return torch.cat(both, dim=-1).float()

    def _stage(self, ids: Tensor, cache: TokenCache, parents: Any) -> Tensor:
        if parents is not None:
            raise ValueError("X-Omni reads no trees of drafts: draft chains")
        if len(ids) != cache.batch or ids.shape[1] == 0:
            raise ValueError(
                f"expected at least one token for each of the cache's {cache.batch} rows but got ids of shape "
                f"{tuple(ids.shape)}"
            )
        mask, angles = self.behind(cache.lengths, ids.shape[1], ids.device)
        return self.mixed(self.embed(ids), ids >= TEXT, angles, mask, cache)

    def _fits_step(self, cache: TokenCache, new: int = 1) -> bool:
        # The op for a step runs every layer on every row.
        return False


@check_kinds
class XOmni(nn.Module):
    """Language model and decoder; the tokenizer stands beside them.

    Args:
        config: settings.
    """

    # Its head and embeddings are read outside of the calls that gather weights.
    shardable = False

    def __init__(self, config: XOmniConfig) -> None:
        super().__init__()
        self.config = config
        self.language = XOmniLanguage(config)
        self.decoder = FlowDecoder(
            config.in_channels, config.code_channels, config.decoder_channels, config.factor
        )

    @check_kinds
    def forward(self, ids: Tensor) -> Tensor:
        """Logits of what follows each token; ids `[B, L]` to float32 `[B, L, 261 + V]`."""
        return self.language.logits(self.language.hidden(ids))

    @check_kinds
    def sequences(self, captions: Sequence[str], codes: Tensor, *, image_first: bool = False) -> Tensor:
        """Whole sequences, int64 `[B, L]`, -100 behind their ends.

        Args:
            captions: one per picture.
            codes: int64 `[B, S * S]`.
            image_first: the caption stands behind the picture instead of before it.

        Raises:
            ValueError: a caption is too long, or their numbers differ.
        """
        if len(captions) != len(codes):
            raise ValueError(
                f"expected as many captions as pictures but got {len(captions)} and {len(codes)}"
            )
        rows = []
        for caption, picture in zip(captions, (codes + TEXT).tolist(), strict=True):
            text, image = self._bytes(caption), [*self._opening(), *picture, EOM]
            rows.append([BEGIN, *(image + text if image_first else text + image), END])
        longest = max(map(len, rows), default=1)
        return torch.tensor([row + [IGNORED] * (longest - len(row)) for row in rows], device=codes.device)

    def loss(self, ids: Tensor) -> Tensor:
        """Mean negative log-likelihood of `sequences`: of a code among codes, of text among bytes and marks."""
        whole = self(ids[:, :-1].clamp(min=0))
        wanted = ids[:, 1:]
        code = wanted >= TEXT
        parts = [
            F.cross_entropy(whole[code][:, TEXT:], wanted[code] - TEXT, reduction="sum"),
            F.cross_entropy(whole[~code][:, :TEXT], wanted[~code], ignore_index=IGNORED, reduction="sum"),
        ]
        return torch.stack(parts).sum() / (wanted != IGNORED).sum()

    @torch.no_grad()
    @check_kinds
    def draw(
        self,
        captions: Sequence[str],
        *,
        min_p: float | None = 0.03,
        temperature: float = 1.0,
        seed: int | Sequence[int] = 0,
    ) -> Tensor:
        """Codes of pictures for captions, int64 `[B, S * S]`.

        While a picture is drawn codes alone can be chosen, and exactly S * S of them are.

        Args:
            captions: one per picture.
            min_p: see `arcore.ops.sample`; the paper's .03.
            temperature: 0 takes the likeliest codes.
            seed: one number, or one per row.
        """
        if not captions:
            return torch.zeros(0, self.config.side**2, dtype=torch.int64)
        rows = [[BEGIN, *self._bytes(caption), *self._opening()] for caption in captions]
        longest = max(map(len, rows))
        place = self.language.embedding.weight.device
        ids = torch.tensor([[END] * (longest - len(row)) + row for row in rows], device=place)
        mask = torch.tensor(
            [[False] * (longest - len(row)) + [True] * len(row) for row in rows], device=place
        )
        count = self.config.side**2
        cache = self.language.make_cache(len(rows), longest + count)
        logits = self.language.prefill(ids, cache, mask)
        seeds, drawn = row_seeds(seed, len(rows), place), []
        for position in range(count):
            token = sample(
                logits[:, TEXT:],
                temperature=temperature,
                min_p=min_p,
                seed=seeds,
                offset=position,
                check=True,
            )
            assert not isinstance(token, Sampled)
            drawn.append(token)
            if position + 1 < count:
                logits = self.language.step(token + TEXT, cache)
        return torch.stack(drawn, 1)

    @torch.no_grad()
    @check_kinds
    def describe(self, codes: Tensor) -> list[str]:
        """The likeliest captions of pictures, from codes int64 `[B, S * S]`."""
        opening = torch.tensor([BEGIN, *self._opening()], device=codes.device).expand(len(codes), -1)
        close = torch.full((len(codes), 1), EOM, device=codes.device)
        ids = torch.cat([opening, codes + TEXT, close], 1)
        texts = torch.full((len(codes), self.config.max_caption), END, device=codes.device)
        if not len(codes):
            return []
        cache = self.language.make_cache(len(codes), self.language.max_length)
        logits = self.language.prefill(ids, cache)
        for position in range(self.config.max_caption):
            token = logits[:, :TEXT].argmax(-1)
            texts[:, position] = token
            if bool((texts[:, : position + 1] == END).any(1).all()):
                break
            logits = self.language.step(token, cache)
        rows = [row[: row.index(END)] if END in row else row for row in texts.tolist()]
        return [bytes(byte for byte in row if byte < BEGIN).decode("utf-8", "replace") for row in rows]

    def code_logits(self, captions: Sequence[str], codes: Tensor) -> Tensor:
        """Logits of the codes of pictures behind their captions, `[B, S * S]` to float32 `[B, S * S, V]`."""
        ids = self.sequences(captions, codes)
        whole = self(ids[:, :-1].clamp(min=0))
        return whole[ids[:, 1:] >= TEXT][:, TEXT:].view(*codes.shape, -1)

    def _bytes(self, caption: str) -> list[int]:
        text = list(caption.encode())
        if len(text) > self.config.max_caption:
            raise ValueError(
                f"expected captions of at most {self.config.max_caption} bytes but one has {len(text)}: shorten it, or "
                "set max_caption"
            )
        return text

    def _opening(self) -> list[int]:
        return [SOM, *f"{self.config.side} {self.config.side}".encode(), IMAGE]


@preset(tokenizer="vq16_tiny")
def xomni_tiny() -> XOmniConfig:
    """28x28 digits as 7 x 7 codes between the names of their classes; trains on a CPU in minutes."""
    return XOmniConfig()
