"""LlamaGen against its published layout, transcribed with complex numbers as the released code computes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.decoding import GuidedModel
from arcore.zoo.raster.llamagen import LlamaGen, LlamaGenConfig

CONFIG = LlamaGenConfig(
    dim=64, num_layers=3, num_heads=4, num_kv_heads=2, vocab_size=32, side=4, num_classes=5
)


def published(config: LlamaGenConfig) -> dict[str, Tensor]:
    """Random weights under the released names."""
    torch.manual_seed(0)
    head = config.dim // config.num_heads
    kv = (config.num_kv_heads or config.num_heads) * head
    shapes = {
        "cls_embedding.embedding_table.weight": (config.num_classes + 1, config.dim),
        "tok_embeddings.weight": (config.vocab_size, config.dim),
        "norm.weight": (config.dim,),
        "output.weight": (config.vocab_size, config.dim),
    }
    for i in range(config.num_layers):
        shapes |= {
            f"layers.{i}.attention.wqkv.weight": (config.dim + 2 * kv, config.dim),
            f"layers.{i}.attention.wo.weight": (config.dim, config.dim),
            f"layers.{i}.feed_forward.w1.weight": (config.hidden_dim, config.dim),
            f"layers.{i}.feed_forward.w3.weight": (config.hidden_dim, config.dim),
            f"layers.{i}.feed_forward.w2.weight": (config.dim, config.hidden_dim),
            f"layers.{i}.attention_norm.weight": (config.dim,),
            f"layers.{i}.ffn_norm.weight": (config.dim,),
        }
    return {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()} | {"freqs_cis": torch.zeros(1)}


def transcription(state: dict[str, Tensor], config: LlamaGenConfig, codes: Tensor, label: int) -> Tensor:
    """The released network in float64 for one image, rotary positions as complex factors of neighbouring channels."""
    w = {name: value.double() for name, value in state.items()}
    head, heads = config.dim // config.num_heads, config.num_heads
    kv_heads = config.num_kv_heads or heads
    x = torch.cat(
        [w["cls_embedding.embedding_table.weight"][[label]], w["tok_embeddings.weight"][codes[:-1]]]
    )
    half = head // 2
    rates = 1 / config.rope_theta ** (torch.arange(0, half, 2).double() / half)
    factor = torch.zeros(len(x), half, dtype=torch.complex128)
    for p in range(1, len(x)):
        row, column = divmod(p - 1, config.side)
        factor[p] = torch.polar(torch.ones(half).double(), torch.cat([row * rates, column * rates]))

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + config.norm_eps).rsqrt() * weight

    def turn(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (half, 2)).contiguous())
        return torch.view_as_real(pairs * factor.unsqueeze(1)).flatten(-2)

    for i in range(config.num_layers):
        first = f"layers.{i}."
        qkv = norm(x, w[f"{first}attention_norm.weight"]) @ w[f"{first}attention.wqkv.weight"].T
        q, k, v = qkv.split([heads * head, kv_heads * head, kv_heads * head], dim=-1)
        q, k = turn(q.unflatten(-1, (heads, head))), turn(k.unflatten(-1, (kv_heads, head)))
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v.unflatten(-1, (kv_heads, head))))
        scores = torch.einsum("ihd,jhd->hij", q, k) / head**0.5
        scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
        mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)
        x = x + mixed @ w[f"{first}attention.wo.weight"].T
        y = norm(x, w[f"{first}ffn_norm.weight"])
        gate, up = (y @ w[f"{first}feed_forward.{name}.weight"].T for name in ("w1", "w3"))
        x = x + (F.silu(gate) * up) @ w[f"{first}feed_forward.w2.weight"].T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


@torch.no_grad()
def test_the_published_layout_gives_the_numbers_of_a_transcription(tmp_path: Any) -> None:
    state = published(CONFIG)
    torch.save({"model": state}, tmp_path / "c2i.pt")
    fields = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
    model = arcore.create_model("llamagen_tiny", weights=tmp_path / "c2i.pt", **fields).eval()
    codes, labels = torch.randint(32, (2, 16)), torch.tensor([1, 5])
    expected = torch.stack(
        [transcription(state, CONFIG, c, int(n)) for c, n in zip(codes, labels, strict=True)]
    )
    assert (model(codes, labels) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_names_and_sizes_are_the_published_ones() -> None:
    with torch.device("meta"):
        model = LlamaGen(arcore.models.get_config("llamagen_b"))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx(111, abs=1)
    left = published(CONFIG)
    left.pop("layers.1.feed_forward.w3.weight")
    ours = LlamaGen(CONFIG).from_official(left)
    assert "layers.1.feed_forward.w1.weight" in ours
    assert "layers.1.mlp.gate_up.weight" not in ours


@torch.no_grad()
def test_the_class_token_is_seen_with_logit_zero() -> None:
    model = LlamaGen(CONFIG)
    model.load_state_dict(model.from_official(published(CONFIG)))
    angles = model.rotary.at(torch.tensor([0, 1, 17, 40]))
    assert not angles.cos[0, 0].any() and not angles.sin[0, 0].any()
    # The first code stands at row 0, column 0: nothing turns.
    assert torch.equal(angles.cos[0, 1], torch.ones_like(angles.cos[0, 1]))
    assert torch.equal(angles.cos[0, 2], angles.cos[0, 3])
    assert torch.equal(
        model.rotary.span(0, 20, torch.device("cpu")).cos, model.rotary.at(torch.arange(20)).cos
    )


def test_refuses_what_does_not_fit() -> None:
    model = LlamaGen(CONFIG)
    with pytest.raises(ValueError, match="labels from 0 to 5"):
        model(torch.zeros(1, 4, dtype=torch.int64), torch.tensor([6]))
    with pytest.raises(ValueError, match="ids from 0 to 37"):
        model.prefill(torch.tensor([[38]]), model.make_cache(1, 4))
    with pytest.raises(ValueError, match="multiple of 4"):
        LlamaGenConfig(dim=24, num_layers=1, num_heads=4)
    assert isinstance(model.guided(2.0), GuidedModel)
