"""The tokenizer of Kronos: candles to two coarse-to-fine tokens and back (Shi et al., arXiv:2508.02739).

A causal transformer reads normalised candles; binary spherical quantisation makes `s1_bits + s2_bits` bits of each. The
first bits are the coarse token s1, the others the fine token s2. A causal decoder makes candles of all bits, and in
training of the coarse ones alone too, so that s1 means something by itself.

As in the released code, `n` layers in a config are n - 1 layers in the network.

Legend: B windows, T rows, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arcore.catalog import Published, System, preset
from arcore.catalog.claims import Claim, at_least, at_most, equals
from arcore.masks import IntervalMask
from arcore.nn import Angles, RotaryTable
from arcore.nn.bsq import BinarySphericalQuantizer, bits_of, index_of
from arcore.nn.kinds import check_kinds
from arcore.zoo.series._kronos_layers import KronosLayer, angles_of, causal, init_linear, layers_from_official
from arcore.zoo.series._ohlcv import CANDLE

SYSTEM = System(
    name="kronos_tokenizer",
    title="Kronos tokenizer",
    paper="arXiv:2508.02739",
    paper_title="Kronos: A Foundation Model for the Language of Financial Markets",
    topic="series",
    kind="model",
    model="KronosTokenizer",
    ops=("block_sparse_attention",),
    recipe="own",
    summary="Candles to a coarse and a fine token of binary spherical quantisation, and back.",
    claim="On held-out prices all bits reconstruct better than the coarse ones, and those than half the variance.",
    checked_on="real data",
)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class KronosTokenizerConfig:
    """Settings of `KronosTokenizer`.

    Attributes:
        dim: width D.
        num_heads: heads.
        hidden_dim: width of the feed-forward networks.
        encoder_layers: layers of the encoder, plus one.
        decoder_layers: layers of the decoder, plus one.
        s1_bits: bits of the coarse token.
        s2_bits: bits of the fine token.
        channels: columns of a candle.
        group: see `arcore.nn.bsq.BinarySphericalQuantizer`, as the next four.
        beta: likewise.
        gamma0: likewise.
        gamma: likewise.
        zeta: likewise.
        context: rows of a training window that are used for normalisation.
        horizon: rows of it that follow.
        dropout: of what layers add.

    Raises:
        ValueError: a size is out of range.
    """

    dim: int = 256
    num_heads: int = 4
    hidden_dim: int = 512
    encoder_layers: int = 4
    decoder_layers: int = 4
    s1_bits: int = 10
    s2_bits: int = 10
    channels: int = len(CANDLE)
    group: int = 4
    beta: float = 0.05
    gamma0: float = 1.0
    gamma: float = 1.1
    zeta: float = 0.05
    context: int = 90
    horizon: int = 10
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if min(self.encoder_layers, self.decoder_layers) < 2 or min(self.s1_bits, self.s2_bits) < 1:
            raise ValueError(
                f"expected at least 2 layers and 1 bit but got {self.encoder_layers}, {self.decoder_layers} layers and "
                f"{self.s1_bits}, {self.s2_bits} bits"
            )
        if self.num_heads < 1 or self.dim % (2 * self.num_heads):
            raise ValueError(
                f"expected dim to be a multiple of 2 * num_heads but got {self.dim} and {self.num_heads}"
            )

    @property
    def normalise(self) -> str:
        """Every window by the moments of its first `context` rows."""
        return "window"


class Reconstruction(NamedTuple):
    """What the tokenizer makes of candles.

    Attributes:
        coarse: `[B, T, C]`, from the bits of s1.
        full: `[B, T, C]`, from all bits.
        loss: scalar, of the quantiser.
    """

    coarse: Tensor
    full: Tensor
    loss: Tensor


@check_kinds
class KronosTokenizer(nn.Module):
    """Candles to tokens and back.

    Args:
        config: settings.
    """

    def __init__(self, config: KronosTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.context, self.horizon, self.normalise = config.context, config.horizon, config.normalise
        self.vocab_sizes = (2**config.s1_bits, 2**config.s2_bits)
        bits = config.s1_bits + config.s2_bits

        def layers(count: int) -> nn.ModuleList:
            sizes = (config.dim, config.num_heads, config.hidden_dim, config.dropout)
            return nn.ModuleList(KronosLayer(*sizes) for _ in range(count - 1))

        self.embed = nn.Linear(config.channels, config.dim)
        self.encoder = layers(config.encoder_layers)
        self.to_bits = nn.Linear(config.dim, bits)
        self.quantizer = BinarySphericalQuantizer(
            bits,
            group=config.group,
            beta=config.beta,
            gamma0=config.gamma0,
            gamma=config.gamma,
            zeta=config.zeta,
        )
        self.from_coarse = nn.Linear(config.s1_bits, config.dim)
        self.from_bits = nn.Linear(bits, config.dim)
        self.decoder = layers(config.decoder_layers)
        self.head = nn.Linear(config.dim, config.channels)
        self.rotary = RotaryTable(config.dim // config.num_heads)
        init_linear(self)

    @check_kinds
    def forward(self, values: Tensor) -> Reconstruction:
        """Quantise and reconstruct normalised candles `[B, T, C]`."""
        found = self.quantizer(self._latent(values))
        coarse = self._decode(self.from_coarse(found.codes[..., : self.config.s1_bits]))
        return Reconstruction(coarse, self._decode(self.from_bits(found.codes)), found.loss)

    def objective(self, values: Tensor, calendar: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Half of both reconstructions' squared errors and the quantiser's loss."""
        out = self(values)
        coarse, full = ((one - values).square().mean() for one in (out.coarse, out.full))
        figures = {"mse_coarse": coarse.detach(), "mse_full": full.detach(), "bsq": out.loss.detach()}
        return (coarse + full + out.loss) / 2, figures

    @torch.no_grad()
    @check_kinds
    def encode(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens s1 and s2, int64 `[B, T]`, of normalised candles `[B, T, C]`."""
        bits = self._latent(values) > 0
        return index_of(bits[..., : self.config.s1_bits]), index_of(bits[..., self.config.s1_bits :])

    def codes(self, s1: Tensor, s2: Tensor) -> Tensor:
        """Codes `[B, T, bits]` of tokens."""
        bits = torch.cat([bits_of(s1, self.config.s1_bits), bits_of(s2, self.config.s2_bits)], -1)
        return (bits.to(self.head.weight.dtype) * 2 - 1) / bits.shape[-1] ** 0.5

    @torch.no_grad()
    @check_kinds
    def decode(
        self, s1: Tensor, s2: Tensor, mask: IntervalMask | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Normalised candles `[B, T, C]` of tokens `[B, T]`.

        Args:
            s1, s2: tokens.
            mask: which rows a row sees; those before it when None.
            positions: int64 `[T]`; 0, 1, ... when None.
        """
        return self._decode(self.from_bits(self.codes(s1, s2)), mask, positions)

    @torch.no_grad()
    def decode_coarse(self, s1: Tensor) -> Tensor:
        """Normalised candles `[B, T, C]` of coarse tokens alone."""
        codes = self.codes(s1, torch.zeros_like(s1))[..., : self.config.s1_bits]
        return self._decode(self.from_coarse(codes))

    def _latent(self, values: Tensor) -> Tensor:
        if values.dim() != 3 or values.shape[2] != self.config.channels:
            raise ValueError(
                f"expected candles of shape [B, T, {self.config.channels}] but got {tuple(values.shape)}"
            )
        x = self.embed(values)
        mask, angles = causal(x.shape[1], x.device), angles_of(self.rotary, x.shape[1], x.device)
        for layer in self.encoder:
            x = layer(x, angles, mask)
        out: Tensor = self.to_bits(x)
        return out

    def _decode(self, x: Tensor, mask: IntervalMask | None = None, positions: Tensor | None = None) -> Tensor:
        mask = mask or causal(x.shape[1], x.device)
        angles: Angles = (
            angles_of(self.rotary, x.shape[1], x.device) if positions is None else self.rotary.at(positions)
        )
        for layer in self.decoder:
            x = layer(x, angles, mask)
        out: Tensor = self.head(x)
        return out

    @classmethod
    def official_config(cls, content: Mapping[str, Any]) -> KronosTokenizerConfig:
        """The config of published weights, from the config.json beside them."""
        names = {
            "dim": "d_model",
            "num_heads": "n_heads",
            "hidden_dim": "ff_dim",
            "encoder_layers": "n_enc_layers",
            "decoder_layers": "n_dec_layers",
            "channels": "d_in",
            "group": "group_size",
        }
        same = ("s1_bits", "s2_bits", "beta", "gamma0", "gamma", "zeta")
        given = {ours: content[theirs] for ours, theirs in names.items()} | {n: content[n] for n in same}
        return KronosTokenizerConfig(**given)

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the released code under our names.

        Raises:
            ValueError: heads are of another width.
        """
        left = {key: value for key, value in state.items() if not key.startswith("tokenizer.bsq.")}
        head_dim = self.config.dim // self.config.num_heads
        ours: dict[str, Tensor] = {}
        for part in ("encoder", "decoder"):
            ours |= layers_from_official(left, part, part, len(getattr(self, part)), head_dim)
        renamed = {
            "quant_embed": "to_bits",
            "post_quant_embed": "from_bits",
            "post_quant_embed_pre": "from_coarse",
        }
        for theirs, name in renamed.items():
            for part in ("weight", "bias"):
                if (found := left.pop(f"{theirs}.{part}", None)) is not None:
                    ours[f"{name}.{part}"] = found
        return ours | left


@preset(weights=Published("NeoQuasar/Kronos-Tokenizer-base", "model.safetensors", ("config.json",)))
def kronos_tokenizer_base() -> KronosTokenizerConfig:
    """Of the small and base models: 4 M parameters, 10 + 10 bits; NeoQuasar/Kronos-Tokenizer-base."""
    return KronosTokenizerConfig()


@preset(weights=Published("NeoQuasar/Kronos-Tokenizer-2k", "model.safetensors", ("config.json",)))
def kronos_tokenizer_2k() -> KronosTokenizerConfig:
    """Of the mini model with windows of 2,048 rows; NeoQuasar/Kronos-Tokenizer-2k."""
    return KronosTokenizerConfig()


@preset
def kronos_tokenizer_tiny() -> KronosTokenizerConfig:
    """6 + 6 bits; trains on a CPU in a minute or two."""
    return KronosTokenizerConfig(
        dim=64,
        num_heads=4,
        hidden_dim=128,
        encoder_layers=3,
        decoder_layers=3,
        s1_bits=6,
        s2_bits=6,
        context=60,
    )


def claim(*, quick: bool) -> Claim:
    """Bits survive the way through tokens; with training, errors on held-out prices from s1 and from all bits."""
    model = KronosTokenizer(kronos_tokenizer_tiny()).eval()
    values = torch.randn(2, 30, 6)
    s1, s2 = model.encode(values)
    again = (model.codes(s1, s2) > 0) == (model._latent(values) > 0)
    changed = values.clone()
    changed[:, 20:] += 1
    with torch.no_grad():
        leak = (model.decode(*model.encode(changed)) - model.decode(s1, s2))[:, :20].abs().max()
    rows = [
        equals("share of bits that tokens keep", again.float().mean(), 1),
        at_most("change of earlier candles when later ones change", leak, 1e-6),
    ]
    if quick:
        return Claim(tuple(rows))
    from arcore.zoo.series.kronos_tokenizer.recipe import trained_on_stocks

    trained, held_out = trained_on_stocks()
    with torch.no_grad():
        out = trained(held_out)
    coarse, full = ((one - held_out).square().mean() for one in (out.coarse, out.full))
    variance = held_out.var(correction=0)
    rows += [
        at_least("squared error of s1 alone less that of all bits, held-out stocks", coarse - full, 0.001),
        at_most("squared error of s1 alone over half the variance", coarse / (variance / 2), 1),
    ]
    return Claim(tuple(rows))


def __getattr__(name: str) -> Any:
    if name == "RECIPE":
        from arcore.zoo.series.kronos_tokenizer.recipe import RECIPE

        return RECIPE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
