"""Loops that draft and verify: the same text as plain decoding where that is promised, the same law everywhere else."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

import arcore
from arcore.decoding import (
    Context,
    Draft,
    GuidedModel,
    LookupDrafter,
    MixedModel,
    ModelDrafter,
    NGramDrafter,
    Sampling,
    Session,
    TreeShape,
    copy_above,
    exact,
    generate,
    jacobi,
    next_token,
    random_tokens,
    relaxed,
    repeat_last,
    speculative_chain,
    speculative_tree,
    typical,
)

PROMPTS = [[1, 2, 3, 1, 2], [4], [5, 6, 5, 6, 5, 6, 5]]
TREE = TreeShape.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1)])


def language_model(vocab: int = 11, seed: int = 0, sharp: float = 1.0, layers: int = 2) -> Any:
    """A random Llama that says something: its logits are not all alike."""
    torch.manual_seed(seed)
    model = arcore.create_model(
        "llama_tiny", dim=32, num_layers=layers, num_heads=4, num_kv_heads=2, hidden_dim=48, vocab_size=vocab
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * sharp * torch.randn_like(parameter))
    return model.eval()


def drafters() -> dict[str, Any]:
    torch.manual_seed(3)
    small = language_model(seed=0, layers=1)
    text = generate(language_model(), [[1, 2]], max_new_tokens=200, temperature=0.7).rows()[0]
    return {
        "lookup": LookupDrafter(count=5),
        "ngram": NGramDrafter.fit([text], order=3, count=4),
        "chain": ModelDrafter(small, count=4, sampling=Sampling(temperature=0.0)),
        "itself": ModelDrafter(language_model(), count=4, sampling=Sampling(temperature=0.0)),
        "tree": ModelDrafter(small, shape=TREE),
        "dynamic tree": ModelDrafter(small, shape=TreeShape.full(3, 2, 2), keep=7),
    }


@pytest.mark.parametrize("name", ["lookup", "ngram", "chain", "itself", "tree", "dynamic tree"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_chosen_drafts_do_not_change_the_text(name: str, temperature: float) -> None:
    model = language_model()
    settings: dict[str, Any] = {
        "max_new_tokens": 24, "temperature": temperature, "top_k": 6, "eos": 9, "seed": [5, 6, 7]
    }  # fmt: skip
    expected = generate(model, PROMPTS, **settings)
    out = speculative_tree(model, drafters()[name], PROMPTS, **settings)
    assert out.rows() == expected.rows()
    assert out.tokens_per_round >= 1.0
    if name == "itself" and temperature == 0.0:
        # A drafter that is right is always accepted, apart from the first token of a round.
        assert out.tokens_per_round > 2.5
        assert out.calls < max(expected.lengths.tolist()) / 2


class Recorder(ModelDrafter):
    """Counts the states that a drafter is told to keep, beside the tokens that stand in the texts."""

    def start(self, model: Any, batch: int, max_length: int) -> None:
        super().start(model, batch, max_length)
        self.held = [0] * batch
        self.most = max_length

    def propose(self, context: Context) -> Draft:
        assert context.kept is not None
        self.held = [have + new for have, new in zip(self.held, context.kept, strict=True)]
        # The last token has not been read.
        assert self.held == [len(text) - 1 for text in context.texts]
        assert max(self.held) < self.most
        return super().propose(context)


def test_drafters_are_told_of_no_token_beyond_the_end_of_a_text() -> None:
    model = language_model()
    plain = generate(model, PROMPTS, max_new_tokens=17, temperature=0.0).rows()
    # The first row ends within a round, and the others go on.
    for eos in (None, plain[0][2]):
        drafter = Recorder(language_model(), count=4, sampling=Sampling(temperature=0.0))
        out = speculative_tree(model, drafter, PROMPTS, max_new_tokens=17, temperature=0.0, eos=eos)
        assert out.rows() == generate(model, PROMPTS, max_new_tokens=17, temperature=0.0, eos=eos).rows()


def law(model: Any, prompt: list[int], length: int, sampling: Sampling) -> Tensor:
    """The probability of every continuation, in the order of `itertools.product`."""
    vocab = model.vocab_size
    every = torch.tensor(list(itertools.product(range(vocab), repeat=length)))
    full = torch.cat([torch.tensor(prompt).expand(len(every), -1), every], dim=1)
    with torch.no_grad():
        probs = sampling.probs(model(full)[:, len(prompt) - 1 : -1])
    return probs.gather(2, every.unsqueeze(2)).squeeze(2).double().prod(1)


def fits(ids: Tensor, expected: Tensor, vocab: int) -> float:
    """p-value of the G-test; a text that cannot be drawn fails."""
    place = (ids * vocab ** torch.arange(ids.shape[1] - 1, -1, -1)).sum(1)
    counts = torch.bincount(place, minlength=len(expected)).double()
    possible = expected > 0
    assert not counts[~possible].any()
    counts, mean = counts[possible], expected[possible] * len(ids)
    return float(
        stats.power_divergence(counts, mean * counts.sum() / mean.sum(), lambda_="log-likelihood").pvalue
    )


ROWS = 6000
DRAWN = Sampling(temperature=1.2, top_k=3)


@pytest.mark.parametrize("how", ["token", "block", "tree", "jacobi", "jacobi random", "plain"])
def test_drawn_drafts_leave_the_law_as_it_is(how: str) -> None:
    vocab, length, prompt = 4, 3, [1, 2]
    model, small = language_model(vocab, seed=1, sharp=2), language_model(vocab, seed=2, sharp=2)
    settings: dict[str, Any] = {"max_new_tokens": length, "sampling": DRAWN, "seed": 11}
    rows = [prompt] * ROWS
    if how.startswith("jacobi"):
        fill = random_tokens(vocab) if how.endswith("random") else repeat_last
        out = jacobi(model, rows, window=3, initialiser=fill, **settings)
    elif how == "plain":
        out = jacobi(model, rows, window=1, **settings)
        assert out.calls == length
    elif how == "tree":
        out = speculative_tree(model, DrawnTree(vocab), rows, **settings)
    else:
        drafter = ModelDrafter(small, count=2, sampling=Sampling(temperature=1.5))
        out = speculative_chain(model, drafter, rows, method=how, **settings)  # type: ignore[arg-type]
    assert fits(out.ids, law(model, prompt, length, DRAWN), vocab) > 1e-3
    if how != "plain":
        assert out.tokens_per_round > 1.05


class DrawnTree:
    """Two roots and a child of the first, drawn from fixed distributions without replacement."""

    max_nodes = 3

    def __init__(self, vocab: int) -> None:
        self.probs = torch.tensor([0.4, 0.3, 0.2, 0.1])[:vocab]

    def start(self, *_: Any) -> None: ...

    def propose(self, context: Any) -> Draft:
        generator = torch.Generator().manual_seed(context.round)
        batch = len(context.texts)
        roots = torch.multinomial(self.probs.expand(batch, -1), 2, generator=generator)
        child = torch.multinomial(self.probs.expand(batch, -1), 1, generator=generator)
        return Draft(torch.cat([roots, child], 1), torch.tensor([-1, -1, 0]), self.probs.expand(batch, 3, -1))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize(
    "fill", [repeat_last, random_tokens(11), copy_above(3)], ids=["repeat", "random", "above"]
)
def test_jacobi_with_common_numbers_writes_the_text_of_plain_decoding(temperature: float, fill: Any) -> None:
    model = language_model()
    settings: dict[str, Any] = {
        "max_new_tokens": 21,
        "temperature": temperature,
        "top_k": 5,
        "eos": 9,
        "seed": 3,
    }
    out = jacobi(model, PROMPTS, window=6, initialiser=fill, coupling="common", **settings)
    assert out.rows() == generate(model, PROMPTS, **settings).rows()
    if temperature == 0.0:
        fresh = jacobi(model, PROMPTS, window=6, initialiser=fill, **settings)
        assert fresh.rows() == out.rows()


@pytest.mark.parametrize("how", ["chain", "jacobi"])
def test_a_row_does_not_depend_on_its_batch(how: str) -> None:
    model, small = language_model(), language_model(seed=4, layers=1)

    def run(rows: list[int]) -> list[list[int]]:
        settings: dict[str, Any] = {"max_new_tokens": 17, "seed": [20 + r for r in rows], "eos": 2}
        prompts = [PROMPTS[r] for r in rows]
        if how == "jacobi":
            return jacobi(model, prompts, window=5, **settings).rows()
        return speculative_chain(model, ModelDrafter(small, count=3), prompts, **settings).rows()

    together = run([0, 1, 2])
    assert [run([r])[0] for r in range(3)] == together
    assert run([2, 0]) == [together[2], together[0]]


def test_typical_and_relaxed_verification_are_greedy_at_temperature_zero_and_looser_above() -> None:
    model, drafter = language_model(sharp=0.5), ModelDrafter(language_model(seed=9, sharp=0.5), shape=TREE)
    near = torch.stack([torch.tensor([j for j in range(11) if j != i]) for i in range(11)])
    greedy = generate(model, PROMPTS, max_new_tokens=12, temperature=0.0).rows()
    for verify in (typical(), relaxed(near, delta=0.0)):
        out = speculative_tree(model, drafter, PROMPTS, max_new_tokens=12, temperature=0.0, verify=verify)
        assert out.rows() == greedy
    strict, loose = (
        speculative_tree(model, drafter, PROMPTS, max_new_tokens=40, verify=verify).tokens_per_round
        for verify in (exact(), relaxed(near, delta=0.9))
    )
    assert loose > strict
    assert relaxed(near, delta=0.0) is not None
    exactly = speculative_tree(model, drafter, PROMPTS, max_new_tokens=20, seed=1, verify=exact())
    same = speculative_tree(
        model, drafter, PROMPTS, max_new_tokens=20, seed=1, verify=relaxed(near, delta=0.0)
    )
    assert same.rows() == exactly.rows()


@torch.no_grad()
def test_mixed_models_draw_from_the_product_of_their_distributions() -> None:
    first, second = language_model(), language_model(seed=5)
    mixed = MixedModel([first, second], [1.0, 0.5])
    ids = torch.tensor([[1, 2, 3]])
    cache = mixed.make_cache(1, 9)
    expected = first(ids)[:, -1].log_softmax(-1) + 0.5 * second(ids)[:, -1].log_softmax(-1)
    torch.testing.assert_close(mixed.prefill(ids, cache).softmax(-1), expected.softmax(-1))
    settings: dict[str, Any] = {"max_new_tokens": 15, "seed": 2}
    plain = generate(mixed, PROMPTS, **settings)
    assert speculative_tree(mixed, LookupDrafter(count=4), PROMPTS, **settings).rows() == plain.rows()
    alone = generate(MixedModel([first, second], [1.0, 0.0]), PROMPTS, **settings)
    assert alone.rows() == generate(first, PROMPTS, **settings).rows()
    with pytest.raises(ValueError, match=r"theirs have \[11, 4\]"):
        MixedModel([first, language_model(4)], [1.0, 1.0])
    with pytest.raises(ValueError, match="a weight for each"):
        MixedModel([first], [1.0, 1.0])


@torch.no_grad()
def test_guidance_is_two_texts_with_the_same_new_tokens() -> None:
    model = language_model()
    uncond = torch.tensor([[0]])
    settings: dict[str, Any] = {"max_new_tokens": 14, "temperature": 0.0}
    guided = GuidedModel(model, scale=2.5, uncond=uncond)
    plain = generate(guided, PROMPTS, **settings).rows()
    for prompt, new in zip(PROMPTS, plain, strict=True):
        for i, token in enumerate(new):
            cond = model(torch.tensor([prompt + new[:i]]))[0, -1]
            other = model(torch.tensor([[0, *new[:i]]]))[0, -1]
            assert (other + 2.5 * (cond - other)).argmax() == token
    for run in (
        speculative_tree(guided, ModelDrafter(model, shape=TREE), PROMPTS, **settings),
        jacobi(guided, PROMPTS, window=5, **settings),
    ):
        assert run.rows() == plain
    # Within an interval of no tokens, or at scale 1, nothing is guided.
    unguided = generate(model, PROMPTS, **settings).rows()
    for same in (
        GuidedModel(model, scale=1.0, uncond=uncond),
        GuidedModel(model, scale=3.0, uncond=uncond, interval=(0, 0)),
    ):
        assert generate(same, PROMPTS, **settings).rows() == unguided
    early = GuidedModel(model, scale=2.5, uncond=uncond, interval=(0, 3))
    text = generate(early, PROMPTS, **settings).rows()
    assert [row[:3] for row in text] == [row[:3] for row in plain]
    rest = generate(
        model, [p + r[:3] for p, r in zip(PROMPTS, text, strict=True)], **{**settings, "max_new_tokens": 11}
    )
    assert [row[3:] for row in text] == rest.rows()
    assert speculative_tree(early, LookupDrafter(), PROMPTS, **settings).rows() == text


@torch.no_grad()
def test_a_session_that_was_rewound_or_forked_expects_what_a_fresh_one_does() -> None:
    model = language_model()
    session = Session(model, PROMPTS, max_length=40)
    seeds = torch.tensor([1, 2, 3])
    session.draw(6, Sampling(), seeds)
    fork = session.fork([2, 0, 0])
    session.rewind([4, 3, 9])
    session.feed([[7, 8], [], [1]])
    for one in (session, fork):
        fresh = Session(model, one.texts, max_length=40)
        torch.testing.assert_close(one.logits, fresh.logits)
    assert [len(text) for text in session.texts] == [6, 3, 10]
    assert fork.texts[1] == fork.texts[2] != session.texts[0]
    with pytest.raises(ValueError, match="expected a length from 1"):
        session.rewind([0, 1, 1])
    with pytest.raises(ValueError, match="for each of 3 rows"):
        session.feed([[1]])


def test_strings_end_rows_and_log_probabilities_are_those_of_the_draw() -> None:
    model = language_model()

    def decode(tokens: list[int]) -> str:
        return "".join(chr(97 + token) for token in tokens)

    free = generate(model, PROMPTS, max_new_tokens=20, seed=4)
    text = decode(free.rows()[0])
    out = generate(model, PROMPTS, max_new_tokens=20, seed=4, stop=[text[3:6]], decode=decode)
    assert decode(out.rows()[0]) == text[: text.index(text[3:6]) + 3]
    assert (
        speculative_chain(
            model, LookupDrafter(), PROMPTS, max_new_tokens=20, seed=4, stop=[text[3:6]], decode=decode
        ).rows()
        == out.rows()
    )
    with pytest.raises(ValueError, match="give decode="):
        generate(model, PROMPTS, max_new_tokens=2, stop=["x"])
    with pytest.raises(ValueError, match=r"write \['x'\]"):
        generate(model, PROMPTS, max_new_tokens=2, stop="x", decode=decode)
    out = generate(
        model,
        PROMPTS,
        max_new_tokens=6,
        seed=4,
        top_k=3,
        temperature=0.7,
        return_logprobs=True,
        return_kept=True,
    )
    assert out.logprobs is not None and out.kept is not None
    for r, (prompt, new) in enumerate(zip(PROMPTS, out.rows(), strict=True)):
        for i, token in enumerate(new):
            with torch.no_grad():
                probs = Sampling(top_k=3, temperature=0.7).probs(
                    model(torch.tensor([prompt + new[:i]]))[0, -1]
                )
            assert out.logprobs[r, i] == pytest.approx(float(probs[token].log()), abs=1e-4)
            assert int(out.kept[r, i, 0]) == sum(1 << j for j in range(11) if probs[j] > 0)
    steps = list(next_token(model, PROMPTS, max_new_tokens=3, seed=4))
    assert torch.equal(torch.stack([step.tokens for step in steps], 1), free.ids[:, :3])


class Undraftable:
    """A model that reads one token after the other only."""

    vocab_size = 11

    def make_cache(self, batch: int, max_length: int) -> Any: ...

    def prefill(self, ids: Tensor, cache: Any, mask: Tensor | None = None) -> Any: ...

    def step(self, ids: Tensor, cache: Any) -> Any: ...


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_model_with_a_state_reads_chains_of_drafts(temperature: float) -> None:
    torch.manual_seed(0)
    model = arcore.create_model("mamba_tiny", d_model=32, n_layer=2, vocab_size=11, pad_vocab_size_multiple=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": temperature, "seed": 5, "eos": 3}
    plain = generate(model, PROMPTS, **options).rows()
    assert speculative_chain(model, LookupDrafter(count=4), PROMPTS, **options).rows() == plain
    assert jacobi(model, PROMPTS, window=4, coupling="common", **options).rows() == plain
    with pytest.raises(ValueError, match="a state has no branches"):
        speculative_tree(model, ModelDrafter(language_model(), shape=TREE), PROMPTS, **options)


def test_refuses_what_does_not_fit() -> None:
    model = language_model()
    for run in (
        lambda one: speculative_chain(one, LookupDrafter(), [[1]], max_new_tokens=1),
        lambda one: jacobi(one, [[1]], max_new_tokens=1),
        lambda one: Session(one, [[1]], max_length=4),
    ):
        with pytest.raises(TypeError, match=r"Undraftable cannot .*: it has no `extend`"):
            run(Undraftable())
    with pytest.raises(ValueError, match="vocabularies must be the same"):
        speculative_chain(model, ModelDrafter(language_model(4)), PROMPTS, max_new_tokens=3)
    with pytest.raises(ValueError, match="made for texts of 2048 tokens"):
        speculative_chain(model, LookupDrafter(), PROMPTS, max_new_tokens=2045)
    with pytest.raises(ValueError, match="window must be at least 1 token"):
        jacobi(model, PROMPTS, max_new_tokens=3, window=0)
    with pytest.raises(ValueError, match="expected the initialiser to give 1 tokens"):
        jacobi(
            model, PROMPTS, max_new_tokens=3, window=3, initialiser=lambda prompt, text, count: [99] * count
        )
    with pytest.raises(ValueError, match="an orphan or none"):
        TreeShape.from_paths([(0, 1)])
    with pytest.raises(ValueError, match="got both"):
        jacobi(model, PROMPTS, max_new_tokens=3, sampling=Sampling(), top_k=3)
    with pytest.raises(ValueError, match="3 of them, one per row"):
        jacobi(model, PROMPTS, max_new_tokens=3, seed=[1, 2])
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    for run in (lambda: jacobi(model, PROMPTS, max_new_tokens=3),):
        with pytest.raises(ValueError, match=r"distribution|invalid|NaN"):
            run()
