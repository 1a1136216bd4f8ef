"""Infinity: the published names, sizes and arithmetic, sampling, and runs from the command line."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.catalog import create_model, load_checkpoint, load_weights
from arcore.catalog.claims import shaken
from arcore.recipes import recipe_for
from arcore.training import train
from arcore.zoo.next_scale.infinity.config import InfinityConfig
from arcore.zoo.next_scale.infinity.draw import draw_bits
from arcore.zoo.next_scale.infinity.model import Infinity, bit_loss
from arcore.zoo.next_scale.infinity.text import Text, t5_vectors, word_vectors

SETTINGS = {"steps": 2, "batch_size": 32, "checkpoint_every": 2, "accelerator": "cpu", "warmup": 0}
SMALL: dict[str, Any] = {
    "depth": 4,
    "embed_dim": 32,
    "num_heads": 2,
    "mlp_dim": 64,
    "bits": 6,
    "patch_nums": (1, 2, 3),
    "grid": 5,
    "text_dim": 24,
    "text_length": 7,
    "pool_heads": 4,
}


class Protocol:
    """How the model contract drives it."""

    def __init__(self, preset: str) -> None:
        self.tokenizer: Any = shaken(create_model("msbsq_tiny")).eval()
        self.config = arcore.models.get_config(preset)
        sizes = [side * side for side in self.config.patch_nums]
        self.bits = [torch.rand(3, size, self.config.bits) < 0.5 for size in sizes]
        self.inputs = self.tokenizer.scale_inputs(self.bits).detach()
        self.text = word_vectors(["a 3 and a 7", "four", "the digit on the left"], self.config.text_dim)
        self.dropped = torch.tensor([False, True, False])

    def forward(self, model: Any) -> Tensor:
        return model(self.inputs, self.text)

    def expected_shape(self) -> tuple[int, ...]:
        return (3, sum(side * side for side in self.config.patch_nums), self.config.bits, 2)

    def loss(self, model: Any) -> Tensor:
        return bit_loss(model(self.inputs, self.text, self.dropped), self.bits)

    def told(self, model: Any, rows: list[int]) -> Any:
        return model.tell(Text(self.text.vectors[rows], self.text.lengths[rows]))

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        told, cache = self.told(model, [0, 1, 2]), model.make_cache(3)
        parts = [
            model.scale_logits(k, None if k == 0 else self.inputs[:, start - 1 : stop - 1], told, cache)
            for k, (start, stop) in enumerate(itertools.pairwise(model.scale_starts))
        ]
        return self.forward(model), torch.cat(parts, 1)

    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        with torch.no_grad():
            told = self.told(model, rows)
        drawn = draw_bits(model, self.tokenizer, told, seed=[7 + row for row in rows])
        return drawn.bits, drawn.images


def official_shapes(config: InfinityConfig, chunks: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the files that the authors publish."""
    c, t, hidden = config.embed_dim, config.text_dim, config.mlp_dim
    shapes: dict[str, tuple[int, ...]] = {
        "cfg_uncond": (config.text_length, t),
        "pos_start": (1, 1, c),
        "text_norm.weight": (t,),
        "text_proj_for_sos.ca.mat_q": (1, config.pool_heads, c // config.pool_heads),
        "text_proj_for_sos.ca.v_bias": (c,),
        "text_proj_for_sos.ca.zero_k_bias": (c,),
        "text_proj_for_sos.ca.mat_kv.weight": (2 * c, t),
        "text_proj_for_sos.ca.proj.weight": (c, c),
        "text_proj_for_sos.ca.proj.bias": (c,),
        "text_proj_for_ca.0.weight": (c, t),
        "text_proj_for_ca.0.bias": (c,),
        "text_proj_for_ca.2.weight": (c, c),
        "text_proj_for_ca.2.bias": (c,),
        "lvl_embed.weight": (15, c),
        "word_embed.weight": (c, config.bits),
        "word_embed.bias": (c,),
        "shared_ada_lin.1.weight": (6 * c, c),
        "shared_ada_lin.1.bias": (6 * c,),
        "head_nm.ada_lin.1.weight": (2 * c, c),
        "head_nm.ada_lin.1.bias": (2 * c,),
        "head.weight": (2 * config.bits, c),
        "head.bias": (2 * config.bits,),
    }
    block: dict[str, tuple[int, ...]] = {
        "ada_gss": (1, 1, 6, c),
        "sa.scale_mul_1H11": (1, config.num_heads, 1, 1),
        "sa.q_bias": (c,),
        "sa.v_bias": (c,),
        "sa.zero_k_bias": (c,),
        "sa.mat_qkv.weight": (3 * c, c),
        "sa.proj.weight": (c, c),
        "sa.proj.bias": (c,),
        "ca.v_bias": (c,),
        "ca.zero_k_bias": (c,),
        "ca.mat_q.weight": (c, c),
        "ca.mat_q.bias": (c,),
        "ca.mat_kv.weight": (2 * c, c),
        "ca.proj.weight": (c, c),
        "ca.proj.bias": (c,),
        "ffn.fc1.weight": (hidden, c),
        "ffn.fc1.bias": (hidden,),
        "ffn.fc2.weight": (c, hidden),
        "ffn.fc2.bias": (c,),
        "ca_norm.weight": (c,),
        "ca_norm.bias": (c,),
    }
    per = config.depth // chunks
    for i in range(config.depth):
        prefix = f"block_chunks.{i // per}.module.{i % per}" if chunks > 1 else f"blocks.{i}"
        shapes |= {f"{prefix}.{name}": shape for name, shape in block.items()}
    return shapes


def official_weights(config: InfinityConfig, chunks: int) -> dict[str, Tensor]:
    """Random weights in that form."""
    state = {name: 0.3 * torch.randn(shape) for name, shape in official_shapes(config, chunks).items()}
    return {name: value * 0 if name.endswith("zero_k_bias") else value for name, value in state.items()}


def norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def turned(x: Tensor, places: list[tuple[int, int]]) -> Tensor:
    """Rotary positions of rows and columns, pair by pair."""
    out, half = x.clone(), x.shape[-1] // 2
    for token, place in enumerate(places):
        for pair in range(half):
            axis, number = divmod(pair, half // 2)
            angle = place[axis] * 10000.0 ** (-2 * number / half)
            one, two = x[..., token, 2 * pair], x[..., token, 2 * pair + 1]
            out[..., token, 2 * pair] = one * math.cos(angle) - two * math.sin(angle)
            out[..., token, 2 * pair + 1] = one * math.sin(angle) + two * math.cos(angle)
    return out


def places_of(patch_nums: tuple[int, ...], grid: int) -> list[tuple[int, int]]:
    """Where on the finest grid the tokens of all scales stand."""
    return [
        (round(row * grid / side), round(column * grid / side))
        for side in patch_nums
        for row in range(side)
        for column in range(side)
    ]


class Textbook:
    """The published forward pass of one row, written out from its formulas with dense attention.

    Args:
        weights: under the published names, in one list of blocks.
        config: settings.
    """

    def __init__(self, weights: dict[str, Tensor], config: InfinityConfig) -> None:
        self.w, self.config = weights, config

    def linear(self, x: Tensor, name: str) -> Tensor:
        out = x @ self.w[f"{name}.weight"].T
        return out + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else out

    def heads(self, x: Tensor, heads: int | None = None) -> Tensor:
        return x.unflatten(-1, (heads or self.config.num_heads, -1)).transpose(0, 1)

    def keys(self, x: Tensor, name: str, bias: str | None = None, heads: int | None = None) -> list[Tensor]:
        k, v = self.linear(x, f"{name}").chunk(2, -1)
        return [
            self.heads(k, heads),
            self.heads(v + self.w[bias or f"{name[: -len('.mat_kv')]}.v_bias"], heads),
        ]

    def soft(self, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | float = 0.0) -> Tensor:
        return ((q @ k.transpose(-1, -2) * scale + bias).softmax(-1) @ v).transpose(0, 1).flatten(1)

    def unit(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)

    def read(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """The text's vector and its tokens."""
        w, config = self.w, self.config
        text = text / (text.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w["text_norm.weight"]
        k, v = self.keys(text, "text_proj_for_sos.ca.mat_kv", heads=config.pool_heads)
        q = w["text_proj_for_sos.ca.mat_q"].transpose(0, 1)  # [H, 1, D]
        found = self.soft(q, k, v, (config.embed_dim // config.pool_heads) ** -0.5)
        pooled = self.linear(found, "text_proj_for_sos.ca.proj")[0]
        hidden = F.gelu(self.linear(text, "text_proj_for_ca.0"), approximate="tanh")
        return pooled, self.linear(hidden, "text_proj_for_ca.2")

    def ffn(self, x: Tensor, name: str) -> Tensor:
        return self.linear(F.gelu(self.linear(x, f"{name}.fc1"), approximate="tanh"), f"{name}.fc2")

    def qkv(self, h: Tensor, block: str, places: list[tuple[int, int]]) -> list[Tensor]:
        w = self.w
        q, k, v = self.linear(h, f"{block}.sa.mat_qkv").chunk(3, -1)
        q, k, v = (
            self.heads(q + w[f"{block}.sa.q_bias"]),
            self.heads(k),
            self.heads(v + w[f"{block}.sa.v_bias"]),
        )
        warm = w[f"{block}.sa.scale_mul_1H11"][0].clamp(max=math.log(100)).exp()
        return [turned(self.unit(q) * warm, places), turned(self.unit(k), places), v]

    def cross(self, x: Tensor, name: str, keys: list[Tensor]) -> Tensor:
        q = self.heads(self.linear(x, f"{name}.mat_q"))
        scale = (self.config.embed_dim // self.config.num_heads) ** -0.5
        return self.linear(self.soft(q, *keys, scale), f"{name}.proj")

    def affine(self, x: Tensor, name: str) -> Tensor:
        return norm(x) * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def scales(self, front: int = 0) -> Tensor:
        """The scale of each token."""
        sizes = [side * side for side in self.config.patch_nums]
        return torch.tensor([0] * front + [k for k, size in enumerate(sizes) for _ in range(size)])

    def logits(self, x: Tensor, pooled: Tensor) -> Tensor:
        scale, shift = self.linear(F.silu(pooled), "head_nm.ada_lin.1").chunk(2, -1)
        return self.linear(norm(x) * (1 + scale) + shift, "head").unflatten(-1, (self.config.bits, 2))

    def forward(self, inputs: Tensor, text: Tensor) -> Tensor:
        w, config = self.w, self.config
        pooled, context = self.read(text)
        x = torch.cat([pooled + w["pos_start"][0], self.linear(inputs, "word_embed")])
        level = self.scales()
        x = x + w["lvl_embed.weight"][level]
        allowed = torch.where(level[:, None] >= level[None], 0.0, -math.inf)
        places = places_of(config.patch_nums, config.grid)
        shared = self.linear(F.silu(pooled), "shared_ada_lin.1").view(6, -1)
        for i in range(config.depth):
            b = f"blocks.{i}"
            gate1, gate2, scale1, scale2, shift1, shift2 = shared + w[f"{b}.ada_gss"][0, 0]
            q, k, v = self.qkv(norm(x) * (1 + scale1) + shift1, b, places)
            x = x + gate1 * self.linear(self.soft(q, k, v, 1.0, allowed), f"{b}.sa.proj")
            x = x + self.cross(
                self.affine(x, f"{b}.ca_norm"), f"{b}.ca", self.keys(context, f"{b}.ca.mat_kv")
            )
            x = x + gate2 * self.ffn(norm(x) * (1 + scale2) + shift2, f"{b}.ffn")
        return self.logits(x, pooled)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [1, 2])
def test_published_checkpoint_gives_published_arithmetic(tmp_path: Path, chunks: int):
    config = InfinityConfig(**SMALL)
    torch.save(official_weights(config, chunks), tmp_path / "infinity.pth")
    model = Infinity(config).eval()
    load_weights(model, tmp_path / "infinity.pth")
    plain = official_weights(config, 1)
    state = torch.load(tmp_path / "infinity.pth", weights_only=True)
    per = config.depth // chunks
    for i in range(config.depth if chunks > 1 else 0):
        old, new = f"block_chunks.{i // per}.module.{i % per}.", f"blocks.{i}."
        state |= {
            new + name[len(old) :]: value for name, value in list(state.items()) if name.startswith(old)
        }
    book = Textbook({name: state[name] for name in plain}, config)
    inputs, vectors, lengths = torch.randn(3, 13, 6), torch.randn(3, 7, 24), torch.tensor([7, 1, 4])
    found = model(inputs, Text(vectors, lengths))
    for row, length in enumerate(lengths.tolist()):
        wanted = book.forward(inputs[row], vectors[row, :length])
        torch.testing.assert_close(found[row], wanted, rtol=1e-5, atol=1e-4)
    # The second row without its text.
    dropped = model(inputs, Text(vectors, lengths), torch.tensor([False, True, False]))
    null = book.forward(inputs[1], state["cfg_uncond"][:1])
    torch.testing.assert_close(dropped[1], null, rtol=1e-5, atol=1e-4)
    assert torch.equal(dropped[0], found[0])


@pytest.mark.parametrize(
    ("preset", "chunks", "millions"),
    [
        ("infinity_125m", 4, 125.15),
        ("infinity_2b", 8, 2204.6),
        ("infinity_8b", 8, 8375.8),
        ("infinity_20b", 1, 19952.2),
    ],
)
def test_published_sizes(preset: str, chunks: int, millions: float):
    with torch.device("meta"):
        model: Any = create_model(preset)
    state = {
        name: torch.empty(shape, device="meta")
        for name, shape in official_shapes(model.config, chunks).items()
        if not name.endswith("zero_k_bias")
    }
    ours = model.from_official(state)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-4)


@pytest.fixture
def parts() -> tuple[Any, Any, Text]:
    tokenizer = shaken(create_model("msbsq_tiny")).eval()
    model = shaken(create_model("infinity_tiny"), scale=0.3).eval()
    return model, tokenizer, word_vectors(["a 3 and a 7", "four"], 64)


@torch.no_grad()
def test_guidance_on_logits_and_between_blocks(parts: tuple[Any, Any, Text]):
    model, tokenizer, text = parts
    null = model.null(text.lengths)
    both = Text(torch.cat([text.vectors, null.vectors]), text.lengths.repeat(2))
    alone = draw_bits(model, tokenizer, model.tell(text), seed=3)
    for more in ({}, {"guide_at": -2}):
        same = draw_bits(model, tokenizer, model.tell(both), guidance=(1.0,), seed=3, **more)
        assert all(torch.equal(one, two) for one, two in zip(alone.bits, same.bits, strict=True)) or more
    nothing = draw_bits(model, tokenizer, model.tell(null), seed=3)
    zero = draw_bits(model, tokenizer, model.tell(both), guidance=(0.0,), seed=3)
    assert all(torch.equal(one, two) for one, two in zip(nothing.bits, zero.bits, strict=True))
    # By hand at the first scale, where a bit is 1 where the guided logit of 1 is larger.
    strong = draw_bits(model, tokenizer, model.tell(both), guidance=([4.0, 1, 1, 1, 1],), temperature=0.0)
    told = model.tell(both)
    logits = model.scale_logits(0, None, told, model.make_cache(4))
    mixed = 4 * logits[:2] - 3 * logits[2:]
    assert torch.equal(strong.bits[0], mixed[..., 1] > mixed[..., 0])
    with pytest.raises(ValueError, match="one strength of guidance, or 5 of them"):
        draw_bits(model, tokenizer, told, guidance=([1.0, 2.0],))
    with pytest.raises(ValueError, match="guide_at to be 0, or from -3 to -1"):
        draw_bits(model, tokenizer, told, guidance=(2.0,), guide_at=-4)
    with pytest.raises(ValueError, match="2 copies of each picture but got 3 rows"):
        draw_bits(model, tokenizer, model.tell(word_vectors(["a", "b", "c"], 64)), guidance=(2.0,))
    other = create_model("msbsq_tiny", patch_nums=(1, 2, 4, 6))
    with pytest.raises(ValueError, match="the same scales and bits"):
        draw_bits(model, other, told)


@torch.no_grad()
def test_top_p_drops_the_less_likely_value(parts: tuple[Any, Any, Text]):
    model, tokenizer, text = parts
    rows = Text(text.vectors[:1].expand(200, -1, -1), text.lengths[:1].expand(200))
    told = model.tell(rows)
    chance = model.scale_logits(0, None, told, model.make_cache(200))[0, 0].softmax(-1)  # [d, 2]
    free = draw_bits(model, tokenizer, told, seed=1).bits[0][:, 0].float().mean(0)
    kept = draw_bits(model, tokenizer, told, seed=1, top_p=0.6).bits[0][:, 0].float().mean(0)
    assert (free - chance[:, 1]).abs().max() < 0.14
    sure = chance.max(1).values >= 0.6
    assert sure.any()
    assert torch.equal(kept[sure], (chance[sure, 1] > 0.5).float())


def test_words_have_vectors_of_their_own():
    one = word_vectors(["a 3 and a 7", "A 3"], 64)
    assert one.lengths.tolist() == [5, 2]
    assert torch.equal(one.vectors[0, :2], one.vectors[1, :2])
    assert torch.equal(one.vectors[1, 2:], torch.zeros(3, 64))
    # The same word at two places differs by its place alone.
    a = one.vectors[0, 0] - one.vectors[0, 3]
    assert 0 < a.abs().max() <= 2
    assert word_vectors([""], 8).lengths.tolist() == [1]


def test_texts_that_do_not_fit(parts: tuple[Any, Any, Text]):
    model, _, text = parts
    with pytest.raises(ValueError, match="1 to 24 tokens but got 25"):
        model.tell(word_vectors(["a " * 25], 64))
    with pytest.raises(ValueError, match=r"vectors \[B, T, 64\]"):
        model.tell(Text(text.vectors[..., :8], text.lengths))
    with pytest.raises(ValueError, match="scale 1 while the cache holds 0"):
        model.scale_logits(1, torch.zeros(2, 4, 8), model.tell(text), model.make_cache(2))
    with pytest.raises(ValueError, match=r"\(2, 65, 8\)"):
        model(torch.zeros(2, 64, 8), text)
    with pytest.raises(ValueError, match="multiple of 4 channels"):
        InfinityConfig(**{**SMALL, "num_heads": 16})


def test_text_through_t5(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "3", "7", "and"])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
    fast.save_pretrained(tmp_path)
    config = transformers.T5Config(
        vocab_size=7, d_model=24, d_kv=8, num_layers=1, num_heads=2, d_ff=16, feed_forward_proj="gated-gelu"
    )
    encoder = transformers.T5EncoderModel(config).eval()
    encoder.save_pretrained(tmp_path)
    text = t5_vectors(["a 3 and a 7", "a 7"], tmp_path, 24)
    assert text.lengths.tolist() == [5, 2]
    with torch.no_grad():
        alone = encoder(input_ids=torch.tensor([[3, 5]])).last_hidden_state[0]
    torch.testing.assert_close(text.vectors[1, :2], alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="width 2048 but its width is 24"):
        t5_vectors(["a"], tmp_path, 2048)
    with pytest.raises(FileNotFoundError, match="--text-encoder"):
        t5_vectors(["a"], tmp_path / "nowhere", 24)


def pictures(folder: Path) -> str:
    """A few grey pictures of two classes."""
    from PIL import Image

    for name, value in (("cat", 40), ("dog", 190)):
        (folder / name).mkdir(parents=True)
        for number in range(6):
            Image.new("L", (24, 24), value + number).save(folder / name / f"{number}.png")
    return str(folder)


def test_from_the_command_line(tmp_path: Path, capsys: Any):
    from arcore.cli import main

    run, out = tmp_path / "run", str(tmp_path / "x.png")
    data = pictures(tmp_path / "data")
    assert recipe_for("infinity_tiny").options().data == "scenes"
    train("infinity_tiny", out=run, settings=SETTINGS, tokenizer_steps=1, show_progress=False, data=data)
    model = load_checkpoint(next(run.glob("step-*")))[0]["model"]
    assert model.config.patch_nums == (1, 2, 3, 4, 6)
    capsys.readouterr()
    drawn = ["sample", str(run), "--prompt", "a 3 and a 7", "-n", "2", "--out", out]
    assert main([*drawn, "--cfg", "2", "--tau", "0.5", "--guide-at", "-1"]) == 0
    assert "2 x 'a 3 and a 7'" in capsys.readouterr().out
    assert main(["sample", str(run)]) == 2
    assert "--prompt TEXT" in capsys.readouterr().err
    assert main([*drawn, "--cfg", "2", "3"]) == 2
    assert "or 5 of them" in capsys.readouterr().err
    with torch.device("meta"):
        big = create_model("infinity_125m")
    assert big.config.text_dim == 2048
    weights = tmp_path / "w.pth"
    weights.write_bytes(b"")
    assert main(["sample", "infinity_125m", "--weights", str(weights), "--prompt", "x"]) == 2
    assert "--tokenizer FILE" in capsys.readouterr().err
    train("vq16_tiny", out=tmp_path / "vq", settings=SETTINGS, data="digits", show_progress=False)
    with pytest.raises(ValueError, match="none of bits"):
        train(
            "infinity_tiny",
            out=tmp_path / "y",
            settings=SETTINGS,
            tokenizer=tmp_path / "vq",
            show_progress=False,
            data=data,
        )
