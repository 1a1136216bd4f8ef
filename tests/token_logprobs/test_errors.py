"""Wrong arguments are named, with what was expected, what came, and the way out."""

from __future__ import annotations

import math

import pytest
import torch

from arcore.ops import (
    linear_logprobs,
    reference_linear_logprobs,
    reference_token_logprobs,
    token_logprobs,
)

LOGITS, TARGET = torch.zeros(2, 3, 70), torch.zeros(2, 3, dtype=torch.long)
HIDDEN, WEIGHT = torch.zeros(2, 3, 8), torch.zeros(70, 8)

SHARED = {
    "target_shape": (dict(target=TARGET[0]), r"expected target of shape \(2, 3\).* but got \(3,\)"),
    "softcap": (dict(softcap=0.0), r"softcap to be positive and finite but got 0.0; pass None for none"),
    "temperature": (
        dict(temperature=0.0),
        r"temperature to be positive and finite but got 0.0; .* take argmax",
    ),
    "temperature_nan": (dict(temperature=math.nan), r"temperature to be positive and finite but got nan"),
    "temperature_shape": (
        dict(temperature=torch.ones(2)),
        r"temperature to broadcast to the rows \(2, 3\) but got \(2,\)",
    ),
    "mask_width": (
        dict(mask=torch.ones(69, dtype=torch.bool)),
        r"mask, bool, to broadcast to \(2, 3, 70\) with a last dimension of 70 .* but got \(69,\)",
    ),
    "mask_words": (
        dict(mask=torch.ones(2, 3, 70, dtype=torch.int32)),
        r"mask, int32, to broadcast to \(2, 3, 3\) with a last dimension of 3 for 70 columns but got \(2, 3, 70\)",
    ),
    "mask_rows": (dict(mask=torch.ones(5, 3, 70, dtype=torch.bool)), r"but got \(5, 3, 70\)"),
    "device": (
        dict(target=TARGET.to("meta")),
        r"expected (target|mask) on the device of .*, cpu, but got meta",
    ),
}
TYPES = {
    "target": (dict(target=TARGET.float()), r"target of dtype int64 or int32 but got float32"),
    "mask": (
        dict(mask=torch.ones(70)),
        r"mask of dtype bool, or int32 with 32 columns a word, but got float32",
    ),
    "temperature": (
        dict(temperature=torch.ones(2, 3, dtype=torch.long)),
        r"temperature of a floating-point dtype but got int64",
    ),
    "ignore_index": (dict(ignore_index=1.5), r"ignore_index to be an integer but got 1.5"),
}
FUNCTIONS = {
    "token_logprobs": lambda target=TARGET, **o: token_logprobs(LOGITS, target, **o),
    "reference_token_logprobs": lambda target=TARGET, **o: reference_token_logprobs(LOGITS, target, **o),
    "linear_logprobs": lambda target=TARGET, **o: linear_logprobs(HIDDEN, WEIGHT, target, **o),
    "reference_linear_logprobs": lambda target=TARGET, **o: reference_linear_logprobs(
        HIDDEN, WEIGHT, target, **o
    ),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", SHARED)
def test_values(name, function):
    options, message = SHARED[name]
    with pytest.raises(ValueError, match=message):
        FUNCTIONS[function](**options)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", TYPES)
def test_types(name, function):
    options, message = TYPES[name]
    with pytest.raises(TypeError, match=message):
        FUNCTIONS[function](**options)


@pytest.mark.parametrize("bad", [-1, 70, 2**40])
@pytest.mark.parametrize("function", [f for f in FUNCTIONS if not f.startswith("reference")])
def test_targets_out_of_range(function, bad):
    target = TARGET.clone()
    target[1, 0] = bad
    with pytest.raises(
        RuntimeError, match=rf"targets in \[0, 70\) or ignore_index=-100 but got {bad} in row 3"
    ):
        FUNCTIONS[function](target=target)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("function", [f for f in FUNCTIONS if not f.startswith("reference")])
def test_temperature_rows_out_of_range(function, bad):
    temperature = torch.ones(2, 3)
    temperature[0, 2] = bad
    with pytest.raises(RuntimeError, match=r"temperature to be positive and finite but got .* in row 2"):
        FUNCTIONS[function](temperature=temperature)


def test_logits():
    with pytest.raises(TypeError, match=r"but got float64; for float64 \(gradcheck\) call reference_"):
        token_logprobs(LOGITS.double(), TARGET)
    with pytest.raises(ValueError, match=r"expected logits of shape \[..., V\] but got a scalar"):
        token_logprobs(torch.tensor(1.0), torch.tensor(0))
    with pytest.raises(ValueError, match=r"stride 1 but got strides \(210, 1, 3\); pass logits.contiguous"):
        token_logprobs(torch.zeros(2, 70, 3).transpose(1, 2), TARGET)
    with pytest.raises(ValueError, match=r"mask whose last dimension has stride 1"):
        token_logprobs(LOGITS, TARGET, mask=torch.ones(2, 70, 3, dtype=torch.bool).transpose(1, 2))


def test_linear():
    with pytest.raises(ValueError, match=r"expected weight of shape \(V, H=8\), .* but got \(70, 9\)"):
        linear_logprobs(HIDDEN, torch.zeros(70, 9), TARGET)
    with pytest.raises(ValueError, match=r"expected bias of shape \(70,\), .* but got \(8,\)"):
        linear_logprobs(HIDDEN, WEIGHT, TARGET, bias=torch.zeros(8))
    with pytest.raises(TypeError, match=r"weight of hidden's dtype float32 but got bfloat16; .*autocast"):
        linear_logprobs(HIDDEN, WEIGHT.bfloat16(), TARGET)
    with pytest.raises(TypeError, match=r"hidden of dtype float32, bfloat16 or float16 but got float64"):
        linear_logprobs(HIDDEN.double(), WEIGHT.double(), TARGET)
    with pytest.raises(ValueError, match=r"weight on the device of hidden, cpu, but got meta"):
        linear_logprobs(HIDDEN, WEIGHT.to("meta"), TARGET)
    for tile in ((0, 32), (1, 0), (1, 33)):
        with pytest.raises(ValueError, match=r"a positive multiple of 32 columns\) but got \("):
            linear_logprobs(HIDDEN, WEIGHT, TARGET, tile=tile)


def test_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        token_logprobs(LOGITS, TARGET, 0.5)


def test_raw_ops_check_too():
    """torch.ops calls reach the C++ checks: wrong input is an error there, never a crash."""
    op = torch.ops.arcore.token_logprobs
    rest = (1.0, 0.0, -100, True)
    with pytest.raises(
        RuntimeError, match=r"arcore::token_logprobs: expected target as a contiguous tensor of 6"
    ):
        op(LOGITS, TARGET[:1], None, None, *rest)
    with pytest.raises(RuntimeError, match=r"expected temperature_rows as a contiguous tensor of 6 Float"):
        op(LOGITS, TARGET, torch.ones(5), None, *rest)
    with pytest.raises(
        RuntimeError, match=r"mask with the rows of logits \(2, 3, 70\) and a last dimension of 3"
    ):
        op(LOGITS, TARGET, None, torch.zeros(2, 3, 4, dtype=torch.int32), *rest)
    with pytest.raises(RuntimeError, match=r"float32, bfloat16 or float16 but got Double"):
        op(LOGITS.double(), TARGET, None, None, *rest)
    with pytest.raises(RuntimeError, match=r"expected softcap to be positive, or 0 for none, but got -1"):
        op(LOGITS, TARGET, None, None, 1.0, -1.0, -100, True)
    state = torch.zeros(6, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"expected state as a contiguous tensor of 24 Double"):
        torch.ops.arcore.token_logprobs_backward(
            None, None, None, LOGITS, TARGET, None, None, state[:5], 1.0, 0.0, -100
        )
    tile, flat = torch.zeros(6, 40), TARGET.flatten()
    with pytest.raises(RuntimeError, match=r"starts at a multiple of 32 columns and ends by vocab=70"):
        torch.ops.arcore.token_logprobs_update_(tile, flat, None, None, 1.0, 0.0, -100, 32, 70, True, state)
    with pytest.raises(RuntimeError, match=r"starts at a multiple of 32 columns"):
        torch.ops.arcore.token_logprobs_tile_backward_(
            None, None, None, tile, flat, None, None, state, 1.0, 0.0, -100, 8, 70, False
        )
