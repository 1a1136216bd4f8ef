"""Mamba: settings and presets."""

from __future__ import annotations

from dataclasses import dataclass

from arcore.catalog import Published, preset
from arcore.nn.kinds import check_kinds
from arcore.zoo.state_space._attention import AttentionSettings
from arcore.zoo.state_space._common import NEOX


@check_kinds
@dataclass(frozen=True, kw_only=True)
class StateSpaceConfig(AttentionSettings):
    """What Mamba and Mamba-2 have in common.

    Attributes:
        d_model: width C.
        n_layer: layers.
        vocab_size: tokens that mean something.
        pad_vocab_size_multiple: embedding and logits have `vocab_size` rounded up to a multiple of this.
        d_state: states per channel.
        d_conv: taps of the convolution.
        expand: inner channels over C.
        bias: biases in the projections in and out.
        conv_bias: biases in the convolution.
        norm_eps: of the norms.
        residual_in_fp32: keep the residual stream in float32 when the weights are of lower precision.
        tie_embeddings: the last linear layer is the embedding.
        d_intermediate: width of a gated network after each mixer, rounded up to a multiple of 128; 0: none.
        rms_norm: RMS norms; False: layer norms.
        others: those of `AttentionSettings`, for layers of attention between those of state spaces.

    Raises:
        ValueError: a size is below 1, `d_intermediate` below 0, or the settings of the attention do not fit together.
    """

    d_model: int
    n_layer: int
    vocab_size: int = 50277
    pad_vocab_size_multiple: int = 8
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    bias: bool = False
    conv_bias: bool = True
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    tie_embeddings: bool = True
    d_intermediate: int = 0
    rms_norm: bool = True

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple", "d_state", "expand"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        if self.d_intermediate < 0:
            raise ValueError(f"expected d_intermediate to be at least 0 but got {self.d_intermediate}")
        self.check_attention(self.d_model, self.n_layer)


@check_kinds
@dataclass(frozen=True, kw_only=True)
class MambaConfig(StateSpaceConfig):
    """Settings of `Mamba`. The defaults are those of the published models.

    Attributes:
        dt_rank: rank of the step sizes; ceil(C / 16) when None.
        others: those of `StateSpaceConfig`.
    """

    dt_rank: int | None = None


@preset
def mamba_tiny() -> MambaConfig:
    """Bytes as tokens; trains on a CPU in minutes."""
    return MambaConfig(d_model=128, n_layer=4, vocab_size=256)


@preset(weights=Published("state-spaces/mamba-130m", "pytorch_model.bin", ("config.json",), NEOX))
def mamba_130m() -> MambaConfig:
    """The Pile, GPT-NeoX tokens; weights: state-spaces/mamba-130m."""
    return MambaConfig(d_model=768, n_layer=24)


@preset(weights=Published("state-spaces/mamba-370m", "pytorch_model.bin", ("config.json",), NEOX))
def mamba_370m() -> MambaConfig:
    """The Pile, GPT-NeoX tokens; weights: state-spaces/mamba-370m."""
    return MambaConfig(d_model=1024, n_layer=48)


@preset(weights=Published("state-spaces/mamba-790m", "pytorch_model.bin", ("config.json",), NEOX))
def mamba_790m() -> MambaConfig:
    """The Pile, GPT-NeoX tokens; weights: state-spaces/mamba-790m."""
    return MambaConfig(d_model=1536, n_layer=48)


@preset(weights=Published("state-spaces/mamba-1.4b", "pytorch_model.bin", ("config.json",), NEOX))
def mamba_1_4b() -> MambaConfig:
    """The Pile, GPT-NeoX tokens; weights: state-spaces/mamba-1.4b."""
    return MambaConfig(d_model=2048, n_layer=48)


@preset(weights=Published("state-spaces/mamba-2.8b", "pytorch_model.bin", ("config.json",), NEOX))
def mamba_2_8b() -> MambaConfig:
    """The Pile, GPT-NeoX tokens; weights: state-spaces/mamba-2.8b."""
    return MambaConfig(d_model=2560, n_layer=64)
