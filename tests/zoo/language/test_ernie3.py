"""Two masks on one trunk, memory against a longer context, the five tasks, and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.catalog.claims import shaken
from arcore.cli import main
from arcore.recipes import train
from arcore.zoo.language.ernie3.recipe import ErnieOptions, ErnieSampling
from arcore.zoo.language.ernie3.tasks import (
    CLS,
    IGNORED,
    MASK,
    ORDERS,
    RELATION,
    SEP,
    TASKS,
    Material,
    Triple,
    find_triples,
    read_triples,
    with_names,
)

TEXT = " ".join(
    f"And Name{chr(97 + i % 26)} begat Heir{chr(97 + i % 7)}, the son of Name{chr(97 + i % 26)}. So the years went on."
    for i in range(60)
)


class Protocol:
    """Bytes, and a segment before them."""

    def __init__(self, preset: str) -> None:
        self.ids = torch.randint(256, (3, 24))
        self.material = Material(TEXT, find_triples(TEXT), 48, 0)
        self.lessons = [(task, self.material.draw(task, 3)) for task in TASKS]

    def forward(self, model: Any) -> Tensor:
        return model(self.ids)

    def expected_shape(self) -> tuple[int, ...]:
        return (3, 24, 288)

    def loss(self, model: Any) -> Tensor:
        return sum((model.loss(task, lesson) for task, lesson in self.lessons), torch.zeros(()))

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        """Behind every prefix, against one pass."""
        steps = [model(self.ids[:, : i + 1])[:, -1] for i in range(self.ids.shape[1])]
        return self.forward(model), torch.stack(steps, 1)

    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        found = torch.cat([model.write(self.ids[row : row + 1], 5, seed=7 + row) for row in rows])
        return [found], model(self.ids[rows]).softmax(-1)


def model_of(**changes: Any) -> Any:
    return shaken(arcore.create_model("ernie3_tiny", **changes)).eval()


@torch.no_grad()
def test_one_call_with_both_masks_is_two_calls():
    model = model_of()
    ids = torch.randint(256, (3, 17))
    one, other = model.both(ids)
    full, _ = model.trunk(model.embedding(ids), torch.tensor([False]))
    causal, _ = model.trunk(model.embedding(ids), torch.tensor([True]))
    assert torch.equal(one, full)
    assert torch.equal(other, causal)
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % 256
    full2, causal2 = model.both(changed)
    assert (full2 - full)[:, 0].abs().max() > 1e-4
    assert torch.equal(causal2[:, :-1], causal[:, :-1])


@torch.no_grad()
@pytest.mark.parametrize("enhanced", [False, True])
def test_memory_is_a_longer_context(enhanced: bool):
    model = model_of(enhanced=enhanced, memory=20)
    ids = torch.randint(256, (2, 30))
    whole, _ = model.hidden(ids, "write")
    _, memory = model.hidden(ids[:, :20], "write")
    later, _ = model.hidden(ids[:, 20:], "write", memory)
    distance = (later - whole[:, 20:]).abs().max()
    # With inputs in memory it is exact; outputs reach further, so another thing.
    assert (distance < 1e-4) == (not enhanced)
    short = model_of(enhanced=enhanced, memory=5)
    _, kept = short.hidden(ids, "write")
    assert {part.shape[1] for parts in kept.values() for part in parts} == {5}


def test_no_gradient_goes_into_memory():
    model = model_of()
    ids = torch.randint(256, (1, 8))
    before = model.embedding(ids).detach().requires_grad_()
    _, kept = model.trunk(before, torch.tensor([True]))
    out, _ = model.trunk(model.embedding(ids), torch.tensor([True]), [part.requires_grad_() for part in kept])
    out.sum().backward()
    assert before.grad is None
    assert all(part.grad is None for part in kept)


def test_hidden_words_are_whole():
    material = Material(TEXT, find_triples(TEXT), 64, 0)
    lesson = material.hidden_words(20)
    hidden = lesson.ids == MASK
    assert torch.equal(hidden, lesson.targets != IGNORED)
    assert 0.05 < hidden.float().mean() < 0.35
    for row in range(20):
        original = torch.where(hidden[row], lesson.targets[row], lesson.ids[row])[1:].tolist()
        text = bytes(token for token in original if token < 256).decode()
        assert text in TEXT
        for place in hidden[row].nonzero()[:, 0].tolist():
            if not hidden[row, place - 1] and place > 1:
                assert not chr(original[place - 2]).isalnum()


def test_documents_orders_and_distances():
    material = Material(TEXT, find_triples(TEXT), 64, 0)
    ids, targets, before = material.documents(4)
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    joined = bytes(torch.cat([before, ids], 1)[0].tolist()).decode()
    assert joined in TEXT
    assert len(ORDERS) == 9
    lesson = material.orders(30)
    for row in range(30):
        order = ORDERS[int(lesson.targets[row])]
        parts = (
            bytes(t if t < 256 else 0 for t in lesson.ids[row, 1:].tolist()).decode().strip("\0").split("\0")
        )
        assert len(parts) == len(order)
        whole = [""] * len(order)
        for part, number in zip(parts, order, strict=True):
            whole[number] = part
        assert "".join(whole) in TEXT
    lesson = material.distances(60)
    assert set(lesson.targets.tolist()) == {0, 1, 2}
    for row in (lesson.targets == 0).nonzero()[:, 0].tolist():
        tokens = lesson.ids[row].tolist()
        assert tokens[0] == CLS
        assert bytes(token for token in tokens if token < 256).decode() in TEXT


def test_triples_and_sentences(tmp_path: Path):
    found = find_triples("In time Adam begat Seth. Saul, the son of Kish, ruled. David king of Judah slept.")
    assert [(one.head, one.relation, one.tail) for one in found] == [
        ("Adam", "begat", "Seth"),
        ("Saul", "son of", "Kish"),
        ("David", "king of", "Judah"),
    ]
    assert found[0].text == "In time Adam begat Seth"
    material = Material(TEXT, found, 64, 0)
    assert material.relations == ["begat", "king of", "son of"]
    lesson = material.knowledge(found)
    row = lesson.ids[0].tolist()
    assert row[:6] == [CLS, *b"Adam", SEP]
    assert row[6] == MASK
    assert int(lesson.targets[0, 6]) == RELATION
    assert (lesson.targets != IGNORED).sum() == 3
    assert bytes(t for t in row if t < 256).decode() == "AdamSethIn time Adam begat Seth"
    bare = material.knowledge(found, text=False)
    assert bytes(t for t in bare.ids[0].tolist() if t < 256).decode() == "AdamSeth"
    words = material.knowledge(found, words=True)
    assert int(words.ids[0, 6]) == RELATION
    assert (words.targets[0] != IGNORED).any()
    table = tmp_path / "kg.tsv"
    table.write_text("# remark\nAdam\tfather\tSeth\nEve\tmother\tSeth\tEve bare Seth\n")
    known = read_triples(table, "Then Adam begat Seth and died. Others lived.")
    assert known[0].text == "Then Adam begat Seth and died"
    assert known[1].text == "Eve bare Seth"


def test_names_are_exchanged_in_triple_and_sentence_alike():
    one = Triple(
        "Ann", "wife of", "Annas", "And Annas, whose wife of old was Ann, Annas said, loved Hannah (Ann)"
    )
    changed = with_names(one, "Eve", "Ann")
    assert changed == Triple(
        "Eve", "wife of", "Ann", "And Ann, whose wife of old was Eve, Ann said, loved Hannah (Eve)"
    )
    assert with_names(one, "Ann", "Annas") == one
    same = with_names(Triple("A", "is", "A", "A is A"), "B", "C")
    assert same.head == same.tail == "B"
    assert same.text == "B is B"


def test_picked_triples_are_renamed_and_no_relation_drowns_the_others():
    many = [Triple(f"H{i}", "often", f"T{i}", f"H{i} often T{i}") for i in range(600)]
    few = [Triple("Ada", "once", "Bob", "Ada once Bob")] * 40
    picked = Material(TEXT, [*many, *few], 48, 0, rename=0.5).pick(800)
    once = [one for one in picked if one.relation == "once"]
    # 40 of 120 + 40, and not 40 of 640.
    assert 0.2 < len(once) / 800 < 0.3
    assert all(one.text == f"{one.head} {one.relation} {one.tail}" for one in picked)
    renamed = sum(one not in {*many, *few} for one in picked) / 800
    assert 0.4 < renamed < 0.6
    plain = Material(TEXT, [*many, *few], 48, 0, rename=0.5).pick(50, text=False)
    assert all(one in {*many, *few} for one in plain)


def test_bad_input(tmp_path: Path):
    table = tmp_path / "kg.tsv"
    with pytest.raises(FileNotFoundError, match=r"--kg .*kg\.tsv does not exist"):
        read_triples(table, "")
    table.write_text("a\tb\tc\na\tb\n")
    with pytest.raises(ValueError, match=r"kg\.tsv:2: expected head, relation and tail"):
        read_triples(table, "")
    table.write_bytes(b"a\tb\tc\na\tb\t\xff\n")
    with pytest.raises(ValueError, match=r"kg\.tsv:2: the file is not UTF-8 text: byte 0xff"):
        read_triples(table, "")
    table.write_text("".join(f"a\tr{i}\tb\n" for i in range(30)))
    with pytest.raises(ValueError, match=r"kg\.tsv:29: 'r28' is one relation more than the 28"):
        read_triples(table, "")
    with pytest.raises(ValueError, match="--rename must be a share from 0 to 1 but got nan"):
        ErnieOptions(rename=float("nan"))
    table.write_text("\n")
    with pytest.raises(ValueError, match="holds no triple"):
        read_triples(table, "")
    with pytest.raises(ValueError, match="too short for rows of 64"):
        Material("short", [], 64, 0)
    model = model_of()
    with pytest.raises(ValueError, match="expected use to be one of 'understand', 'write' but got 'read'"):
        model.hidden(torch.zeros(1, 3, dtype=torch.int64), "read")
    with pytest.raises(ValueError, match="expected a task of words, document"):
        model.loss("none", Material(TEXT, find_triples(TEXT), 48, 0).draw("words", 1))
    short = tmp_path / "short.txt"
    short.write_text(TEXT[:150])
    with pytest.raises(
        ValueError, match=r"short\.txt: 135 characters to train on are too few for --length 96"
    ):
        train("ernie3_tiny", out=tmp_path / "run", data=str(short), show_progress=False)
    with pytest.raises(ValueError, match="--length must be at least 32"):
        ErnieOptions(length=8)
    with pytest.raises(ValueError, match="choose write, embed or relate"):
        ErnieSampling(task="read")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="heads of an even width"):
        arcore.create_model("ernie3_tiny", heads=7)


def test_the_loss_of_hidden_tokens_reads_these_alone():
    model = model_of()
    lesson = Material(TEXT, find_triples(TEXT), 48, 0).draw("words", 2)
    logits = model(lesson.ids, "understand")
    which = lesson.targets != IGNORED
    expected = F.cross_entropy(logits[which], lesson.targets[which])
    torch.testing.assert_close(model.loss("words", lesson), expected)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, out = tmp_path / "some.txt", str(tmp_path / "run")
    path.write_text(TEXT * 2)
    words = ["--data", str(path), "--length", "32", "--rows", "2", "--steps", "2", "--batch-size", "5"]
    assert main(["train", "ernie3_tiny", *words, "--out", out]) == 0
    assert main(["sample", out, "--prompt", "And Namea", "--max-new-tokens", "40"]) == 0
    capsys.readouterr()
    assert (
        main(
            [
                "sample",
                out,
                "--task",
                "relate",
                "--head",
                "Namea",
                "--tail",
                "Heirb",
                "--prompt",
                "Namea begat",
            ]
        )
        == 0
    )
    assert "begat: " in capsys.readouterr().out
    vectors = tmp_path / "vectors.safetensors"
    assert main(["sample", out, "--task", "embed", "--prompt", "And", "--out", str(vectors)]) == 0
    assert pytest.importorskip("safetensors.torch").load_file(vectors)["prompt"].shape == (64,)
    assert main(["sample", out, "--task", "relate"]) == 2
    assert "name both ends" in capsys.readouterr().err
    path.write_text("No knowledge here. " * 100)
    assert (
        main(["train", "ernie3_tiny", "--data", str(path), "--length", "32", "--out", str(tmp_path / "x")])
        == 2
    )
    assert "give a table with --kg FILE" in capsys.readouterr().err
