"""Kronos's tokenizer against a transcription of the released network and quantiser in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import arcore
from arcore.nn.bsq import BinarySphericalQuantizer, bits_of, index_of
from arcore.zoo.series.kronos_tokenizer import KronosTokenizer, KronosTokenizerConfig

SIZES: dict[str, Any] = {
    "dim": 16,
    "num_heads": 2,
    "hidden_dim": 24,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "s1_bits": 4,
    "s2_bits": 4,
}


class Protocol:
    """Candles to tokens and back."""

    def __init__(self, preset: str) -> None:
        self.values = torch.randn(3, 24, 6)

    def forward(self, model: Any) -> Tensor:
        return model(self.values).full

    def expected_shape(self) -> tuple[int, ...]:
        return (3, 24, 6)

    def loss(self, model: Any) -> Tensor:
        return model.objective(self.values, torch.zeros(3, 24, 5, dtype=torch.int64))[0]

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        """Encoded and decoded at once, and row by row: both are causal."""
        parts = [model.decode(*model.encode(self.values[:, : t + 1]))[:, t] for t in range(24)]
        return self.forward(model), torch.stack(parts, 1)

    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        tokens = model.encode(self.values[rows])
        return list(tokens), model.decode(*tokens).tanh()


def layer_shapes(first: str, dim: int, hidden: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{first}norm1.weight": (dim,), f"{first}norm2.weight": (dim,)}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= {f"{first}self_attn.{name}.weight": (dim, dim), f"{first}self_attn.{name}.bias": (dim,)}
    shapes |= {f"{first}ffn.{name}.weight": (hidden, dim) for name in ("w1", "w3")}
    return shapes | {
        f"{first}ffn.w2.weight": (dim, hidden),
        f"{first}self_attn.rotary.inv_freq": (head_dim // 2,),
    }


def published() -> dict[str, Tensor]:
    """Random weights under the released names."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"embed": (16, 6), "head": (6, 16), "quant_embed": (8, 16)}
    shapes |= {"post_quant_embed_pre": (16, 4), "post_quant_embed": (16, 8)}
    shapes = {f"{name}.weight": s for name, s in shapes.items()} | {
        f"{n}.bias": s[:1] for n, s in shapes.items()
    }
    for part, count in (("encoder", 2), ("decoder", 1)):
        for i in range(count):
            shapes |= layer_shapes(f"{part}.{i}.", 16, 24, 8)
    state = {name: 0.4 * torch.randn(shape) for name, shape in shapes.items()}
    return state | {
        "tokenizer.bsq.basis": 2 ** torch.arange(8),
        "tokenizer.bsq.group_basis": 2 ** torch.arange(4),
    }


