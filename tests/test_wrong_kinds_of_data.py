"""Wrong kinds of values for data sets, decoders, the catalogue and training: our errors.

As tests/test_wrong_kinds_of_parts.py; what stands in tests/test_wrong_kinds.py, with words of its own, is not repeated.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import arcore
from arcore import catalog, data, decoding, training
from tests import test_wrong_kinds
from tests.kinds import faults

pytest.importorskip("pytorch_lightning")
Call = tuple[Callable[..., Any], dict[str, Any]]


@functools.cache
def model(name: str) -> Any:
    torch.manual_seed(0)
    return arcore.create_model(name).eval()


def series(rows: int = 20) -> data.Series:
    day = 24 * 3600 * 10**9
    values = torch.arange(rows, dtype=torch.float64).unsqueeze(1)
    return data.Series("a", ("x",), values, times=torch.arange(rows) * day, dates=True)


def history() -> Tensor:
    return torch.arange(24.0).reshape(12, 2)


def icon(folder: Path) -> Path:
    path = folder / "icon.svg"
    path.write_text('<svg viewBox="0 0 8 8"><path d="M1 1 L6 1 L6 6 Z"/></svg>')
    return path


def fasta(folder: Path) -> Path:
    path = folder / "a.fasta"
    path.write_text(">one\nACDE\n")
    return path


def table(folder: Path) -> Path:
    path = folder / "table.csv"
    path.write_text("t,x\n" + "\n".join(f"2020-01-{day:02d},{day}" for day in range(1, 21)))
    return path


def pictures() -> tuple[Tensor, Tensor]:
    return torch.zeros(2, 1, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8, dtype=torch.uint8)


def pixels() -> Any:
    from arcore.data.pixels import InMemoryPixels

    return InMemoryPixels(
        torch.zeros(2, 1, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8, dtype=torch.uint8), ("a", "b")
    )


def prompt() -> Tensor:
    return torch.tensor([[1, 2, 3]])


def session() -> decoding.Session:
    return decoding.Session(model("llama_tiny"), [[1, 2]], max_length=8)


CALLS: dict[str, Callable[[Path], Call]] = {}
HOMES: dict[str, ModuleType] = {}


def call(home: ModuleType) -> Callable[[Callable[[Path], Call]], Callable[[Path], Call]]:
    def add(function: Callable[[Path], Call]) -> Callable[[Path], Call]:
        CALLS[function.__name__] = function
        HOMES[function.__name__] = home
        return function

    return add


def add(home: ModuleType, name: str, make: Callable[[Path], Call]) -> None:
    CALLS[name], HOMES[name] = make, home


add(
    data,
    "ConceptPair",
    lambda f: (data.ConceptPair, {"target": "a", "replacement": "b", "seed": 0, "seen": (0.0, 1.0)}),
)
add(data, "ConceptPairs", lambda f: (data.ConceptPairs, {"pairs": (), "tried": 0}))
add(
    data,
    "concept_pairs",
    lambda f: (
        data.concept_pairs,
        {
            "templates": ["a {}"],
            "concept": "x",
            "replacement": "y",
            "draw": lambda prompts, seed: torch.zeros(len(prompts), 1),
            "judge": lambda pictures: torch.ones(len(pictures)),
            "tau": 0.5,
            "n": 1,
            "tries": 2,
            "seed": 0,
        },
    ),
)
add(data, "load_mnist", lambda f: (data.load_mnist, {"split": "test", "image_size": 28}))
add(data, "load_scenes", lambda f: (data.load_scenes, {"split": "test", "image_size": 24}))
add(
    data,
    "Scenes",
    lambda f: (
        data.Scenes,
        {
            "images": torch.zeros(2, 1, 8, 8),
            "subjects": torch.zeros(2, 2, 1, 8, 8),
            "digits": torch.zeros(2, 2, dtype=torch.int64),
            "distinct": 0,
        },
    ),
)
add(
    data,
    "Series",
    lambda f: (
        data.Series,
        {"name": "a", "columns": ("x",), "values": torch.zeros(3, 1).double(), "dates": False},
    ),
)
add(data, "Series.place", lambda f: (series().place, {"row": 0}))
add(
    data,
    "series_of_table",
    lambda f: (
        data.series_of_table,
        {
            "table": pytest.importorskip("pandas").DataFrame({"x": [1.0, 2.0]}),
            "columns": ["x"],
            "name": "a",
            "unsorted": "sort",
        },
    ),
)
add(data, "Text", lambda f: (data.Text, {"train": "abc", "test": "d", "digest": "1", "notes": ()}))
add(
    data,
    "Text.tokens",
    lambda f: (data.Text("abc", "d", "1").tokens, {"split": "train", "tokenizer": data.ByteTokenizer()}),
)
add(data, "ByteTokenizer", lambda f: (data.ByteTokenizer().encode, {"text": "a"}))
add(data, "ByteTokenizer.decode", lambda f: (data.ByteTokenizer().decode, {"ids": [1, 2]}))
add(data, "ByteTokenizer.tensor", lambda f: (data.ByteTokenizer().tensor, {"text": "a"}))
add(data, "BPETokenizer", lambda f: (data.BPETokenizer.train, {"text": "abc abcd " * 40, "vocab_size": 300}))
add(data, "BPETokenizer.load", lambda f: (data.BPETokenizer.load, {"path": tokenizer(f)}))
add(data, "BPETokenizer.encode", lambda f: (bpe().encode, {"text": "a"}))
add(data, "BPETokenizer.decode", lambda f: (bpe().decode, {"ids": [1, 2]}))
add(data, "TextStream", lambda f: (data.TextStream, {"tokenizer": data.ByteTokenizer()}))
add(data, "TextStream.add", lambda f: (data.TextStream(data.ByteTokenizer()).add, {"token": 65}))


@functools.cache
def bpe() -> data.BPETokenizer:
    return data.BPETokenizer.train("abc abcd " * 40, 300)


def tokenizer(folder: Path) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(bpe().json() or "")
    return path


@call(data)
def canny(folder: Path) -> Call:
    from arcore.data.edges import canny

    return canny, {"images": torch.zeros(1, 1, 8, 8), "sigma": 1.0, "low": 0.1, "high": 0.2}


@call(data)
def edge_overlap(folder: Path) -> Call:
    from arcore.data.edges import edge_overlap

    return edge_overlap, {"one": torch.zeros(1, 1, 8, 8), "other": torch.zeros(1, 1, 8, 8)}


@call(data)
def mase(folder: Path) -> Call:
    from arcore.data.forecast_scores import mase

    return mase, {
        "predicted": torch.ones(3, 2),
        "actual": torch.ones(3, 2),
        "history": history(),
        "season": 1,
    }


@call(data)
def crps(folder: Path) -> Call:
    from arcore.data.forecast_scores import crps

    return crps, {"paths": torch.ones(4, 3, 2), "actual": torch.ones(3, 2)}


@call(data)
def last_value(folder: Path) -> Call:
    from arcore.data.forecast_baselines import last_value

    return last_value, {"history": history(), "horizon": 2}


@call(data)
def seasonal_naive(folder: Path) -> Call:
    from arcore.data.forecast_baselines import seasonal_naive

    return seasonal_naive, {"history": history(), "horizon": 2, "season": 3}


@call(data)
def drift(folder: Path) -> Call:
    from arcore.data.forecast_baselines import drift

    return drift, {"history": history(), "horizon": 2}


@call(data)
def baselines(folder: Path) -> Call:
    from arcore.data.forecast_baselines import baselines

    return baselines, {"history": history(), "horizon": 2, "season": 1, "which": ("drift",)}


@call(data)
def chain(folder: Path) -> Call:
    from arcore.data.proteins import Chain

    return Chain, {"name": "A", "sequence": "AC", "coordinates": torch.zeros(2, 4, 3), "numbers": ("1", "2")}


@call(data)
def read_fasta(folder: Path) -> Call:
    from arcore.data.proteins import read_fasta

    return read_fasta, {"path": fasta(folder), "letters": "ACDE"}


@call(data)
def write_fasta(folder: Path) -> Call:
    from arcore.data.proteins import write_fasta

    return write_fasta, {"path": folder / "out.fasta", "entries": [("a", "AC")], "width": 60}


@call(data)
def ideal_backbone(folder: Path) -> Call:
    from arcore.data.proteins import ideal_backbone

    return ideal_backbone, {"angles": [(-60.0, -45.0), (-60.0, -45.0)]}


@call(data)
def parse_path(folder: Path) -> Call:
    from arcore.data.svg import parse_path

    return parse_path, {"text": "M1 1 L2 2"}


@call(data)
def read_icon(folder: Path) -> Call:
    from arcore.data.svg import read_icon

    return read_icon, {"path": icon(folder)}


@call(data)
def load_icons(folder: Path) -> Call:
    from arcore.data.svg import load_icons

    return load_icons, {"source": icon(folder).parent, "skip_bad": True}


@call(data)
def in_memory_pixels(folder: Path) -> Call:
    from arcore.data.pixels import InMemoryPixels

    return InMemoryPixels, {
        "images": torch.zeros(2, 1, 1, 8, 8, dtype=torch.uint8),
        "masks": torch.zeros(2, 8, 8, dtype=torch.uint8),
        "class_names": ("a", "b"),
    }


@call(data)
def open_pixels(folder: Path) -> Call:
    from arcore.data.pixels import open_pixels

    return open_pixels, {
        "source": "mnist_masks",
        "pictures": 1,
        "image_size": 48,
        "channels": 1,
        "split": "test",
    }


@call(data)
def calendar(folder: Path) -> Call:
    from arcore.data.calendar import calendar

    return calendar, {"times": series().times}


@call(data)
def times_to_come(folder: Path) -> Call:
    from arcore.data.calendar import times_to_come

    return times_to_come, {"series": series(), "count": 2}


@call(data)
def mend_gaps(folder: Path) -> Call:
    from arcore.data.calendar import mend_gaps

    return mend_gaps, {"series": series(), "how": "keep"}


@call(data)
def season(folder: Path) -> Call:
    from arcore.data.calendar import season

    return season, {"series": series()}


@call(data)
def load_series(folder: Path) -> Call:
    from arcore.data.load_series import load_series

    return load_series, {
        "source": table(folder),
        "time": "t",
        "columns": ["x"],
        "unsorted": "sort",
        "gaps": "keep",
        "missing": "drop",
    }


@call(data)
def rotate_windows(folder: Path) -> Call:
    from arcore.data.rotation_crop import rotate_windows

    return rotate_windows, {
        "images": torch.zeros(1, 1, 32, 32),
        "windows": torch.tensor([[0, 0, 2]]),
        "angles": torch.zeros(1),
        "patch_size": 8,
    }


@call(data)
def compose(folder: Path) -> Call:
    from arcore.data.scenes import compose

    return compose, {
        "left": torch.zeros(1, 1, 8, 8),
        "right": torch.zeros(1, 1, 8, 8),
        "heights": torch.zeros(1, 2, dtype=torch.int64),
    }


add(
    decoding,
    "NGramDrafter",
    lambda f: (decoding.NGramDrafter.fit, {"texts": [[1, 2, 3, 1, 2]], "order": 2, "count": 2}),
)
add(decoding, "TreeShape", lambda f: (decoding.TreeShape.from_paths, {"paths": [(0,), (0, 0)]}))
add(
    decoding,
    "ModelDrafter",
    lambda f: (
        decoding.ModelDrafter,
        {"model": model("llama_tiny"), "count": 2, "sampling": decoding.Sampling()},
    ),
)
add(
    decoding,
    "next_token",
    lambda f: (
        first(decoding.next_token),
        {"model": model("llama_tiny"), "prompt": prompt(), "max_new_tokens": 1},
    ),
)
add(
    decoding,
    "speculative_tree",
    lambda f: (
        decoding.speculative_tree,
        {
            "model": model("llama_tiny"),
            "drafter": decoding.LookupDrafter(count=2),
            "prompt": prompt(),
            "max_new_tokens": 1,
        },
    ),
)
add(decoding, "repeat_last", lambda f: (decoding.repeat_last, {"prompt": 1, "text": [1, 2], "count": 2}))
add(decoding, "Session.fork", lambda f: (session().fork, {"rows": [0]}))
add(decoding, "Session.feed", lambda f: (session().feed, {"tokens": [[1]]}))
add(decoding, "Session.rewind", lambda f: (session().rewind, {"lengths": [1]}))
add(
    decoding,
    "Session.draw",
    lambda f: (session().draw, {"count": 1, "sampling": decoding.Sampling(), "seeds": torch.tensor([0])}),
)
add(
    decoding,
    "Kept",
    lambda f: (
        decoding.Kept,
        {"indices": [torch.zeros(1, 1).long()], "region": torch.ones(2, 2, dtype=torch.bool)},
    ),
)
add(
    decoding,
    "Sampling.allowed",
    lambda f: (decoding.Sampling(without_repeats=2).allowed, {"ids": prompt(), "vocab_size": 5}),
)
add(
    decoding,
    "stream_blocks",
    lambda f: (first(decoding.stream_blocks), {"model": model("acdit_tiny"), **DRAWN}),
)
add(
    decoding,
    "stream_frames",
    lambda f: (first(decoding.stream_frames), {"model": model("ar_diffusion_tiny"), **DRAWN}),
)
DRAWN = {"labels": torch.tensor([1, 2]), "cfg_scale": 1.5}


def first(stream: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stream)
    def begin(**given: Any) -> Any:
        return next(iter(stream(**given)), None)

    return begin


@call(decoding)
def mass_ctc(folder: Path) -> Call:
    from arcore.decoding.mass_ctc import mass_ctc

    return mass_ctc, {
        "logprobs": torch.zeros(2, 4),
        "masses": [1.0, 2.0, 3.0],
        "target": 1.0,
        "tolerance": 0.1,
        "grid": 0.1,
    }


add(
    catalog,
    "list_systems",
    lambda f: (catalog.list_systems, {"topic": "series", "kind": "model", "recipe": "own"}),
)
add(catalog, "find", lambda f: (catalog.find, {"name": "var"}))
add(catalog, "search", lambda f: (catalog.search, {"words": "var"}))
add(catalog, "build", lambda f: (catalog.build, {"description": catalog.describe(model("var_tiny"))}))
add(
    catalog,
    "Published",
    lambda f: (catalog.Published, {"repository": "a/b", "file": "c.pth", "beside": ("d",), "tokenizer": "e"}),
)
add(
    catalog,
    "System",
    lambda f: (
        catalog.System,
        {
            "name": "a",
            "title": "A",
            "paper": "arXiv:2404.02905",
            "topic": "series",
            "kind": "model",
            "summary": "B.",
            "claim": "C.",
            "checked_on": "real data",
            "model": "A",
            "recipe": "language",
        },
    ),
)


@call(catalog)
def gguf(folder: Path) -> Call:
    from arcore.catalog.gguf import GGUF
    from tests.catalog.test_gguf import llama_file

    llama_file(folder / "m.gguf")
    return GGUF, {"path": folder / "m.gguf"}


@call(catalog)
def shaken(folder: Path) -> Call:
    from arcore.catalog.claims import shaken

    return shaken, {"module": nn.Linear(2, 2), "seed": 1, "scale": 0.1}


@call(training)
def parameter_groups(folder: Path) -> Call:
    from arcore.training.groups import parameter_groups

    return parameter_groups, {"module": nn.Linear(2, 2), "weight_decay": 0.1}


@call(training)
def random_windows(folder: Path) -> Call:
    from arcore.training.windows import RandomWindows

    return RandomWindows, {
        "inner": pixels(),
        "size": 4,
        "scale": "half",
        "zoom": 1.0,
        "mirror": True,
        "seed": 0,
    }


add(training, "Task", lambda f: (training.Task, {"config": training.TrainConfig()}))
add(
    training,
    "fit",
    lambda f: (
        training.fit,
        {
            "task": Nothing(training.TrainConfig(steps=1)),
            "train": Ones(),
            "out": f / "run",
            "title": "a",
            "show_progress": False,
        },
    ),
)


class Nothing(training.Task):
    """Learns one number."""

    saved = ("network",)

    def __init__(self, config: training.TrainConfig) -> None:
        super().__init__(config)
        self.network = nn.Linear(1, 1)

    def loss(self, images: Tensor, labels: Tensor) -> Any:
        return self.network(images).square().mean(), {}

    def meta(self) -> dict[str, Any]:
        return {}


class Ones(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        return torch.ones(1), 0


@call(training)
def recipe_for(folder: Path) -> Call:
    from arcore.recipes import recipe_for

    return recipe_for, {"name": "var_tiny"}


@call(training)
def float32_matmul(folder: Path) -> Call:
    return arcore.float32_matmul, {"backend": "auto"}


@call(training)
def quantizer(folder: Path) -> Call:
    from arcore.nn.bsq import BinarySphericalQuantizer

    return BinarySphericalQuantizer, {"bits": 8, "group": 4, "beta": 0.1, "sharpness": 1.0}


@call(training)
def discriminator(folder: Path) -> Call:
    from arcore.nn.critics import PatchDiscriminator

    return PatchDiscriminator, {"in_channels": 1, "channels": 4, "depth": 1}


ELSEWHERE = {name.split(".")[0] for name in test_wrong_kinds.NAMES}
# What a decoder or data set returns, base classes, and what is no function.
RESULTS = {"Window", "RotatedImages", "GenerateOutput", "NextScaleOutput", "SpeculativeOutput", "Step", "Draft"} | {
    "Context", "ImageDataset", "TextTokenizer", "load_kjv", "CatalogError", "Entry", "ModelInfo", "PresetInfo",
    "catalog", "preset", "FitResult",
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_wrong_kinds_are_refused_in_our_words(name: str, tmp_path: Path):
    function, right = CALLS[name](tmp_path)
    assert faults(function, right, values=True) == []


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_are_right(name: str, tmp_path: Path):
    function, right = CALLS[name](tmp_path)
    function(**right)


@pytest.mark.parametrize("room", [data, decoding, catalog, training], ids=lambda room: room.__name__)
def test_every_public_name_has_a_call(room: ModuleType):
    called = {name.split(".")[0] for name, home in HOMES.items() if home is room} | ELSEWHERE | RESULTS
    public = {name for name in room.__all__ if not getattr(getattr(room, name), "_is_protocol", False)}
    made = {
        name
        for name in public
        if inspect.isclass(getattr(room, name)) or inspect.isroutine(getattr(room, name))
    }
    assert made - called == set()
