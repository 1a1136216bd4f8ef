"""Training language models on a text."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arcore.data import ByteTokenizer, load_text
from arcore.models import create_model, load_checkpoint
from arcore.recipes import recipe_for
from arcore.recipes._sampling import sample
from arcore.recipes.language import LanguageTask, TextSampling, tokenizer_of
from arcore.training import TrainConfig, checkpoint, train
from arcore.training.stream import RandomStream

SETTINGS = {
    "steps": 6,
    "batch_size": 4,
    "checkpoint_every": 3,
    "accelerator": "cpu",
}


def run(out, **options):
    if "resume" not in options:
        options = {"context": 32, **options}
    return train("mamba_tiny", out=out, show_progress=False, **{"settings": SETTINGS, **options})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """Real English: the licence of Python's own standard library."""
    import pydoc_data.topics

    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n".join(pydoc_data.topics.topics.values())[:60000], encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text) -> Path:
    return run(tmp_path_factory.mktemp("run"), data=text).checkpoint


def test_a_run_leaves_model_figures_and_a_sample(trained, text):
    networks, meta = load_checkpoint(trained)
    assert list(networks) == ["model"]
    assert meta["text_tokenizer"] == "bytes"
    assert meta["data"] == text
    rows = (trained.parent / "metrics.csv").read_text().splitlines()
    assert rows[0] == "step,split,loss,bits_per_byte,lr,grad_norm,samples_per_second"
    assert [row.split(",")[:2] for row in rows[1:]] == [["3", "test"], ["6", "train"], ["6", "test"]]
    _, _, loss, bits, *_ = rows[-1].split(",")
    assert float(bits) == pytest.approx(float(loss) / math.log(2), rel=1e-5)
    sample = (trained.parent / "sample.txt").read_text(encoding="utf-8")
    assert sample.startswith(f"step 6\n\n{load_text(text).test[:32]}")


