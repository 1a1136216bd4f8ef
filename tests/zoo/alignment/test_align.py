"""`arcore run align`: every objective on a small model, resume, judges that fail, the guard, and what it refuses."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import arcore
from arcore.data.text_tokenizers import ByteTokenizer
from arcore.nn import Rollout, TokenStats
from arcore.zoo.alignment import align
from arcore.zoo.alignment.align import Options, files, policy
from arcore.zoo.alignment.align.claim import learn_palindromes
from arcore.zoo.alignment.align.loop import Aligner
from arcore.zoo.alignment.align.objectives import OBJECTIVES, Scored, token_rewards
from arcore.zoo.alignment.align.rewards import RewardFailure, load_judge, load_problems, load_prompts, vowels
from arcore.zoo.alignment.align.shown import Shown, draw, summary
from arcore.zoo.statistics.reusable_holdout import EvalGuard

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own imports

Batch = dict[str, Tensor]

REWARD = "def reward(prompt, response):\n    return sum(map(ord, response)) % 7 / 6\n"
VERIFIER = "def reward(prompt, response):\n    return float(sum(map(ord, response)) % 2)\n"
SEVERAL = (
    "def rewards(prompt, response):\n    s = sum(map(ord, response))\n"
    "    return {'a': s % 3 / 2, 'b': s % 5 / 4}\n"
)
RATER = "def prefer(prompt, first, second):\n    return float(len(set(first)) >= len(set(second)))\n"


class Contract:
    """GRPO as the command calls it, against a loop over tokens."""

    learns = ("logprobs",)
    tolerance = 1e-12

    def batch(self, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        old = -torch.rand(8, 6, generator=generator, dtype=torch.float64)
        mask = torch.arange(6) < torch.randint(2, 7, (8, 1), generator=generator)
        mask[:, 0] = False
        return {
            "logprobs": old + 0.3 * torch.randn(8, 6, generator=generator, dtype=torch.float64),
            "old": old,
            "reference": old - 0.1,
            "rewards": torch.rand(8, generator=generator, dtype=torch.float64),
            "mask": mask,
            "groups": torch.arange(8) // 4,
        }

    def loss(self, batch: Batch, **changes: Any) -> Tensor:
        options = Options(prompts=Path("p"), reward="vowels", **({"kl_weight": 0.05} | changes))
        order = torch.argsort(batch["groups"], stable=True)
        b = {name: value[order] for name, value in batch.items()}
        rollout = Rollout(
            tokens=torch.zeros(b["mask"].shape, dtype=torch.int64), mask=b["mask"], groups=b["groups"]
        )
        stats = TokenStats(b["logprobs"])
        return OBJECTIVES["grpo"].loss(
            Scored(rollout, stats, b["old"], b["reference"], b["rewards"], options)
        )

    def reference(self, batch: Batch) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for row in range(8):
            group = batch["rewards"][batch["groups"] == batch["groups"][row]]
            gain = (batch["rewards"][row] - group.mean()) / group.std(correction=0)
            places = batch["mask"][row].nonzero()[:, 0]
            for place in places:
                rho = (batch["logprobs"][row, place] - batch["old"][row, place]).exp()
                d = batch["reference"][row, place] - batch["logprobs"][row, place]
                worth = min(rho * gain, min(max(rho, 0.8), 1.2) * gain)
                total = total + (0.05 * (d.exp() - d - 1) - worth) / len(places) / 8
        return total

    def special_case(self) -> tuple[Tensor, Tensor]:
        """Without a KL term and limits it is the ratio times the advantage."""
        batch = self.batch(3)
        found = self.loss(batch, kl_weight=0.0, clip_low=1.0, clip_high=math.inf)
        ratio = (batch["logprobs"] - batch["old"]).exp()
        total = torch.zeros((), dtype=torch.float64)
        for row in range(8):
            group = batch["rewards"][batch["groups"] == batch["groups"][row]]
            gain = (batch["rewards"][row] - group.mean()) / group.std(correction=0)
            total = total - gain * ratio[row][batch["mask"][row]].mean() / 8
        return found, total

    def padded(self, batch: Batch) -> Batch:
        names = ("logprobs", "old", "reference")
        wide = {n: torch.nn.functional.pad(batch[n], (0, 2), value=math.nan) for n in names}
        return batch | wide | {"mask": torch.nn.functional.pad(batch["mask"], (0, 2))}


def small(seed: int = 0, **sizes: int) -> tuple[Any, ByteTokenizer]:
    torch.manual_seed(seed)
    settings = {"num_layers": 1, "dim": 32, "num_heads": 2, "num_kv_heads": 1, "hidden_dim": 32} | sizes
    return arcore.create_model("llama_tiny", **settings).eval(), ByteTokenizer()


def options(folder: Path, objective: str = "grpo", source: str = REWARD, **changes: Any) -> Options:
    prompts, reward = folder / "prompts.txt", folder / "reward.py"
    prompts.write_text("abc\nde\\nf\nghij\nkl\n", encoding="utf-8")
    reward.write_text(source, encoding="utf-8")
    few: dict[str, Any] = {
        "steps": 2, "group": 4, "max_new_tokens": 4, "lora_rank": 2, "lr": 1e-2, "eval_samples": 2, "held_out": 0.5,
    }  # fmt: skip
    return Options(
        prompts=prompts, reward=str(reward), objective=objective, out=folder / "run", **few | changes
    )


def weights(aligner: Aligner) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in aligner.policy.trained.items()}


def moved(aligner: Aligner, before: dict[str, Tensor]) -> bool:
    return any(not torch.equal(p, before[name]) for name, p in aligner.policy.trained.items())


SOURCES = {
    "rewards": REWARD, "verifier": VERIFIER, "pairs": REWARD, "rater": RATER, "revisions": RATER, "several": SEVERAL,
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_steps_with_a_ratio_of_exactly_one(name: str, tmp_path: Path) -> None:
    aligner = Aligner(options(tmp_path, name, SOURCES[OBJECTIVES[name].needs]), small())
    with torch.no_grad():
        law = aligner.policy.model(torch.arange(5)[None])
    before = weights(aligner)
    for _ in range(2):
        figures = aligner.advance()
    assert figures["ratio_error"] == 0
    assert figures["sampler_gap"] < 1e-4
    assert figures["entropy"] > 0
    assert figures["kl"] > 0
    assert moved(aligner, before)
    with torch.no_grad(), aligner.policy.frozen() as frozen:  # the adapters alone have moved
        assert torch.equal(frozen(torch.arange(5)[None]), law)
    assert not torch.allclose(aligner.policy.model(torch.arange(5)[None]), law, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"top_p": 0.7}, {"min_p": 0.2, "temperature": 0.5}, {"lora_rank": 0}, {"updates": 3},
        {"clip_negative": 2.0, "entropy_share": 0.5, "kl_weight": 0.1},
    ],
)  # fmt: skip
def test_filters_full_weights_and_variants_keep_the_ratio(changes: dict[str, Any], tmp_path: Path) -> None:
    aligner = Aligner(options(tmp_path, **changes), small())
    before = weights(aligner)
    for _ in range(2):
        figures = aligner.advance()
    assert figures["ratio_error"] == 0
    assert figures["sampler_gap"] < 1e-4
    assert moved(aligner, before)


@pytest.mark.parametrize("name", ["drw", "drw_hypervolume"])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(name: str, tmp_path: Path) -> None:
    whole = Aligner(options(tmp_path, name, SEVERAL, steps=4), small())
    whole.evaluate()
    for _ in range(4):
        whole.advance()
    whole.evaluate()
    first = Aligner(options(tmp_path, name, SEVERAL, steps=4), small())
    first.evaluate()
    for _ in range(2):
        first.advance()
    files.save(first)
    second = Aligner(options(tmp_path, name, SEVERAL, steps=4, resume=True), small())
    files.load(second)
    for _ in range(2):
        second.advance()
    second.evaluate()
    assert all(torch.equal(p, whole.policy.trained[name]) for name, p in second.policy.trained.items())
    assert whole.scoring.weights is not None
    assert second.scoring.weights is not None
    assert torch.equal(second.scoring.weights, whole.scoring.weights)
    assert second.evaluations == whole.evaluations
    assert second.scoring.factor == whole.scoring.factor
    seconds = [{**row, "seconds": 0} for row in second.rows]
    assert seconds == [{**row, "seconds": 0} for row in whole.rows]
    files.save(second)
    with open(tmp_path / "run/metrics.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]
    with pytest.raises(ValueError, match=r"has --group 4 but got 6; give the same"):
        files.load(Aligner(options(tmp_path, name, SEVERAL, group=6), small()))
    (tmp_path / "run/checkpoint/trained.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged"):
        files.load(Aligner(options(tmp_path, name, SEVERAL), small()))


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("def reward(p, r):\n    return float('nan')\n", r"expected reward\(\) to be finite but got nan"),
        ("def reward(p, r):\n    return 1 / 0\n", r"reward\(\) raised ZeroDivisionError: division by zero"),
        ("def reward(p, r):\n    return 'good'\n", r"to return a number but got 'good'"),
        (
            "n = []\ndef rewards(p, r):\n    n.append(1)\n    return [1.0] * len(n)\n",
            r"expected 1 rewards .* got 2",
        ),
        ("def rewards(p, r):\n    return 1.0\n", r"to return a mapping or a list of numbers but got 1.0"),
        ("def rewards(p, r):\n    return {}\n", r"at least one reward of rewards\(\) but got \{\}"),
        ("def reward(p, r):\n    raise SystemExit(3)\n", r"reward\(\) raised SystemExit: 3"),
        ("def reward(p, r):\n    return 10**400\n", r"to return a number but got 1000"),
        ("def reward(p, r):\n    return 1e39\n", r"to be finite but got 1e\+39"),
        ("def reward(p):\n    return 1.0\n", r"reward\(\) raised TypeError: .*takes 1 positional argument"),
    ],
)
def test_a_judge_that_fails_loses_nothing(source: str, told: str, tmp_path: Path) -> None:
    aligner = Aligner(options(tmp_path, source=source), small())
    before = weights(aligner)
    figures = aligner.advance()
    assert "reward" not in figures
    assert not moved(aligner, before)
    kept = json.loads((tmp_path / "run/failed/step-000001.json").read_text())
    assert len(kept["responses"]) == 8
    assert len(kept["tokens"]) == 8
    assert aligner.step == 1
    assert "step-000001.json" in aligner.skipped[0]
    stopping = Aligner(options(tmp_path, source=source, on_reward_error="stop"), small())
    with pytest.raises(RuntimeError, match=rf"step 1: .*{told}.*kept in .*step-000001"):
        stopping.advance()
    assert stopping.step == 0


def test_an_evaluation_that_cannot_be_judged_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The judge fails in the evaluation behind step 2 alone: 8 calls of the first one and 16 of the steps are fine."""
    source = "n = []\ndef reward(p, r):\n    n.append(1)\n    return float('nan') if len(n) == 25 else len(n) % 2\n"
    monkeypatch.setattr(policy, "language_model", lambda source: small())
    report = align.run(options(tmp_path, source=source, eval_every=2, save_every=9, steps=3))
    assert [found["step"] for found in report.values["evaluations"]] == [0, 3]
    assert "not judged: evaluation at step 2: expected reward() to be finite" in report.text
    assert "evaluation at step 2: expected reward() to be finite" in capsys.readouterr().err
    kept = json.loads((tmp_path / "run/failed/evaluation-000002.json").read_text())
    assert len(kept["responses"]) == 4
    other = options(tmp_path, source=source, eval_every=2, save_every=9, steps=3, on_reward_error="stop")
    other = other.__class__(**{**other.__dict__, "out": tmp_path / "stopped"})
    with pytest.raises(RuntimeError, match=r"evaluation at step 2: .*kept in .*evaluation-000002\.json"):
        align.run(other)
    # What was learnt before the evaluation is there to go on from.
    assert json.loads((tmp_path / "stopped/checkpoint/state.json").read_text())["step"] == 2


