"""Exact properties: carried states, packing, direction, groups, layout, threads, batch mates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from arcore.ops import selective_scan, ssd
from tests.selective_scan.cases import call, everything, make_case

ALONG_TIME = ("u", "delta", "z", "B", "C", "grad_out")


def part(case, start, stop):
    return case.map(lambda name, t: t[..., start:stop] if name in ALONG_TIME and t.dim() > 2 else t)


@pytest.mark.parametrize("cut", [0, 1, 63, 64, 100, 130])
@pytest.mark.parametrize("reverse", [False, True])
def test_split_scan_equals_whole_scan(cut, reverse):
    case = make_case(2, 20, 130, 16, initial=True, reverse=reverse)
    whole = everything(case)
    pieces = [part(case, 0, cut), part(case, cut, 130)]
    order = [1, 0] if reverse else [0, 1]
    leaves = {name: t.detach().requires_grad_() for name, t in case.floats().items()}
    full = replace(case, **leaves)
    state, outs = leaves["initial_state"], [None, None]
    for i in order:
        start, stop = (0, cut) if i == 0 else (cut, 130)
        outs[i], state = call(selective_scan, replace(part(full, start, stop), initial_state=state))
    out = torch.cat(outs, dim=-1)
    assert len(pieces) == 2
    torch.testing.assert_close(out, whole["out"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, whole["last_state"], rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad([out, state], list(leaves.values()), [case.grad_out, case.grad_last_state])
    for name, grad in zip(leaves, grads, strict=True):
        scale = whole[name].abs().max()
        assert ((grad - whole[name]).abs().max() <= 1e-5 * scale).item(), name


def test_one_step_at_a_time_equals_scan():
    case = make_case(2, 20, 37, 16, initial=True)
    out, last = call(selective_scan, case)
    state, outs = case.initial_state, []
    for t in range(37):
        step, state = call(selective_scan, replace(part(case, t, t + 1), initial_state=state))
        outs.append(step)
    assert torch.equal(torch.cat(outs, dim=-1), out)
    assert torch.equal(state, last)


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_row_equals_separate_calls(reverse):
    lengths = [5, 64, 0, 100, 1]
    case = make_case(dim=20, state=16, lengths=lengths, initial=True, reverse=reverse)
    packed = everything(case)
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    totals = {name: torch.zeros_like(packed[name]) for name in ("A", "D", "delta_bias")}
    for i, length in enumerate(lengths):
        start, stop = starts[i], starts[i] + length
        alone = replace(
            part(case, start, stop),
            cu_seqlens=None,
            initial_state=case.initial_state[i : i + 1],
            grad_last_state=case.grad_last_state[i : i + 1],
        )
        for name, value in everything(alone).items():
            if name in totals:
                totals[name] += value
            elif name in ("last_state", "initial_state"):
                assert torch.equal(value[0], packed[name][i]), name
            else:
                assert torch.equal(value, packed[name][..., start:stop]), name
    for name, total in totals.items():
        torch.testing.assert_close(total, packed[name], rtol=1e-4, atol=1e-4)


def test_sequence_ids_equal_packed_row():
    lengths = [5, 64, 100, 1]
    packed = make_case(dim=20, state=16, lengths=lengths)
    ids = torch.arange(4).repeat_interleave(torch.tensor(lengths))[None].int()
    by_id = replace(packed, cu_seqlens=None, seq_idx=ids)
    out, last = call(selective_scan, packed)
    out_by_id, last_by_id = call(selective_scan, by_id)
    assert torch.equal(out, out_by_id)
    assert torch.equal(last[-1:], last_by_id)


def test_left_padding_equals_the_row_alone():
    short = make_case(1, 20, 50, 16, initial=True)
    pad = 21
    long = short.map(
        lambda name, t: torch.nn.functional.pad(t, (pad, 0), value=3.0) if name in ALONG_TIME else t
    )
    ids = torch.zeros(1, 50 + pad, dtype=torch.int32)
    ids[:, :pad] = -1
    out, last = call(selective_scan, short)
    padded_out, padded_last = call(selective_scan, replace(long, seq_idx=ids))
    torch.testing.assert_close(padded_out[..., pad:], out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(padded_last, last, rtol=1e-6, atol=1e-6)
    assert torch.equal(padded_out[..., :pad], torch.zeros(1, 20, pad))


def test_reverse_equals_flip():
    for length in (1, 64, 130):
        case = make_case(2, 20, length, 16, initial=True)
        flipped = case.map(lambda name, t: t.flip(-1) if name in ALONG_TIME and t.dim() > 2 else t)
        expected = everything(flipped)
        for name, value in everything(replace(case, reverse=True)).items():
            mirrored = value.flip(-1) if name in (*ALONG_TIME, "out") else value
            assert torch.equal(mirrored, expected[name]), name


def test_groups_equal_repeated_channels():
    case = make_case(2, 12, 70, 5, b="3", c="3")
    per_channel = case.map(
        lambda name, t: t.repeat_interleave(4, dim=1) if name in ("B", "C") and t.dim() == 4 else t
    )
    grouped, repeated = everything(case), everything(per_channel)
    assert torch.equal(grouped["out"], repeated["out"])
    for name in ("B", "C"):
        summed = repeated[name].unflatten(1, (3, 4)).sum(2)
        torch.testing.assert_close(grouped[name], summed, rtol=1e-4, atol=1e-4)


def test_linear_in_the_input():
    case = make_case(2, 20, 70, 16)
    twice = case.map(lambda name, t: 2 * t if name == "u" else t)
    assert torch.equal(call(selective_scan, twice)[0], 2 * call(selective_scan, case)[0])


LAYOUTS = {
    "channel_last": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "sliced": lambda t: t.repeat_interleave(3, dim=-1)[..., ::3],
    "offset": lambda t: torch.nn.functional.pad(t, (3, 2, 1, 4))[..., 1:-4, 3:-2],
    "batch_inner": lambda t: t.movedim(0, 1).contiguous().movedim(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layout_changes_no_bit(layout, dtype):
    for reverse in (False, True):
        case = make_case(2, 36, 131, 16, dtype=dtype, reverse=reverse)
        other = case.map(lambda name, t: LAYOUTS[layout](t) if name in ALONG_TIME else t)
        expected = everything(case)
        for name, value in everything(other).items():
            assert torch.equal(value, expected[name]), name


def test_output_has_the_layout_of_the_input():
    case = make_case(2, 36, 40, 16)
    out, _ = call(selective_scan, case.map(lambda n, t: LAYOUTS["channel_last"](t) if n == "u" else t))
    assert out.stride() == (36 * 40, 1, 36)


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_thread_count_changes_no_bit(restore_threads):
    # Enough work that the op does use several threads.
    case = make_case(3, 300, 150, 16, b="2", initial=True)
    torch.set_num_threads(1)
    expected = everything(case)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        for name, value in everything(case).items():
            assert torch.equal(value, expected[name]), name


def test_batch_mates_and_repetition_change_no_bit():
    case = make_case(3, 20, 100, 16, initial=True)
    together = everything(case)
    again = everything(case)
    for name, value in together.items():
        assert torch.equal(value, again[name]), name
    per_row = {*ALONG_TIME, "initial_state", "grad_last_state"}
    for i in range(3):
        alone = everything(case.map(lambda name, t, i=i: t[i : i + 1] if name in per_row else t))
        for name in ("out", "last_state", "u", "delta", "B", "C", "z", "initial_state"):
            assert torch.equal(alone[name][0], together[name][i]), name


def test_numbers_below_2_to_the_minus_126_are_0() -> None:
    """A denormal input that the other factors would bring back into sight counts as 0; a normal one does not."""
    ones, A = torch.ones(1, 3, 40), -torch.ones(3, 2)
    B, C = torch.full((1, 2, 40), 1e20), torch.ones(1, 2, 40)
    heads = (torch.ones(1, 40, 1), -torch.ones(1), torch.full((1, 40, 1, 2), 1e20), torch.ones(1, 40, 1, 2))
    for size, seen in ((1e-40, False), (1e-37, True)):
        u = torch.full((1, 3, 40), size)
        assert bool((selective_scan(u, ones, A, B, C) != 0).all()) == seen
        assert bool((ssd(u.mT.reshape(1, 40, 1, 3), *heads) != 0).any()) == seen
