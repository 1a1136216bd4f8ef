"""What every network of the zoo must do, tested on each preset that ends in `_tiny`."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import get_args

import pytest
import torch

import arcore
from arcore.catalog import find, list_systems
from arcore.models import load_checkpoint, save_checkpoint
from arcore.nn.kinds import argument_kinds

MAX_PARAMETERS = 2_000_000


def test_every_system_has_a_tiny_preset():
    assert {find(name).entry.system.name for name in arcore.list_models("*_tiny")} >= set(
        list_systems(kind="model")
    )


def test_tiny_is_small(model):
    assert sum(parameter.numel() for parameter in model.parameters()) <= MAX_PARAMETERS


def test_forward_has_the_promised_shape(adapter, model):
    out = adapter.forward(model)
    assert tuple(out.shape) == adapter.expected_shape()
    assert out.dtype == torch.float32
    assert out.isfinite().all()


@torch.no_grad()
def test_forward_refuses_what_are_no_tensors(adapter, model):
    """Lists, texts and None in place of a tensor: our error, which names the argument."""
    calls = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    adapter.forward(model)
    handle.remove()
    args, kwargs = calls[0]
    names = list(inspect.signature(model.forward).parameters)
    for place, value in enumerate(args):
        if not isinstance(value, torch.Tensor):
            continue
        kind = argument_kinds(model.forward)[names[place]]
        for wrong in (value.tolist(), "x", *([None] if type(None) not in get_args(kind) else [])):
            if isinstance(wrong, list) and kind is not torch.Tensor:
                continue
            with pytest.raises(TypeError, match=f"expected {names[place]} to be a"):
                model(*args[:place], wrong, *args[place + 1 :], **kwargs)


def test_gradients_reach_all_parameters(adapter, model):
    adapter.loss(model).backward()
    without = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert without == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_loss_falls_over_five_steps(adapter, preset):
    model = arcore.create_model(preset)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(6):
        loss = adapter.loss(model)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0], losses


@torch.no_grad()
def test_steps_equal_one_pass(adapter, model):
    whole, steps = adapter.stepwise(model)
    assert whole.std() > 0.1
    # Of the largest value: both round sums of that size, in orders that differ with the processor.
    assert (whole - steps).abs().max() <= 1e-5 * max(1.0, float(whole.abs().max()))


@torch.no_grad()
def test_checkpoint_round_trip(adapter, preset, model, tmp_path: Path):
    pytest.importorskip("safetensors")
    save_checkpoint(tmp_path / "checkpoint", {"network": model}, {"note": "ours"})
    modules, meta = load_checkpoint(tmp_path / "checkpoint")
    assert meta == {"note": "ours"}
    loaded = [modules["network"], arcore.create_model(preset, weights=tmp_path / "checkpoint")]
    for other in loaded:
        assert other.config == model.config
        state = other.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert torch.equal(adapter.forward(other.eval()), adapter.forward(model))


def test_training_step_compiles_as_one_graph(adapter, shallow):
    """Loss, gradients and what the step leaves in buffers are those of eager mode, random draws included."""
    check_compiled(adapter, shallow, "eager")


@pytest.mark.slow
def test_training_step_compiles_ahead_of_time(adapter, model):
    """All layers, and the backward traced too, which takes several times as long; ops are held to that one by one."""
    check_compiled(adapter, model, "aot_eager")


def check_compiled(adapter, eager, backend):
    torch._dynamo.reset()
    traced = copy.deepcopy(eager.train())
    compiled = torch.compile(traced, fullgraph=True, backend=backend)
    losses = []
    for module in (eager, compiled):
        torch.manual_seed(0)
        losses.append(adapter.loss(module))
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0])
    for (name, one), other in zip(eager.named_parameters(), traced.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(traced.state_dict(), eager.state_dict())


def test_generation_is_repeatable_and_ignores_batch_mates(adapter, model):
    codes, images = adapter.generate(model, [0, 1, 2])
    again, _ = adapter.generate(model, [0, 1, 2])
    assert all(torch.equal(a, b) for a, b in zip(codes, again, strict=True))
    for rows in ([1], [2, 0]):
        part, pictures = adapter.generate(model, rows)
        assert all(torch.equal(a[rows], b) for a, b in zip(codes, part, strict=True))
        torch.testing.assert_close(pictures, images[rows], rtol=0, atol=1e-4)
    assert not model.training
    assert images.min() >= -1
    assert images.max() <= 1
