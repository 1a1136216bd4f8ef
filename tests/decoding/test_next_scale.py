"""The next-scale loop, driven by a model and a tokenizer that write down what they are asked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import arcore
from arcore.decoding import Kept, generate_next_scale, row_seeds
from arcore.nn import KVCache, ScaleModel, ScaleTokenizer
from arcore.ops import filter_probs, sample

VOCAB = 6


class ScriptedModel:
    """Its logits are a function of the label and the scale; the null class is 9."""

    patch_nums = (1, 2, 3)
    vocab_size = VOCAB
    null_class = 9

    def __init__(self) -> None:
        self.calls: list[tuple[int, Tensor | None, list[int]]] = []

    def make_cache(self, batch: int) -> KVCache:
        return KVCache(num_layers=1, batch=batch, num_heads=1, max_length=14, head_dim=8)

    def table(self, k: int, label: int) -> Tensor:
        return torch.randn(VOCAB, generator=torch.Generator().manual_seed(100 * k + label))

    def scale_logits(self, k: int, inputs: Tensor | None, labels: Tensor, cache: KVCache) -> Tensor:
        self.calls.append((k, inputs, labels.tolist()))
        rows = torch.zeros(len(labels), 1, self.patch_nums[k] ** 2, 8)
        cache.append(0, rows, rows)
        logits = torch.stack([self.table(k, label) for label in labels.tolist()])
        return logits.unsqueeze(1).expand(-1, self.patch_nums[k] ** 2, -1)


class CountingTokenizer:
    """Its latent holds the sum of all codes so far; an image is that sum."""

    patch_nums = (1, 2, 3)
    vocab_size = VOCAB

    def empty_latent(self, batch: int) -> Tensor:
        return torch.zeros(batch, 1, 3, 3)

    def add_scale(self, k: int, indices: Tensor, latent: Tensor) -> Tensor:
        assert indices.shape == (len(latent), self.patch_nums[k] ** 2)
        return latent + indices.sum(1).view(-1, 1, 1, 1)

    def next_input(self, k: int, latent: Tensor) -> Tensor:
        return latent[:, :, 0, 0].unsqueeze(1).expand(-1, self.patch_nums[k + 1] ** 2, -1)

    def decode_latent(self, latent: Tensor) -> Tensor:
        return latent / 100

    def scale_inputs(self, indices: list[Tensor]) -> Tensor:
        raise AssertionError("training only")


def test_parts_follow_the_protocols():
    assert isinstance(ScriptedModel(), ScaleModel)
    assert isinstance(CountingTokenizer(), ScaleTokenizer)
    assert isinstance(arcore.create_model("var_tiny"), ScaleModel)
    assert isinstance(arcore.create_model("msvq_tiny"), ScaleTokenizer)


def test_order_of_calls_and_guidance_rows():
    model, labels = ScriptedModel(), torch.tensor([4, 2])
    out = generate_next_scale(model, CountingTokenizer(), labels, cfg_scale=2.0, previews=True)
    assert [(k, rows) for k, _, rows in model.calls] == [(k, [4, 2, 9, 9]) for k in range(3)]
    sums = torch.stack([codes.sum(1) for codes in out.indices]).cumsum(0)  # [K, B]
    assert model.calls[0][1] is None
    for k in (1, 2):
        inputs = model.calls[k][1]
        assert inputs.shape == (4, (k + 1) ** 2, 1)
        # Both halves of the guided pair read what the conditional half drew.
        assert torch.equal(inputs[:, 0, 0], sums[k - 1].repeat(2).float())
    assert torch.equal(out.images[:, 0, 0, 0], sums[-1] / 100)
    assert torch.equal(torch.stack(out.previews)[:, :, 0, 0, 0], sums / 100)
    assert torch.equal(out.images, out.previews[-1])


def test_no_guidance_runs_half_the_rows():
    model = ScriptedModel()
    out = generate_next_scale(model, CountingTokenizer(), torch.tensor([4, 2]), cfg_scale=0.0)
    assert [rows for _, _, rows in model.calls] == [[4, 2]] * 3
    assert out.previews == []


def test_guidance_ramp():
    """At scale k of K the guided logits are (1 + t) conditional - t unconditional, t = cfg k / (K - 1)."""
    model = ScriptedModel()
    out = generate_next_scale(model, CountingTokenizer(), torch.tensor([4]), cfg_scale=3.0, temperature=0.0)
    for k, codes in enumerate(out.indices):
        t = 3.0 * k / 2
        guided = (1 + t) * model.table(k, 4) - t * model.table(k, 9)
        assert codes.unique().tolist() == [guided.argmax().item()]
    plain = generate_next_scale(model, CountingTokenizer(), torch.tensor([4]), cfg_scale=0.0, temperature=0.0)
    assert any(not torch.equal(a, b) for a, b in zip(out.indices, plain.indices, strict=True))


def test_single_scale_is_not_guided():
    model, tokenizer = ScriptedModel(), CountingTokenizer()
    model.patch_nums = tokenizer.patch_nums = (3,)
    generate_next_scale(model, tokenizer, torch.tensor([4]), cfg_scale=3.0)
    assert [rows for _, _, rows in model.calls] == [[4]]


def test_seeds_and_batch_mates():
    def codes(labels: list[int], seed: int | list[int]) -> Tensor:
        out = generate_next_scale(ScriptedModel(), CountingTokenizer(), torch.tensor(labels), seed=seed)
        return torch.cat(out.indices, dim=1)

    whole = codes([1, 1, 1], 5)
    assert torch.equal(codes([1, 1, 1], 5), whole)
    assert torch.equal(codes([1, 7], 5), torch.stack([whole[0], codes([3, 7], 5)[1]]))
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(codes([1, 1, 1], 6), whole)
    assert torch.equal(codes([1, 1], [8, 8])[0], codes([2, 1], [3, 8])[1])


def test_filters_reach_the_draw():
    out = generate_next_scale(ScriptedModel(), CountingTokenizer(), torch.arange(4), top_k=1, seed=1)
    greedy = generate_next_scale(
        ScriptedModel(), CountingTokenizer(), torch.arange(4), temperature=0.0, seed=2
    )
    nucleus = generate_next_scale(ScriptedModel(), CountingTokenizer(), torch.arange(4), top_p=1e-6, seed=3)
    for other in (out, nucleus):
        assert all(torch.equal(a, b) for a, b in zip(other.indices, greedy.indices, strict=True))


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_draws_are_those_of_the_op(cfg_scale):
    """Every code is `arcore.ops.sample` of the guided logits, keyed by its row's seed and its place among all codes."""
    model, labels = ScriptedModel(), torch.tensor([4, 2, 2])
    settings = {"temperature": 1.3, "top_k": 4, "top_p": 0.95}
    out = generate_next_scale(model, CountingTokenizer(), labels, cfg_scale=cfg_scale, seed=11, **settings)
    place = 0
    for k, codes in enumerate(out.indices):
        for i in range(codes.shape[1]):
            for row, label in enumerate(labels.tolist()):
                expected = sample(
                    model.table(k, label), uncond=model.table(k, 9), cfg_scale=1 + cfg_scale * k / 2,
                    **settings, seed=int(row_seeds(11, 3)[row]), offset=place,
                )  # fmt: skip
                assert codes[row, i] == expected
            place += 1


