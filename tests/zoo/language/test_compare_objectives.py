"""Inputs and targets, T5's layers against transformers, what the architectures see, and `arcore run`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from arcore.cli import main
from arcore.masks import causal, full
from arcore.nn.t5 import RelativeBias, T5Attention, T5Layer, relative_buckets
from arcore.zoo.language.compare_objectives.model import SENTINEL, START, Model, Pair, make_pair
from arcore.zoo.language.compare_objectives.study import (
    Data,
    Options,
    choice_accuracy,
    choices,
    held_out_loss,
    run,
    task_pairs,
)


def texts(length: int = 40) -> torch.Tensor:
    return torch.randint(256, (3, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("length", [4, 7, 40, 200])
def test_spans_and_sentinels_put_a_text_together_again(length: int):
    original = texts(length)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        inputs, targets = make_pair("MLM", original, generator)
        for row in range(3):
            spans: dict[int, list[int]] = {}
            for token in targets[row].tolist():
                if token >= SENTINEL:
                    spans[token] = []
                else:
                    spans[max(spans)].append(token)
            assert spans.pop(max(spans)) == []
            whole = [
                t
                for token in inputs[row, 1:].tolist()
                for t in (spans[token] if token >= SENTINEL else [token])
            ]
            assert whole == original[row].tolist()
        assert sum(map(len, spans.values())) == max(1, round(0.15 * length))


def test_the_other_objectives():
    original, generator = texts(), torch.Generator().manual_seed(1)
    inputs, targets = make_pair("FLM", original, generator)
    assert inputs.tolist() == [[START]] * 3
    assert torch.equal(targets, original)
    cuts = set()
    for _ in range(20):
        inputs, targets = make_pair("PLM", original, generator)
        assert torch.equal(torch.cat([inputs[:, 1:], targets], 1), original)
        assert targets.shape[1] >= 1
        cuts.add(targets.shape[1])
    assert len(cuts) > 5
    with pytest.raises(ValueError, match="one of 'FLM', 'PLM', 'MLM'"):
        make_pair("XLM", original, generator)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 4 tokens"):
        make_pair("MLM", original[:, :3], generator)


@pytest.mark.parametrize("both", [True, False])
def test_buckets_are_those_of_transformers(both: bool):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = torch.arange(-300, 301)
    theirs = t5.T5Attention._relative_position_bucket(distance, bidirectional=both)
    assert torch.equal(relative_buckets(distance, both=both), theirs)


@torch.no_grad()
def test_attention_is_that_of_a_plain_loop():
    torch.manual_seed(0)
    attention, bias = T5Attention(12, 3), RelativeBias(3, buckets=8, farthest=16)
    bias.weight.normal_()
    x = torch.randn(1, 6, 12)
    found = attention(x, x, causal(6).to_bool(), bias(6, 6))[0]
    q, k, v = (part(x)[0].view(6, 3, 4) for part in (attention.q, attention.k, attention.v))
    for i in range(6):
        heads = []
        for head in range(3):
            numbers = relative_buckets(torch.arange(i + 1) - i, buckets=8, farthest=16)
            scores = k[: i + 1, head] @ q[i, head] + bias.weight[numbers, head]
            heads.append(scores.softmax(0) @ v[: i + 1, head])
        torch.testing.assert_close(found[i], attention.o(torch.cat(heads)), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="give memory"):
        T5Layer(12, 3, 8, cross=True)(x, full(6, 6).to_bool(), bias(6, 6))


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["CD", "ND", "ED"])
def test_targets_see_all_inputs_and_earlier_targets(architecture: str):
    torch.manual_seed(0)
    model = Model(architecture, dim=16, layers=1, heads=2)  # type: ignore[arg-type]
    pair = Pair(torch.cat([torch.full((3, 1), START), texts()[:, :5]], 1), texts()[:, 5:12])
    logits = model(pair)
    assert logits.shape == (*pair.targets.shape, 320)
    other = pair.targets.clone()
    other[:, 2] = (other[:, 2] + 1) % 256
    change = (model(Pair(pair.inputs, other)) - logits).abs().amax((0, 2))
    assert change[:3].max() == 0
    assert change[3:].min() > 0
    other = pair.inputs.clone()
    other[:, -1] = (other[:, -1] + 1) % 256
    assert (model(Pair(other, pair.targets)) - logits).abs().amax((0, 2)).min() > 0
    model(pair)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert (
        parameters > 1.2 * sum(p.numel() for p in Model("CD", dim=16, layers=1, heads=2).parameters())
    ) == (architecture == "ED")


def test_measures(tmp_path: Path):
    path = tmp_path / "some.txt"
    path.write_text("".join(f"line {i} of a text that goes on. " for i in range(200)))
    data = Data(str(path), 24, 0)

    class Oracle(torch.nn.Module):
        """Prefers small bytes."""

        def forward(self, pair: Pair) -> torch.Tensor:
            return -torch.arange(320.0).expand(*pair.targets.shape, 320) / 50

    right = choices(Oracle(), data, count=40)
    assert set(right.tolist()) <= {0.0, 1.0}
    assert float(choices(Oracle(), data).mean()) == choice_accuracy(Oracle(), data)
    assert choices(Oracle(), data, test=False, count=7).shape == (7,)
    one = held_out_loss(Oracle(), "FLM", data)
    task_pairs(data, 2)
    assert one == held_out_loss(Oracle(), "FLM", data)
    kinds = {bytes(task_pairs(data, 1).inputs[0, 1:2].tolist()) for _ in range(30)}
    assert kinds == {b"R", b"S", b"C"}
    path.write_text("short")
    with pytest.raises(ValueError, match="too few for pieces of 24"):
        Data(str(path), 24, 0)
    with pytest.raises(ValueError, match="--context must be at least 24"):
        Options(context=8)
    with pytest.raises(ValueError, match="--heads must divide --dim"):
        Options(heads=5)
    with pytest.raises(ValueError, match="one of 'CD', 'ND', 'ED' but got 'XX'"):
        Model("XX", dim=8, layers=1, heads=1)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "some.txt"
    path.write_text("".join(f"line {i} of a text that goes on. " for i in range(200)))
    where = ["--json", str(tmp_path / "found.json"), "--figure", str(tmp_path / "figure.png")]
    small = [
        "--steps",
        "3",
        "--multitask",
        "1",
        "--context",
        "24",
        "--batch",
        "2",
        "--dim",
        "16",
        "--heads",
        "2",
    ]
    assert main(["run", "compare_objectives", "--data", str(path), *small, *where]) == 0
    assert "CD:FLM" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())["entries"]
    assert len(found) == 9
    assert found["ND:FLM"] == found["CD:FLM"]
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_a_guard_tells_shares_and_goes_on(tmp_path: Path):
    path = tmp_path / "some.txt"
    path.write_text("".join(f"line {i} of a text that goes on. " for i in range(200)))
    few = Options(
        data=str(path), steps=1, multitask=0, context=24, batch=2, dim=16, layers=1, heads=2,
        guard=tmp_path / "guard.json", guard_budget=1,
    )  # fmt: skip
    report = run(few)
    assert "guarded" in report.text
    assert "choice of 4" not in report.text
    shares = [entry["guarded"] for entry in report.values["entries"].values()]
    assert all(math.isnan(share) or -0.5 < share < 1.5 for share in shares)
    assert not math.isnan(shares[0])
    run(few)  # reads the file that the first one wrote
