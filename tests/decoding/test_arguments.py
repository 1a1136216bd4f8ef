"""Wrong kinds of models and arguments are refused in our words, before a model runs; NaN never comes out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import arcore
from arcore.decoding import (
    generate,
    generate_blocks,
    generate_frames,
    generate_masked,
    generate_next_scale,
    stream,
    stream_blocks,
    stream_frames,
)

LABELS = torch.tensor([1, 2])


@pytest.fixture(scope="module")
def zoo() -> dict[str, Any]:
    names = ("var_tiny", "msvq_tiny", "acdit_tiny", "mar_tiny", "ar_diffusion_tiny", "mamba_tiny")
    return {name: arcore.create_model(name) for name in names}


LOOPS = {
    "var_tiny": lambda model, tokenizer: generate_next_scale(model, tokenizer, LABELS),
    "acdit_tiny": lambda model, _: generate_blocks(model, LABELS),
    "mar_tiny": lambda model, _: generate_masked(model, LABELS, iterations=2),
    "ar_diffusion_tiny": lambda model, _: generate_frames(model, LABELS),
    "mamba_tiny": lambda model, _: generate(model, [[1]], max_new_tokens=1),
}


@pytest.mark.parametrize("own", LOOPS)
def test_models_of_other_kinds(zoo, own: str):
    tokenizer = zoo["msvq_tiny"]
    for name, model in zoo.items():
        if name == own:
            continue
        with pytest.raises(TypeError, match=r"expected model to be a \w+Model but got \w+; ") as error:
            LOOPS[own](model, tokenizer)
        assert ("arcore.decoding.generate" in str(error.value)) == (name != "msvq_tiny")
    for wrong in (None, "var_tiny", torch.nn.Linear(1, 1), type(zoo[own])):
        with pytest.raises(TypeError, match="expected model to be a"):
            LOOPS[own](wrong, tokenizer)


def test_a_model_in_place_of_the_tokenizer(zoo):
    with pytest.raises(TypeError, match="expected tokenizer to be a ScaleTokenizer but got VAR"):
        generate_next_scale(zoo["var_tiny"], zoo["var_tiny"], LABELS)


LOOP_OF = {
    "var_tiny": lambda zoo, labels, **more: generate_next_scale(
        zoo["var_tiny"], zoo["msvq_tiny"], labels, **more
    ),
    "acdit_tiny": lambda zoo, labels, **more: generate_blocks(zoo["acdit_tiny"], labels, **more),
    "mar_tiny": lambda zoo, labels, **more: generate_masked(zoo["mar_tiny"], labels, **more),
    "ar_diffusion_tiny": lambda zoo, labels, **more: generate_frames(
        zoo["ar_diffusion_tiny"], labels, **more
    ),
}


@pytest.mark.parametrize("name", LOOP_OF)
@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([1, 2], "expected labels as an int64 tensor .* but got list"),
        (3, "but got int"),
        (torch.tensor([1.0, 2.0]), "expected labels of dtype int64 but got float32"),
        (torch.tensor(1), r"expected labels of shape \[B\] but got \(\)"),
    ],
)
def test_labels(zoo, name: str, labels: Any, says: str):
    with pytest.raises((TypeError, ValueError), match=says):
        LOOP_OF[name](zoo, labels)


BAD = [
    ("var_tiny", {"cfg_scale": "x"}, "cfg_scale to be a number but got 'x'"),
    ("var_tiny", {"cfg_scale": float("inf")}, "cfg_scale to be a finite number"),
    ("var_tiny", {"cfg_scale": float("nan")}, "cfg_scale to be a finite number"),
    ("var_tiny", {"top_k": 2.5}, "top_k to be a whole number but got 2.5"),
    ("var_tiny", {"top_p": "0.9"}, "top_p to be a number"),
    ("var_tiny", {"temperature": "hot"}, "temperature to be a number"),
    ("var_tiny", {"seed": "x"}, "seed to be a whole number, or one per row"),
    ("var_tiny", {"seed": 1.5}, "seed to be a whole number, or one per row"),
    ("var_tiny", {"seed": [1.5, 2]}, "seed must be a whole number"),
    ("acdit_tiny", {"solver": "ddim"}, "solver to be one of arcore.schedules, such as DDIM.* but got 'ddim'"),
    ("acdit_tiny", {"times": [3, 2, -1]}, "times to be a tensor but got list"),
    ("acdit_tiny", {"context": torch.zeros(1)}, r"context of shape \(2, 'K', 4, 4\)"),
    ("acdit_tiny", {"context": torch.zeros(2, 1, 4, 4).long()}, "context of a floating dtype"),
    ("acdit_tiny", {"context": torch.full((2, 1, 4, 4), float("nan"))}, "context of finite values"),
    ("acdit_tiny", {"guided_channels": 1.5}, "guided_channels must be a whole number"),
    ("mar_tiny", {"solver": "ddpm"}, "solver to be one of arcore.schedules"),
    ("mar_tiny", {"iterations": 2.5}, "iterations must be a whole number"),
    ("mar_tiny", {"times": "linspace"}, "times to be a tensor but got str"),
    ("mar_tiny", {"temperature": "1"}, "temperature to be a number"),
    ("ar_diffusion_tiny", {"context": torch.zeros(1)}, "context of shape"),
    ("ar_diffusion_tiny", {"context": [1]}, "context to be a tensor but got list"),
    ("ar_diffusion_tiny", {"frames": 8.5}, "frames must be a whole number"),
    ("ar_diffusion_tiny", {"lag": 1.5}, "lag must be a whole number"),
    ("ar_diffusion_tiny", {"levels": [[1], [0]]}, "levels to be a tensor but got list"),
    ("ar_diffusion_tiny", {"solver": 3}, "solver to be one of arcore.schedules"),
]


@pytest.mark.parametrize(("name", "settings", "says"), BAD, ids=str)
def test_wrong_arguments(zoo, name: str, settings: dict[str, Any], says: str):
    with pytest.raises((TypeError, ValueError), match=says):
        LOOP_OF[name](zoo, LABELS, **settings)


@pytest.mark.parametrize(
    ("prompt", "settings", "says"),
    [
        ([[1]], {"eos": "x"}, "expected eos as token ids but got the text 'x'"),
        ([[1]], {"eos": ["x"]}, "eos"),
        ([[1]], {"eos": 999}, "expected eos from 0 to 255, the model's tokens, but got 999"),
        ([[1]], {"eos": -1}, "eos must be at least 0"),
        ([[1]], {"eos": 2.5}, "expected eos as token ids but got 2.5"),
        ([[1]], {"stop": ["end"]}, "the stop 'end' is a string: give decode="),
        ([[1]], {"stop": [[1, 999]]}, "expected stop from 0 to 255"),
        ([[1]], {"max_new_tokens": 2.5}, "max_new_tokens must be a whole number"),
        ([[1]], {"max_new_tokens": "many"}, "max_new_tokens must be a whole number"),
        ([[1]], {"repetition_penalty": "x"}, "repetition_penalty to be a number"),
        ("words", {}, "encode a text with the tokenizer"),
        (5, {}, "expected the prompt as ids"),
        ([1, 2], {}, "one list of ids per row of the prompt but a row is 1"),
        (["a"], {}, "a row is 'a'"),
        ([[1.5]], {}, "an id of the prompt must be a whole number"),
        (torch.tensor([[1.0]]), {}, "a prompt of dtype int64 but got float32"),
        (torch.tensor([[1]]), {"mask": [[True]]}, "mask to be a bool tensor but got list"),
    ],
)
def test_wrong_arguments_of_text(zoo, prompt: Any, settings: dict[str, Any], says: str):
    for loop in (generate, stream):
        with pytest.raises((TypeError, ValueError), match=says):
            loop(zoo["mamba_tiny"], prompt, **{"max_new_tokens": 2, **settings})


def test_prompts_of_other_models(zoo):
    """Which ids a prompt may hold is the model's affair: class tokens lie behind the codes that it draws."""
    with pytest.raises(ValueError, match="from 0 to 255 but got 999"):
        generate(zoo["mamba_tiny"], [[999]], max_new_tokens=1)


