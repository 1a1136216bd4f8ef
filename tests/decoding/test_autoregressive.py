"""Generation token by token, on a model small enough to follow by hand and on Mamba."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import arcore
from arcore.decoding import generate, row_seeds, stream
from arcore.nn import TokenModel
from arcore.ops import filter_probs, sample


class Counter(nn.Module):
    """Expects the sum of all tokens read so far, modulo 10; has two columns too many, which are likeliest."""

    vocab_size = 10

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def make_cache(self, batch: int, max_length: int) -> dict[str, Tensor]:
        self.max_length = max_length
        return {"sum": torch.zeros(batch, dtype=torch.int64)}

    def logits(self, cache: dict[str, Tensor]) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        logits = torch.nn.functional.one_hot(cache["sum"] % 10, 12) * 5.0
        logits[:, 10:] = 99.0
        return logits

    def prefill(self, ids: Tensor, cache: dict[str, Tensor], mask: Tensor | None = None) -> Tensor:
        self.calls.append(("prefill", ids.shape[1]))
        cache["sum"] += (ids if mask is None else ids * mask).sum(1)
        return self.logits(cache)

    def step(self, ids: Tensor, cache: dict[str, Tensor]) -> Tensor:
        self.calls.append(("step", len(ids)))
        cache["sum"] += ids
        return self.logits(cache)


def test_greedy_by_hand():
    model = Counter().train()
    out = generate(model, torch.tensor([[1, 2], [0, 5]]), max_new_tokens=4, temperature=0.0)
    assert out.ids.tolist() == [[3, 6, 2, 4], [5, 0, 0, 0]]
    assert out.lengths.tolist() == [4, 4]
    assert out.rows() == [[3, 6, 2, 4], [5, 0, 0, 0]]
    # One pass for the prompt, one step per token but the last, whose logits nobody needs.
    assert model.calls == [("prefill", 2)] + [("step", 2)] * 3
    assert model.max_length == 6
    assert model.training
    assert isinstance(model, TokenModel)
    assert isinstance(arcore.create_model("mamba_tiny"), TokenModel)


def test_prompts_of_different_lengths():
    out = generate(Counter(), [[1, 2], [7], [9, 9, 9]], max_new_tokens=2, temperature=0.0)
    assert out.ids.tolist() == [[3, 6], [7, 4], [7, 4]]
    ids = torch.tensor([[0, 1, 2], [8, 8, 7]])
    mask = torch.tensor([[True, True, True], [False, False, True]])
    assert generate(Counter(), ids, mask=mask, max_new_tokens=2, temperature=0.0).ids.tolist() == [
        [3, 6],
        [7, 4],
    ]


def test_rows_end_each_for_itself():
    prompts = [[1, 2], [5, 0], [4]]  # 3 6 2 4 8 6 2 ..., 5 0 0 ..., 4 8 6 2 ...
    out = generate(Counter(), prompts, max_new_tokens=6, temperature=0.0, eos=8, pad_id=-9)
    assert out.rows() == [[3, 6, 2, 4, 8], [5, 0, 0, 0, 0, 0], [4, 8]]
    assert out.ids.tolist()[2] == [4, 8, -9, -9, -9, -9]
    model = Counter()
    out = generate(model, prompts, max_new_tokens=60, temperature=0.0, eos=[8, 5])
    assert out.rows() == [[3, 6, 2, 4, 8], [5], [4, 8]]
    assert out.ids.shape == (3, 5)
    assert len(model.calls) == 5
    out = generate(Counter(), prompts, max_new_tokens=60, temperature=0.0, stop=[[6, 2], [0, 0, 0]])
    assert out.rows() == [[3, 6, 2], [5, 0, 0, 0], [4, 8, 6, 2]]
    # A stop sequence must be new text, not the prompt's end.
    assert generate(Counter(), [[6, 2]], max_new_tokens=1, temperature=0.0, stop=[[2, 8]]).rows() == [[8]]


def test_streaming_gives_the_same_tokens_one_at_a_time():
    model = Counter().train()
    tokens = stream(model, [[1, 2], [4]], max_new_tokens=9, temperature=0.0, eos=8)
    assert model.calls == []
    assert next(tokens).tolist() == [3, 4]
    assert model.calls == [("prefill", 2)]
    assert [step.tolist() for step in tokens] == [[6, 8], [2, -1], [4, -1], [8, -1]]
    assert model.training
    given_up = stream(model, [[1, 2]], max_new_tokens=9)
    next(given_up)
    given_up.close()
    assert model.training


def test_seeds_belong_to_rows():
    model: Any = arcore.create_model("mamba_tiny")
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    together = generate(model, prompts, max_new_tokens=12, seed=[11, 22, 33])
    for row in range(3):
        alone = generate(model, [prompts[row]], max_new_tokens=12, seed=[11 * (row + 1)])
        assert alone.rows() == [together.rows()[row]]
    assert generate(model, prompts, max_new_tokens=12, seed=5).rows() != together.rows()
    same = generate(model, [[1, 2]] * 3, max_new_tokens=12, seed=5).rows()
    assert same[0] != same[1] != same[2]
    assert same == generate(model, [[1, 2]] * 3, max_new_tokens=12, seed=5).rows()


def test_repetition_penalty_counts_prompt_and_new_tokens_but_no_padding():
    class Flat(Counter):
        def logits(self, cache: dict[str, Tensor]) -> Tensor:
            return torch.arange(12.0, 0.0, -1.0).expand(len(cache["sum"]), 12)

    out = generate(Flat(), [[1], [3, 0]], max_new_tokens=11, temperature=0.0, repetition_penalty=100.0)
    # Likeliest first, each once; the padding in the first row is token 0 and does not count.
    assert out.ids[0].tolist() == [0, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0]
    assert out.ids[1].tolist() == [1, 2, 4, 5, 6, 7, 8, 9, 0, 0, 0]


class Table(Counter):
    """Logits of a row depend on the sum so far; two columns too many are likeliest."""

    def logits(self, cache: dict[str, Tensor]) -> Tensor:
        rows = [torch.randn(12, generator=torch.Generator().manual_seed(int(n))) for n in cache["sum"] % 97]
        logits = 2 * torch.stack(rows)
        logits[:, 10:] = 99.0
        return logits


SETTINGS = {"temperature": 0.8, "top_k": 6, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.4}


def test_draws_are_those_of_the_op():
    """Every token is `arcore.ops.sample` of its row's logits, with the row's seed and the token's position."""
    prompts = [[1, 2, 3], [4], [5, 6]]
    out = generate(Table(), prompts, max_new_tokens=20, seed=7, **SETTINGS)
    for row, prompt in enumerate(prompts):
        text = list(prompt)
        for token in out.rows()[row]:
            logits = Table().eval().logits({"sum": torch.tensor([sum(text)])})[0, :10]
            expected = sample(
                logits,
                **SETTINGS,
                history=torch.tensor(text),
                seed=int(row_seeds(7, 3)[row]),
                offset=len(text),
            )
            assert token == expected.item()
            text.append(token)


