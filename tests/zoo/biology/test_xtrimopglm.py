"""Texts with blanks, the network against a plain transcription of GLM, and infilling from the command line."""

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
from arcore.catalog.claims import shaken
from arcore.cli import main
from arcore.data.proteins import read_fasta, write_fasta
from arcore.zoo.biology.xtrimopglm.blanks import (
    IGNORED,
    VOCABULARIES,
    blank,
    draw_spans,
    lesson,
    masked_tokens,
    padded,
)
from arcore.zoo.biology.xtrimopglm.claim import GOLDEN, bracket_accuracy, brackets
from arcore.zoo.biology.xtrimopglm.model import GLM, GLMConfig
from arcore.zoo.biology.xtrimopglm.recipe import BlankOptions, BlankSampling


class Protocol:
    """Texts with a blank each."""

    def __init__(self, preset: str) -> None:
        self.config = arcore.models.get_config(preset)
        self.specials = VOCABULARIES[self.config.vocabulary].specials
        self.texts = [torch.randint(1, 20, (18,)).tolist() for _ in range(3)]
        special: Any = {"mask": self.specials.span_mask, "sop": self.specials.sop, "eop": self.specials.eop}
        self.rows = [blank(text, [(9, 13), (2, 4)], **special) for text in self.texts]
        self.ids, self.targets, self.positions, self.prefix = (
            torch.stack(part) for part in zip(*self.rows, strict=True)
        )

    def forward(self, model: Any) -> Tensor:
        return model(self.ids, self.positions, self.prefix.tolist())

    def expected_shape(self) -> tuple[int, ...]:
        return (3, self.ids.shape[1], self.config.vocab_size)

    def loss(self, model: Any) -> Tensor:
        logits = model(self.ids, self.positions, int(self.prefix[0]))
        return F.cross_entropy(logits.flatten(0, 1), self.targets.flatten(), ignore_index=IGNORED)

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        prefix, length = int(self.prefix[0]), self.ids.shape[1]
        cache = model.make_cache(3, length)
        steps = [model.read(self.ids[:, :prefix], self.positions[..., :prefix], cache)]
        for i in range(prefix, length):
            steps.append(model.read(self.ids[:, i : i + 1], self.positions[..., i : i + 1], cache))
        return self.forward(model)[:, prefix - 1 :], torch.stack(steps, 1)

    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        parts = [self.ids[row, : int(self.prefix[row])].tolist() for row in rows]
        spans = [
            model.infill(part, max_new_tokens=5, least=5, seed=7 + row)
            for part, row in zip(parts, rows, strict=True)
        ]
        return [torch.tensor(spans)], model(
            self.ids[rows], self.positions[rows], self.prefix[rows].tolist()
        ).softmax(-1)