def broken(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    return model


def test_nan_never_comes_out(zoo):
    """Every loop stops with the place where the model first gave NaN, also the streams."""
    calls = [
        lambda: generate(broken(arcore.create_model("mamba_tiny")), [[1]], max_new_tokens=2),
        lambda: generate_next_scale(broken(arcore.create_model("var_tiny")), zoo["msvq_tiny"], LABELS),
        lambda: generate_next_scale(
            arcore.create_model("var_tiny"), broken(arcore.create_model("msvq_tiny")), LABELS, cfg_scale=0
        ),
        lambda: generate_blocks(broken(arcore.create_model("acdit_tiny")), LABELS),
        lambda: next(stream_blocks(broken(arcore.create_model("acdit_tiny")), LABELS)),
        lambda: generate_frames(broken(arcore.create_model("ar_diffusion_tiny")), LABELS),
        lambda: next(stream_frames(broken(arcore.create_model("ar_diffusion_tiny")), LABELS)),
        lambda: generate_masked(broken(arcore.create_model("mar_tiny")), LABELS),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="NaN"):
            call()


def test_overflow_in_float16_is_an_error():
    """A head that predicts noise divides by almost no signal; in bfloat16 the same model stays finite."""
    torch.manual_seed(0)
    made = arcore.create_model("mar_tiny")
    model = type(made)(dataclasses.replace(made.config, prediction="eps")).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(0, 0.02)
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(ValueError, match=r"NaN .*use bfloat16"):
        generate_masked(model, LABELS, iterations=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert generate_masked(model, LABELS, iterations=8).isfinite().all()


def test_a_half_precision_model_with_its_float32_tokenizer(zoo):
    tokenizer = zoo["msvq_tiny"]
    model = arcore.create_model("var_tiny").bfloat16()
    images = generate_next_scale(model, tokenizer, LABELS).images
    assert images.shape == (2, 1, 8, 8)
    assert images.isfinite().all()
    half = arcore.create_model("msvq_tiny").bfloat16()
    assert generate_next_scale(zoo["var_tiny"], half, LABELS).images.isfinite().all()
