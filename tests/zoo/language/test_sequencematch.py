"""A backspace for language models: the loss, edit histories in one pass, and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arcore.catalog import load_checkpoint, save_checkpoint
from arcore.cli import main
from arcore.decoding import Sampling, Session
from arcore.decoding.laws import small_model
from arcore.training import checkpoint
from arcore.zoo.language.sequencematch.check import context_error, continued, identities, stretches
from arcore.zoo.language.sequencematch.edits import (
    contexts,
    edited_hidden,
    noisy,
    with_backspace,
    write_with_backspace,
)
from arcore.zoo.language.sequencematch.loss import sequencematch_loss

Batch = dict[str, Tensor]


class Contract:
    learns = ("logits", "sampled")
    tolerance = 1e-12

    def batch(self, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        return {
            "logits": torch.randn(4, 7, 5, generator=generator, dtype=torch.float64),
            "actions": torch.randint(5, (4, 6), generator=generator),
            "mask": torch.arange(6) < torch.tensor([6, 1, 4, 0])[:, None],
            "sampled": torch.randn(4, 5, 5, generator=generator, dtype=torch.float64),
            "sampled_mask": torch.arange(4) < torch.tensor([4, 2, 0, 3])[:, None],
        }

    def loss(self, batch: Batch, **settings: Any) -> Tensor:
        return sequencematch_loss(**batch, **{"alpha": 0.1, "gamma": 0.9, **settings})  # type: ignore[arg-type]

    def reference(self, batch: Batch) -> Tensor:
        gained, data, own = [], [], []
        for row in range(4):
            for t in range(6):
                if batch["mask"][row, t]:
                    value, after = (torch.logsumexp(batch["logits"][row, t + i], 0) for i in (0, 1))
                    r = batch["logits"][row, t, batch["actions"][row, t]] - 0.9 * after
                    gained.append((0.1 * r - (0.1 * r) ** 2 / 4) / 0.1)
                    data.append(value - 0.9 * after)
            for t in range(4):
                if batch["sampled_mask"][row, t]:
                    value, after = (torch.logsumexp(batch["sampled"][row, t + i], 0) for i in (0, 1))
                    own.append(value - 0.9 * after)
        gain, first, second = (sum(part) / len(part) for part in (gained, data, own))
        return first / 2 + second / 2 - gain

    def special_case(self) -> tuple[Tensor, Tensor]:
        """At alpha 0, with the model's states those of the texts, it is the cross entropy."""
        batch = self.batch(3)
        batch |= {"sampled": batch["logits"], "sampled_mask": batch["mask"]}
        logs = batch["logits"][:, :-1].log_softmax(-1).gather(2, batch["actions"].unsqueeze(2)).squeeze(2)
        return self.loss(batch, alpha=0.0), -logs[batch["mask"]].mean()

    def padded(self, batch: Batch) -> Batch:
        pad = torch.nn.functional.pad
        return batch | {
            "logits": pad(batch["logits"], (0, 0, 0, 3), value=7.0),
            "actions": pad(batch["actions"], (0, 3), value=2),
            "mask": pad(batch["mask"], (0, 3)),
        }


def test_values_telescope_for_other_discounts_and_depths() -> None:
    for gamma, depth, actions in ((0.5, 1, 3), (0.99, 4, 2), (0.8, 2, 4)):
        assert max(identities(gamma, depth, actions)) < 1e-10


def test_wrong_tokens_are_put_in_and_taken_back() -> None:
    ids = torch.randint(8, (5, 31))
    history = noisy(ids, 8, 0.3, torch.Generator().manual_seed(1))
    assert history.raw.shape == history.wanted.shape == (5, 30)
    assert (history.raw == 8).any()
    for row in range(5):
        texts = contexts(history.raw[row].tolist(), 8)
        own = ids[row].tolist()
        for i, text in enumerate(texts):
            right = text == own[: len(text)]
            # After a wrong token the backspace is right, and everywhere else the text's own token.
            assert int(history.wanted[row, i]) == (own[len(text)] if right else 8)
            if i + 1 < 30:
                taken = int(history.raw[row, i + 1]) == int(history.wanted[row, i])
                assert bool(history.follows[row, i]) == taken
    assert torch.equal(noisy(ids, 8, 0.0).raw, ids[:, :-1])


@torch.no_grad()
def test_one_pass_reads_all_edited_texts() -> None:
    model = small_model(9, seed=3)
    raw = noisy(torch.randint(8, (3, 25)), 8, 0.4, torch.Generator().manual_seed(2)).raw
    assert context_error(model, raw, 8) < 1e-5
    plain = torch.randint(8, (2, 9))
    torch.testing.assert_close(edited_hidden(model, plain, 8), model.hidden(plain))
    with pytest.raises(ValueError, match="that at 1 of row 0 deletes the first token"):
        edited_hidden(model, torch.tensor([[1, 8, 2]]), 8)


