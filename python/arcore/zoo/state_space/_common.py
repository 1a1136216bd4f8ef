"""What the config.json beside published Mamba and Mamba-2 weights says, of the authors' code or of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arcore.zoo.state_space._attention import official_attention

# Whose tokenizer the published models of state-spaces were trained with.
NEOX = "EleutherAI/gpt-neox-20b"


def original_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """What configs of the authors' code say about the network around the mixers, attention layers included."""
    names = (
        "d_model",
        "n_layer",
        "d_intermediate",
        "vocab_size",
        "pad_vocab_size_multiple",
        "residual_in_fp32",
        "tie_embeddings",
    )
    fields = {name: content[name] for name in names if name in content} | official_attention(content)
    return fields if content.get("rms_norm", True) else fields | {"rms_norm": False}


def original_layers(content: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What configs of the authors' code say about the mixers.

    Raises:
        ValueError: the mixers are of another kind.
    """
    ssm = dict(content.get("ssm_cfg") or {})
    found = ssm.pop("layer", "Mamba1")
    if found != kind:
        raise ValueError(f"expected layers of kind {kind} but ssm_cfg has {found}")
    return ssm


def no_more(ssm: Mapping[str, Any]) -> None:
    """Raise ValueError if settings of the mixers are left that are not just about initialisation."""
    left = [name for name in ssm if not name.startswith(("dt_m", "dt_init", "dt_scale", "A_init"))]
    if left:
        raise ValueError(f"ssm_cfg has unknown settings: {', '.join(sorted(left))}")


def transformers_config(content: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """What configs of transformers say about Mamba and Mamba-2 alike.

    Raises:
        ValueError: it is the config of another model.
    """
    if content.get("model_type") != model_type:
        raise ValueError(
            f"expected d_model (the authors' code) or model_type={model_type!r} (transformers) but got "
            f"model_type={content.get('model_type')!r}"
        )
    if content.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"expected hidden_act='silu' but got {content['hidden_act']!r}")
    return {
        "d_model": content["hidden_size"],
        "n_layer": content["num_hidden_layers"],
        "vocab_size": content["vocab_size"],
        "pad_vocab_size_multiple": 1,
        "d_conv": content.get("conv_kernel", 4),
        "expand": int(content.get("expand", 2)),
        "bias": content.get("use_bias", False),
        "conv_bias": content.get("use_conv_bias", True),
        "norm_eps": content.get("layer_norm_epsilon", 1e-5),
        "residual_in_fp32": content.get("residual_in_fp32", True),
        "tie_embeddings": content.get("tie_word_embeddings", model_type == "mamba"),
    }
