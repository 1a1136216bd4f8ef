"""GenARM: the law of the mix, the reward model's loss, several objectives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import arcore
from arcore.catalog import save_checkpoint
from arcore.catalog.claims import shaken
from arcore.cli import main
from arcore.data import ByteTokenizer
from arcore.decoding import LookupDrafter, generate, speculative_chain
from arcore.decoding.laws import outcomes, small_model
from arcore.zoo.alignment.genarm.loss import answer_logprobs, arm_loss, guided_by, mixed_law
from arcore.zoo.alignment.genarm.recipe import RULES, make_pairs


class Contract:
    """Texts of two tokens out of three, by a base model and two reward models."""

    bound = 0.0

    def __init__(self) -> None:
        models = [small_model(3, seed=seed) for seed in (1, 2, 3)]
        self.mixed = guided_by(models[0], models[1:], [0.7, -0.4])
        self.law = mixed_law(self.mixed, [1, 2], 2)

    def draw(self, count: int, seed: int) -> tuple[Tensor, int]:
        out = generate(self.mixed, [[1, 2]] * count, max_new_tokens=2, seed=seed)
        return outcomes(out.ids, 3), 2 * count

    def plain_calls(self, count: int) -> int:
        return 2 * count


def test_the_loss_is_bradley_terry_on_log_probabilities_of_answers() -> None:
    model = small_model(7)
    better, worse = torch.randint(7, (3, 6)), torch.randint(7, (3, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0], [0, 0, 1, 0, 0, 0]]).bool()
    sums = []
    for ids in (better, worse):
        rows = []
        for row, keep in zip(ids, mask, strict=True):
            probs = model(row.unsqueeze(0))[0].log_softmax(-1)
            rows.append(sum(probs[i - 1, row[i]] for i in range(1, 6) if keep[i]))
        sums.append(torch.stack(rows))
        torch.testing.assert_close(answer_logprobs(model, ids, mask), sums[-1])
    loss, ranked = arm_loss(model, (better, mask), (worse, mask), beta=0.3, gamma=0.1)
    torch.testing.assert_close(loss, -(0.3 * (sums[0] - sums[1]) - 0.1).sigmoid().log().mean())
    assert float(ranked) == pytest.approx(float((sums[0] > sums[1]).float().mean()))
    # What stands behind an answer, such as padding, does not count.
    changed = better.clone()
    changed[2, 3:] = 0
    torch.testing.assert_close(answer_logprobs(model, changed, mask), sums[0])


def test_drafts_serve_the_mix_like_any_model() -> None:
    mixed = guided_by(small_model(9), [small_model(9, seed=5)], [1.5])
    prompts = [[1, 2, 1, 2], [3]]
    plain = generate(mixed, prompts, max_new_tokens=25, seed=4)
    assert (
        speculative_chain(mixed, LookupDrafter(), prompts, max_new_tokens=25, seed=4).rows() == plain.rows()
    )
    with pytest.raises(ValueError, match="models of one vocabulary"):
        guided_by(small_model(9), [small_model(8)], [1.0])


def test_pairs_are_the_models_own_answers_and_the_rule_decides() -> None:
    model, words = small_model(256, seed=2), ByteTokenizer()
    prompts = torch.randint(97, 120, (5, 3))

    def rule(text: str) -> float:
        return float(sum(ord(letter) % 2 for letter in text[:3]))

    pairs = make_pairs(model, words, prompts, rule, count=20, answer=4, seed=3)
    assert pairs.shape == (20, 2, 7)
    for pair in pairs.tolist():
        assert pair[0][:3] == pair[1][:3]
        better, worse = (rule(words.decode(row[3:])) for row in pair)
        assert better > worse
    assert torch.equal(pairs, make_pairs(model, words, prompts, rule, count=20, answer=4, seed=3))
    with pytest.raises(ValueError, match="tells none of 320 pairs of answers apart"):
        make_pairs(model, words, prompts, lambda _: 1.0, count=2, answer=2, seed=0)
    with pytest.raises(ValueError, match="the rule gave NaN"):
        make_pairs(model, words, prompts, lambda _: float("nan"), count=2, answer=2, seed=0)


def test_rules_say_what_they_are_named_after() -> None:
    assert RULES["short-words"]("a bc") > RULES["short-words"]("abc de")
    assert RULES["commas"]("a, b; c:") == 3
    assert RULES["vowels"]("ab, e") == pytest.approx(2 / 3)
    assert all(rule("") <= 0 for rule in RULES.values())


def test_a_reward_model_is_trained_and_guides_from_the_command_line(tmp_path: Path, capsys: Any) -> None:
    facts = {"preset": "llama_tiny", "text_tokenizer": "bytes"}
    sizes = {"dim": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "hidden_dim": 48}
    save_checkpoint(tmp_path / "lm", {"model": shaken(arcore.create_model("llama_tiny", **sizes))}, facts)
    (tmp_path / "text.txt").write_text("in the beginning was the word, and the word was " * 30)
    asked = ["train", "genarm", "--base", str(tmp_path / "lm"), "--data", str(tmp_path / "text.txt")]
    asked += [
        "--pairs",
        "40",
        "--answer",
        "6",
        "--rule",
        "vowels",
        "--steps",
        "3",
        "--out",
        str(tmp_path / "arm"),
    ]
    assert main(asked) == 0
    assert "ranked" in capsys.readouterr().out
    guided = ["sample", str(tmp_path / "lm"), "--prompt", "in", "--max-new-tokens", "3"]
    guided += ["--guide", f"{tmp_path / 'arm'}:1", f"{tmp_path / 'lm'}:-0.5"]
    assert main(guided) == 0
    assert main([*asked[:-1], str(tmp_path / "other"), "--rule", "rhymes"]) == 2
    assert "rhymes" in capsys.readouterr().err