def test_an_interrupted_text_goes_on_as_it_would_have():
    whole = generate(Table(), [[1, 2, 3], [4]], max_new_tokens=12, seed=[5, 6], **SETTINGS).rows()
    for row, prompt in enumerate(([1, 2, 3], [4])):
        rest = generate(
            Table(), [prompt + whole[row][:5]], max_new_tokens=7, seed=[5 + row], **SETTINGS
        ).rows()
        assert rest == [whole[row][5:]]


@pytest.mark.parametrize("settings", [{"min_p": 0.3}, {"top_k": 2}, {"top_p": 0.5}], ids=str)
def test_filters_reach_the_draw(settings):
    model = Table().eval()
    first = model.logits({"sum": torch.tensor([3])})[:, :10]
    drawn = generate(model, torch.full((300, 1), 3), max_new_tokens=1, seed=0, **settings).ids
    kept = (filter_probs(first, **settings) > 0)[0].nonzero().flatten()
    assert 1 < len(kept) < 10
    assert torch.equal(drawn.unique(), kept)


def test_float64_and_nan():
    class Double(Table):
        def logits(self, cache: dict[str, Tensor]) -> Tensor:
            return super().logits(cache).double()

    wanted = generate(Table(), [[1]], max_new_tokens=9, seed=3)
    assert torch.equal(generate(Double(), [[1]], max_new_tokens=9, seed=3).ids, wanted.ids)

    class Broken(Table):
        def logits(self, cache: dict[str, Tensor]) -> Tensor:
            return super().logits(cache) * torch.tensor([[1.0], [torch.nan]])

    with pytest.raises(ValueError, match=r"row \(1,\) has NaN"):
        generate(Broken(), [[1], [2]], max_new_tokens=9)


def test_nothing_to_do():
    out = generate(Counter(), [[1], [2, 3]], max_new_tokens=0)
    assert out.ids.shape == (2, 0)
    assert out.lengths.tolist() == [0, 0]
    out = generate(Counter(), torch.zeros(0, 3, dtype=torch.int64), max_new_tokens=4)
    assert out.ids.shape == (0, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0 but got -1"),
        ({"prompt": [[1], []]}, "expected at least one token in every row"),
        ({"prompt": torch.zeros(1, 0, dtype=torch.int64)}, "expected at least one token in every row"),
        (
            {"prompt": torch.zeros(3, dtype=torch.int64)},
            r"expected a prompt of shape \[B, L\] but got \(3,\)",
        ),
        ({"mask": torch.ones(1, 1, dtype=torch.bool)}, "expected a mask only with a tensor of ids"),
        (
            {"prompt": torch.ones(1, 2, dtype=torch.int64), "mask": torch.ones(1, 3, dtype=torch.bool)},
            r"expected a bool mask of shape \(1, 2\) but got bool of shape \(1, 3\)",
        ),
        ({"stop": [[]]}, "expected stop sequences of at least one token"),
        ({"repetition_penalty": 0.0}, "expected repetition_penalty > 0"),
        ({"temperature": -1.0}, "expected a finite temperature >= 0"),
        ({"top_k": -2}, "expected top_k >= -1"),
        ({"temperature": 0.0, "top_p": 1.5}, "expected 0 <= top_p <= 1"),
        ({"seed": [1, 2]}, "expected one seed, or 1 of them"),
    ],
)
def test_errors_come_before_the_model_runs(settings: dict[str, Any], message: str):
    model = Counter()
    arguments: dict[str, Any] = {"prompt": [[1]], "max_new_tokens": 3} | settings
    with pytest.raises(ValueError, match=message):
        stream(model, arguments.pop("prompt"), **arguments)
    assert model.calls == []
