"""GenARM: the law of the mix, the reward model's loss, several objectives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from arcore.decoding import LookupDrafter, generate, speculative_chain
from arcore.decoding.laws import outcomes, small_model
from arcore.zoo.alignment.genarm import answer_logprobs, arm_loss, guided_by, mixed_law


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
