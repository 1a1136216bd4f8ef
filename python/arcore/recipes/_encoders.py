"""Networks that start from a pretrained encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from arcore.catalog import create_model, load_checkpoint
from arcore.nn.kinds import check_kinds
from arcore.recipes._recipe import Start
from arcore.training import checkpoint


@check_kinds
@dataclass(frozen=True, kw_only=True)
class PretrainedOptions:
    """Start from a pretrained encoder.

    Attributes:
        pretrained: run folder or checkpoint of a pretrained encoder to start from, or a file of published weights, with
            `encoder`. Default: random weights.
        encoder: preset of the published weights in `pretrained`, such as arm_base_pz16.
    """

    pretrained: Path | None = None
    encoder: str | None = None

    def __post_init__(self) -> None:
        if self.encoder is not None and self.pretrained is None:
            raise ValueError(
                f"encoder says whose weights `pretrained` holds: give the file of {self.encoder} too"
            )


def from_encoder(start: Start, options: PretrainedOptions, overrides: Mapping[str, Any]) -> nn.Module:
    """A new network of the preset, which takes over what a pretrained encoder knows; it has `start_from(encoder)`.

    Raises:
        ValueError: the network starts from no encoder, or from another one.
    """
    model = start.fresh(**overrides)
    if options.pretrained is None:
        return model
    begin: Any = getattr(model, "start_from", None)
    if begin is None:
        raise ValueError(f"{start.preset} does not start from a pretrained encoder: leave that out")
    if options.encoder is not None:
        encoder: Any = create_model(options.encoder, weights=options.pretrained)
    else:
        networks, _ = load_checkpoint(checkpoint.find(options.pretrained))
        if "model" not in networks:
            raise ValueError(
                f"{options.pretrained} holds no pretrained encoder such as roma_tiny but {', '.join(networks)}"
            )
        encoder = networks["model"]
    try:
        begin(encoder)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the encoder in {options.pretrained} does not fit {start.preset}: {error}"
        ) from error
    return model