def test_held_out_figure_is_that_of_the_whole_part(trained, text):
    model = load_checkpoint(trained)[0]["model"].eval()
    tokens = ByteTokenizer().tensor(load_text(text).test).long()
    pieces = (len(tokens) - 1) // 32
    ids, labels = tokens[: pieces * 32].view(-1, 32), tokens[1 : pieces * 32 + 1].view(-1, 32)
    with torch.no_grad():
        nll = -model(ids).log_softmax(-1).gather(2, labels.unsqueeze(2)).double().mean()
    logged = (trained.parent / "metrics.csv").read_text().splitlines()[-1].split(",")
    assert float(logged[2]) == pytest.approx(float(nll), rel=1e-5)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_resume_is_exact(tokenizer, tmp_path, text, monkeypatch):
    if tokenizer != "bytes":
        pytest.importorskip("tokenizers")
    expected = run(tmp_path / "whole", data=text, tokenizer=tokenizer).checkpoint
    original = LanguageTask.training_step

    def failing(self, batch, batch_idx):
        if self.step == 4:
            raise RuntimeError("power cut")
        return original(self, batch, batch_idx)

    broken = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr(LanguageTask, "training_step", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            run(broken, data=text, tokenizer=tokenizer)
    assert checkpoint.find(broken).name == "step-00000003"
    resumed = run(broken, resume=broken, settings={}).checkpoint
    assert resumed.name == "step-00000006"
    assert same(weights(resumed), weights(expected))
    states = [checkpoint.read_optimizer(path)["optimizer_states"][0]["state"] for path in (expected, resumed)]
    assert all(same(states[0][key], states[1][key]) for key in states[0])
    names = [sorted(path.name for path in folder.iterdir()) for folder in (expected, resumed)]
    assert names[0] == names[1]
    assert ("tokenizer.json" in names[0]) == (tokenizer != "bytes")
    meta = checkpoint.read_meta(resumed)
    assert tokenizer_of(resumed, meta).vocab_size == load_checkpoint(resumed)[0]["model"].vocab_size
    assert (expected.parent / "sample.txt").read_text() == (resumed.parent / "sample.txt").read_text()
    one, two = ((path.parent / "metrics.csv").read_text().splitlines() for path in (expected, resumed))
    assert [row.rpartition(",")[0] for row in one] == [row.rpartition(",")[0] for row in two]


def test_accumulated_batches_equal_a_large_one(tmp_path, text):
    one = run(tmp_path / "one", data=text, settings=SETTINGS | {"steps": 2})
    parts = SETTINGS | {"steps": 2, "batch_size": 2, "accumulate": 2}
    two = run(tmp_path / "two", data=text, settings=parts)
    left, right = weights(one.checkpoint), weights(two.checkpoint)
    # AdamW's first steps have the size of the learning rate whatever the gradient; rounding may turn a few of them.
    far = sum(int(((left[key] - right[key]).abs() > 1e-5).sum()) for key in left)
    assert far < 0.01 * sum(value.numel() for value in left.values())


def test_bf16_follows_fp32(tmp_path, text, trained):
    half = run(tmp_path, data=text, settings=SETTINGS | {"precision": "bf16-mixed"})
    full = (trained.parent / "metrics.csv").read_text().splitlines()[-1].split(",")
    assert half.history[-1]["loss"] == pytest.approx(float(full[2]), rel=0.02)
    assert all(value.dtype == torch.float32 for value in weights(half.checkpoint).values())


def test_loss_is_cross_entropy_in_bits_of_bytes():
    model = create_model("mamba_tiny", n_layer=1)
    task = LanguageTask(TrainConfig(), {"model": model}, {}, None, (2.0, 4.0))
    tokens = torch.randint(256, (3, 9), generator=torch.Generator().manual_seed(0))
    for mode, ratio in ((True, 2.0), (False, 4.0)):
        task.train(mode)
        loss, figures = task.loss(tokens[:, :-1], tokens[:, 1:])
        scores = model(tokens[:, :-1]).log_softmax(-1)
        expected = -scores.gather(2, tokens[:, 1:].unsqueeze(2)).mean()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(figures["bits_per_byte"], expected.detach() / math.log(2) / ratio)


def test_places_depend_on_seed_and_position_only():
    def batches(start, stop, size=4, seed=0, **options):
        return list(RandomStream(1000, size, start=start, stop=stop, seed=seed, **options))

    whole = batches(0, 50)
    assert batches(20, 50) == whole[20:]
    assert batches(0, 25, size=8) == [whole[i] + whole[i + 1] for i in range(0, 50, 2)]
    assert [batches(0, 2, rank=r, world_size=2) for r in (0, 1)] == [whole[0:4:2], whole[1:4:2]]
    assert batches(0, 50, seed=1) != whole
    places = [place for batch in batches(0, 1000) for place in batch]
    assert 0 <= min(places) < 10
    assert 990 < max(places) < 1000
    assert sum(places) / len(places) == pytest.approx(500, rel=0.05)


def test_what_is_refused(tmp_path, text, trained):
    with pytest.raises(ValueError, match="is too short for pieces of 100000"):
        run(tmp_path / "a", data=text, context=100000)
    with pytest.raises(ValueError, match="the options of mamba_tiny have no 'pretrained'"):
        run(tmp_path / "b", data=text, pretrained=trained)
    with pytest.raises(ValueError, match="was started with tokenizer=bytes, which cannot become bpe"):
        run(tmp_path / "c", resume=trained, tokenizer="bpe")
    with pytest.raises(ValueError, match="is no longer that of the run"):
        run(tmp_path / "d", resume=trained, data="kjv", settings={})
    with pytest.raises(ValueError, match="was started with context=32, which cannot become 64"):
        run(tmp_path / "e", resume=trained, settings={}, context=64)


def test_weights_that_are_not_published_ones(tmp_path, trained, text):
    options = TextSampling(prompt="a", max_new_tokens=1)
    recipe = recipe_for("mamba_tiny")
    with pytest.raises(ValueError, match=f"belongs to a run, .*: use `arcore sample {trained}`"):
        sample(recipe, options, preset="mamba_tiny", weights=trained / "model.safetensors")
    damaged = tmp_path / "cut.safetensors"
    damaged.write_bytes((trained / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(
        ValueError, match=r"cut\.safetensors are damaged or truncated: .*; fetch them, or save them"
    ):
        sample(recipe, options, preset="mamba_tiny", weights=damaged)
    with pytest.raises(ValueError, match=r"--prompt is no UTF-8 text: .* \(or with PYTHONUTF8=1\)"):
        sample(
            recipe, TextSampling(prompt=b"\xff".decode(errors="surrogateescape")), checkpoint_folder=trained
        )
    damaged.write_bytes((trained / "model.safetensors").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer.json: put the tokenizer"):
        sample(recipe, options, preset="mamba_tiny", weights=damaged)


def test_a_changed_text_is_noticed(tmp_path, text):
    path = tmp_path / "mine.txt"
    path.write_text(Path(text).read_text(encoding="utf-8"), encoding="utf-8")
    run(tmp_path / "run", data=str(path))
    path.write_text("x" + path.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(ValueError, match="is no longer that of the run"):
        run(tmp_path / "run", resume=tmp_path / "run", settings={"steps": 8})
