"""Kronos against a transcription of the released network and of its loop in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import arcore
from arcore.catalog.checkpoints import save_pretrained
from arcore.catalog.claims import shaken
from arcore.data import Series
from arcore.decoding.sampling import Sampling
from arcore.zoo.series._kronos_layers import packed_paths
from arcore.zoo.series._ohlcv import CANDLE, candles
from arcore.zoo.series.kronos import Kronos, KronosConfig, kronos_tiny
from arcore.zoo.series.kronos.generating import generate_paths
from arcore.zoo.series.kronos.recipe import RECIPE, KronosSampling, tokenizer_preset
from arcore.zoo.series.kronos_tokenizer import KronosTokenizer, kronos_tokenizer_tiny

from .test_kronos_tokenizer import attention, block, layer_shapes, turned

SIZES: dict[str, Any] = {
    "dim": 16,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 24,
    "s1_bits": 3,
    "s2_bits": 4,
}
TABLES = (("minute", 60), ("hour", 24), ("weekday", 7), ("day", 32), ("month", 13))


class Protocol:
    """Tokens of candles."""

    def __init__(self, preset: str) -> None:
        self.config = arcore.models.get_config(preset)
        self.s1, self.s2 = (
            torch.randint(2**bits, (3, 24)) for bits in (self.config.s1_bits, self.config.s2_bits)
        )
        self.dates = torch.stack([torch.randint(1, n, (3, 24)) for _, n in TABLES], -1)
        self.dates[..., 0] = torch.arange(24)
        self.values = torch.randn(3, 20, 6)

    def forward(self, model: Any) -> Tensor:
        following = self.s1.roll(-1, 1)
        return torch.cat(list(model(self.s1, self.s2, self.dates, following)), -1)

    def expected_shape(self) -> tuple[int, ...]:
        return (3, 24, 2**self.config.s1_bits + 2**self.config.s2_bits)

    def loss(self, model: Any) -> Tensor:
        # Rows of the calendar's tables that the batch does not name have no gradient.
        unused = sum(table.weight.square().sum() for table in model.calendar)
        return model.objective(self.s1, self.s2, self.dates)[0] + 1e-6 * unused

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        """One pass, and the last row of longer and longer windows."""
        parts = []
        for t in range(24):
            hidden = model.hidden(self.s1[:, : t + 1], self.s2[:, : t + 1], self.dates[:, : t + 1])
            following = self.s1.roll(-1, 1)[:, : t + 1]
            parts.append(torch.cat([model.coarse(hidden), model.fine(hidden, following)], -1)[:, -1])
        return self.forward(model), torch.stack(parts, 1)

    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(0)
        tokenizer = KronosTokenizer(kronos_tokenizer_tiny()).eval()
        dates = self.dates[rows]
        seeds = [7 + row for row in rows]
        out = generate_paths(model, tokenizer, self.values[rows], dates, 4, paths=3, seed=seeds)
        return [out.s1.movedim(1, 0), out.s2.movedim(1, 0)], out.values.movedim(1, 0).tanh()


def published() -> dict[str, Tensor]:
    """Random weights under the released names."""
    torch.manual_seed(0)
    cross = "dep_layer.cross_attn."
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.emb_s1.weight": (8, 16),
        "embedding.emb_s2.weight": (16, 16),
    }
    shapes |= {
        "embedding.fusion_proj.weight": (16, 32),
        "embedding.fusion_proj.bias": (16,),
        "norm.weight": (16,),
    }
    shapes |= {f"time_emb.{name}_embed.weight": (rows, 16) for name, rows in TABLES}
    for i in range(2):
        shapes |= layer_shapes(f"transformer.{i}.", 16, 24, 8)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= {f"{cross}{name}.weight": (16, 16), f"{cross}{name}.bias": (16,)}
    shapes |= {f"{cross}rotary.inv_freq": (2,), "dep_layer.norm.weight": (16,)}
    shapes |= {"head.proj_s1.weight": (8, 16), "head.proj_s1.bias": (8,)}
    shapes |= {"head.proj_s2.weight": (16, 16), "head.proj_s2.bias": (16,)}
    return {name: 0.4 * torch.randn(shape) for name, shape in shapes.items()}


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def linear(w: dict[str, Tensor], x: Tensor, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def hidden(w: dict[str, Tensor], s1: Tensor, s2: Tensor, dates: Tensor) -> Tensor:
    both = torch.cat([w["embedding.emb_s1.weight"][s1] * 4, w["embedding.emb_s2.weight"][s2] * 4], -1)
    x = linear(w, both, "embedding.fusion_proj")
    for i, (name, _) in enumerate(TABLES):
        x = x + w[f"time_emb.{name}_embed.weight"][dates[:, i]]
    for i in range(2):
        x = block(w, f"transformer.{i}.", x, 2)
    return norm(x, w["norm.weight"])


def fine(w: dict[str, Tensor], context: Tensor, following: Tensor, *, rope: bool) -> Tensor:
    """The released dependency layer of training (`rope`), or with one query as in generation."""
    cross = "dep_layer.cross_attn."
    q = linear(w, w["embedding.emb_s1.weight"][following], f"{cross}q_proj").unflatten(1, (4, -1))
    k, v = (linear(w, context, f"{cross}{name}_proj").unflatten(1, (4, -1)) for name in "kv")
    if rope:
        q, k = turned(q), turned(k)
    mixed = linear(w, attention(q, k, v, causal=rope), f"{cross}out_proj")
    return linear(w, norm(context + mixed, w["dep_layer.norm.weight"]), "head.proj_s2")


@pytest.fixture
def released(tmp_path: Path) -> tuple[Any, dict[str, Tensor]]:
    state = published()
    save_file(state, tmp_path / "model.safetensors")
    model = arcore.create_model("kronos_tiny", weights=tmp_path / "model.safetensors", **SIZES).eval()
    return model, {name: value.double() for name, value in state.items()}


@torch.no_grad()
def test_released_weights_give_the_numbers_of_a_transcription(released: Any):
    model, w = released
    s1, s2, following = torch.randint(8, (11,)), torch.randint(16, (11,)), torch.randint(8, (11,))
    dates = torch.stack([torch.randint(n, (11,)) for _, n in TABLES], -1)
    context = hidden(w, s1, s2, dates)
    trained = model(s1[None], s2[None], dates[None], following[None], "causal_rope")
    drawn = model(s1[None], s2[None], dates[None], following[None], "official_generate")
    close: dict[str, float] = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(trained.s1[0].double(), linear(w, context, "head.proj_s1"), **close)
    torch.testing.assert_close(trained.s2[0].double(), fine(w, context, following, rope=True), **close)
    for t in range(11):
        one = fine(w, context[: t + 1], following[t : t + 1], rope=False)[-1]
        torch.testing.assert_close(drawn.s2[0, t].double(), one, **close)
    assert (trained.s2 - drawn.s2).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("mode", ["official_generate", "causal_rope"])
@pytest.mark.parametrize("max_length", [256, 23, 17])
def test_greedy_paths_are_those_of_the_released_loop(mode: Any, max_length: int):
    """Also where the rows slide: a window of 20 rows and 6 candles with room for 23, or for fewer than the window."""
    model = shaken(Kronos(replace(kronos_tiny(), dependency=mode, max_length=max_length))).eval()
    tokenizer = shaken(KronosTokenizer(kronos_tokenizer_tiny())).eval()
    values, dates = torch.randn(2, 20, 6), torch.randint(0, 7, (2, 26, 5))
    s1, s2 = tokenizer.encode(values.clamp(-5, 5))
    for step in range(20, 26):
        start = max(0, step - max_length)
        context = model.hidden(s1[:, start:], s2[:, start:], dates[:, start:step])
        first = model.coarse(context[:, -1]).argmax(-1, keepdim=True)
        given = torch.cat([s1[:, start + 1 :], first], 1)
        second = model.fine(context, given)[:, -1].argmax(-1, keepdim=True)
        s1, s2 = torch.cat([s1, first], 1), torch.cat([s2, second], 1)
    rows = min(26, max_length)
    expected = tokenizer.decode(s1[:, -rows:], s2[:, -rows:])[:, -6:]
    for cached in (True, False):
        out = generate_paths(
            model, tokenizer, values, dates, 6, paths=2, sampling=Sampling(temperature=0.0), cached=cached
        )
        for path in range(2):
            assert torch.equal(out.s1[path], s1[:, 20:])
            assert torch.equal(out.s2[path], s2[:, 20:])
            torch.testing.assert_close(out.values[path], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_path_does_not_depend_on_how_many_there_are():
    model, tokenizer = Kronos(kronos_tiny()).eval(), KronosTokenizer(kronos_tokenizer_tiny()).eval()
    values, dates = torch.randn(1, 9, 6), torch.zeros(1, 14, 5, dtype=torch.int64)
    many = generate_paths(model, tokenizer, values, dates, 5, paths=7, seed=3)
    few = generate_paths(model, tokenizer, values, dates, 5, paths=2, seed=3)
    assert torch.equal(many.s1[:2], few.s1)
    assert len({tuple(path.tolist()) for path in many.s1[:, 0]}) > 1
    one = generate_paths(model, tokenizer, values, dates[:, :10], 1, paths=1, seed=3)
    assert one.values.shape == (1, 1, 1, 6)
    none = generate_paths(model, tokenizer, values[:0], dates[:0], 5, paths=2)
    assert none.values.shape == (2, 0, 5, 6)


def test_training_predicts_s2_with_a_drawn_or_the_true_s1():
    s1, s2 = torch.randint(64, (2, 3, 12))
    dates = torch.zeros(3, 12, 5, dtype=torch.int64)
    torch.manual_seed(0)
    taught = Kronos(kronos_tiny()).train()
    drawing = Kronos(replace(kronos_tiny(), teacher_forcing=False)).train()
    drawing.load_state_dict(taught.state_dict())
    found = [
        float(model.objective(s1, s2, dates)[1]["ce_s2"]) for model in (taught, taught, drawing, drawing)
    ]
    assert found[0] == found[1]
    assert len(set(found[1:])) == 3
    assert float(drawing.eval().objective(s1, s2, dates)[1]["ce_s2"]) == pytest.approx(found[0], abs=1e-5)


def test_paths_behind_a_prefix_see_it_and_themselves():
    mask, positions = packed_paths(3, 2, 2, torch.device("cpu"))
    assert mask.to_bool()[0, 0].long().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 1, 0],
        [1, 1, 1, 0, 0, 1, 1],
    ]
    assert positions.tolist() == [0, 1, 2, 3, 4, 3, 4]


def test_what_does_not_fit_is_refused(released: Any):
    model, _ = released
    tokenizer = KronosTokenizer(kronos_tokenizer_tiny()).eval()
    values, dates = torch.randn(1, 9, 6), torch.zeros(1, 14, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="do not belong together"):
        generate_paths(model, tokenizer, values, dates, 5)
    with pytest.raises(ValueError, match=r"a calendar of shape \[1, 9 \+ 4, 5\]"):
        generate_paths(model, tokenizer, values, dates, 4)
    with pytest.raises(ValueError, match="paths must be at least 1"):
        generate_paths(model, tokenizer, values, dates, 5, paths=0)
    with pytest.raises(ValueError, match="T from 1 to 256"):
        model.hidden(torch.zeros(1, 300, dtype=torch.int64), torch.zeros(1, 300, dtype=torch.int64))
    with pytest.raises(ValueError, match="dependency to be"):
        KronosConfig(**SIZES, dependency="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dim to be a multiple of 8"):
        KronosConfig(**{**SIZES, "dim": 12})


def test_candles_of_a_table():
    values = torch.arange(12.0).double().view(2, 6)
    one = candles(Series("a", ("Close", "Open", "HIGH", "low", "Volume", "note"), values))
    assert one.columns == ("open", "high", "low", "close", "volume", "amount")
    assert one.values[0].tolist() == [1, 2, 3, 0, 4, 4 * 1.5]
    bare = candles(Series("a", ("close", "open", "high", "low"), values[:, :4]))
    assert bare.values[:, 4:].tolist() == [[0, 0], [0, 0]]
    with pytest.raises(ValueError, match=r"t\.csv has no column 'open': candles need open, high, low, close"):
        candles(Series("a", ("close", "x"), values[:, :2], file="t.csv"))


def test_published_models_want_dates(tmp_path: Path):
    for preset, folder in (
        ("kronos_tiny", tmp_path / "k"),
        (tokenizer_preset("kronos_tiny"), tmp_path / "t"),
    ):
        save_pretrained(arcore.create_model(preset), folder)
    options = KronosSampling(tokenizer=tmp_path / "t")
    networks, facts = RECIPE.published("kronos_tiny", tmp_path / "k", options)
    bare = Series("a", CANDLE, torch.ones(9, 6, dtype=torch.float64), file="candles.csv")
    with pytest.raises(ValueError, match=r"candles\.csv: the model was trained on rows with dates"):
        RECIPE.check_columns(networks["model"], facts, [bare])
