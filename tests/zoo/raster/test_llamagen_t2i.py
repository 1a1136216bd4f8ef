"""LlamaGen for captions: the released layout against a transcription, padding, and captions from a file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.catalog.claims import shaken
from arcore.cli import main
from arcore.decoding import (
    LookupDrafter,
    ModelDrafter,
    TreeShape,
    generate,
    speculative_chain,
    speculative_tree,
)
from arcore.zoo.raster._captions import CaptionSampling, encode_caption, read_captions
from arcore.zoo.raster.llamagen_t2i import LlamaGenText, LlamaGenTextConfig

CONFIG = LlamaGenTextConfig(
    dim=64, num_layers=3, num_heads=4, vocab_size=32, side=4, caption_tokens=7, caption_dim=24
)


class Protocol:
    """Codes in raster order behind captions of several lengths."""

    def __init__(self, preset: str) -> None:
        self.config = arcore.models.get_config(preset)
        self.length = self.config.side**2
        self.codes = torch.randint(self.config.vocab_size, (3, self.length))
        places = self.config.caption_tokens
        self.captions = torch.randn(3, places, self.config.caption_dim)
        self.mask = torch.arange(places) >= torch.tensor([[0], [2], [places - 1]])

    def forward(self, model: Any) -> Tensor:
        return model(self.codes, self.captions, self.mask)

    def expected_shape(self) -> tuple[int, ...]:
        return (3, self.length, self.config.vocab_size)

    def loss(self, model: Any) -> Tensor:
        # What stands for no caption learns where captions are dropped.
        none = model.no_caption
        # Of a sharded network the whole of it.
        none = (none.full_tensor() if hasattr(none, "full_tensor") else none).expand(3, -1, -1)
        with warnings.catch_warnings():
            # torch.compile looks at .grad of what comes in, which is no leaf here.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
            found = [self.forward(model), model(self.codes, none, self.mask)]
        return sum(F.cross_entropy(one.flatten(0, 1), self.codes.flatten()) for one in found)

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        bound = model.captioned(self.captions, self.mask)
        cache = bound.make_cache(3, self.config.caption_tokens + self.length)
        parts = [bound.prefill(bound.prompt(torch.zeros(3)), cache, self.mask)]
        parts += [bound.step(self.codes[:, i], cache) for i in range(self.length - 1)]
        return self.forward(model), torch.stack(parts, dim=1)

    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        captions, mask = self.captions[rows], self.mask[rows]
        bound = model.captioned(captions, mask)
        prompt, seeds = bound.prompt(torch.zeros(len(rows))), [7 + r for r in rows]
        out = generate(bound.guided(1.5), prompt, mask=mask, max_new_tokens=self.length, top_k=3, seed=seeds)
        return [out.ids], model(out.ids, captions, mask).softmax(-1)


def published(config: LlamaGenTextConfig) -> dict[str, Tensor]:
    """Random weights under the released names."""
    torch.manual_seed(0)
    dim, wide = config.dim, config.hidden_dim
    shapes = {
        "cls_embedding.uncond_embedding": (config.caption_tokens, config.caption_dim),
        "cls_embedding.cap_proj.fc1.weight": (dim, config.caption_dim),
        "cls_embedding.cap_proj.fc2.weight": (dim, dim),
        "tok_embeddings.weight": (config.vocab_size, dim),
        "norm.weight": (dim,),
        "output.weight": (config.vocab_size, dim),
    }
    for i in range(config.num_layers):
        shapes |= {
            f"layers.{i}.attention.wqkv.weight": (3 * dim, dim),
            f"layers.{i}.attention.wo.weight": (dim, dim),
            f"layers.{i}.feed_forward.w1.weight": (wide, dim),
            f"layers.{i}.feed_forward.w3.weight": (wide, dim),
            f"layers.{i}.feed_forward.w2.weight": (dim, wide),
            f"layers.{i}.attention_norm.weight": (dim,),
            f"layers.{i}.ffn_norm.weight": (dim,),
        }
    return {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()} | {"freqs_cis": torch.zeros(1)}


def transcription(
    state: dict[str, Tensor],
    config: LlamaGenTextConfig,
    codes: Tensor,
    caption: Tensor | None,
    mask: Tensor,
    added: dict[int, Tensor] | None = None,
) -> Tensor:
    """The released network in float64 for one image: a dense mask, rotary positions as complex factors.

    `added` holds what is added to the states that predict codes in front of some layers, `[L, C]` each.
    """
    w = {name: value.double() for name, value in state.items()}
    head, heads, front = config.dim // config.num_heads, config.num_heads, config.caption_tokens
    given = w["cls_embedding.uncond_embedding"] if caption is None else caption.double()
    inner = F.gelu(given @ w["cls_embedding.cap_proj.fc1.weight"].T, approximate="tanh")
    x = torch.cat([inner @ w["cls_embedding.cap_proj.fc2.weight"].T, w["tok_embeddings.weight"][codes[:-1]]])
    half = head // 2
    rates = 1 / config.rope_theta ** (torch.arange(0, half, 2).double() / half)
    factor = torch.zeros(len(x), half, dtype=torch.complex128)
    for p in range(front, len(x)):
        row, column = divmod(p - front, config.side)
        factor[p] = torch.polar(torch.ones(half).double(), torch.cat([row * rates, column * rates]))
    allowed = torch.ones(len(x), len(x)).tril().bool()
    allowed[:, :front] &= mask
    allowed |= torch.eye(len(x)).bool()

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + config.norm_eps).rsqrt() * weight

    def turn(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (half, 2)).contiguous())
        return torch.view_as_real(pairs * factor.unsqueeze(1)).flatten(-2)

    for i in range(config.num_layers):
        first = f"layers.{i}."
        if added is not None and i in added:
            x = torch.cat([x[: front - 1], x[front - 1 :] + added[i]])
        qkv = norm(x, w[f"{first}attention_norm.weight"]) @ w[f"{first}attention.wqkv.weight"].T
        q, k, v = (part.unflatten(-1, (heads, head)) for part in qkv.chunk(3, dim=-1))
        scores = torch.einsum("ihd,jhd->hij", turn(q), turn(k)) / head**0.5
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        mixed = torch.einsum("hij,jhd->ihd", weights, v).flatten(1)
        x = x + mixed @ w[f"{first}attention.wo.weight"].T
        y = norm(x, w[f"{first}ffn_norm.weight"])
        gate, up = (y @ w[f"{first}feed_forward.{name}.weight"].T for name in ("w1", "w3"))
        x = x + (F.silu(gate) * up) @ w[f"{first}feed_forward.w2.weight"].T
    return (norm(x, w["norm.weight"]) @ w["output.weight"].T)[front - 1 :]


@torch.no_grad()
def test_the_published_layout_gives_the_numbers_of_a_transcription(tmp_path: Path) -> None:
    state = published(CONFIG)
    torch.save({"model": state}, tmp_path / "t2i.pt")
    fields = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
    model: Any = arcore.create_model("llamagen_t2i_tiny", weights=tmp_path / "t2i.pt", **fields).eval()
    codes, captions = torch.randint(32, (3, 16)), torch.randn(3, 7, 24)
    mask = torch.arange(7) >= torch.tensor([[0], [3], [6]])
    expected = torch.stack(
        [transcription(state, CONFIG, *row) for row in zip(codes, captions, mask, strict=True)]
    )
    tolerance = 1e-5 * expected.abs().max()
    assert (model(codes, captions, mask) - expected).abs().max() <= tolerance
    # The branch without captions keeps the padding of the captions.
    none = torch.stack([transcription(state, CONFIG, c, None, m) for c, m in zip(codes, mask, strict=True)])
    guided = model.captioned(captions, mask).guided(2.5)
    cache = guided.make_cache(3, 7 + 16)
    parts = [guided.prefill(model.prompt(torch.zeros(3)), cache, mask)]
    parts += [guided.step(codes[:, i], cache) for i in range(15)]
    mixed = none + 2.5 * (expected - none)
    assert (torch.stack(parts, 1) - mixed).abs().max() <= 1e-5 * mixed.abs().max()
    broken = {**state, "extra": torch.zeros(1)}
    torch.save({"model": broken}, tmp_path / "t2i.pt")
    with pytest.raises(ValueError, match="extra"):
        arcore.create_model("llamagen_t2i_tiny", weights=tmp_path / "t2i.pt", **fields)


@torch.no_grad()
def test_rows_of_one_length_with_captions_of_several_are_at_their_own_places() -> None:
    # Drafts bring rows with captions of two and of four tokens to the same number of tokens.
    model: Any = shaken(LlamaGenText(CONFIG)).eval()
    captions = torch.randn(2, 7, 24)
    mask = torch.arange(7) >= torch.tensor([[3], [5]])
    bound = model.captioned(captions, mask)
    prompt = bound.prompt(torch.zeros(2))
    plain = generate(bound, prompt, mask=mask, max_new_tokens=16, seed=3, top_k=2).ids
    for drafter in (LookupDrafter(3), ModelDrafter(bound, shape=TreeShape.full(2, 2))):
        out = speculative_tree(bound, drafter, prompt, mask=mask, max_new_tokens=16, seed=3, top_k=2)
        assert torch.equal(out.ids, plain)
    for row in range(2):
        one = model.captioned(captions[row : row + 1], mask[row : row + 1])
        alone = speculative_chain(
            one,
            LookupDrafter(3),
            prompt[:1],
            mask=mask[row : row + 1],
            max_new_tokens=16,
            top_k=2,
            seed=[int(torch.arange(2)[row])],
        )
        assert alone.ids.shape == (1, 16)


def test_the_sizes_are_the_published_ones() -> None:
    with torch.device("meta"):
        model = LlamaGenText(arcore.models.get_config("llamagen_t2i_xl_256"))
    assert model.caption.fc1.weight.shape == (1280, 2048)
    assert model.no_caption.shape == (120, 2048)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx(775, abs=10)


def test_captions_from_a_file_make_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = arcore.create_model("vq16_tiny")
    config = arcore.models.get_config(
        "llamagen_t2i_tiny", vocab_size=tokenizer.vocab_size, side=tokenizer.side
    )
    model = shaken(LlamaGenText(config))
    arcore.models.save_checkpoint(tmp_path / "run", {"model": model, "tokenizer": tokenizer}, {})
    torch.save({"captions": torch.randn(2, 6, 16), "mask": torch.arange(6) >= torch.tensor([[0], [4]])},
               tmp_path / "two.pt")  # fmt: skip
    asked = ["sample", str(tmp_path / "run"), "--captions", str(tmp_path / "two.pt"), "-n", "3"]
    asked += ["--out", str(tmp_path / "x.png")]
    assert main(asked) == 0
    assert main([*asked, "--decoder", "jacobi", "--window", "4", "--cfg", "1"]) == 0
    assert "2 captions" in capsys.readouterr().out
    assert (tmp_path / "x.png").is_file()
    assert main(["train", "llamagen_t2i_tiny", "--out", str(tmp_path / "t")]) == 2
    assert "is not trained here" in capsys.readouterr().err


def test_refuses_what_does_not_fit(tmp_path: Path) -> None:
    model = LlamaGenText(CONFIG)
    codes = torch.zeros(1, 16, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected captions of shape"):
        model(codes, torch.zeros(1, 8, 24))
    with pytest.raises(ValueError, match="padding only before"):
        model(codes, torch.zeros(1, 7, 24), torch.tensor([[True] * 6 + [False]]))
    with pytest.raises(ValueError, match="captions come first"):
        model.guided(2.0)
    with pytest.raises(ValueError, match=r"none was given: use model\.captioned"):
        model.prefill(model.prompt(torch.zeros(1)), model.make_cache(1, 9))
    with pytest.raises(ValueError, match="expected 2 captions, one per row, but got 1"):
        bound = model.captioned(torch.zeros(1, 7, 24))
        bound.prefill(model.prompt(torch.zeros(2)), bound.make_cache(2, 9))
    torch.save({"captions": torch.zeros(1, 3, 24)}, tmp_path / "short.pt")
    with pytest.raises(ValueError, match="pad short captions on the left"):
        read_captions(tmp_path / "short.pt", 7, 24)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match='with "captions" of shape'):
        read_captions(tmp_path / "broken.safetensors", 7, 24)
    with pytest.raises(FileNotFoundError):
        read_captions(tmp_path / "no.pt", 7, 24)
    for options, complaint in (
        ({}, "say what to draw"),
        ({"caption": "a cat"}, "--caption and --t5 go together"),
        ({"label": "3", "captions": tmp_path / "short.pt"}, "--class is for models of classes"),
    ):
        with pytest.raises(ValueError, match=complaint):
            CaptionSampling(**options)


def test_a_t5_makes_the_embeddings(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"a": 0, "cat": 1, "<unk>": 2}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(tmp_path)
    config = transformers.T5Config(vocab_size=8, d_model=24, d_kv=8, d_ff=16, num_layers=1, num_heads=3)
    encoder = transformers.T5EncoderModel(config).eval()
    encoder.save_pretrained(tmp_path)
    found, mask = encode_caption("a cat", tmp_path, 7, 24)
    assert mask.tolist() == [[False] * 5 + [True] * 2]
    with torch.no_grad():
        expected = encoder(input_ids=torch.tensor([[0, 1]])).last_hidden_state
    torch.testing.assert_close(found[:, 5:], expected)
    with pytest.raises(ValueError, match="encoder of width 2048"):
        encode_caption("a cat", tmp_path, 120, 2048)