def test_an_evaluation_out_of_the_range_of_rewards_says_which_option(tmp_path: Path) -> None:
    source = "def reward(prompt, response):\n    return 3.0\n"
    with pytest.raises(
        ValueError, match=r"--reward-range: expected rewards from 0 to 1 .* got 3 to 3; give --reward-r"
    ):
        Aligner(options(tmp_path, source=source), small()).evaluate()
    ranged = Aligner(options(tmp_path, source=source, reward_range=(0.0, 3.0)), small())
    assert ranged.evaluate()["guarded"] == 3


def test_rewards_in_another_order_and_of_the_runs_own_names(tmp_path: Path) -> None:
    source = (
        "n = []\ndef rewards(p, r):\n    n.append(1)\n    found = {'loss': 0.25, 'b': len(n) % 2}\n"
        "    return found if len(n) % 3 else dict(reversed(found.items()))\n"
    )
    figures = Aligner(options(tmp_path, source=source), small()).advance()
    assert figures["reward_loss"] == 0.25
    assert figures["b"] == 0.5
    assert figures["reward"] == pytest.approx(0.375)
    assert figures["loss"] != 0.25


def test_equal_rewards_change_nothing_and_are_told(tmp_path: Path) -> None:
    for name, source in (
        ("grpo", "def reward(p, r):\n    return 0.5\n"),
        ("dpo", "def reward(p, r):\n    return 1\n"),
    ):
        aligner = Aligner(options(tmp_path, name, source, kl_weight=0.0), small())
        before = weights(aligner)
        figures = aligner.advance()
        assert not moved(aligner, before)
        assert "nothing to learn from" in aligner.skipped[0]
        assert figures["kl"] == 0


