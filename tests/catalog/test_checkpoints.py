"""Checkpoints and weight files: all or nothing, and one clear sentence about a bad one."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

import arcore
from arcore.models import build, describe, load_checkpoint, load_weights, save_checkpoint

safetensors = pytest.importorskip("safetensors.torch")


def small(**overrides):
    return arcore.create_model("var_tiny", depth=1, embed_dim=16, num_heads=1, **overrides)


@pytest.fixture
def model():
    return small()


@pytest.fixture(params=["pth", "safetensors"])
def file(request, model, tmp_path: Path) -> Path:
    path = tmp_path / f"weights.{request.param}"
    if request.param == "pth":
        torch.save(model.state_dict(), path)
    else:
        safetensors.save_file(model.state_dict(), path)
    return path


def same(left, right) -> bool:
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_weights_of_both_formats(model, file: Path):
    other = small()
    assert not same(other, model)
    load_weights(other, file)
    assert same(other, model)
    made = arcore.create_model("var_tiny", weights=file, depth=1, embed_dim=16, num_heads=1)
    assert same(made, model)
    assert all(parameter.requires_grad and parameter.is_cpu for parameter in made.parameters())
    # The new module does not share memory with the file or the old one.
    with torch.no_grad():
        made.pos_embed.zero_()
    load_weights(other, file)
    assert same(other, model)


def test_dtype_of_the_module_stays(model, tmp_path: Path):
    torch.save(
        {key: value.to(torch.bfloat16) for key, value in model.state_dict().items()}, tmp_path / "w.pt"
    )
    other = arcore.create_model("var_tiny", weights=tmp_path / "w.pt", depth=1, embed_dim=16, num_heads=1)
    assert {parameter.dtype for parameter in other.parameters()} == {torch.float32}
    assert torch.equal(other.pos_embed, model.pos_embed.bfloat16().float())


def test_bad_fit_is_listed_and_nothing_is_loaded(model, tmp_path: Path):
    state = model.state_dict()
    state["head.linear.bias"] = torch.zeros(7)
    state["pos_start"] = torch.zeros(1, 1, 16, dtype=torch.int64)
    for name in ("q_bias", "v_bias", "log_scale", "qkv.weight"):
        state[f"blocks.9.attn.{name}"] = torch.zeros(16)
    del state["word_embed.weight"], state["word_embed.bias"]
    torch.save(state, tmp_path / "w.pth")
    other = small()
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(ValueError, match="do not fit the model") as error:
        load_weights(other, tmp_path / "w.pth")
    message = str(error.value)
    assert str(tmp_path / "w.pth") in message
    assert "2 missing (word_embed.weight, word_embed.bias)" in message
    assert (
        "4 unexpected (blocks.9.attn.q_bias, blocks.9.attn.v_bias, blocks.9.attn.log_scale, ...)" in message
    )
    assert "1 of another shape (head.linear.bias is (7,) instead of (128,))" in message
    assert "1 of another kind of dtype (pos_start is int64)" in message
    assert "\n" not in message
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize("part", [0.0, 0.3, 0.999])
def test_truncated_file(model, file: Path, part: float):
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ValueError, match=rf"weights\.{file.suffix[1:]} are damaged") as error:
        load_weights(small(), file)
    assert "\n" not in str(error.value)


def test_flipped_bit_in_a_torch_file(model, tmp_path: Path):
    file = tmp_path / "weights.pth"
    torch.save(model.state_dict(), file)
    data = bytearray(file.read_bytes())
    marker = model.pos_embed.detach().numpy().tobytes()
    data[data.index(marker) + 5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"weights\.pth are damaged or truncated: .*checksum"):
        load_weights(small(), file)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_file_of_another_kind(tmp_path: Path, name: str):
    (tmp_path / name).write_text("no weights at all, but a text of some length\n" * 10)
    with pytest.raises(ValueError, match=f"{name} are damaged"):
        load_weights(small(), tmp_path / name)


def test_file_that_would_run_code(tmp_path: Path):
    class Danger:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state": Danger()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="could run code"):
        load_weights(small(), tmp_path / "w.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Danger()))
    with pytest.raises(ValueError, match=r"old\.pth"):
        load_weights(small(), tmp_path / "old.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": 1}, {"model": {"a": 1}}])
def test_file_without_a_table_of_tensors(tmp_path: Path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth are no table of tensors by name"):
        load_weights(small(), tmp_path / "w.pth")


def test_missing_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"the weights .*none\.pth do not exist"):
        arcore.create_model("var_tiny", weights=tmp_path / "none.pth")


def test_descriptions_survive_json(model):
    model = small(patch_nums=(1, 2, 4), class_drop=0.25)
    description = json.loads(json.dumps(describe(model)))
    assert description["system"] == "var"
    assert build(description).config == model.config
    assert build({"system": "var_tiny", "config": description["config"]}).config == model.config
    with pytest.raises(TypeError, match="a model or tokenizer of the zoo but got Linear"):
        describe(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"system": "vra", "config": {}}, "there is no model 'vra'; did you mean"),
        ({"system": "var"}, "expected a description with 'system' and 'config'"),
        ({"system": "var", "config": {"depth": 1, "colour": 1}}, "unknown settings: colour"),
        ({"system": "var", "config": {"depth": 1}}, "does not fit: .*embed_dim"),
    ],
)
def test_bad_descriptions(description, message: str):
    with pytest.raises(ValueError, match=message):
        build(description)


@pytest.fixture
def folder(model, tmp_path: Path) -> Path:
    tokenizer = arcore.create_model("msvq_tiny", channels=4)
    save_checkpoint(
        tmp_path / "run" / "last", {"model": model, "tokenizer": tokenizer}, {"classes": ["a", "b"]}
    )
    return tmp_path / "run" / "last"


def test_checkpoint_of_two_modules(model, folder: Path):
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.safetensors",
    ]
    modules, meta = load_checkpoint(folder)
    assert same(modules["model"], model)
    assert modules["tokenizer"].config.channels == 4
    assert meta == {"classes": ["a", "b"]}
    # A folder can stand for the weights of its module of the same system.
    other = arcore.create_model("msvq_tiny", weights=folder, channels=4)
    assert same(other, modules["tokenizer"])


def test_replacing_a_checkpoint_is_all_or_nothing(model, folder: Path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(TypeError, match="zoo but got Linear"):
        save_checkpoint(folder, {"model": torch.nn.Linear(1, 1)})
    with pytest.raises(TypeError, match="JSON"):
        save_checkpoint(folder, {"model": model}, {"bad": object()})
    with pytest.raises(ValueError, match="'modules'"):
        save_checkpoint(folder, {"model": model}, {"modules": 1})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    save_checkpoint(folder, {"model": model})
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["last"]


def test_bad_checkpoint_folders(folder: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nowhere is no checkpoint"):
        load_checkpoint(tmp_path / "nowhere")
    config = folder / "config.json"
    text = config.read_text()
    for bad in ("", text[:40], "[]", "{}", '{"modules": 3}'):
        config.write_text(bad)
        with pytest.raises(ValueError, match=r"config\.json is damaged"):
            load_checkpoint(folder)
    config.write_text(text.replace('"embed_dim"', '"embed_dom"'))
    with pytest.raises(ValueError, match=r"config\.json does not fit: .*unknown settings: embed_dom"):
        load_checkpoint(folder)
    config.write_text(text)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"model\.safetensors are damaged or truncated"):
        load_checkpoint(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors do not exist"):
        load_checkpoint(folder)


def test_folder_without_the_system(folder: Path):
    content = json.loads((folder / "config.json").read_text())
    del content["modules"]["tokenizer"]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"one module of the system 'msvq' in the checkpoint .* but it has 0"
    ):
        arcore.create_model("msvq_tiny", weights=folder)


def test_weights_of_another_system_are_named(folder: Path):
    """The file, the system it was saved from, and what is missing."""
    file = folder / "tokenizer.safetensors"
    with pytest.raises(
        ValueError, match=r"tokenizer\.safetensors were saved from the system 'msvq': .*do not fit"
    ):
        arcore.create_model("llama_tiny", weights=file)
    with pytest.raises(ValueError, match=r"'llama' in .* but it has 0 among its 2, of msvq, var"):
        arcore.create_model("llama_tiny", weights=folder)
    # Nothing of ours beside it: the file alone is blamed.
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"the weights .*tokenizer\.safetensors do not fit"):
        arcore.create_model("llama_tiny", weights=file)
