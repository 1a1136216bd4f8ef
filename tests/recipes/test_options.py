"""What people look for: images of their own size, other starts, changed settings, augmentation, held-out folders."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from arcore.catalog import create_model, find, load_checkpoint
from arcore.data import load_digits
from arcore.training import TrainConfig, checkpoint, fit, train
from arcore.training.augment import Augmented

Image = pytest.importorskip("PIL.Image")

SETTINGS = {"steps": 2, "batch_size": 4, "checkpoint_every": 0, "accelerator": "cpu"}


def photos(
    root: Path, size: tuple[int, int], mode: str = "RGB", count: int = 12, classes=("cat", "dog")
) -> str:
    generator = torch.Generator().manual_seed(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(count):
            values = torch.randint(
                256, (size[1] * size[0] * len(mode.replace("L", "x")),), generator=generator
            )
            Image.frombytes(mode, size, bytes(values.tolist())).save(root / name / f"{number:02}.png")
    return str(root)


def run(preset, out, **options):
    return train(preset, out=out, show_progress=False, **{"settings": SETTINGS, **options})


def test_images_of_an_own_size_in_colour(tmp_path, capsys):
    data = photos(tmp_path / "my photos", (32, 32))
    out = train("var_tiny", out=tmp_path / "run", data=data, tokenizer_steps=1, settings=SETTINGS)
    networks, meta = load_checkpoint(out.checkpoint)
    assert networks["tokenizer"].config.image_size == 32
    assert networks["tokenizer"].config.in_channels == 3
    assert (
        networks["tokenizer"].config.patch_nums
        == networks["model"].config.patch_nums
        == (1, 2, 3, 4, 5, 6, 8)
    )
    assert networks["model"].config.num_classes == 2
    assert meta["class_names"] == ["cat", "dog"]
    err = capsys.readouterr().err
    assert f"{data}: colour images of 32 x 32 pixels; msvq_tiny is built for 32 x 32 pixels, colour" in err
    assert "the tokenizer msvq_tiny first, 1 steps" in err
    # A tokenizer of that size fits.
    again = run("var_tiny", tmp_path / "again", data=data, tokenizer=tmp_path / "run" / "tokenizer")
    assert load_checkpoint(again.checkpoint)[0]["model"].config.patch_nums[-1] == 8


@pytest.mark.parametrize(
    ("size", "mode", "options", "expected"),
    [
        ((16, 16), "RGB", {}, (16, 3)),
        ((20, 14), "RGB", {}, (8, 3)),
        ((16, 16), "L", {}, (16, 1)),
        ((400, 400), "L", {}, (8, 1)),
        ((16, 16), "RGB", {"image_size": 24, "channels": 1}, (24, 1)),
    ],
)
def test_what_is_inferred_and_what_is_said(tmp_path, size, mode, options, expected):
    data = photos(tmp_path / "data", size, mode, count=3)
    out = run("dit_tiny", tmp_path / "run", data=data, **options)
    config = load_checkpoint(out.checkpoint)[0]["model"].config
    assert (config.image_size, config.in_channels) == expected


@pytest.mark.parametrize(
    ("size", "expected"), [(8, (8, 4)), (28, (28, 7)), (32, (32, 8)), (33, (32, 8)), (64, (64, 8))]
)
def test_tokenizers_of_other_sizes(size, expected):
    from arcore.catalog import get_config

    config = get_config("msvq_tiny")
    other = get_config("msvq_tiny", **config.for_images(size, 3))
    assert (other.image_size, other.patch_nums[-1]) == expected
    model = create_model("msvq_tiny", **config.for_images(size, 3)).eval()
    with torch.no_grad():
        out = model(torch.zeros(1, 3, expected[0], expected[0]))
    assert out.reconstruction.shape[-1] == expected[0]


def test_a_size_that_does_not_suit_the_network_is_scaled(tmp_path, capsys):
    data = photos(tmp_path / "data", (20, 20), "L", count=3)
    out = train("roma_tiny", out=tmp_path / "run", data=data, settings=SETTINGS)
    assert load_checkpoint(out.checkpoint)[0]["model"].config.image_size == 48
    assert (
        "grey images of 20 x 20 pixels; roma_tiny is built for 48 x 48 pixels, grey"
        in capsys.readouterr().err
    )
    with pytest.raises(ValueError, match="image_size"):
        run("roma_tiny", tmp_path / "b", data=data, image_size=20)


def test_published_sizes_of_the_tokenizer_stay_what_they_are():
    from arcore.catalog import get_config

    config = get_config("msvq_ch160")
    same = get_config("msvq_ch160", **config.for_images(256, 3))
    assert same == config


def test_a_held_out_folder(tmp_path):
    data = photos(tmp_path / "data", (8, 8), "L", count=12)
    other = photos(tmp_path / "other", (8, 8), "L", count=5)
    out = run("dit_tiny", tmp_path / "run", data=data, held_out=other)
    meta = checkpoint.read_meta(out.checkpoint)
    assert meta["items"] == 24 + 10
    assert [row["split"] for row in out.history] == ["train", "test"]
    wrong = photos(tmp_path / "wrong", (8, 8), "L", classes=("cat", "cow"))
    with pytest.raises(ValueError, match=r"are of the classes cat, cow but those in .* of cat, dog"):
        run("dit_tiny", tmp_path / "b", data=data, held_out=wrong)


def test_epochs(tmp_path):
    settings = {key: value for key, value in SETTINGS.items() if key != "steps"}
    data = photos(tmp_path / "data", (8, 8), "L", count=10)
    out = run("dit_tiny", tmp_path / "run", data=data, settings=settings | {"epochs": 1.5, "accumulate": 2})
    assert out.checkpoint.name == f"step-{-(-18 * 3 // 16):08}", "18 images to train on, 8 in a step"
    with pytest.raises(ValueError, match="as steps or as epochs, not as both"):
        run("dit_tiny", tmp_path / "b", settings=SETTINGS | {"epochs": 2})


def test_other_weights_to_start_from(tmp_path):
    first = run("dit_tiny", tmp_path / "first")
    second = run(
        "dit_tiny", tmp_path / "second", init_from=tmp_path / "first", settings=SETTINGS | {"lr": 1e-12}
    )
    one, two = (load_checkpoint(out.checkpoint)[0]["model"].state_dict() for out in (first, second))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="init_from is for a new run"):
        run("dit_tiny", tmp_path / "second", resume=tmp_path / "second", init_from=tmp_path / "first")
    with pytest.raises(ValueError, match="were made with depth=4 but the model has depth=2"):
        run("dit_tiny", tmp_path / "third", init_from=tmp_path / "first", model_settings={"depth": 2})


def test_a_run_without_a_checkpoint_goes_on_with_its_settings(tmp_path, monkeypatch):
    """Interrupted before its first checkpoint: --resume alone brings settings and options back."""
    from arcore.training.task import Task

    settings = SETTINGS | {"lr": 7e-4, "steps": 4}
    options = {"block_size": 16, "settings": settings, "model_settings": {"depth": 2}}
    expected = run("acdit_tiny", tmp_path / "whole", **options).checkpoint
    original = Task.training_step

    def failing(self, batch, batch_idx):
        if self.step == 1:
            raise RuntimeError("power cut")
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Task, "training_step", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            run("acdit_tiny", tmp_path / "cut", **options)
    assert checkpoint.newest(tmp_path / "cut") is None
    resumed = run("acdit_tiny", tmp_path / "cut", resume=tmp_path / "cut", settings={}).checkpoint
    one, two = (checkpoint.read_weights(folder, "model") for folder in (expected, resumed))
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    meta = checkpoint.read_meta(resumed)
    assert meta["training"]["lr"] == 7e-4
    assert meta["modules"]["model"]["config"]["depth"] == 2


def test_unknown_names_get_a_suggestion(tmp_path):
    with pytest.raises(ValueError, match=r"the settings of a run have no 'stepss'; did you mean steps"):
        run("dit_tiny", tmp_path, settings={"stepss": 3})
    with pytest.raises(
        ValueError, match=r"the options of dit_tiny have no 'heldout'; did you mean held_out\?"
    ):
        run("dit_tiny", tmp_path, heldout="x")


def test_mirrored_and_shifted_images():
    digits = load_digits("train")
    plain = digits[5][0]
    flips = Augmented(digits, flip=True, crop=0, seed=0)
    seen = [flips[5, place][0] for place in range(40)]
    mirrored = sum(torch.equal(image, plain.flip(-1)) for image in seen)
    assert 8 < mirrored < 32
    assert all(torch.equal(image, plain) or torch.equal(image, plain.flip(-1)) for image in seen)
    shifts = Augmented(digits, flip=False, crop=2, seed=0)
    seen = [shifts[5, place][0] for place in range(60)]
    assert all(image.shape == plain.shape for image in seen)
    assert any(torch.equal(image[:, :, :-1], plain[:, :, 1:]) for image in seen), "one to the left"
    assert len({image.numpy().tobytes() for image in seen}) > 15
    again = Augmented(digits, flip=False, crop=2, seed=0)
    assert all(torch.equal(again[5, place][0], image) for place, image in enumerate(seen))
    with pytest.raises(ValueError, match="crop must be below the image's 8 pixels but got 8"):
        Augmented(digits, flip=False, crop=8, seed=0)


def test_an_augmented_run_is_resumed_bit_for_bit(tmp_path):
    options = {"flip": True, "crop": 1}
    settings = SETTINGS | {"steps": 4, "checkpoint_every": 2, "schedule": "constant"}
    whole = run("dit_tiny", tmp_path / "whole", **options, settings=settings).checkpoint
    run("dit_tiny", tmp_path / "parts", **options, settings=settings | {"steps": 2})
    parts = run("dit_tiny", tmp_path / "parts", resume=tmp_path / "parts", settings={"steps": 4}).checkpoint
    one, two = (checkpoint.read_weights(folder, "model") for folder in (whole, parts))
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    plain = run("dit_tiny", tmp_path / "plain", settings=settings).checkpoint
    assert not torch.equal(
        one["head.linear.weight"], checkpoint.read_weights(plain, "model")["head.linear.weight"]
    )


def test_the_same_data_elsewhere_are_taken_and_others_are_not(tmp_path, monkeypatch):
    import shutil

    data = photos(tmp_path / "data", (8, 8), "L", count=12)
    monkeypatch.chdir(tmp_path)
    run("dit_tiny", tmp_path / "run", data="data")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    more = {"resume": tmp_path / "run"}
    run("dit_tiny", tmp_path / "run", **more, settings={"steps": 3})
    shutil.move(data, tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="data"):
        run("dit_tiny", tmp_path / "run", **more, settings={"steps": 4})
    run("dit_tiny", tmp_path / "run", **more, settings={"steps": 4}, data="../moved")
    (tmp_path / "moved" / "cat" / "00.png").rename(tmp_path / "moved" / "cat" / "99.png")
    with pytest.raises(ValueError, match="is not the same: what was trained on could become held out"):
        run("dit_tiny", tmp_path / "run", **more, settings={"steps": 5}, data="../moved")


def test_a_folder_called_like_a_built_in_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    with pytest.warns(UserWarning, match="'digits' is the data set of that name"):
        run("dit_tiny", tmp_path / "run", data="digits")
    assert checkpoint.read_meta(checkpoint.find(tmp_path / "run"))["data"] == "digits"
    with pytest.warns(UserWarning, match="'digits' is the data set of that name"):
        run("dit_tiny", tmp_path / "run", resume=tmp_path / "run", settings={"steps": 3})


def test_the_command_in_the_record_can_be_pasted(tmp_path, monkeypatch):
    import sys

    from arcore.training.run_folder import read_record

    words = ["/somewhere/bin/arcore", "train", "dit_tiny", "--out", "a folder/run", "--lr", "1e-3"]
    monkeypatch.setattr(sys, "argv", words)
    run("dit_tiny", tmp_path / "run")
    record = read_record(tmp_path / "run")
    assert record["command"] == "arcore train dit_tiny --out 'a folder/run' --lr 1e-3"
    assert shlex.split(record["command"]) == ["arcore", *words[1:]]


def test_fit_of_a_task_takes_epochs(tmp_path, monkeypatch):
    from arcore.recipes.diffusion import DiffusionTask

    config = TrainConfig(epochs=0.01, batch_size=4, accelerator="cpu")
    task = DiffusionTask(config, {"model": create_model("dit_tiny")}, {})
    result = fit(task, load_digits("train"), tmp_path, show_progress=False)
    assert result.steps == 4


def test_imagenets_scale_of_values(tmp_path):
    from arcore.recipes import recipe_for
    from arcore.training.augment import denormalized, normalized

    images = torch.rand(2, 3, 4, 4) * 2 - 1
    expected = (images * 0.5 + 0.5 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    torch.testing.assert_close(normalized(images), expected)
    torch.testing.assert_close(denormalized(expected), images)
    options = {"data": "photos", "channels": 3, "normalize": "imagenet"}
    out = run("roma_tiny", tmp_path / "run", **options)
    assert recipe_for("roma_tiny").finish(out.checkpoint, tmp_path / "run")
    assert (tmp_path / "run" / "predictions.png").is_file()
    with pytest.raises(ValueError, match="are those of colour images, and these have 1 channel"):
        run("roma_tiny", tmp_path / "grey", normalize="imagenet")


def test_a_recipe_of_a_systems_own(monkeypatch):
    import sys
    from types import ModuleType, SimpleNamespace

    from arcore.recipes import _recipe
    from arcore.recipes.next_cluster import NextCluster

    home: Any = ModuleType("a_system_of_somebody")
    home.RECIPE = NextCluster()
    monkeypatch.setitem(sys.modules, home.__name__, home)

    def found(recipe):
        entry = find("roma").entry
        system = dataclasses.replace(entry.system, name="mine", recipe=recipe)
        place = dataclasses.replace(entry.place, module=home.__name__)
        return lambda name: SimpleNamespace(entry=dataclasses.replace(entry, system=system, place=place))

    monkeypatch.setattr(_recipe, "find", found("own"))
    assert _recipe.recipe_for("mine") is home.RECIPE
    monkeypatch.setattr(_recipe, "find", found(None))
    with pytest.raises(ValueError, match="it has no recipe"):
        _recipe.recipe_for("mine")
