"""The loss of masked tokens, reading in both directions against a plain transcription, adapters and facts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.catalog.claims import shaken
from arcore.cli import main
from arcore.zoo.language.bico.objective import (
    bico_loss,
    both_ways,
    masked_loss,
    read_both_ways,
    reverse_accuracy,
    small_world,
)
from arcore.zoo.language.bico.recipe import FactOptions, Padded, adapt, merge, read_facts


class Contract:
    """Cross entropy of masked tokens."""

    learns = ("logits",)
    tolerance = 1e-12

    def batch(self, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            "logits": torch.randn(4, 6, 9, generator=generator, dtype=torch.float64),
            "ids": torch.randint(9, (4, 6), generator=generator),
            "masked": torch.rand(4, 6, generator=generator) < 0.5,
        }

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return masked_loss(batch["logits"], batch["ids"], batch["masked"])

    def reference(self, batch: dict[str, Tensor]) -> Tensor:
        total, count = torch.zeros((), dtype=torch.float64), 0
        for row in range(len(batch["ids"])):
            for place in range(1, batch["ids"].shape[1]):
                if batch["masked"][row, place]:
                    logits = batch["logits"][row, place - 1]
                    total = total + logits.exp().sum().log() - logits[batch["ids"][row, place]]
                    count += 1
        return total / count

    def special_case(self) -> tuple[Tensor, Tensor]:
        """With all tokens masked it is next-token prediction."""
        batch = self.batch(3)
        every = batch | {"masked": torch.ones_like(batch["masked"])}
        known = F.cross_entropy(batch["logits"][:, :-1].flatten(0, 1), batch["ids"][:, 1:].flatten())
        return self.loss(every), known

    def padded(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            "logits": F.pad(batch["logits"], (0, 0, 0, 3), value=7.0),
            "ids": F.pad(batch["ids"], (0, 3), value=1),
            "masked": F.pad(batch["masked"], (0, 3)),
        }


def plain(model: Any, ids: Tensor, hidden: Tensor) -> Tensor:
    """One row, written with loops over pairs of tokens."""
    config = model.config
    heads, shared = config.num_heads, config.num_heads // config.num_kv_heads
    width = config.dim // heads
    rates = 1.0 / config.rope_theta ** (torch.arange(0, width, 2).float() / width)

    def turn(x: Tensor, place: int) -> Tensor:
        angle = place * rates
        first, second = x.chunk(2)
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()]
        )

    x = model.embedding.weight[ids]
    for layer in model.layers:
        h = layer.norm1(x)
        qkv = layer.attention.qkv(h).view(len(ids), heads + 2 * config.num_kv_heads, width)
        out = torch.zeros(len(ids), heads, width)
        for head in range(heads):
            for i in range(len(ids)):
                scores, values = [], []
                for j in range(len(ids)):
                    if not hidden[j]:
                        sign = 1 if j <= i else -1
                        q, k = turn(qkv[i, head], sign * i), turn(qkv[j, heads + head // shared], sign * j)
                        scores.append(q @ k / width**0.5)
                        values.append(qkv[j, heads + config.num_kv_heads + head // shared])
                out[i, head] = torch.stack(scores).softmax(0) @ torch.stack(values)
        x = x + layer.attention.out(out.flatten(1))
        x = x + layer.mlp(layer.norm2(x))
    return model.logits(model.norm(x))


def small() -> Any:
    torch.manual_seed(0)
    return shaken(arcore.create_model("llama_tiny", vocab_size=20, num_layers=2)).eval()


@torch.no_grad()
def test_reading_in_both_directions_is_that_of_a_plain_loop():
    model = small()
    ids = torch.randint(20, (2, 7))
    hidden = torch.zeros(2, 7, dtype=torch.bool)
    hidden[0, 3] = hidden[1, 5] = hidden[1, 6] = True
    found = read_both_ways(model, ids, hidden)
    for row in range(2):
        torch.testing.assert_close(found[row], plain(model, ids[row], hidden[row]), rtol=1e-4, atol=1e-4)


def test_the_mask_of_keys_that_stand_twice():
    hidden = torch.tensor([[False, True, False, False]])
    allowed = both_ways(hidden).to_bool()[0, 0]
    place = torch.arange(4)
    lower = place <= place.unsqueeze(1)
    expected = torch.cat([lower, ~lower], 1) & ~hidden.repeat(1, 2)
    assert torch.equal(allowed, expected)


def test_padding_changes_no_loss():
    model = small()
    ids = torch.randint(1, 20, (3, 8))
    longer = F.pad(ids, (0, 4))
    for both in (False, True):
        torch.manual_seed(1)
        valid = torch.ones_like(ids, dtype=torch.bool)
        one = bico_loss(model, ids, valid, both=both, rate=0.999999)
        torch.manual_seed(1)
        other = bico_loss(model, longer, F.pad(valid, (0, 4)), both=both, rate=0.999999)
        torch.testing.assert_close(one, other)
        one.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_wrong_shapes():
    model = small()
    ids = torch.randint(20, (2, 7))
    with pytest.raises(ValueError, match=r"expected hidden \(2, 7\)"):
        read_both_ways(model, ids, torch.zeros(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"expected logits \[B, L, V\]"):
        masked_loss(torch.zeros(2, 7, 20), ids, torch.zeros(2, 6, dtype=torch.bool))
    windowed = arcore.create_model("llama_tiny", window=4)
    with pytest.raises(ValueError, match="sliding window"):
        read_both_ways(windowed, ids, torch.zeros(2, 7, dtype=torch.bool))


def test_a_small_world():
    facts = small_world(10, 3)
    assert facts.train.shape == (15, 4)
    assert facts.reverse.shape == (5, 4)
    pairs = {(a, b) for _, a, _, b in facts.train[:10].tolist()}
    for rows in (facts.train[10:], facts.reverse):
        assert all((a, b) in pairs for _, b, _, a in rows.tolist())
    assert not {tuple(row) for row in facts.train.tolist()} & {tuple(row) for row in facts.reverse.tolist()}


def test_adapters_begin_at_the_model_and_merge_into_it():
    pytest.importorskip("peft")
    model = small()
    ids = torch.randint(20, (1, 9))
    before, names = model(ids), list(model.state_dict())
    adapted = adapt(model, 4, 8)
    assert torch.equal(adapted(ids), before)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 4 * 2
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    changed = adapted(ids)
    assert (changed - before).abs().max() > 1e-2
    merged = merge(adapted)
    assert list(merged.state_dict()) == names
    torch.testing.assert_close(merged(ids), changed, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_facts_are_learned_in_the_order_that_was_read():
    assert reverse_accuracy("ntp", seed=0, count=500, pairs=20)[0] == 1.0


def test_bad_facts(tmp_path: Path):
    path = tmp_path / "facts.jsonl"
    with pytest.raises(FileNotFoundError, match=r"give a \.jsonl file"):
        read_facts(path)
    for text, message in [
        ('{"text": "a"}\n{"text": \n', r"facts\.jsonl:2: expected a JSON table"),
        ('\n{"prompt": "a"}\n', r'facts\.jsonl:2: expected "text", or "prompt" and "completion"'),
        ('{"text": 3}\n', r"facts\.jsonl:1: expected"),
        ("[1]\n", r"facts\.jsonl:1: expected"),
        ("\n", "holds no fact"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_facts(path)
    with pytest.raises(ValueError, match=r"--base FOLDER --data facts\.jsonl"):
        FactOptions()
    with pytest.raises(ValueError, match="--rate must lie between 0 and 1"):
        FactOptions(base="x", data=path, rate=1.0)
    with pytest.raises(ValueError, match="--longest must be at least 2"):
        FactOptions(base="x", data=path, longest=1)


def test_facts_are_padded():
    from arcore.data.text_tokenizers import ByteTokenizer

    data = Padded(["abc", "a", "long text"], ByteTokenizer(), 6)
    ids, valid = data[0]
    assert bytes(ids[valid].tolist()) == b"\nabc"
    assert valid.tolist() == [True] * 4 + [False] * 2
    assert len(data) == 3


@pytest.mark.parametrize("lora", [0, 4])
def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], lora: int):
    if lora:
        pytest.importorskip("peft")
    text, facts = tmp_path / "some.txt", tmp_path / "facts.jsonl"
    text.write_text("A short text to begin with. " * 40)
    facts.write_text(
        "".join(json.dumps({"prompt": f"Name {i} is ", "completion": f"thing {i}."}) + "\n" for i in range(6))
    )
    base, out = str(tmp_path / "base"), str(tmp_path / "bico")
    small = ["--steps", "1", "--batch-size", "2"]
    assert main(["train", "llama_tiny", "--data", str(text), "--context", "16", *small, "--out", base]) == 0
    words = ["--base", base, "--data", str(facts), "--held-out", str(facts), "--lora", str(lora)]
    assert main(["train", "bico", *words, "--steps", "3", "--batch-size", "2", "--out", out]) == 0
    assert main(["sample", out, "--prompt", "Name 1 is", "--max-new-tokens", "3", "--temperature", "0"]) == 0
    assert main(["train", "bico", "--resume", out, "--steps", "4"]) == 2
    assert "cannot be resumed" in capsys.readouterr().err
