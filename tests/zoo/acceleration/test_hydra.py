"""Draft heads of Hydra and Medusa: what a head sees, what a tree proposes, and the text that comes out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.catalog import get_config
from arcore.catalog.claims import shaken
from arcore.decoding import Context, MixedModel, ModelDrafter, TreeShape, generate, speculative_tree
from arcore.zoo.acceleration.hydra.drafter import DEPTH_WIDTHS, HydraDrafter, published_shape
from arcore.zoo.acceleration.hydra.heads import HydraConfig, HydraHeads, hydra_loss
from arcore.zoo.acceleration.hydra.recipe import heads_for


def base_model(vocab: int = 256) -> Any:
    torch.manual_seed(0)
    model = arcore.create_model(
        "llama_tiny", dim=64, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=96, vocab_size=vocab
    )
    return shaken(model).eval().requires_grad_(False)


class Protocol:
    """Heads on a random model."""

    def __init__(self, preset: str) -> None:
        self.base = base_model()
        self.ids = torch.randint(256, (3, 12))
        self.hidden = self.base.hidden(self.ids).detach()

    def forward(self, model: Any) -> Tensor:
        return torch.cat(model(self.hidden, self.ids, self.base), dim=1)

    def expected_shape(self) -> tuple[int, ...]:
        return (3, 10 + 9 + 8, 256)

    def loss(self, model: Any) -> Tensor:
        logits = model(self.hidden, self.ids, self.base)
        return sum(
            F.cross_entropy(one.flatten(0, 1), self.ids[:, i + 2 :].flatten()) for i, one in enumerate(logits)
        )

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        parts, hidden = [], self.hidden
        if model.prefix is not None:
            # Token by token, behind its own cache.
            cache, steps = model.prefix.make_cache(3, 12), []
            for t in range(12):
                steps.append(model.prefix(self.hidden[:, t : t + 1], cache))
                cache.commit(1)
            hidden = torch.cat(steps, dim=1)
        for i in range(3):
            for t in range(12 - i - 2):
                between = self.base.embedding(self.ids[:, t + 1 : t + i + 2])
                parts.append(model.head(i, hidden[:, t], between, self.base))
        return self.forward(model), torch.stack(parts, dim=1)

    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        prompts = [self.ids[r, : 3 + 4 * r].tolist() for r in rows]
        drafter = HydraDrafter(model, TreeShape.full(2, 2, 1))
        seeds = [7 + r for r in rows]
        out = speculative_tree(self.base, drafter, prompts, max_new_tokens=9, top_k=50, seed=seeds)
        return [out.ids], self.forward(model)[rows].softmax(-1)


def test_the_published_tree_has_63_nodes() -> None:
    shape = published_shape()
    assert [len(level) for level in shape.levels] == list(DEPTH_WIDTHS)


@pytest.mark.parametrize("kind", ["hydra", "medusa"])
def test_a_tree_holds_the_likeliest_tokens_after_each_of_its_paths(kind: Any) -> None:
    model = base_model()
    heads = shaken(HydraHeads(HydraConfig(dim=64, vocab_size=256, num_heads=3, kind=kind))).eval()
    shape = TreeShape.from_paths([(0,), (1,), (0, 0), (1, 1), (1, 0), (1, 1, 0), (0, 0, 2)])
    drafter = HydraDrafter(heads, shape)
    drafter.start(model, 2, 40)
    hidden = torch.randn(2, 64)
    texts = [[3, 5], [9]]
    draft = drafter.propose(Context(texts, torch.tensor([1, 2]), 1, [20, 20], torch.device("cpu"), hidden))
    assert draft.parents is not None
    for row in range(2):
        for i in range(len(shape.parents)):
            path, at = [], shape.parents[i]
            while at >= 0:
                path, at = [int(draft.tokens[row, at]), *path], shape.parents[at]
            between = model.embedding(torch.tensor([texts[row][-1], *path]))
            logits = heads.head(len(path), hidden[row], between, model)
            assert draft.tokens[row, i] == logits.topk(3).indices[shape.ranks[i]]


@pytest.mark.parametrize("kind", ["hydra", "medusa"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_heads_do_not_change_the_text_of_any_row(kind: Any, temperature: float) -> None:
    model = base_model()
    heads = shaken(HydraHeads(HydraConfig(dim=64, vocab_size=256, num_heads=2, kind=kind))).eval()
    prompts = [[1, 2, 3], [4], [5] * 9]
    options: dict[str, Any] = {"max_new_tokens": 15, "temperature": temperature, "seed": [1, 2, 3], "eos": 7}
    expected = generate(model, prompts, **options).rows()
    out = speculative_tree(model, HydraDrafter(heads), prompts, **options)
    assert out.rows() == expected


def test_the_loss_asks_each_head_for_its_own_token() -> None:
    model = base_model(vocab=16)
    heads = HydraHeads(HydraConfig(dim=64, vocab_size=16, num_heads=2)).start_from(model)
    ids = torch.randint(16, (2, 9))
    hidden = model.hidden(ids)
    terms = []
    for i in range(2):
        for t in range(9 - i - 2):
            logits = heads.head(i, hidden[:, t], model.embedding(ids[:, t + 1 : t + i + 2]), model)
            terms.append((i, F.cross_entropy(logits, ids[:, t + i + 2])))
    expected = sum(torch.stack([x for i, x in terms if i == h]).mean() for h in range(2))
    torch.testing.assert_close(hydra_loss(heads, model, ids), expected)
    # The teacher of head i at place t is the model's own distribution of the token that the head predicts.
    soft = model(ids).softmax(-1)
    terms = []
    for i in range(2):
        for t in range(9 - i - 2):
            logits = heads.head(i, hidden[:, t], model.embedding(ids[:, t + 1 : t + i + 2]), model)
            terms.append((i, -(soft[:, t + i + 1] * logits.log_softmax(-1)).sum(-1).mean()))
    expected = sum(torch.stack([x for i, x in terms if i == h]).mean() for h in range(2))
    torch.testing.assert_close(hydra_loss(heads, model, ids, lm=0.0, teacher=1.0), expected)


def test_refuses_heads_of_another_model_and_trees_that_are_too_deep() -> None:
    heads = HydraHeads(HydraConfig(dim=64, vocab_size=256, num_heads=2))
    with pytest.raises(ValueError, match="3 tokens deep but there are 2 heads"):
        HydraDrafter(heads, TreeShape.full(1, 1, 1))
    with pytest.raises(ValueError, match="this one has width 64 and 16 tokens"):
        speculative_tree(base_model(16), HydraDrafter(heads), [[1]], max_new_tokens=2)
    with pytest.raises(ValueError, match='kind "hydra" or "medusa"'):
        HydraConfig(dim=8, vocab_size=8, kind="eagle")  # type: ignore[arg-type]
    assert ModelDrafter(base_model(), shape=TreeShape.full(2)).max_nodes == 2


def test_heads_of_few_tokens_propose_the_frequent_ones_and_change_no_text() -> None:
    model = base_model()
    text = torch.tensor([9, 9, 9, 250, 250, 3, 3, 7])
    config = HydraConfig(dim=64, vocab_size=256, num_heads=2, shared_lm_head=True, draft_vocab=3)
    heads = HydraHeads(config).start_from(model, text)
    assert heads.draft_tokens is not None
    assert heads.draft_tokens.tolist() == [3, 9, 250]
    assert heads.places(torch.tensor([9, 7, 250])).tolist() == [1, -100, 2]
    hidden, between = torch.randn(2, 64), torch.randn(2, 1, 64)
    wide = HydraHeads(HydraConfig(dim=64, vocab_size=256, num_heads=2, shared_lm_head=True))
    wide.load_state_dict(heads.state_dict(), strict=False)
    expected = wide.head(0, hidden, between, model)[:, [3, 9, 250]]
    torch.testing.assert_close(heads.head(0, hidden, between, model), expected)
    # The loss leaves out targets that heads cannot propose, and the teacher's law is that of the tokens that they can.
    ids = torch.tensor([[1, 2, 9, 250, 7, 3, 8]])
    logits = heads(model.hidden(ids), ids, model)
    terms = [
        F.cross_entropy(logits[i][0, kept], heads.places(ids)[0, i + 2 :][kept])
        for i, kept in enumerate(([0, 1, 3], [0, 2]))
    ]
    torch.testing.assert_close(hydra_loss(heads, model, ids), terms[0] + terms[1])
    soft = model(ids)[..., [3, 9, 250]].softmax(-1)
    terms = [
        -(soft[:, i + 1 : i + 1 + one.shape[1]] * one.log_softmax(-1)).sum(-1).mean()
        for i, one in enumerate(logits)
    ]
    torch.testing.assert_close(hydra_loss(heads, model, ids, lm=0.0, teacher=1.0), terms[0] + terms[1])
    drafter = HydraDrafter(heads, TreeShape.full(2, 1))
    out = speculative_tree(model, drafter, [[1, 2], [9]], max_new_tokens=12, temperature=0.0)
    assert out.rows() == generate(model, [[1, 2], [9]], max_new_tokens=12, temperature=0.0).rows()
    with pytest.raises(ValueError, match="draft_vocab from 1 to the 8 tokens of the model but got 9"):
        HydraConfig(dim=8, vocab_size=8, draft_vocab=9)


def plus_heads(vocab: int = 256) -> HydraHeads:
    config = HydraConfig(
        dim=64, vocab_size=vocab, num_heads=2, num_layers=2, prefix_heads=4, prefix_kv_heads=2
    )
    return shaken(HydraHeads(config)).eval()


class Checked(HydraDrafter):
    """Compares what the prefix layer's cache gives with reading each row's text anew."""

    worst, rounds = 0.0, 0

    def _prefixed(self, context: Context) -> Tensor:
        found = super()._prefixed(context)
        for row, text in enumerate(context.texts):
            if context.kept is None or context.kept[row]:
                whole = self.heads.prefix(self.model.hidden(torch.tensor([text[:-1]])))[0, -1]
                self.worst = max(self.worst, float((whole - found[row]).abs().max() / whole.abs().max()))
        self.rounds += 1
        return found


@torch.no_grad()
def test_the_prefix_layer_keeps_what_it_read_of_each_row() -> None:
    model, heads = base_model(), plus_heads()
    prompts = [[1, 2, 3], [4], [5] * 9]
    options: dict[str, Any] = {"max_new_tokens": 15, "temperature": 0.9, "seed": [1, 2, 3], "eos": 7}
    expected = generate(model, prompts, **options).rows()
    drafter = Checked(heads, TreeShape.full(3, 1))
    assert speculative_tree(model, drafter, prompts, **options).rows() == expected
    assert drafter.rounds > 3
    assert drafter.worst < 1e-4
    # A mix gives no states of its prompt; the heads' own model reads it.
    mixed = MixedModel([model, model], [0.5, 0.5])
    drafter = Checked(heads, TreeShape.full(3, 1), base=model)
    assert speculative_tree(mixed, drafter, prompts, **options).rows() == expected
    assert drafter.worst < 1e-4


def test_a_prefix_layer_begins_as_a_norm_and_learns() -> None:
    model = base_model()
    config = HydraConfig(dim=64, vocab_size=256, num_heads=2, prefix_heads=4)
    heads = HydraHeads(config).start_from(model)
    ids = torch.randint(256, (2, 12))
    hidden = model.hidden(ids)
    assert heads.prefix is not None
    torch.testing.assert_close(
        F.normalize(heads.prefix(hidden), dim=-1), F.normalize(hidden, dim=-1), rtol=1e-4, atol=1e-5
    )
    hydra_loss(heads, model, ids, lm=0.0, teacher=1.0).backward()
    gradients = {name: p.grad for name, p in heads.prefix.named_parameters()}
    assert gradients["layers.0.attention.out.weight"].abs().sum() > 0
    with pytest.raises(ValueError, match="prefix_heads to divide dim=64 but got 5"):
        HydraConfig(dim=64, vocab_size=256, prefix_heads=5)


def test_heads_of_a_kind_take_the_sizes_of_their_model() -> None:
    model = base_model()
    for kind, (layers, prefix) in {"hydra": (1, None), "medusa": (1, None), "hydra++": (4, 4)}.items():
        config = get_config("hydra_tiny", **heads_for(model, kind))
        assert (config.dim, config.vocab_size, config.num_layers) == (64, 256, layers)
        assert config.prefix_heads == prefix
        HydraHeads(config).check(model)


def test_heads_are_for_models_that_give_their_hidden_states() -> None:
    heads = HydraHeads(get_config("hydra_tiny"))
    with pytest.raises(TypeError, match="heads read a model's hidden states, which a Mamba does not give"):
        heads.check(arcore.create_model("mamba_tiny"))