def block(w: dict[str, Tensor], first: str, x: Tensor, heads: int) -> Tensor:
    """The released layer in float64, `[T, D]`."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w[f"{first}{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{first}self_attn.{name}.weight"].T + w[f"{first}self_attn.{name}.bias"]

    y = norm(x, "norm1")
    q, k, v = (linear(y, name).unflatten(1, (heads, -1)) for name in ("q_proj", "k_proj", "v_proj"))
    mixed = attention(turned(q), turned(k), v, causal=True)
    x = x + linear(mixed, "out_proj")
    y = norm(x, "norm2")
    gate, up, down = (w[f"{first}ffn.{name}.weight"] for name in ("w1", "w3", "w2"))
    return x + (F.silu(y @ gate.T) * (y @ up.T)) @ down.T


def turned(x: Tensor) -> Tensor:
    """Rotary angles from position 0 on for `[T, H, D]`, as complex factors of channels i and i + D / 2."""
    half = x.shape[-1] // 2
    rates = 10000.0 ** (-torch.arange(half).double() / half)
    factor = torch.polar(torch.ones(len(x), half).double(), torch.arange(len(x)).double()[:, None] * rates)
    pairs = torch.complex(x[..., :half], x[..., half:]) * factor[:, None]
    return torch.cat([pairs.real, pairs.imag], -1)


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)


@torch.no_grad()
def test_released_weights_give_the_numbers_of_a_transcription(tmp_path: Path):
    state = published()
    save_file(state, tmp_path / "model.safetensors")
    model: Any = arcore.create_model(
        "kronos_tokenizer_tiny", weights=tmp_path / "model.safetensors", **SIZES
    ).eval()
    w = {name: value.double() for name, value in state.items()}
    values = torch.randn(2, 13, 6)
    s1, s2 = model.encode(values)
    for row in range(2):
        x = values[row].double() @ w["embed.weight"].T + w["embed.bias"]
        for i in range(2):
            x = block(w, f"encoder.{i}.", x, 2)
        z = x @ w["quant_embed.weight"].T + w["quant_embed.bias"]
        bits = z > 0
        expected = [sum(int(bit) << j for j, bit in enumerate(four)) for four in bits[:, :4].tolist()]
        assert s1[row].tolist() == expected
        codes = (bits.double() * 2 - 1) / 8**0.5
        decoded = []
        for name, part in (("post_quant_embed", codes), ("post_quant_embed_pre", codes[:, :4])):
            x = part @ w[f"{name}.weight"].T + w[f"{name}.bias"]
            decoded.append(block(w, "decoder.0.", x, 2) @ w["head.weight"].T + w["head.bias"])
        torch.testing.assert_close(model.decode(s1, s2)[row].double(), decoded[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.decode_coarse(s1)[row].double(), decoded[1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(values).coarse[row].double(), decoded[1], rtol=1e-4, atol=1e-4)


def test_the_config_beside_published_weights_is_read(tmp_path: Path):
    save_file(published(), tmp_path / "model.safetensors")
    content = {"d_in": 6, "d_model": 16, "n_heads": 2, "ff_dim": 24, "n_enc_layers": 3, "n_dec_layers": 2}
    content |= {
        "s1_bits": 4,
        "s2_bits": 4,
        "beta": 0.1,
        "gamma0": 1.0,
        "gamma": 1.1,
        "zeta": 0.05,
        "group_size": 4,
    }
    content |= {f"{name}_dropout_p": 0.2 for name in ("ffn", "attn", "resid")}
    (tmp_path / "config.json").write_text(json.dumps(content))
    model: Any = arcore.create_model("kronos_tokenizer", weights=tmp_path)
    assert model.config == KronosTokenizerConfig(**SIZES, beta=0.1)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="heads of width 8 but the model has 4: change num_heads"):
        arcore.create_model(
            "kronos_tokenizer_tiny",
            weights=str(tmp_path / "model.safetensors"),
            **{**SIZES, "num_heads": 4, "beta": 0.1},
        )


def test_the_quantiser_is_its_formula():
    quantizer = BinarySphericalQuantizer(8, group=4, beta=0.05, gamma0=0.7, gamma=1.1, zeta=0.3)
    z = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    out = quantizer(z)
    unit = z / z.norm(dim=-1, keepdim=True)
    codes = unit.sign() / 8**0.5
    torch.testing.assert_close(out.codes, codes)
    (gradient,) = torch.autograd.grad(out.codes[0, 0, 0], z, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(unit[0, 0, 0], z, retain_graph=True)[0])
    certain, sums = 0.0, torch.zeros(2, 16, dtype=torch.float64)
    for row in unit.flatten(0, 1):
        for value in row:
            p = torch.sigmoid(-4 * value / 8**0.5)
            certain = certain - p * (p + 1e-8).log() - (1 - p) * (1 - p + 1e-8).log()
        for g in range(2):
            corner = torch.stack([bits_of(torch.tensor(c), 4).double() * 2 - 1 for c in range(16)]) / 8**0.5
            sums[g] += (2 * corner @ row[4 * g : 4 * g + 4]).softmax(0)
    shares = sums / 10
    spread = -(shares * (shares + 1e-8).log()).sum()
    expected = 0.05 * (codes - unit).square().sum(-1).mean() + 0.3 * (0.7 * certain / 10 - 1.1 * spread)
    torch.testing.assert_close(out.loss, expected)
    with pytest.raises(ValueError, match="expected group to divide bits=8"):
        BinarySphericalQuantizer(8, group=3)


def test_bits_and_indices():
    index = torch.arange(1024)
    assert torch.equal(index_of(bits_of(index, 10)), index)
    assert bits_of(torch.tensor(5), 4).tolist() == [True, False, True, False]


def test_wrong_candles_and_configs():
    with pytest.raises(ValueError, match=r"expected candles of shape \[B, T, 6\]"):
        KronosTokenizer(KronosTokenizerConfig(**SIZES))(torch.zeros(2, 5, 4))
    with pytest.raises(ValueError, match="at least 2 layers"):
        KronosTokenizerConfig(encoder_layers=1)
    with pytest.raises(ValueError, match="multiple of 2"):
        KronosTokenizerConfig(dim=30, num_heads=4)


def test_prices_must_vary_and_volumes_need_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Only what candles cannot do without is refused."""
    from arcore.cli import main

    table = tmp_path / "prices.csv"
    rows = [f"{10 + i % 5},{12 + i % 5},{9 + i % 5},5.0,7" for i in range(300)]
    table.write_text("open,high,low,close,volume\n" + "\n".join(rows) + "\n")
    command = [
        "train",
        "kronos_tokenizer_tiny",
        "--data",
        str(table),
        "--out",
        str(tmp_path / "run"),
        "--steps",
        "1",
    ]
    assert main(command) == 2
    assert "prices.csv does not vary in the training rows" in capsys.readouterr().err
    changing = [f"{10 + i % 5},{12 + i % 5},{9 + i % 5},{11 + i % 5},7" for i in range(300)]
    table.write_text("open,high,low,close,volume\n" + "\n".join(changing) + "\n")
    assert main(command) == 0