def test_a_policy_that_gives_no_numbers_any_more_is_told(tmp_path: Path) -> None:
    aligner = Aligner(options(tmp_path, lr=1e30, kl_weight=0.0, max_grad_norm=1e9), small())
    aligner.advance()
    with pytest.raises(RuntimeError, match="after step 1 the policy gives no numbers any more: lower --lr"):
        aligner.advance()


def test_empty_responses_are_judged_as_empty_texts(tmp_path: Path) -> None:
    """A policy that can only end: its responses are one token, the end, and no text."""
    model, tokenizer = small()
    model.eos_ids = tuple(range(256))
    source = "n = []\ndef reward(prompt, response):\n    n.append(1)\n    return len(response) + len(n) % 2\n"
    aligner = Aligner(options(tmp_path, source=source, held_out=0.0), (model, tokenizer))
    rollout, _, responses = aligner.draw(0)
    assert set(responses) == {""}
    assert rollout.lengths.tolist() == [1] * 8
    figures = aligner.advance()
    assert figures["ratio_error"] == 0
    assert figures["length"] == 1
    assert figures["reward"] == pytest.approx(0.5)


def test_a_reference_of_another_architecture_but_the_same_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "language_model", lambda source: small(1, num_layers=2, dim=48, num_heads=4))
    aligner = Aligner(options(tmp_path, reference="other", kl_weight=0.1), small())
    assert aligner.advance()["kl"] > 0
    monkeypatch.setattr(policy, "language_model", lambda source: small(1, vocab_size=300))
    with pytest.raises(ValueError, match="expected a model with the policy's vocabulary of 256 tokens"):
        Aligner(options(tmp_path, reference="other"), small())


