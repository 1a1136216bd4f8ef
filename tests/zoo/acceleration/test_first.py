"""FiRST: what routers decide, and models that skip layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arcore.decoding import LookupDrafter, Sampling, generate, speculative_chain
from arcore.decoding.laws import outcomes, small_model, text_law
from arcore.zoo.acceleration.first import Routers, SkippingModel, routed_loss


class Contract:
    """Texts of two tokens out of three by a model whose routers keep all layers."""

    bound = 0.0

    def __init__(self) -> None:
        model = small_model(3, layers=3)
        self.model = SkippingModel(model, Routers(32, 3))
        self.law = text_law(model, [1, 2], 2, Sampling())

    def draw(self, count: int, seed: int) -> tuple[Tensor, int]:
        out = generate(self.model, [[1, 2]] * count, max_new_tokens=2, seed=seed)
        return outcomes(out.ids, 3), 2 * count

    def plain_calls(self, count: int) -> int:
        return 2 * count


@torch.no_grad()
def test_skipping_with_a_cache_is_the_model_without_those_layers() -> None:
    model, shorter = small_model(7, layers=5), small_model(7, layers=5)
    del shorter.layers[3], shorter.layers[1]
    skipping = SkippingModel(model, skip=[1, 3])
    prompts = [[1, 2, 1, 2], [3]]
    expected = generate(shorter, prompts, max_new_tokens=20, seed=3).rows()
    assert generate(skipping, prompts, max_new_tokens=20, seed=3).rows() == expected
    assert speculative_chain(skipping, LookupDrafter(), prompts, max_new_tokens=20, seed=3).rows() == expected
    assert model.skipped == frozenset()
    cache = skipping.make_cache(2, 12)
    skipping.prefill(torch.tensor([[1, 2], [3, 4]]), cache)
    assert cache.keys.shape[0] == 3
    assert torch.equal(model(torch.tensor([[1, 2]])), small_model(7, layers=5)(torch.tensor([[1, 2]])))


@torch.no_grad()
def test_routers_decide_by_their_mean_over_the_prompt() -> None:
    model, routers = small_model(7, layers=4), Routers(32, 4)
    routers.routers[1].bias.fill_(-3.0)
    assert SkippingModel(model, routers).decide(torch.tensor([[1, 2, 3]])) == (1,)
    # The ends are never skipped.
    for router in routers.routers:
        router.bias.fill_(-3.0)
    assert SkippingModel(model, routers).decide(torch.tensor([[1, 2, 3]])) == (1, 2)
    # A router that looks at the state: above the mean one way, below it the other.
    x = model.embed(torch.tensor([[1, 2, 3]]))
    visible, angles = model.behind((0,), 3, x.device)
    direction = model.layers[0](x, angles, visible).mean(1)[0]
    for sign, expected in ((1.0, (2,)), (-1.0, (1, 2))):
        routers.routers[1].weight.copy_(sign * direction.unsqueeze(0))
        routers.routers[1].bias.fill_(0.0)
        assert SkippingModel(model, routers).decide(torch.tensor([[1, 2, 3]])) == expected


def test_the_soft_loss_is_the_model_where_all_is_kept_and_prices_the_rest() -> None:
    model, routers = small_model(7, layers=4), Routers(32, 4)
    ids = torch.randint(7, (3, 9))
    with torch.no_grad():
        for router in routers.routers:
            router.bias.fill_(40.0)
    loss, mean = routed_loss(model, routers, ids, price=0.5)
    plain = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, plain + 0.5)
    assert mean == 1.0
    loss.backward()
    assert all(p.grad is None for p in model.parameters())


def test_refuses_what_does_not_fit() -> None:
    model = small_model(7, layers=3)
    with pytest.raises(ValueError, match="one of them"):
        SkippingModel(model)
    with pytest.raises(ValueError, match="not all, but got"):
        SkippingModel(model, skip=[0, 1, 2])
    with pytest.raises(ValueError, match="at most 1 layers"):
        Routers(8, 1)
    with pytest.raises(ValueError, match="without padding"):
        generate(SkippingModel(model, Routers(32, 3)), [[1, 2], [3]], max_new_tokens=2)