def test_draws_follow_the_guided_distribution():
    model, n = ScriptedModel(), 2000
    model.table = lambda k, label: torch.linspace(-1, 1, VOCAB) * (k + 1 if label != 9 else -1)
    out = generate_next_scale(model, CountingTokenizer(), torch.full((n,), 3), cfg_scale=2.0, top_k=4, seed=1)
    for k, codes in enumerate(out.indices):
        probs = filter_probs((1 + k) * model.table(k, 3) - k * model.table(k, 9), top_k=4)
        share = codes.flatten().bincount(minlength=VOCAB) / codes.numel()
        assert ((share - probs).abs() <= 5 * (probs * (1 - probs) / codes.numel()).sqrt()).all()


def test_nan_is_an_error():
    model = ScriptedModel()
    model.table = lambda k, label: torch.full((VOCAB,), torch.nan if k == 1 else 0.0)
    with pytest.raises(ValueError, match=r"row \(0, 0\) has NaN"):
        generate_next_scale(model, CountingTokenizer(), torch.tensor([4]))


def test_modules_are_evaluated_and_put_back():
    model = arcore.create_model("var_tiny", drop_path=0.9, class_drop=1.0)
    tokenizer = arcore.create_model("msvq_tiny")
    model.blocks[1].eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    labels = torch.tensor([1, 2])
    first = generate_next_scale(model, tokenizer, labels, seed=1)
    second = generate_next_scale(model, tokenizer, labels, seed=1)
    assert torch.equal(first.images, second.images)
    assert not first.images.requires_grad
    assert model.training
    assert tokenizer.training
    assert not model.blocks[1].training
    # The class reaches the model although training would drop every one.
    other = generate_next_scale(model, tokenizer, labels + 1, seed=1)
    assert not torch.equal(first.images, other.images)


def test_no_labels_give_no_images():
    out = generate_next_scale(
        arcore.create_model("var_tiny"), arcore.create_model("msvq_tiny"), torch.tensor([], dtype=torch.int64)
    )
    assert out.images.shape == (0, 1, 8, 8)
    assert [tuple(codes.shape) for codes in out.indices] == [(0, 1), (0, 4), (0, 9), (0, 16)]