def test_merged_weights_are_the_policy(tmp_path: Path) -> None:
    model, tokenizer = small()
    aligner = Aligner(options(tmp_path), (model, tokenizer))
    aligner.advance()
    plain, _ = small(5)
    plain.load_state_dict(files.merged(aligner.policy.model))
    ids = torch.arange(12)[None]
    torch.testing.assert_close(plain(ids), model(ids), rtol=1e-5, atol=1e-5)


def test_the_command_trains_resumes_and_evaluates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(policy, "language_model", lambda source: small())
    report = align.run(options(tmp_path, save_merged=True))
    assert "largest |ratio - 1| before each rollout's first update: 0" in report.text
    assert len(report.values["rows"]) == 2
    assert len(report.values["evaluations"]) == 2
    assert (tmp_path / "run/plot.png").stat().st_size > 1000
    assert arcore.create_model("llama_tiny", weights=None) is not None
    assert (tmp_path / "run/merged/model.safetensors").is_file()
    assert "step 2/2" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds a run already: go on with --resume"):
        align.run(options(tmp_path))
    again = align.run(options(tmp_path, resume=True, steps=3))
    assert len(again.values["rows"]) == 3
    judged = align.run(options(tmp_path, evaluate=True))
    assert len(judged.values["evaluations"]) == 4
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        align.run(options(tmp_path, resume=True, **{"seed": 0}).__class__(
            **{**options(tmp_path, resume=True).__dict__, "out": tmp_path / "nowhere"}))  # fmt: skip


