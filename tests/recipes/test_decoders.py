"""Text by the loops that the command line offers, and the table that compares them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import arcore
from arcore.catalog import save_checkpoint
from arcore.catalog.claims import shaken
from arcore.cli import main
from arcore.cli._decoding import _law
from arcore.data.text import load_text
from arcore.decoding import Draft, MixedModel, exact, generate, relaxed
from arcore.nn import quantise
from arcore.ops.speculative import codebook_neighbours
from arcore.recipes import recipe_for, text_decoders
from arcore.recipes.language import RECIPE, TextSampling, language_model
from arcore.recipes.text_decoders import TextRequest, decoder_names, near_relaxed, text_decoder
from arcore.zoo.acceleration.hydra.heads import HydraConfig, HydraHeads


def small(vocab: int = 256, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return shaken(
        arcore.create_model("llama_tiny", dim=64, num_layers=2, num_heads=4, hidden_dim=96, vocab_size=vocab),
        seed=seed + 1,
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    model = small()
    facts = {"preset": "llama_tiny", "text_tokenizer": "bytes"}
    save_checkpoint(tmp_path / "lm", {"model": model}, facts)
    save_checkpoint(tmp_path / "other", {"model": small(seed=5)}, facts)
    save_checkpoint(tmp_path / "wide", {"model": small(vocab=300)}, facts)
    heads = HydraHeads(HydraConfig(dim=64, vocab_size=256, num_heads=2)).start_from(model)
    save_checkpoint(
        tmp_path / "heads", {"model": heads}, {"preset": "hydra_tiny", "base": str(tmp_path / "lm")}
    )
    (tmp_path / "text.txt").write_text("and the and the land and the sand " * 20)
    (tmp_path / "judge.py").write_text(
        "def evaluate(text):\n    return 2 * sum(c < 'A' for c in text) / max(len(text), 1) - 1\n"
    )
    return tmp_path


def sampled(folder: Path, **options: Any) -> list[str]:
    from arcore.recipes._sampling import sample

    chosen = TextSampling(**{"prompt": "and the ", "max_new_tokens": 12, "num": 2, "seed": 3, **options})
    return sample(RECIPE, chosen, checkpoint_folder=folder).texts


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_all_exact_decoders_write_the_same_text(run: Path, temperature: float) -> None:
    plain = sampled(run / "lm", temperature=temperature)
    for options in (
        {"decoder": "lookup", "window": 4},
        {"decoder": "suffix"},
        {"decoder": "jacobi", "window": 4},
        {"decoder": "ngram", "corpus": str(run / "text.txt")},
        {"decoder": "hydra", "heads": run / "heads"},
    ):
        assert sampled(run / "lm", temperature=temperature, **options) == plain
    # A drawn chain has the law and not the tokens.
    draft: dict[str, Any] = {"decoder": "draft", "draft": str(run / "other"), "temperature": temperature}
    assert (sampled(run / "lm", **draft) == plain) is (temperature == 0)


def test_ngrams_of_a_corpus_are_read_and_counted_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(text_decoders, "load_text", lambda source: read.append(source) or load_text(source))
    (run / "corpus").mkdir()
    (run / "corpus" / "a.txt").write_text("the sand " * 40)
    options: dict[str, Any] = {"decoder": "ngram", "corpus": str(run / "corpus"), "temperature": 0.0}
    first = sampled(run / "lm", **options)
    assert sampled(run / "lm", **options) == first
    assert len(read) == 1
    (run / "corpus" / "b.txt").write_text("and the " * 40)
    assert sampled(run / "lm", **options) == first
    assert len(read) == 2


def test_guides_multiply_distributions(run: Path) -> None:
    plain = sampled(run / "lm", temperature=0.0)
    assert sampled(run / "lm", guide=(f"{run / 'other'}:0",), temperature=0.0) == plain
    weights = (f"{run / 'other'}:0.5", f"{run / 'lm'}:-0.25")
    found = sampled(run / "lm", guide=weights, temperature=0.0, num=1)
    models = [language_model(str(run / name))[0] for name in ("lm", "other", "lm")]
    ids = generate(
        MixedModel(models, [1.0, 0.5, -0.25]), [list(b"and the ")], max_new_tokens=12, temperature=0.0
    )
    assert found == ["and the " + language_model(str(run / "lm"))[1].decode(ids.rows()[0])]
    assert found != plain[:1]
    # Drafts of the base's heads are verified by the mix.
    assert (
        sampled(run / "lm", guide=weights, temperature=0.0, num=1, decoder="hydra", heads=run / "heads")
        == found
    )
    for guide, complaint in (
        ("lm", "expects MODEL:ALPHA such as out/reward:0.5 but got 'lm'"),
        ("lm:nan", "expects MODEL:ALPHA"),
        (f"{run / 'wide'}:1", "vocabulary of 300 tokens is not that of the model, which has 256"),
    ):
        with pytest.raises(ValueError, match=complaint):
            sampled(run / "lm", guide=(guide,))
    with pytest.raises(FileNotFoundError):
        sampled(run / "lm", guide=(f"{run / 'nothing'}:1",))


def test_lossy_verification_accepts_more_and_its_options_are_checked(run: Path, capsys: Any) -> None:
    asked = ["sample", str(run / "lm"), "--prompt", "and", "--decoder", "suffix", "--max-new-tokens", "24"]

    def rate(*more: str) -> float:
        assert main([*asked, *more]) == 0
        return float(capsys.readouterr().out.rpartition("(")[2].split()[0])

    assert rate("--verify", "typical", "--epsilon", "0.0001", "--delta", "0.0001") >= rate()
    assert rate("--verify", "relaxed", "--delta", "1", "--neighbours", "200") >= rate()
    for options, complaint in (
        ({"verify": "loose", "decoder": "suffix"}, "choose exact, typical or relaxed"),
        ({"epsilon": 0.1, "decoder": "suffix"}, "--epsilon is for --verify typical, not exact"),
        ({"neighbours": 7, "decoder": "suffix", "verify": "typical"}, "--neighbours is for --verify relaxed"),
        ({"verify": "typical"}, "--verify is for --decoder suffix or lookup .* not plain"),
    ):
        with pytest.raises(ValueError, match=complaint):
            TextSampling(prompt="x", **options)


def test_neighbours_that_are_found_when_asked_for_are_those_of_the_whole_table() -> None:
    torch.manual_seed(0)
    vectors, drafts = torch.randn(40, 6), torch.randint(40, (30, 3))
    probs = torch.randn(30, 4, 40).softmax(-1)
    draft, seeds, offsets = Draft(drafts), torch.arange(30), torch.zeros(30, dtype=torch.int64)
    whole = relaxed(codebook_neighbours(vectors, 8), delta=0.4)(probs, draft, seeds, offsets)
    verify = near_relaxed(vectors, 8, 0.4)
    for _ in range(2):
        found = verify(probs, draft, seeds, offsets)
        assert torch.equal(found.tokens, whole.tokens)
    plain = exact()(probs, draft, seeds, offsets)
    assert int(found.accepted.sum()) > int(plain.accepted.sum())


def test_a_search_for_what_an_evaluator_likes(run: Path, capsys: Any) -> None:
    asked = ["sample", str(run / "lm"), "--prompt", "and", "--max-new-tokens", "4", "--decoder", "rain"]
    asked += ["--simulations", "6"]
    assert main([*asked, "--evaluator", str(run / "judge.py")]) == 0
    assert "texts were judged)" in capsys.readouterr().out
    assert main([*asked, "--evaluator", "self"]) == 0
    assert "(value " in capsys.readouterr().out
    for name, content, complaint in (
        ("raises", "def evaluate(text):\n    return 1 / 0", "the evaluator failed on a text"),
        ("nan", "def evaluate(text):\n    return float('nan')", "from -1 to 1 but got nan"),
        ("empty", "x = 1", "expected a function evaluate(text)"),
        ("broken", "def evaluate(", "it does not run (SyntaxError"),
    ):
        (run / f"{name}.py").write_text(content + "\n")
        assert main([*asked, "--evaluator", str(run / f"{name}.py")]) == 2
        said = capsys.readouterr().err
        assert complaint in said
        assert ("what was written so far is" in said) is (name in ("raises", "nan"))
    assert main([*asked, "--evaluator", str(run / "none.py")]) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert main(asked) == 2
    assert "needs something that judges texts" in capsys.readouterr().err


def test_options_of_another_decoder_and_missing_ones_are_refused(run: Path) -> None:
    assert {"plain", "suffix", "ngram", "draft", "jacobi", "hydra", "rain"} <= set(decoder_names())
    with pytest.raises(
        ValueError, match=r"expected --decoder to be one of .plain., .*hydra.* but got .beam."
    ):
        TextSampling(prompt="x", decoder="beam")
    with pytest.raises(ValueError, match="--heads is for --decoder hydra, not plain"):
        TextSampling(prompt="x", heads=run)
    with pytest.raises(ValueError, match=r"--window is for --decoder .* not hydra"):
        TextSampling(prompt="x", decoder="hydra", window=4)
    with pytest.raises(ValueError, match="--window must be at least 2"):
        TextSampling(prompt="x", decoder="jacobi", window=1)
    with pytest.raises(ValueError, match="needs trained heads: --heads FOLDER"):
        sampled(run / "lm", decoder="hydra")
    with pytest.raises(ValueError, match="--nodes 17: expected 1 to 16 drafts"):
        sampled(run / "lm", decoder="hydra", heads=run / "heads", nodes=17)
    with pytest.raises(ValueError, match="expected draft heads but it holds Llama"):
        sampled(run / "lm", decoder="hydra", heads=run / "lm")
    with pytest.raises(ValueError, match="this one has width 64 and 300 tokens; train heads for it"):
        sampled(run / "wide", decoder="hydra", heads=run / "heads")
    with pytest.raises(ValueError, match="needs the model that drafts"):
        sampled(run / "lm", decoder="draft")
    with pytest.raises(ValueError, match="not that of the model"):
        sampled(run / "lm", decoder="draft", draft=str(run / "wide"))
    with pytest.raises(ValueError, match="the model is made for texts of"):
        sampled(run / "lm", decoder="suffix", max_new_tokens=5000)
    with pytest.raises(ValueError, match=r"expected --decoder to be one of .plain."):
        text_decoder("llama")


def test_the_table_of_loops_and_heads(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["suffix window=5", "jacobi window=4", f"hydra heads={run / 'heads'}"]
    options = [word for row in rows for word in ("--row", row)]
    threads = torch.get_num_threads()
    try:
        asked = ["bench", "decoding", str(run / "lm"), "--tokens", "6", "--law", "400"]
        assert main([*asked, *options, "--batch", "8"]) == 0
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    table = lines[2:-1]
    assert [line[:34].strip() for line in table] == ["plain", *(row[:34].strip() for row in rows)]
    assert all(line.endswith("20 of 20 the same") for line in table)
    assert min(float(line.split()[-6]) for line in table) > 1e-4
    assert (
        main(["sample", str(run / "heads"), "--prompt", "and", "--temperature", "0", "--max-new-tokens", "5"])
        == 0
    )
    assert "tokens per call of the model" in capsys.readouterr().out


def test_several_batches_and_a_file_of_the_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["bench", "decoding", str(run / "lm"), "--tokens", "5", "--count", "3", "--batch", "1", "2"]
    threads = torch.get_num_threads()
    try:
        rows = ["--row", f"medusa heads={run / 'heads'} nodes=2", "--row", f"draft draft={run / 'other'}"]
        assert main([*asked, *rows, "--json", str(run / "table.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().out.count("3 of 3 the same") == 6
    table = json.loads((run / "table.json").read_text())
    assert [(row["batch"], row["loop"].split()[0]) for row in table["rows"]] == [
        (batch, loop) for batch in (1, 2) for loop in ("plain", "medusa", "draft")
    ]
    assert all(row["calls_per_token"] <= 1 for row in table["rows"])


def test_texts_of_another_law_are_found_out(run: Path) -> None:
    model, words = language_model(str(run / "lm"))
    chosen = TextSampling(prompt="x")

    def request(ids: list[list[int]], settings: Any, seed: int) -> TextRequest:
        return TextRequest(
            model, model, words, ids, [seed + i for i in range(len(ids))], settings, language_model
        )

    def colder(asked: TextRequest) -> Any:
        return text_decoder("plain").write(replace(asked, options=replace(asked.options, temperature=0.2)))

    prompt = words.encode("and the")
    assert _law(model, prompt, chosen, text_decoder("plain").write, request, 400) > 1e-4
    assert _law(model, prompt, chosen, colder, request, 400) < 1e-6


def test_what_the_table_refuses(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["bench", "decoding", str(run / "lm"), "--tokens", "2"]
    (run / "empty.txt").write_text("\n \n")
    for more, complaint in (
        (
            ["--row", "suffix windows=5"],
            "expected NAME=VALUE with an option of `arcore sample` but got 'windows=5'",
        ),
        (["--row", "suffix window=many"], "expected a number for window but got 'many'"),
        (["--row", "beam"], "expected --decoder to be one of 'plain'"),
        (["--batch", "0"], "--batch of at least 1"),
        (["--prompts", str(run / "empty.txt")], "the file has no line of text"),
    ):
        assert main([*asked, *more]) == 2
        assert complaint in capsys.readouterr().err


def test_what_is_no_language_model_is_refused(run: Path) -> None:
    with pytest.raises(ValueError, match="holds no language model"):
        language_model(str(run / "heads"))
    with pytest.raises(FileNotFoundError):
        language_model(str(run / "nothing"))


def test_text_in_bfloat16_by_all_decoders(run: Path) -> None:
    from arcore.recipes._sampling import sample

    drawn = {}
    for decoder, more in (("plain", {}), ("suffix", {}), ("hydra", {"heads": run / "heads"})):
        options = TextSampling(prompt="and the ", max_new_tokens=12, temperature=0.0, decoder=decoder, **more)
        drawn[decoder] = sample(RECIPE, options, checkpoint_folder=run / "lm", precision="bfloat16").texts
    # Rounding may turn a near tie between one token at a time and several.
    assert len(drawn["plain"][0]) == len(drawn["suffix"][0]) == len(drawn["hydra"][0]) > 8
    model, _ = language_model(str(run / "lm"))
    half = generate(model.to(torch.bfloat16), [list(b"and the ")], max_new_tokens=12, temperature=0.0)
    assert drawn["plain"] == ["and the " + language_model(str(run / "lm"))[1].decode(half.rows()[0])]


def test_text_from_weights_in_blocks(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from arcore.recipes._sampling import sample

    drawn = {}
    for decoder, more in (("plain", {}), ("suffix", {}), ("hydra", {"heads": run / "heads"})):
        options = TextSampling(prompt="and the ", max_new_tokens=12, temperature=0.0, decoder=decoder, **more)
        drawn[decoder] = sample(RECIPE, options, checkpoint_folder=run / "lm", precision="q8_0").texts
    assert drawn["plain"] == drawn["suffix"] == drawn["hydra"]
    model, words = language_model(str(run / "lm"))
    blocks = quantise(model, "q8_0")
    text = generate(blocks, [list(b"and the ")], max_new_tokens=12, temperature=0.0).rows()[0]
    assert drawn["plain"] == ["and the " + words.decode(text)]
    asked = ["sample", str(run / "lm"), "--prompt", "and", "--max-new-tokens", "3", "--precision"]
    assert main([*asked, "q4_1"]) == 0
    capsys.readouterr()
    assert main([*asked, "stored"]) == 2
    assert "checkpoints store floats" in capsys.readouterr().err
    with pytest.raises(ValueError, match="stores floats; blocks as they are stored come with smollm2"):
        language_model(str(run / "lm"), stored=True)
    with pytest.raises(ValueError, match="only models of text"):
        sample(recipe_for("var_tiny"), None, checkpoint_folder=run, precision="q8_0")
    with pytest.raises(ValueError, match=r"model\.safetensors is no GGUF file"):
        file = run / "model.safetensors"
        sample(RECIPE, options, preset="llama_tiny", weights=file, precision="stored")
    threads = torch.get_num_threads()
    try:
        table = ["bench", "decoding", str(run / "lm"), "--tokens", "3", "--count", "2", "--precision", "q4_0"]
        assert main([*table, "--row", "suffix window=3"]) == 0
        assert "q4_0" in capsys.readouterr().out
    finally:
        torch.set_num_threads(threads)
