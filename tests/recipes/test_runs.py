"""Training presets of the zoo: what a run leaves behind, and that it goes on as if it had never stopped."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arcore.data import load_digits
from arcore.models import load_checkpoint
from arcore.recipes.next_scale import NextScaleTask
from arcore.training import checkpoint, train

SETTINGS = {"steps": 6, "batch_size": 8, "checkpoint_every": 3, "accelerator": "cpu"}


def run(preset, out, **options):
    return train(preset, out=out, show_progress=False, **{"settings": SETTINGS, **options})


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return run("msvq_tiny", tmp_path_factory.mktemp("tokenizer") / "run").checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer) -> Path:
    return run("var_tiny", tmp_path_factory.mktemp("model") / "run", tokenizer=tokenizer).checkpoint


def test_tokenizer_run_leaves_a_checkpoint_that_the_zoo_reads(tokenizer):
    networks, meta = load_checkpoint(tokenizer)
    assert list(networks) == ["tokenizer"]
    assert meta["preset"] == "msvq_tiny"
    assert meta["step"] == 6
    assert meta["class_names"] == list("0123456789")
    assert meta["training"]["batch_size"] == 8


def test_model_run_holds_model_and_tokenizer(model, tokenizer):
    networks, _ = load_checkpoint(model)
    assert sorted(networks) == ["model", "tokenizer"]
    assert networks["model"].config.num_classes == 10
    assert same(weights(model, "tokenizer"), weights(tokenizer, "tokenizer")), "the tokenizer stays frozen"
    with open(model.parent / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["split"]) for row in rows] == [("3", "test"), ("6", "train"), ("6", "test")]


@pytest.mark.parametrize("preset", ["msvq_tiny", "var_tiny"])
def test_resume_is_exact(preset, tmp_path, tokenizer, model, monkeypatch):
    """Class dropout, dead code restarts and running averages included."""
    expected = model if preset == "var_tiny" else tokenizer
    options = {"tokenizer": tokenizer} if preset == "var_tiny" else {}
    from arcore.training.task import Task

    original = Task.training_step

    def failing(self, batch, batch_idx):
        if self.step == 4:
            raise RuntimeError("power cut")
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Task, "training_step", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            run(preset, tmp_path, **options)
    assert checkpoint.find(tmp_path).name == "step-00000003"
    resumed = run(preset, tmp_path, resume=tmp_path, settings={})
    assert resumed.checkpoint.name == "step-00000006"
    for name in checkpoint.read_meta(expected)["modules"]:
        assert same(weights(resumed.checkpoint, name), weights(expected, name))
    states = [
        checkpoint.read_optimizer(path)["optimizer_states"][0]["state"]
        for path in (expected, resumed.checkpoint)
    ]
    assert all(same(states[0][key], states[1][key]) for key in states[0])


def test_a_run_trains_the_tokenizer_that_fits_first(tmp_path, monkeypatch):
    monkeypatch.setattr("arcore.recipes.tokenizer.Tokenizer.defaults", _tiny_config())
    options = {"settings": {"steps": 2, "seed": 5, "batch_size": 4, "accelerator": "cpu"}}
    result = run("var_tiny", tmp_path, **options)
    first = checkpoint.find(tmp_path / "tokenizer")
    assert checkpoint.read_meta(first)["training"]["seed"] == 5
    assert same(weights(result.checkpoint, "tokenizer"), weights(first, "tokenizer"))

    shutil.rmtree(result.checkpoint)
    again = run("var_tiny", tmp_path, resume=tmp_path, settings={})
    assert again.checkpoint.name == "step-00000002"


def _tiny_config():
    from arcore.training import TrainConfig

    return TrainConfig(steps=2, batch_size=4, accelerator="cpu", checkpoint_every=0)


def test_accumulated_batches_equal_a_large_one(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("arcore.recipes._recipe.create_model", _without_class_dropout)
    results = [
        run(
            "var_tiny",
            tmp_path / str(accumulate),
            tokenizer=tokenizer,
            settings=SETTINGS | {"batch_size": 8 // accumulate, "accumulate": accumulate},
        )
        for accumulate in (1, 4)
    ]
    left, right = (weights(result.checkpoint, "model") for result in results)
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=0, atol=1e-4)


def _without_class_dropout(preset, **overrides):
    from arcore.models import create_model

    return create_model(preset, class_drop=0.0, **overrides)


def test_bf16_follows_fp32(tmp_path, tokenizer, model):
    result = run("var_tiny", tmp_path, tokenizer=tokenizer, settings=SETTINGS | {"precision": "bf16-mixed"})
    fp32 = weights(model, "model")
    for key, value in weights(result.checkpoint, "model").items():
        assert value.dtype == torch.float32
        assert (value - fp32[key]).abs().max() < 0.02


def test_tokenizer_codes_do_not_depend_on_precision(tokenizer, model):
    networks, _ = load_checkpoint(model)
    from arcore.training import TrainConfig

    task = NextScaleTask(TrainConfig(), networks, {})
    seen = []
    task.model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].clone()))
    images, labels = load_digits("test").images[:8], load_digits("test").labels[:8]
    task.eval()
    task.loss(images, labels)
    with torch.autocast("cpu", torch.bfloat16):
        task.loss(images, labels)
    assert torch.equal(*seen)


def test_frozen_tokenizer_stays_in_eval_mode(model):
    from arcore.training import TrainConfig

    networks, _ = load_checkpoint(model)
    task = NextScaleTask(TrainConfig(), networks, {}).train()
    assert task.model.training
    assert not task.tokenizer.training
    assert not any(parameter.requires_grad for parameter in task.tokenizer.parameters())


def test_folder_of_images(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    for name, shade in (("dark", 30), ("light", 220)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(12):
            image_module.new("RGB", (12, 10), (shade, shade, number)).save(
                tmp_path / "data" / name / f"{number}.png"
            )
    result = run("msvq_tiny", tmp_path / "run", data=str(tmp_path / "data"))
    assert checkpoint.read_meta(result.checkpoint)["class_names"] == ["dark", "light"]
    shutil.rmtree(tmp_path / "data" / "dark")
    with pytest.raises(ValueError, match="no longer those of the run"):
        run("msvq_tiny", tmp_path / "run", resume=tmp_path / "run", settings={"steps": 8})


class TestRefusals:
    def test_unknown_preset(self, tmp_path):
        with pytest.raises(ValueError, match="var_tiny"):
            run("var_tinny", tmp_path)

    def test_folder_with_a_run(self, tokenizer):
        with pytest.raises(ValueError, match="already holds a run: continue it with --resume"):
            run("msvq_tiny", tokenizer.parent)

    def test_changed_settings_on_resume(self, tokenizer):
        with pytest.raises(
            ValueError, match=r"was started with lr=0\.003, which cannot become 0\.1 on resume"
        ):
            run("msvq_tiny", tokenizer.parent, resume=tokenizer, settings={"lr": 0.1})

    def test_other_preset_on_resume(self, tokenizer, tmp_path):
        with pytest.raises(ValueError, match="trains msvq_tiny, not var_tiny"):
            run("var_tiny", tmp_path, resume=tokenizer)

    def test_other_data_on_resume(self, tokenizer, tmp_path):
        with pytest.raises(ValueError, match="classes in 'photos' are no longer those of the run"):
            run("msvq_tiny", tmp_path, resume=tokenizer, data="photos")

    def test_nothing_to_resume(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            run("msvq_tiny", tmp_path, resume=tmp_path / "gone")

    def test_weights_without_optimizer(self, tokenizer, tmp_path):
        copy = tmp_path / "weights"
        shutil.copytree(tokenizer, copy)
        (copy / "optimizer.pt").unlink()
        with pytest.raises(ValueError, match=r"weights only, without optimizer\.pt"):
            run("msvq_tiny", tmp_path, resume=copy, settings={"steps": 8})

    def test_tokenizer_that_does_not_fit(self, model, tmp_path):
        with pytest.raises(ValueError, match="vocab_size=4096"):
            run("var_d16", tmp_path, tokenizer=model)

    def test_a_system_without_a_recipe(self, monkeypatch):
        from arcore.recipes import _recipe

        monkeypatch.setattr(_recipe, "recipe_module", lambda entry: "arcore.recipes.no_such_protocol")
        with pytest.raises(
            ValueError, match=r"neither trained nor sampled here: arcore\.recipes\.no_such_protocol"
        ):
            _recipe.recipe_for("var_tiny")

    def test_precision_that_nobody_knows(self, tmp_path):
        with pytest.raises(ValueError, match="nonsense"):
            run("msvq_tiny", tmp_path, settings=SETTINGS | {"precision": "nonsense"})

    @pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
    def test_gpu_that_is_not_there(self, tmp_path):
        with pytest.raises(ValueError, match="the training engine refuses"):
            run("msvq_tiny", tmp_path, settings=SETTINGS | {"accelerator": "gpu"})