def test_a_rater_is_evaluated_against_the_reference(tmp_path: Path) -> None:
    aligner = Aligner(options(tmp_path, "spo", RATER), small())
    figures = aligner.evaluate()
    assert 0 <= figures["train"] <= 1


def test_the_guard_spends_goes_on_and_ends() -> None:
    low, high = [0.1] * 50, [0.9] * 50
    guard = EvalGuard(budget=2, sigma=0.01)
    first = guard.check(low, high)
    assert first.held_out
    assert first.value == pytest.approx(0.9, abs=0.1)
    assert guard.check(low, low).value == pytest.approx(0.1)  # the sets agree: free of charge
    other = EvalGuard(budget=2, sigma=0.01)
    other.load(json.loads(json.dumps(guard.state())))
    ours, theirs = guard.check(low, high), other.check(low, high)
    assert ours == theirs
    assert ours.spent == 2
    assert math.isnan(guard.check(low, high).value)
    with pytest.raises(
        ValueError, match=r"scores of held_out from 0.0 to 1.0 but got .* to 2.0; give the range"
    ):
        guard.check(low, [2.0] * 50)
    assert EvalGuard(low=0, high=10, sigma=0.0).check([1.0] * 40, [9.0] * 40).value == pytest.approx(9.0)


def test_token_rewards_put_the_reward_at_the_end() -> None:
    mask = torch.tensor([[False, True, True, False], [False, True, False, False]])
    logp, reference = torch.full((2, 4), -1.0), torch.full((2, 4), -3.0)
    found = token_rewards(torch.tensor([5.0, 7.0]), logp, reference, mask, 0.5)
    assert found.tolist() == [[0, -1, 4, 0], [0, 6, 0, 0]]


