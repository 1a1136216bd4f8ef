"""Values in tensors, which only kernels read, and what kernels write in place: the same rules for all ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from arcore import ops
from tests.decoder_step.test_decoder_step import make as make_layer
from tests.mamba_step.test_mamba_step import make as make_mamba
from tests.speculative.cases import RULES, calls, make_case

LONG = torch.int64


def conv(**change: Any) -> Any:
    given = {"x": torch.zeros(2, 5), "conv_state": torch.zeros(7, 5, 3), "weight": torch.zeros(5, 4)}
    given["conv_state_indices"] = torch.tensor([0, 1])
    return ops.causal_conv1d_update(**{**given, **change})


def state_update(**change: Any) -> Any:
    given = {"state": torch.zeros(4, 3, 2), "x": torch.zeros(2, 3), "dt": torch.zeros(2, 3)}
    given |= {"A": -torch.ones(3, 2), "B": torch.zeros(2, 2), "C": torch.zeros(2, 2)}
    return ops.selective_state_update(**{**given, "state_batch_indices": torch.tensor([0, 1]), **change})


def scan(bounds: list[int]) -> Any:
    u, b = torch.zeros(1, 3, 8), torch.zeros(1, 2, 8)
    cut = torch.tensor(bounds, dtype=torch.int32)
    return ops.selective_scan(u, u, -torch.ones(3, 2), b, b, cu_seqlens=cut)


SHARED = torch.zeros(2, 2, 3, 4)


def mamba3(bounds: list[int]) -> Any:
    t, m = torch.zeros(1, 8, 2), torch.zeros(1, 8, 1, 1, 4)
    x = torch.zeros(1, 8, 2, 1, 3)
    return ops.mamba3_scan(x, t, t, t, m, m, t[..., None], cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


def mamba3_step(**change: Any) -> Tensor:
    state = {"state": SHARED, "angle": torch.zeros(2, 2, 1), "last_B": torch.zeros(2, 2, 1, 4)}
    state |= {"last_x": torch.zeros(2, 2, 1, 3)}
    t, m = torch.zeros(2, 2), torch.zeros(2, 1, 1, 4)
    parts = ops.Mamba3State(*(state | change).values())
    return ops.mamba3_update(parts, torch.zeros(2, 2, 1, 3), t, t, t, m, m, t[..., None])


def layer(**change: Any) -> Any:
    given = make_layer()
    return ops.decoder_step(given.pop("x"), **{**given, **change})


def drafted(rule: str, **change: Any) -> Any:
    name = {"token": "chain"}.get(rule, rule)
    case = make_case(2, 7, parents=[-1, 0])
    given = {"seed": case.seed, "offset": case.offset, "draft_tokens": case.tokens, **change}
    more = {"neighbours": torch.arange(7).expand(7, 7)} if name == "relaxed" else {}
    if name in ("tree", "typical", "relaxed"):
        more["parents"] = given.pop("parents", torch.tensor([-1, 0]))
    return getattr(ops, f"verify_{name}")(case.target, **given, **more)


FAR, SHORT = torch.tensor([[1, 2], [3, 99]]), torch.tensor([1, 9])
X = torch.randn(3, 50)
# name of the public function -> a call with a value that only a kernel sees
WRONG: list[tuple[str, Callable[[], Any]]] = [
    *((f"verify_{rule}", lambda rule=rule: drafted(rule, draft_tokens=FAR))
      for rule in ("chain", "tree", "typical", "relaxed", "jacobi")),
    *((f"verify_{rule}", lambda rule=rule: drafted(rule, lengths=SHORT))
      for rule in ("chain", "tree", "typical", "relaxed", "jacobi")),
    *((f"verify_{rule}", lambda rule=rule: drafted(rule, parents=torch.tensor([-1, 1])))
      for rule in ("tree", "typical", "relaxed")),
    ("token_logprobs", lambda: ops.token_logprobs(X, torch.tensor([0, 1, 50]))),
    ("token_logprobs", lambda: ops.token_logprobs(X, torch.arange(3), temperature=torch.tensor([1.0, -1.0, 1.0]))),
    ("linear_logprobs", lambda: ops.linear_logprobs(X, torch.randn(7, 50), torch.tensor([0, 1, 7]))),
    ("causal_conv1d_update", lambda: conv(conv_state_indices=torch.tensor([0, 9]))),
    ("causal_conv1d_update", lambda: conv(cache_seqlens=torch.tensor([0, -2]))),
    ("causal_conv1d_update", lambda: conv(conv_state=torch.zeros(1, 5, 3).expand(7, 5, 3))),
    ("causal_conv1d_update", lambda: conv(x=torch.zeros(2, 5, 3), num_steps=torch.tensor([1, 4]))),
    ("selective_state_update", lambda: state_update(state_batch_indices=torch.tensor([0, 4]))),
    ("selective_state_update", lambda: state_update(state=torch.zeros(1, 3, 2).expand(4, 3, 2))),
    ("selective_scan", lambda: scan([0, 5, 4, 8])),
    ("selective_scan", lambda: scan([1, 8])),
    ("causal_conv1d", lambda: ops.causal_conv1d(torch.zeros(1, 5, 8), torch.zeros(5, 4),
                                                cu_seqlens=torch.tensor([0, 5, 4, 8], dtype=torch.int32))),
    ("ssd", lambda: ops.ssd(torch.zeros(1, 8, 2, 4), torch.zeros(1, 8, 2), -torch.ones(2), torch.zeros(1, 8, 1, 4),
                            torch.zeros(1, 8, 1, 4), cu_seqlens=torch.tensor([0, 5, 4, 8], dtype=torch.int32))),
    ("mamba3_scan", lambda: mamba3([0, 5, 4, 8])),
    ("mamba3_scan", lambda: mamba3([1, 8])),
    ("mamba3_update", lambda: mamba3_step(state=torch.zeros(1, 1, 1, 4).expand(2, 2, 3, 4))),
    ("mamba3_update", lambda: mamba3_step(last_x=SHARED[:, :, :1, :3])),
    ("decoder_step", lambda: layer(lengths=torch.tensor([5, 70, 3]))),
    ("decoder_step", lambda: layer(lengths=torch.tensor([5, -1, 3]))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "call"), WRONG, ids=[f"{i}-{name}" for i, (name, _) in enumerate(WRONG)])
def test_values_that_only_kernels_see_are_refused_in_the_functions_words(
    name: str, call: Callable[[], Any]
) -> None:
    with pytest.raises(ValueError, match=rf"^arcore\.{name}: expected .+ but .+") as caught:
        call()
    assert "arcore::" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__context__ is None  # one traceback


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_of_verification_names_itself(rule: str) -> None:
    case = make_case(2, 13)
    case.tokens[1, 0] = 99
    with pytest.raises(ValueError, match=r"^arcore\.verify_\w+: expected draft_tokens"):
        calls()[rule](case, seed=case.seed, offset=case.offset)


def test_a_tensor_that_torch_cannot_make_is_told_as_such() -> None:
    big = torch.randn(1, 1, 1).expand(1 << 20, 1 << 20, 4)
    b = torch.randn(1, 4, 1).expand(1 << 20, 4, 4)
    with pytest.raises(RuntimeError, match=r"^arcore\.selective_scan: torch could not make a tensor"):
        ops.selective_scan(big, big, torch.randn(1, 1).expand(1 << 20, 4), b, b)
    wide = torch.randn(1, 1, 1).expand(1 << 20, 1 << 20, 4)
    with pytest.raises(RuntimeError, match=r"^arcore\.causal_conv1d: torch could not make a tensor"):
        ops.causal_conv1d(wide, torch.zeros(1, 4).expand(1 << 20, 4))


# ---- what is written in place ----


def in_place_ops() -> list[str]:
    names = {
        n.removeprefix("arcore::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("arcore::")
    }
    return sorted(n for n in names if getattr(torch.ops.arcore, n).default._schema.is_mutable)


def raw_call(name: str) -> tuple[list[Any], list[Tensor]]:
    """Positional arguments of a raw call, and those among them that are written."""
    x, state = torch.randn(2, 5), torch.randn(2, 5, 3)
    given: dict[str, Any] = {}
    if name.startswith("causal_conv1d_update"):
        given = {"x": x, "conv_state": state, "weight": torch.randn(5, 4), "silu": False, "pad_slot_id": -1}
        if name.endswith("steps"):
            given |= {"x": x.unsqueeze(2), "snapshots": torch.zeros(2, 2, 5, 3)}
    elif name.startswith("selective_state_update"):
        given = {
            "state": torch.randn(2, 5, 3),
            "x": x,
            "dt": x.abs(),
            "A": -torch.rand(5, 3),
            "B": torch.randn(2, 3),
        }
        given |= {"C": torch.randn(2, 3), "dt_softplus": False, "pad_slot_id": -1}
        if name.endswith("steps"):
            given |= {n: given[n].unsqueeze(1) for n in ("x", "dt", "B", "C")}
            given["snapshots"] = torch.zeros(2, 2, 5, 3)
    elif name == "mamba3_update":
        t, m, u = torch.rand(2, 2), torch.randn(2, 1, 1, 4), torch.randn(2, 2, 1, 3)
        given = {
            "state": torch.randn(2, 2, 3, 4),
            "angle": torch.rand(2, 2, 1),
            "last_x": torch.randn(2, 2, 1, 3),
        }
        given |= {
            "last_B": torch.randn(2, 2, 1, 4),
            "x": u,
            "log_decay": -t,
            "before": t,
            "now": t,
            "B": m,
            "C": m,
        }
        given |= {"turn": t[..., None], "halves": False}
    elif name == "decoder_step":
        given = make_layer()
        given |= {"heads": given.pop("num_heads"), "window": 0, "eps": 1e-5}
    elif name == "mamba_step":
        given = {**make_mamba(), "eps": 1e-5}
    elif name.startswith("token_logprobs_"):
        given = {
            "tile": torch.randn(2, 32),
            "target": torch.zeros(2, dtype=LONG),
            "temperature": 1.0,
            "softcap": 0.0,
        }
        given |= {
            "ignore_index": -100,
            "first_column": 0,
            "vocab": 32,
            "entropy": False,
            "need_temperature": False,
        }
        given |= {"state": torch.zeros(2, 4, dtype=torch.float64), "grad_logp": torch.ones(2)}
        given["tally"] = torch.zeros(2, 4, dtype=torch.float64)
    schema = getattr(torch.ops.arcore, name).default._schema
    arguments = [given.get(a.name, a.default_value) for a in schema.arguments]
    written = [
        v for a, v in zip(schema.arguments, arguments, strict=True) if a.alias_info and a.alias_info.is_write
    ]
    return arguments, [t for t in written if t is not None]


def test_there_are_ops_that_write_in_place() -> None:
    assert {"causal_conv1d_update", "selective_state_update_steps", "decoder_step", "mamba_step"} <= set(
        in_place_ops()
    )


@pytest.mark.parametrize("name", in_place_ops())
def test_raw_ops_count_what_they_write(name: str) -> None:
    """autograd then notices that a tensor which it saved was overwritten."""
    arguments, written = raw_call(name)
    assert written
    with torch.no_grad():
        for calls_before in range(2):
            assert [t._version for t in written] == [calls_before] * len(written)
            getattr(torch.ops.arcore, name)(*arguments)
    factor = torch.ones_like(written[0], requires_grad=True)
    loss = (factor * written[0]).sum()
    with torch.no_grad():
        getattr(torch.ops.arcore, name)(*arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", in_place_ops())
def test_raw_ops_refuse_what_requires_grad(name: str) -> None:
    arguments, written = raw_call(name)
    before = [t.clone() for t in written]
    for t in written:
        t.requires_grad_()
    with pytest.raises(RuntimeError, match="in place"):
        getattr(torch.ops.arcore, name)(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(written, before, strict=True))


@pytest.mark.parametrize(
    "name", ["causal_conv1d_update", "selective_state_update", "decoder_step", "mamba_step"]
)
def test_public_functions_count_once(name: str) -> None:
    if name == "decoder_step":
        given = make_layer()
        written = [given["x"], given["keys"], given["values"]]
        ops.decoder_step(given.pop("x"), **given)
    elif name == "mamba_step":
        given = make_mamba()
        written = [given["x"], given["conv_state"], given["state"]]
        ops.mamba_step(given.pop("x"), **given)
    elif name == "causal_conv1d_update":
        written = [torch.zeros(7, 5, 3)]
        conv(conv_state=written[0])
    else:
        written = [torch.zeros(4, 3, 2)]
        state_update(state=written[0])
    assert [t._version for t in written] == [1] * len(written)