def test_bad_arguments():
    model, tokenizer, labels = ScriptedModel(), CountingTokenizer(), torch.tensor([1])
    for change in ({"patch_nums": (1, 2, 4)}, {"vocab_size": 7}):
        other = CountingTokenizer()
        for name, value in change.items():
            setattr(other, name, value)
        with pytest.raises(
            ValueError, match=r"the same scales and codes but got patch_nums=\(1, 2, 3\), vocab_size=6"
        ):
            generate_next_scale(model, other, labels)
    with pytest.raises(ValueError, match="expected cfg_scale >= 0 but got -1"):
        generate_next_scale(model, tokenizer, labels, cfg_scale=-1)
    with pytest.raises(ValueError, match=r"labels of shape \[B\] but got \(1, 1\)"):
        generate_next_scale(model, tokenizer, labels[None])
    with pytest.raises(ValueError, match="one per row"):
        generate_next_scale(model, tokenizer, labels, seed=[1, 2])
    with pytest.raises(ValueError, match="top_p"):
        generate_next_scale(model, tokenizer, labels, top_p=2.0)
    with pytest.raises(ValueError, match="class ids from 0 to 10"):
        generate_next_scale(
            arcore.create_model("var_tiny"), arcore.create_model("msvq_tiny"), torch.tensor([11])
        )


class VectorCounter(CountingTokenizer):
    """A latent of whole maps: the last scale's vectors enlarged, so that what was fed on can be read off."""

    codebook = torch.randn(VOCAB, 1, generator=torch.Generator().manual_seed(5))

    def __init__(self) -> None:
        self.vectors: list[Tensor] = []

    def add_vectors(self, k: int, vectors: Tensor, latent: Tensor) -> Tensor:
        self.vectors.append(vectors)
        return latent + vectors.sum(1).view(-1, 1, 1, 1)


def test_smooth_pictures_come_from_mixtures_by_the_published_formula():
    model, tokenizer, labels = ScriptedModel(), VectorCounter(), torch.tensor([4, 2])
    settings = {"cfg_scale": 2.0, "top_k": 4}
    out = generate_next_scale(model, tokenizer, labels, seed=[3, 8], smooth=True, **settings)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 8)]
    for k, side in enumerate((1, 2, 3)):
        ratio = k / 2
        for row, label in enumerate(labels.tolist()):
            logits = model.table(k, label) * (1 + 2 * ratio) - model.table(k, 9) * 2 * ratio
            logits = logits.masked_fill(logits < logits.topk(4).values[-1], -torch.inf)
            exponential = torch.empty(side * side, VOCAB).exponential_(generator=generators[row])
            scores = ((1 + ratio) * logits - exponential.log()) / max(0.27 * (1 - ratio * 0.95), 0.005)
            torch.testing.assert_close(
                tokenizer.vectors[k][row], scores.softmax(-1) @ VectorCounter.codebook, rtol=1e-4, atol=1e-5
            )
    # The draws are those of the plain run as long as the inputs do not matter to the model, as here.
    plain = generate_next_scale(model, VectorCounter(), labels, seed=[3, 8], **settings)
    assert all(torch.equal(a, b) for a, b in zip(out.indices, plain.indices, strict=True))
    with pytest.raises(TypeError, match="VectorTokenizer"):
        generate_next_scale(model, CountingTokenizer(), labels, smooth=True)


def test_kept_codes_stay_and_the_rest_is_drawn():
    model, labels = ScriptedModel(), torch.tensor([4, 2])
    given = [torch.full((2, side * side), 5) for side in (1, 2, 3)]
    plain = generate_next_scale(model, CountingTokenizer(), labels, seed=1).indices
    region = torch.zeros(3, 3, dtype=torch.bool)
    region[:, 2] = True
    drawn = generate_next_scale(model, CountingTokenizer(), labels, seed=1, kept=Kept(given, region)).indices
    # The first scale always stays; bilinear shrinking of the last column to 2 x 2 covers half of a place or less.
    assert drawn[0].tolist() == [[5], [5]]
    assert torch.equal(drawn[1], torch.where(Kept(given, region).places(1, (1, 2, 3)), 5, plain[1]))
    expected = plain[2].clone()
    expected.view(2, 3, 3)[:, :, 2] = 5
    assert torch.equal(drawn[2], expected)
    everything = Kept(given, torch.ones(40, 60, dtype=torch.bool))
    whole = generate_next_scale(model, CountingTokenizer(), labels, kept=everything).indices
    assert all(torch.equal(a, b) for a, b in zip(whole, given, strict=True))


@pytest.mark.parametrize(
    ("kept", "error", "words"),
    [
        (
            Kept([torch.zeros(2, 1, dtype=torch.int64)], torch.ones(3, 3, dtype=torch.bool)),
            ValueError,
            "indices",
        ),
        (
            Kept([torch.zeros(2, s * s, dtype=torch.int64) for s in (1, 2, 3)], torch.ones(3, 3)),
            TypeError,
            "bool",
        ),
        (
            Kept([torch.zeros(2, s * s, dtype=torch.int64) for s in (1, 2, 3)], torch.ones(3, 2, 2).bool()),
            ValueError,
            r"\[2, H, W\]",
        ),
    ],
)
def test_kept_parts_that_do_not_fit_are_refused(kept: Kept, error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        generate_next_scale(ScriptedModel(), CountingTokenizer(), torch.tensor([4, 2]), kept=kept)