def test_written_texts_are_what_their_edits_leave_and_the_prompt_stays() -> None:
    model = small_model(9, seed=3)
    found = write_with_backspace(model, [1, 2], 8, max_new_tokens=20, sampling=Sampling(), seed=2)
    assert 8 in found.raw
    assert contexts([1, 2, *found.raw], 8)[-1] == [1, 2, *found.text]
    assert min(len(text) for text in contexts([1, 2, *found.raw], 8)[2:]) >= 2
    # Replayed with the same numbers, but each text read anew.
    text, raw = [1, 2], []
    while len(text) - 2 < 20 and len(raw) < 80:
        logits = Session(model, [text], max_length=len(text)).logits[:, :9].clone()
        if len(text) == 2:
            logits[:, 8] = -torch.inf
        raw.append(int(Sampling().draw(logits, torch.tensor([2]), torch.tensor([len(raw)]))))
        text = text[:-1] if raw[-1] == 8 else [*text, raw[-1]]
    assert raw == found.raw
    none = write_with_backspace(
        model, [1, 2], 8, max_new_tokens=20, sampling=Sampling(), seed=2, allowed=False
    )
    assert 8 not in none.raw
    with pytest.raises(ValueError, match="a prompt without backspaces"):
        write_with_backspace(model, [1, 8], 8, max_new_tokens=2, sampling=Sampling())


def test_the_models_own_histories_never_delete_their_first_token() -> None:
    history = noisy(torch.randint(8, (20, 13)), 8, 0.4, torch.Generator().manual_seed(0))
    own = continued(small_model(9, seed=3), history, 8, count=30, seed=0)
    assert own.raw.shape == (30, 12)
    assert all(min(map(len, contexts(row, 8))) >= 1 for row in own.raw.tolist())
    assert not torch.equal(own.raw, continued(small_model(9, seed=3), history, 8, count=30, seed=1).raw)


def test_the_models_stretches_are_those_of_the_data() -> None:
    history = noisy(torch.randint(8, (40, 13)), 8, 0.4, torch.Generator().manual_seed(0))
    every = stretches(history.follows)
    # All steps of the data, each once.
    assert sum(size for *_, size in every) == int(history.follows[:, :-1].sum())
    # A stretch begins at the start of a text or at an inserted error, whose deletion is its first step.
    for row, start, _ in every:
        assert start == 0 or (not history.follows[row, start - 1] and history.wanted[row, start] == 8)
    own = continued(small_model(9, seed=3), history, 8, count=200, seed=0)
    for raw, drawn in zip(own.raw.tolist(), own.drawn, strict=True):
        start, size = int(drawn.int().argmax()), int(drawn.sum())
        assert drawn[start : start + size].all()
        assert any(
            (start, size) == (begin, count) and raw[: start + 1] == history.raw[row, : start + 1].tolist()
            for row, begin, count in every
        )


def test_what_the_loss_refuses() -> None:
    contract = Contract()
    batch = contract.batch(0)
    for change, complaint in (
        ({"actions": batch["actions"][:, :-1]}, r"expected logits \[B, N \+ 1, V\] with actions"),
        ({"sampled_mask": batch["sampled_mask"][:, :-1]}, r"expected sampled \[B', M \+ 1, V\]"),
        ({"mask": torch.zeros_like(batch["mask"])}, "at least one step"),
    ):
        with pytest.raises(ValueError, match=complaint):
            contract.loss(batch | change)
    with pytest.raises(ValueError, match=r"0 < gamma <= 1 but got 0.1 and 0.0"):
        contract.loss(batch, gamma=0.0)
    with pytest.raises(TypeError, match="expected a Llama"):
        with_backspace(torch.nn.Linear(2, 2))


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"preset": "llama_tiny", "text_tokenizer": "bytes"}
    save_checkpoint(tmp_path / "lm", {"model": small_model(256)}, facts)
    (tmp_path / "text.txt").write_text("In the beginning God created the heaven and the earth. " * 60)
    out = str(tmp_path / "out")
    asked = ["train", "sequencematch", "--base", str(tmp_path / "lm"), "--data", str(tmp_path / "text.txt")]
    few = ["--steps", "4", "--batch-size", "2", "--context", "16", "--refresh", "2", "--out", out]
    assert main([*asked, *few]) == 0
    model = load_checkpoint(checkpoint.find(out))[0]["model"]
    assert model.vocab_size == 257
    assert main(["sample", out, "--prompt", "In", "--max-new-tokens", "6"]) == 0
    assert "tokens were taken back)" in capsys.readouterr().out
    for wrong, complaint in (
        (["train", "sequencematch", "--out", str(tmp_path / "x")], "with --base FOLDER"),
        ([*asked, "--eta", "1", "--out", str(tmp_path / "y")], "--eta must be between 0 and 1 but got 1"),
        (
            ["sample", str(tmp_path / "lm"), "--prompt", "In", "--decoder", "sequencematch"],
            "needs a model with a backspace",
        ),
    ):
        assert main(wrong) == 2
        assert complaint in capsys.readouterr().err
