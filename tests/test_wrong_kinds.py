"""Wrong kinds of values for the public functions of models, data, training, decoding and tokenizers: our errors.

Each call below is right. Each of its arguments is then replaced, one at a time, by values of kinds that it is not; each
must be refused by a `raise` of arcore whose message names the argument or what was expected, never by an error from
somewhere inside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import arcore
from arcore import data, decoding, models
from arcore.training import TrainConfig
from tests.kinds import is_ours

pytest.importorskip("pytorch_lightning")
pytest.importorskip("sklearn")

# What an argument is not.
WRONG: dict[str, tuple[Any, ...]] = {
    "whole": ("x", 2.5, [1], True),
    "number": ("x", [1], {}),
    "tensor": ([1, 2], "x", 3),
    "text": (3, [1]),
    "path": (3, 2.5, [1]),
    "choice": ("nope", 3),
    "table": (3, "x", [1]),
    "texts": (3, "x"),
    "model": (None, "var_tiny", nn.Linear(1, 1), 3),
    "yes or no": ("yes", 3),
    "object": (3, "x"),
    "seed": ("x", 2.5, {}, None),
    "eos": ("x", 2.5),
}


class Call(NamedTuple):
    """A call that is right.

    Attributes:
        function: what is called.
        arguments: values that are right, by name, and what kind they are: `(value, kind)`. A kind that ends in ? may be
            None.
    """

    function: Callable[..., Any]
    arguments: dict[str, tuple[Any, str]]


@functools.cache
def model(name: str) -> Any:
    torch.manual_seed(0)
    return arcore.create_model(name).eval()


def labels() -> torch.Tensor:
    return torch.tensor([1, 2])


def prompt() -> torch.Tensor:
    return torch.tensor([[1, 2, 3]])


def series() -> data.Series:
    return data.Series("a", ("x",), torch.arange(20.0, dtype=torch.float64).unsqueeze(1))


TEXT = {"max_new_tokens": (1, "whole"), "seed": (0, "seed"), "temperature": (1.0, "number")}


def calls(folder: Path, model: Callable[[str], Any]) -> dict[str, Call]:
    images = folder / "images"
    text = folder / "text.txt"
    table = folder / "table.csv"
    weights = folder / "weights"
    pictures = model("msvq_tiny")
    lm = lambda: model("mamba_tiny")  # noqa: E731
    drawn = {"labels": (labels(), "tensor"), "cfg_scale": (1.5, "number"), "seed": (0, "seed")}
    shape = {"image_size": (8, "whole"), "channels": (1, "whole")}
    return {
        "create_model": Call(models.create_model, {"name": ("var_tiny", "text"), "depth": (2, "whole")}),
        "get_config": Call(models.get_config, {"name": ("var_tiny", "text"), "depth": (2, "whole")}),
        "model_info": Call(models.model_info, {"name": ("var", "text")}),
        "list_models": Call(
            models.list_models, {"pattern": ("var*", "text?"), "topic": ("next_scale", "choice?")}
        ),
        "load_weights": Call(
            models.load_weights, {"module": (model("var_tiny"), "model"), "path": (weights, "path")}
        ),
        "load_checkpoint": Call(models.load_checkpoint, {"folder": (weights, "path")}),
        "from_pretrained": Call(models.from_pretrained, {"source": (weights, "path")}),
        "save_pretrained": Call(
            models.save_pretrained,
            {"module": (model("var_tiny"), "model"), "folder": (folder / "saved", "path")},
        ),
        "save_checkpoint": Call(
            models.save_checkpoint,
            {"folder": (folder / "checkpoint", "path"), "modules": ({"model": model("var_tiny")}, "table")},
        ),
        "describe": Call(models.describe, {"module": (model("var_tiny"), "model")}),
        "open_dataset": Call(
            data.open_dataset,
            {"source": ("digits", "path"), **shape, "split": ("train", "choice"), "frames": (1, "whole")},
        ),
        "ImageFolder": Call(
            data.ImageFolder,
            {"root": (images, "path"), **shape, "split": ("train", "choice"), "nested": (None, "choice?")},
        ),
        "InMemoryImages": Call(
            data.InMemoryImages,
            {
                "images": (torch.zeros(2, 1, 8, 8), "tensor"),
                "labels": (torch.tensor([0, 1]), "tensor"),
                "class_names": (("a", "b"), "texts"),
            },
        ),
        "VideoFolder": Call(
            data.VideoFolder,
            {
                "root": (folder / "videos", "path"),
                "frames": (1, "whole"),
                **shape,
                "step": (1, "whole"),
                "split": ("train", "choice"),
            },
        ),
        "load_digits": Call(data.load_digits, {"split": ("train", "choice"), "image_size": (8, "whole")}),
        "load_photos": Call(
            data.load_photos,
            {"split": ("train", "choice"), "image_size": (48, "whole"), "channels": (3, "whole")},
        ),
        "load_moving_digits": Call(
            data.load_moving_digits,
            {"split": ("train", "choice"), "frames": (2, "whole"), "image_size": (16, "whole")},
        ),
        "held_out_mask": Call(data.held_out_mask, {"labels": (labels(), "tensor"), "every": (5, "whole")}),
        "adaptive_rotation": Call(
            data.adaptive_rotation,
            {
                "images": (torch.zeros(2, 1, 48, 48), "tensor"),
                "patch_size": (4, "whole"),
                "max_angle": (45.0, "number"),
            },
        ),
        "load_text": Call(data.load_text, {"source": (text, "path"), "separator": ("\n", "text")}),
        "make_tokenizer": Call(data.make_tokenizer, {"wanted": ("bytes", "path"), "text": ("abc", "text")}),
        "TokenCrops": Call(
            data.TokenCrops,
            {"tokens": (torch.arange(9), "tensor"), "length": (2, "whole"), "stride": (1, "whole")},
        ),
        "SeriesWindows": Call(
            data.SeriesWindows,
            {
                "series": ([series()], "texts"),
                "length": (4, "whole"),
                "horizon": (1, "whole"),
                "stride": (1, "whole"),
                "split": ("train", "choice"),
                "held_out": (0.1, "number"),
                "normalise": ("train", "choice?"),
                "missing": ("drop", "choice"),
            },
        ),
        "fill_missing": Call(data.fill_missing, {"series": (series(), "object"), "how": ("drop", "choice")}),
        "read_tables": Call(
            data.read_tables,
            {
                "source": (table, "path"),
                "time": ("t", "text?"),
                "group": (None, "text?"),
                "columns": (["x"], "texts?"),
            },
        ),
        "open_series": Call(
            data.open_series,
            {
                "source": (table, "path"),
                "time": ("t", "text?"),
                "group": (None, "text?"),
                "columns": (["x"], "texts?"),
            },
        ),
        "TrainConfig": Call(
            TrainConfig,
            {
                **dict.fromkeys(
                    (
                        "steps",
                        "batch_size",
                        "accumulate",
                        "warmup",
                        "seed",
                        "checkpoint_every",
                        "keep_last",
                        "patience",
                    ),
                    (1, "whole"),
                ),
                **dict.fromkeys(("num_nodes", "workers"), (1, "whole")),
                **dict.fromkeys(("lr", "final_lr", "weight_decay", "clip", "ema"), (0.5, "number")),
                "epochs": (1.5, "number?"),
                "betas": ((0.9, 0.95), "table"),
                **dict.fromkeys(("keep_best", "oversubscribe"), (False, "yes or no")),
                **dict.fromkeys(("precision", "accelerator", "strategy"), ("auto", "text")),
            }
            | {"schedule": ("cosine", "choice"), "logger": ("csv", "choice")},
        ),
        "train": Call(
            arcore.training.train,
            {
                "preset": ("msvq_tiny", "text"),
                "out": (folder / "run", "path"),
                "settings": ({"steps": 1}, "table?"),
                "model_settings": (None, "table?"),
                "resume": (None, "path?"),
                "init_from": (None, "path?"),
                "show_progress": (False, "skip"),
            },
        ),
        "generate": Call(
            lambda **k: decoding.generate(k.pop("model"), k.pop("prompt"), **k),
            {
                "model": (lm(), "model"),
                "prompt": (prompt(), "object"),
                **TEXT,
                "top_k": (2, "whole?"),
                "top_p": (0.5, "number?"),
                "min_p": (0.1, "number?"),
                "repetition_penalty": (1.0, "number"),
                "eos": (3, "eos?"),
                "pad_id": (0, "whole"),
                "mask": (None, "tensor?"),
            },
        ),
        "stream": Call(
            lambda **k: next(decoding.stream(k.pop("model"), k.pop("prompt"), **k)),
            {"model": (lm(), "model"), "prompt": (prompt(), "object"), **TEXT},
        ),
        "jacobi": Call(
            lambda **k: decoding.jacobi(k.pop("model"), k.pop("prompt"), **k),
            {
                "model": (lm(), "model"),
                "prompt": (prompt(), "object"),
                "max_new_tokens": (1, "whole"),
                "seed": (0, "seed"),
                "window": (2, "whole"),
                "sampling": (decoding.Sampling(), "object?"),
                "coupling": ("fresh", "choice"),
            },
        ),
        "speculative_chain": Call(
            lambda **k: decoding.speculative_chain(k.pop("model"), k.pop("drafter"), k.pop("prompt"), **k),
            {
                "model": (lm(), "model"),
                "drafter": (decoding.LookupDrafter(count=2), "object"),
                "prompt": (prompt(), "object"),
                "max_new_tokens": (1, "whole"),
                "method": ("token", "choice"),
            },
        ),
        "Sampling": Call(
            decoding.Sampling,
            {
                "temperature": (1.0, "number"),
                "top_k": (2, "whole?"),
                "top_p": (0.5, "number?"),
                "min_p": (0.1, "number?"),
                "order": ("hf", "choice"),
            },
        ),
        "LookupDrafter": Call(
            decoding.LookupDrafter,
            {"count": (2, "whole"), "longest": (2, "whole"), "shortest": (1, "whole")},
        ),
        "AboveDrafter": Call(decoding.AboveDrafter, {"width": (2, "whole"), "count": (2, "whole")}),
        "masked_counts": Call(decoding.masked_counts, {"tokens": (4, "whole"), "iterations": (2, "whole")}),
        "row_seeds": Call(decoding.row_seeds, {"seed": (0, "seed"), "batch": (2, "whole")}),
        "random_tokens": Call(decoding.random_tokens, {"vocab_size": (4, "whole"), "seed": (0, "whole")}),
        "copy_above": Call(decoding.copy_above, {"width": (4, "whole")}),
        "typical": Call(
            decoding.typical,
            {"epsilon": (0.1, "number"), "delta": (0.3, "number"), "bonus": ("greedy", "choice")},
        ),
        "exact": Call(decoding.exact, {"method": ("token", "choice")}),
        "relaxed": Call(decoding.relaxed, {"neighbours": (torch.zeros(4, 2, dtype=torch.int64), "tensor")}),
        "allow_without_repeats": Call(
            decoding.allow_without_repeats,
            {"ids": (prompt(), "tensor"), "size": (2, "whole"), "vocab_size": (5, "whole")},
        ),
        "allow_without_words": Call(
            decoding.allow_without_words,
            {"ids": (prompt(), "tensor"), "words": ([[1, 2]], "texts"), "vocab_size": (5, "whole")},
        ),
        "GuidedModel": Call(
            decoding.GuidedModel,
            {"model": (lm(), "model"), "scale": (1.5, "number"), "uncond": (prompt(), "tensor")},
        ),
        "MixedModel": Call(
            decoding.MixedModel, {"models": ([lm(), lm()], "texts"), "weights": ([0.5, 0.5], "texts")}
        ),
        "Session": Call(
            decoding.Session,
            {"model": (lm(), "model"), "prompt": ([[1, 2]], "texts"), "max_length": (8, "whole")},
        ),
        "draw_rollout": Call(
            decoding.draw_rollout,
            {
                "model": (lm(), "model"),
                "prompts": ([[1, 2]], "texts"),
                "count": (2, "whole"),
                "max_new_tokens": (1, "whole"),
                "sampling": (decoding.Sampling(), "object?"),
                "seed": (0, "seed"),
            },
        ),
        "generate_next_scale": Call(
            lambda **k: decoding.generate_next_scale(k.pop("model"), k.pop("tokenizer"), **k),
            {
                "model": (model("var_tiny"), "model"),
                "tokenizer": (pictures, "model"),
                **drawn,
                "top_k": (2, "whole?"),
            },
        ),
        "generate_blocks": Call(
            lambda **k: decoding.generate_blocks(k.pop("model"), **k),
            {
                "model": (model("acdit_tiny"), "model"),
                **drawn,
                "solver": (None, "object?"),
                "times": (None, "tensor?"),
                "guided_channels": (1, "whole?"),
                "context": (None, "tensor?"),
            },
        ),
        "generate_frames": Call(
            lambda **k: decoding.generate_frames(k.pop("model"), **k),
            {
                "model": (model("ar_diffusion_tiny"), "model"),
                **drawn,
                "lag": (1, "whole?"),
                "frames": (None, "whole?"),
                "levels": (None, "tensor?"),
                "solver": (None, "object?"),
                "context": (None, "tensor?"),
                "context_time": (None, "number?"),
                "context_noise": (False, "yes or no"),
                "official_quirks": (False, "yes or no"),
            },
        ),
        "generate_masked": Call(
            lambda **k: decoding.generate_masked(k.pop("model"), **k),
            {
                "model": (model("mar_tiny"), "model"),
                **drawn,
                "iterations": (1, "whole?"),
                "cfg_schedule": ("linear", "choice"),
                "temperature": (1.0, "number"),
            },
        ),
        "tokenizer.encode": Call(
            lambda images: pictures.encode(images), {"images": (torch.zeros(1, 1, 8, 8), "tensor")}
        ),
        "tokenizer.images_to_indices": Call(
            lambda images: pictures(images), {"images": (torch.zeros(1, 1, 8, 8), "tensor")}
        ),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from PIL import Image

    place = tmp_path_factory.mktemp("kinds")
    for name in ("a", "b"):
        (place / "images" / name).mkdir(parents=True)
        for number in range(12):
            Image.new("L", (8, 8), number).save(place / "images" / name / f"{number}.png")
            (place / "videos" / name / f"{number}").mkdir(parents=True)
            Image.new("L", (8, 8), number).save(place / "videos" / name / f"{number}" / "1.png")
    (place / "text.txt").write_text("some words " * 20)
    (place / "table.csv").write_text("t,x\n" + "\n".join(f"{row},{row}" for row in range(20)))
    models.save_pretrained(model("var_tiny"), place / "weights")
    return place


NAMES = list(calls(Path("nowhere"), lambda _: None))


def wrong_values(kind: str) -> list[Any]:
    may_be_none = kind.endswith("?")
    values = list(WRONG[kind.rstrip("?")])
    return values if may_be_none or None in values else [*values, None]


@pytest.mark.parametrize("name", NAMES)
def test_wrong_kinds_are_refused_in_our_words(name: str, folder: Path):
    call = calls(folder, model)[name]
    right = {argument: value for argument, (value, _) in call.arguments.items()}
    faults = []
    for argument, (_, kind) in call.arguments.items():
        for value in [] if kind == "skip" else wrong_values(kind):
            try:
                call.function(**{**right, argument: value})
            except (TypeError, ValueError, OSError) as error:
                if not is_ours(error):
                    faults.append(f"{argument}={value!r}: {type(error).__name__}: {str(error)[:120]}")
            except Exception as error:
                faults.append(f"{argument}={value!r}: {type(error).__name__}: {str(error)[:120]}")
            else:
                faults.append(f"{argument}={value!r}: accepted")
    assert faults == []


@pytest.mark.parametrize("name", [name for name in NAMES if name != "train"])
def test_the_calls_are_right(name: str, folder: Path):
    call = calls(folder, model)[name]
    call.function(**{argument: value for argument, (value, _) in call.arguments.items()})