def transcription(
    state: dict[str, Tensor], ids: Tensor, positions: Tensor, prefix: int, heads: int
) -> Tensor:
    """GLM with learned tables, from the names of its published weights, in float64."""
    s = {name: value.double() for name, value in state.items()}
    x = s["word_embeddings.weight"][ids]
    x = x + s["transformer.position_embeddings.weight"][positions[0]]
    x = x + s["transformer.block_position_embeddings.weight"][positions[1]]
    length, dim = x.shape
    i, j = torch.arange(length).unsqueeze(1), torch.arange(length)
    visible = (j < prefix) | (j <= i)

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (dim,), s[f"{name}.weight"], s[f"{name}.bias"])

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    layer = 0
    while f"transformer.layers.{layer}.input_layernorm.weight" in s:
        first = f"transformer.layers.{layer}"
        h = norm(f"{first}.input_layernorm", x)
        q, k, v = linear(f"{first}.attention.query_key_value", h).chunk(3, -1)
        out = []
        for head in range(heads):
            part = slice(head * dim // heads, (head + 1) * dim // heads)
            scores = q[:, part] @ k[:, part].T / math.sqrt(dim // heads)
            out.append(scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v[:, part])
        x = x + linear(f"{first}.attention.dense", torch.cat(out, -1))
        h = linear(f"{first}.mlp.dense_h_to_4h", norm(f"{first}.post_attention_layernorm", x))
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + linear(f"{first}.mlp.dense_4h_to_h", h)
        layer += 1
    return norm("transformer.final_layernorm", x) @ s["word_embeddings.weight"].T


@torch.no_grad()
def test_published_names_load_and_give_the_plain_models_logits(tmp_path: Path):
    model: Any = shaken(arcore.create_model("glm_tiny")).eval()
    official = {}
    for name, value in model.state_dict().items():
        name = name.removeprefix("positions.")
        official[name if name.startswith("word_") else f"transformer.{name}"] = value.clone()
    torch.save({"module": official, "iteration": 3}, tmp_path / "mp_rank_00_model_states.pt")
    loaded: Any = arcore.create_model("glm_tiny", weights=tmp_path / "mp_rank_00_model_states.pt").eval()
    one = blank(list(range(1, 15)), [(8, 11), (2, 4)], mask=250, sop=251, eop=252)
    found = loaded(one.ids[None], one.positions[None], int(one.prefix))[0]
    expected = transcription(official, one.ids, one.positions, int(one.prefix), 4)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    official.pop("transformer.final_layernorm.bias")
    torch.save({"module": official}, tmp_path / "short.pt")
    with pytest.raises(ValueError, match=r"final_layernorm\.bias"):
        arcore.create_model("glm_tiny", weights=tmp_path / "short.pt")


def released(s: dict[str, Tensor], ids: Tensor, positions: Tensor, visible: Tensor, heads: int) -> Tensor:
    """xTrimoPGLM's layers written out, token by token and head by head, on weights under the released names."""
    x = s["transformer.embedding.word_embeddings.weight"][ids]
    dim, layers = x.shape[1], sum(key.endswith("input_layernorm.weight") for key in s)
    width, alpha = dim // heads, (2 * layers) ** 0.5

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (dim,), s[f"{name}.weight"], s[f"{name}.bias"])

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    def turned(x: Tensor) -> Tensor:
        parts = []
        for half, place in zip(x.chunk(2, -1), positions, strict=True):
            rates = 10000.0 ** -(torch.arange(0, width // 2, 2) / (width // 2))
            angles = (place[:, None] * rates).repeat(1, 2)
            first, second = half.chunk(2, -1)
            parts.append(half * angles.cos() + torch.cat([-second, first], -1) * angles.sin())
        return torch.cat(parts, -1)

    for i in range(layers):
        first = f"transformer.encoder.layers.{i}"
        h = norm(f"{first}.input_layernorm", x)
        mixed = linear(f"{first}.self_attention.query_key_value", h).view(len(ids), heads, 3 * width)
        out = []
        for head in range(heads):
            q, k, v = mixed[:, head].chunk(3, -1)
            scores = turned(q) @ turned(k).T / math.sqrt(width)
            out.append(scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v)
        x = alpha * h + linear(f"{first}.self_attention.dense", torch.cat(out, -1))
        h = norm(f"{first}.post_attention_layernorm", x)
        value, gate = linear(f"{first}.mlp.dense_h_to_4h", h).chunk(2, -1)
        x = alpha * h + linear(f"{first}.mlp.dense_4h_to_h", value * F.gelu(gate))
    return linear("transformer.output_layer", norm("transformer.encoder.final_layernorm", x))


@torch.no_grad()
def test_xtrimopglms_released_layout_loads_and_gives_its_logits(tmp_path: Path):
    model: Any = shaken(arcore.create_model("xtrimopglm_deep_tiny")).eval()
    official = {"transformer.encoder.layers.0.self_attention.rotary_emb.inv_freq": torch.ones(4)}
    for name, value in model.state_dict().items():
        if ".query_key_value." in name:  # q, k and v of a head stand together there
            value = value.unflatten(0, (3, 4, -1)).transpose(0, 1).flatten(0, 2)
        name = name.replace(".attention.", ".self_attention.").replace("head.", "output_layer.")
        place = {"word_embeddings": "embedding.", "output_layer": ""}.get(name.split(".")[0], "encoder.")
        official[f"transformer.{place}{name}"] = value.clone()
    torch.save(official, tmp_path / "pytorch_model.bin")
    loaded: Any = arcore.create_model("xtrimopglm_deep_tiny", weights=tmp_path / "pytorch_model.bin").eval()
    one = blank(list(range(1, 15)), [(8, 11), (2, 4)], mask=100, sop=101, eop=102)
    place = torch.arange(len(one.ids))
    visible = (place <= place[:, None]) | (place < int(one.prefix))
    expected = released(official, one.ids, one.positions, visible, 4)
    found = loaded(one.ids[None], one.positions[None], int(one.prefix))[0]
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    settings = {
        "hidden_size": 64, "num_layers": 3, "num_attention_heads": 4, "padded_vocab_size": 128, "deepnorm": True,
        "ffn_hidden_size": 128, "seq_length": 512, "glu_activation": "geglu", "rotary_embedding_2d": True,
        "apply_residual_connection_post_layernorm": True,
    }  # fmt: skip
    assert GLM.official_config(settings) == model.config
    for name, value in (("glu_activation", "swiglu"), ("rmsnorm", True), ("moe", True), ("deepnorm", False)):
        with pytest.raises(ValueError, match="but the config has"):
            GLM.official_config({**settings, name: value})


def test_deepnorm_begins_with_smaller_branches():
    torch.manual_seed(0)
    model: Any = arcore.create_model("xtrimopglm_deep_tiny")
    beta = 6**-0.5
    attention, mlp = model.layers[0].attention, model.layers[0].mlp
    q, k, v = attention.query_key_value.weight.chunk(3)
    for weight, wanted in (
        (q, 1), (k, 1), (v, beta), (attention.dense.weight, beta), (mlp.dense_h_to_4h.weight, beta),
        (mlp.dense_4h_to_h.weight, beta),
    ):  # fmt: skip
        assert float(weight.detach().std()) == pytest.approx(0.02 * wanted, rel=0.05)
    with pytest.raises(ValueError, match="expected norm pre or deep and mlp gelu or geglu but got 'post'"):
        GLMConfig(dim=8, num_layers=1, num_heads=2, vocab_size=9, norm="post")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hidden_dim to be at least 1"):
        GLMConfig(dim=8, num_layers=1, num_heads=2, vocab_size=9, hidden_dim=0)


@torch.no_grad()
def test_rotary_scores_depend_on_differences_of_both_positions():
    model: Any = shaken(arcore.create_model("xtrimopglm_tiny")).eval()
    ids = torch.randint(1, 20, (1, 9))
    positions = torch.randint(0, 6, (1, 2, 9))
    base = model(ids, positions, 9)
    shift = torch.tensor([7, 3])[None, :, None]
    assert (model(ids, positions + shift, 9) - base).abs().max() < 1e-4
    for axis in (0, 1):
        other = positions.clone()
        other[0, axis, 4] += 1
        assert (model(ids, other, 9) - base).abs().max() > 1e-3


def test_the_example_of_glms_own_code():
    one = blank([900, *range(1, 9)], [(6, 7), (2, 4)], mask=901, sop=904, eop=905)
    assert one.ids.tolist() == GOLDEN[0]
    assert one.targets.tolist() == [IGNORED] * 8 + GOLDEN[1]
    assert one.positions.tolist() == GOLDEN[2]
    assert int(one.prefix) == 8


@pytest.mark.parametrize("spans", [[(2, 4), (4, 5)], [(3, 3)], [(0, 10)], [(4, 6), (5, 7)]])
def test_spans_that_do_not_fit(spans: list[tuple[int, int]]):
    with pytest.raises(ValueError, match="not empty and do not touch"):
        blank(list(range(9)), spans, mask=1, sop=2, eop=3)


def test_spans_are_drawn_apart_and_hold_their_share():
    generator = torch.Generator().manual_seed(0)
    lengths = []
    for length in (1, 2, 5, 40, 400):
        for _ in range(50):
            spans = sorted(draw_spans(length, generator))
            assert all(0 <= a < b <= length for a, b in spans)
            assert all(b[0] > a[1] for a, b in itertools.pairwise(spans))
            if length == 400:
                assert sum(b - a for a, b in spans) == 60
                lengths += [b - a for a, b in spans]
    assert 2.7 < sum(lengths) / len(lengths) < 3.3


def test_tasks_and_padding():
    vocabulary, generator = VOCABULARIES["protein"], torch.Generator().manual_seed(0)
    specials, text = vocabulary.specials, vocabulary.encode("MKVLAGHWYQ" * 40)
    one = masked_tokens(text, specials, 27, generator)
    chosen = one.targets != IGNORED
    assert torch.equal(one.targets[chosen], torch.tensor(text)[chosen])
    assert torch.equal(one.ids[~chosen], torch.tensor(text)[~chosen])
    assert 0.10 < chosen.float().mean() < 0.20
    assert 0.65 < (one.ids[chosen] == specials.token_mask).float().mean() < 0.95
    end = lesson(text, vocabulary, generator, (0, 0, 1))
    assert specials.end_mask == int(end.ids[end.prefix - 1])
    assert vocabulary.decode(end.ids.tolist()) == "MKVLAGHWYQ" * 40
    longer = padded(end, 900)
    assert longer.ids.shape == (900,)
    assert (longer.targets[len(end.ids) :] == IGNORED).all()
    with pytest.raises(ValueError, match="does not fit into 10"):
        padded(end, 10)


def test_brackets_are_balanced():
    for row in brackets(20, 5, torch.Generator().manual_seed(0)).tolist():
        stack = []
        for token in row:
            if token < 5:
                stack.append(token)
            else:
                assert stack.pop() == token - 4
        assert stack == []


@pytest.mark.slow
def test_both_sides_fill_brackets_better():
    assert bracket_accuracy(True, count=400) > bracket_accuracy(False, count=400) + 0.2


def test_bad_input(tmp_path: Path):
    model: Any = arcore.create_model("xtrimopglm_tiny")
    with pytest.raises(ValueError, match="the text has no blank to fill"):
        model.infill([1, 2, 3])
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected positions \[B, 2, L\] for ids \(1, 3\)"):
        model(ids, torch.zeros(1, 3, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match="positions up to 512 but got 600"):
        model(ids, torch.full((1, 2, 3), 600), 0)
    with pytest.raises(ValueError, match="positions rotary or table"):
        GLMConfig(dim=8, num_layers=1, num_heads=1, vocab_size=9, positions="none")  # type: ignore[arg-type]
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be weights"):
            BlankOptions(spans=weight)
    with pytest.raises(ValueError, match="choose infill, generate or understand"):
        BlankSampling(task="write")  # type: ignore[arg-type]


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data, out = tmp_path / "some.fasta", str(tmp_path / "run")
    write_fasta(data, [(f"p{i}", "MKVLAGHWYQ" * (2 + i)) for i in range(12)])
    small = ["--context", "16", "--steps", "2", "--batch-size", "4"]
    assert main(["train", "xtrimopglm_tiny", "--data", str(data), *small, "--out", out]) == 0
    filled = tmp_path / "filled.fasta"
    assert main(["sample", out, "--prompt", "MKV__LAG_HW", "-n", "2", "--out", str(filled)]) == 0
    for _, text in read_fasta(filled, VOCABULARIES["protein"].symbols):
        assert text.startswith("MKV")
        assert text.endswith("HW")
        assert "LAG" in text
    assert main(["sample", out, "--task", "generate", "--prompt", "MKV", "--max-new-tokens", "9"]) == 0
    capsys.readouterr()
    vectors = tmp_path / "vectors.safetensors"
    assert main(["sample", out, "--task", "understand", "--prompt", str(data), "--out", str(vectors)]) == 0
    assert "pseudo-perplexity" in capsys.readouterr().out
    assert len(pytest.importorskip("safetensors.torch").load_file(vectors)) == 12
    for words, message in [
        (["--prompt", "MK1_"], "'1' is no amino acid"),
        (["--prompt", "MKV"], "mark what is to be filled in with _"),
        (["--prompt", "M_", "--task", "generate"], "leave _ out"),
        ([], 'give a text, or a FASTA file, with --prompt "..."'),
    ]:
        assert main(["sample", out, *words]) == 2
        assert message in capsys.readouterr().err
    data.write_text(">a\nMK1\n")
    assert main(["train", "xtrimopglm_tiny", "--data", str(data), "--out", str(tmp_path / "bad")]) == 2
    assert "some.fasta:2: column 3: '1'" in capsys.readouterr().err