def test_judges_and_prompts_of_files(tmp_path: Path) -> None:
    assert load_judge("words:2").rewards(["", ""], ["one two", "one"]).tolist() == [[1.0], [0.5]]
    assert load_judge("regex:^a+$").rewards(["", ""], ["aa", "b"]).tolist() == [[1.0], [0.0]]
    assert vowels("", "abe!") == pytest.approx(2 / 3)
    assert vowels("", "") == 0
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "a\\nb"}\n\n{"prompt": "c"}\n')
    assert load_prompts(lines) == ["a\nb", "c"]
    lines.write_text('{"prompt": "a"}\n{"text": "c"}\n')
    with pytest.raises(ValueError, match=r'p.jsonl:2: expected an object with a text "prompt"'):
        load_prompts(lines)
    with pytest.raises(FileNotFoundError, match="--prompts: there is no file"):
        load_prompts(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="at least one prompt"):
        load_prompts(tmp_path / "empty.txt")
    for text, told in (
        ("def f(): pass\n", "but it has none"),
        (REWARD + RATER, "but it has reward, prefer"),
        ("1 / 0\n", "the file raised ZeroDivisionError"),
    ):
        (tmp_path / "r.py").write_text(text)
        with pytest.raises(ValueError, match=told):
            load_judge(str(tmp_path / "r.py"))
    for source, told in (("regex:(", "no regular expression"), ("nothing", "expected a Python file")):
        with pytest.raises(ValueError, match=told):
            load_judge(source)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_judge(str(tmp_path / "no.py"))
    (tmp_path / "r.py").write_text("def prefer(p, a, b):\n    return 3\n")
    with pytest.raises(RewardFailure, match=r"a probability but got 3.0"):
        load_judge(str(tmp_path / "r.py")).preferences([""], ["a"], ["b"])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"objective": "drgrpo"},
            r"expected --objective to be one of .grpo., .dr_grpo..* did you mean .dr_grpo.",
        ),
        ({"group": 1}, "advantage in a group of one is always 0"),
        ({"objective": "dpo", "group": 3}, "give an even number"),
        ({"objective": "inpo", "tau": 0.1, "eta": 0.05}, r"--tau 0.1: expected 0 < tau <= eta=0.05"),
        ({"max_new_tokens": 0}, "--max-new-tokens: expected at least 1 but got 0"),
        ({"temperature": 0.0}, "--temperature: expected above 0"),
        ({"held_out": 1.0}, r"--held-out in \[0, 1\)"),
        ({"template": "x"}, "expected {prompt} in it"),
        ({"clip_negative": 0.5}, "--clip-negative: expected a ratio above 1 but got 0.5"),
        ({"entropy_share": 2.0}, "--entropy-share: expected at most 1 but got 2.0"),
        ({"objective": "ppo", "smoothing": 1.5}, "--smoothing: expected at most 1 but got 1.5"),
        ({"reward_range": (1.0, 0.0)}, "--reward-range: expected the least reward and a larger one"),
        ({"weights": (1.0, 0.0)}, "--weights: expected numbers above 0"),
    ],
)
def test_options_are_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        options(tmp_path, **changes)


def test_judges_that_do_not_fit_the_objective(tmp_path: Path) -> None:
    for name, source, told in (
        ("spo", REWARD, "needs a rater"),
        ("drw", REWARD, r"needs a reward file with rewards\(prompt, response\)"),
        ("grpo", RATER, "needs rewards but the file has prefer"),
    ):
        with pytest.raises(ValueError, match=told):
            Aligner(options(tmp_path, name, source), small())
    with pytest.raises(ValueError, match="needs a verifier's rewards, 0 or 1"):
        Aligner(options(tmp_path, "nft", REWARD), small()).advance()
    with pytest.raises(ValueError, match=r"--weights has 3 numbers but the file has 2 rewards \(a, b\)"):
        Aligner(options(tmp_path, "grpo", SEVERAL, weights=(1.0, 1.0, 1.0)), small()).advance()
    with pytest.raises(ValueError, match=r"--held-out 0.01 of 4 prompts leaves 0"):
        Aligner(options(tmp_path, held_out=0.01), small())


def test_shows_a_table_and_draws(tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    aligner = Aligner(options(tmp_path), small())
    aligner.evaluate()
    aligner.advance()
    draw(figure, aligner)
    assert figure.axes[0].get_title() == "reward"
    assert "grpo: 1 steps of 2 x 4 responses" in summary(aligner)
    assert Shown(aligner)._table().row_count == 1


def test_rewards_count_more_after_the_front_has_grown(tmp_path: Path) -> None:
    aligner = Aligner(options(tmp_path, "drw_hypervolume", SEVERAL), small())
    aligner.scoring.measure_front(torch.tensor([0.5, 0.5]))
    assert aligner.scoring.factor == 1  # there was nothing to compare with
    aligner.scoring.measure_front(torch.tensor([1.0, 0.5]))
    assert aligner.scoring.factor == pytest.approx(0.5 + 1.5 * math.tanh(0.25))
    plain = Aligner(options(tmp_path, "drw_hypervolume", SEVERAL), small())
    rollout, prompts, responses = plain.draw(0)
    found = [one.scoring.judged(rollout, prompts, responses).rewards for one in (aligner, plain)]
    torch.testing.assert_close(found[0], aligner.scoring.factor * found[1])
    aligner.scoring.measure_front(torch.tensor([0.9, 0.4]))  # dominated
    assert aligner.scoring.factor == 0.5
    assert aligner.advance()["reward"] <= 1  # told without the factor


class _Gym:
    """What is used of reasoning-gym: sums as questions, and a score of answers."""

    DATASETS: ClassVar = {"chain_sum": 0, "chain_product": 0}

    def create_dataset(self, name: str, size: int, seed: int) -> Any:
        class Sums(list):  # type: ignore[type-arg]
            def score_answer(self, answer: str, entry: dict[str, Any]) -> float:
                return 1.0 if answer == entry["answer"] else 0.01

        return Sums({"question": f"{i} + {seed} =", "answer": str(i + seed)} for i in range(size))


def test_problems_of_reasoning_gym_are_prompts_and_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gym = _Gym()
    for name in ("reasoning_gym", "reasoning_gym.factory"):
        monkeypatch.setitem(sys.modules, name, gym)  # type: ignore[arg-type]
    problems = load_problems("reasoning_gym:chain_sum:6", 3)
    assert problems is not None
    assert len(problems.prompts) == 6
    judge = load_judge("reasoning_gym", problems)
    answers = ["5", " 5\n", "so <answer>5</answer>.", "<answer>4</answer> or 5"]
    assert judge.rewards(["2 + 3 ="] * 4, answers).flatten().tolist() == pytest.approx([1, 1, 1, 0.01])
    aligner = Aligner(
        Options(
            prompts="reasoning_gym:chain_sum:8", reward="reasoning_gym", out=tmp_path, group=2,
            max_new_tokens=4, lora_rank=2, eval_samples=1, steps=1,
        ),
        small(),
    )  # fmt: skip
    assert 0 <= aligner.evaluate()["train"] <= 1
    assert "reward" in aligner.advance()
    assert load_problems("prompts.txt", 0) is None
    for source, told in (
        ("reasoning_gym:chain_sun", "has no task 'chain_sun'; did you mean chain_sum"),
        ("reasoning_gym:chain_sum:many", "expected a number of problems but got 'many'"),
        ("reasoning_gym:zzzz", "it has chain_product, chain_sum"),
    ):
        with pytest.raises(ValueError, match=told):
            load_problems(source, 0)
    with pytest.raises(ValueError, match="give --reward reasoning_gym and --prompts reasoning_gym:TASK"):
        load_judge("reasoning_gym")


def test_reasoning_gym_itself() -> None:
    pytest.importorskip("reasoning_gym")
    problems = load_problems("reasoning_gym:chain_sum:4", 0)
    assert problems is not None
    for prompt, entry in problems.entries.items():
        assert problems.score(prompt, f"<answer>{entry['answer']}</answer>") == 1
        assert problems.score(prompt, "no number") < 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "gspo", "ppo", "dpo", "ipo"])
def test_palindromes_are_learnt(name: str) -> None:
    before, after = learn_palindromes(name, updates=300, seed=1)
    assert before <= 0.04
    assert after >= 0.95
