"""Files as others save them: wrapped, prefixed, in any precision, with a word about how they were made."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pickle
import types
from pathlib import Path, PureWindowsPath

import pytest
import torch

import arcore
from arcore.catalog.checkpoints import eos_beside
from arcore.decoding import generate
from arcore.models import load_checkpoint, load_weights, save_checkpoint

safetensors = pytest.importorskip("safetensors.torch")


def small(**overrides):
    return arcore.create_model("var_tiny", depth=1, embed_dim=16, num_heads=1, **overrides)


@pytest.fixture
def model():
    return small()


def same(left, right) -> bool:
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def prefixed(state, prefix: str):
    return {f"{prefix}{key}": value for key, value in state.items()}


WRAPPED = {
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "parts compiled": lambda s: {key.replace("blocks.0.", "blocks.0._orig_mod."): v for key, v in s.items()},
    "ddp": lambda s: prefixed(s, "module."),
    "compiled ddp": lambda s: prefixed(s, "module._orig_mod."),
    "ddp compiled": lambda s: prefixed(s, "_orig_mod.module."),
    "lightning": lambda s: {
        "state_dict": prefixed(s, "model."),
        "epoch": 3,
        "hyper_parameters": {"lr": 1e-3},
    },
    "model": lambda s: {"model": s, "optimizer": {"state": {}}, "step": 3},
    "state_dict": lambda s: {"state_dict": s},
    "model_ema": lambda s: {"model_ema": s},
    "ema of ddp": lambda s: {"ema": prefixed(s, "module.")},
    "averaged": lambda s: {"n_averaged": torch.tensor(3), **prefixed(s, "module.")},
    "trainer": lambda s: {"trainer": {"var_wo_ddp": s, "vae_local": {"x": torch.zeros(1)}}, "args": {}},
    "nested": lambda s: {"state_dict": {"model": prefixed(s, "module.")}},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_and_prefixes_open(model, tmp_path: Path, kind: str):
    torch.save(WRAPPED[kind](model.state_dict()), tmp_path / "w.pt")
    other = small()
    load_weights(other, tmp_path / "w.pt")
    assert same(other, model)


def test_one_of_several_tables_is_chosen(model, tmp_path: Path):
    ema = small()
    path = tmp_path / "w.pt"
    torch.save({"model": model.state_dict(), "ema": {"net": prefixed(ema.state_dict(), "module.")}}, path)
    other = small()
    load_weights(other, path)
    assert same(other, model)
    load_weights(other, path, entry="ema.net")
    assert same(other, ema)
    load_weights(other, f"{path}#model")
    assert same(other, model)
    made = arcore.create_model("var_tiny", weights=f"{path}#ema.net", depth=1, embed_dim=16, num_heads=1)
    assert same(made, ema)
    with pytest.raises(ValueError, match=r"have no entry 'emma': it has model, ema.net"):
        load_weights(other, f"{path}#emma")
    with pytest.raises(ValueError, match="give one of them"):
        load_weights(other, f"{path}#model", entry="ema")
    flat = tmp_path / "w.safetensors"
    safetensors.save_file(prefixed(model.state_dict(), "a.") | prefixed(ema.state_dict(), "b."), flat)
    load_weights(other, f"{flat}#b")
    assert same(other, ema)


def test_a_number_sign_in_a_name_is_a_name(model, tmp_path: Path):
    path = tmp_path / "run#3.pt"
    torch.save(model.state_dict(), path)
    other = small()
    load_weights(other, path)
    assert same(other, model)


def test_plain_values_beside_weights_are_read(model, tmp_path: Path):
    numpy = pytest.importorskip("numpy")
    args = argparse.Namespace(
        lr=numpy.float64(0.1),
        steps=numpy.int64(3),
        flag=numpy.bool_(True),
        half=numpy.float16(1),
        table=numpy.arange(3),
        out=Path("/somewhere/else"),
        pure=PureWindowsPath("C:/x"),
        nested=types.SimpleNamespace(a=1),
        device=torch.device("cpu"),
        dtype=torch.float16,
    )
    torch.save({"model": model.state_dict(), "args": args, "time": datetime.timedelta(3)}, tmp_path / "w.pt")
    other = small()
    load_weights(other, tmp_path / "w.pt")
    assert same(other, model)


class Unknown:
    pass


def test_advice_to_read_code_never_reaches_users(model, tmp_path: Path):
    state = model.state_dict()
    torch.save({"model": state, "extra": Unknown()}, tmp_path / "class.pt")
    torch.save({"model": state, "f": os.path.join}, tmp_path / "function.pt")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"a": Unknown()}))
    torch.save(state, tmp_path / "script.pt")
    import zipfile

    with zipfile.ZipFile(tmp_path / "script.pt", "a") as archive:
        archive.writestr("script/constants.pkl", b"")
    for name in ("class", "function", "module", "text", "pickle", "script"):
        with pytest.raises(ValueError, match=rf"{name}\.pt") as error:
            load_weights(small(), tmp_path / f"{name}.pt")
        message = str(error.value)
        for advice in ("weights_only", "Weights only", "safe_globals", "trust", "\n"):
            assert advice not in message
    with pytest.raises(ValueError, match=r"it holds .*Unknown"):
        load_weights(small(), tmp_path / "class.pt")


def test_unused_statistics_refuse_no_tokenizer(tmp_path: Path):
    tokenizer = arcore.create_model("msvq_tiny")
    state = tokenizer.state_dict()
    name = "quantize.ema_vocab_hit_SV"
    for other in (torch.ones(7, 128), None):
        changed = {key: value for key, value in state.items() if key != name}
        if other is not None:
            changed[name] = other
        torch.save({"trainer": {"vae_local": changed}}, tmp_path / "w.pth")
        again = arcore.create_model("msvq_tiny", weights=tmp_path / "w.pth").state_dict()
        assert not again[name].any()
        assert all(torch.equal(again[key], state[key]) for key in state if key != name)


@pytest.mark.parametrize(
    ("preset", "overrides", "args", "says"),
    [
        ("acdit_tiny", {"block_size": 16}, {"block_size": 4, "num_frames": 1}, "block_size=4"),
        ("acdit_tiny", {}, {"nd_split": "3_1", "num_frames": 1}, r"nd_split=\(3, 1\)"),
        ("acdit_tiny", {}, {"no_qk_norm": True}, "no_qk_norm=True"),
        ("acdit_tiny", {}, {"image_size": 128, "vae_patch_pixels": 8}, "image_size=16"),
        ("dit_tiny", {}, {"model": "DiT-S/2"}, "num_heads=6"),
        ("dit_tiny", {}, {"image_size": 512}, "image_size=64"),
        ("mar_tiny", {}, {"model": "mar_base"}, "num_heads=12"),
        ("mar_tiny", {}, {"img_size": 256, "vae_stride": 16}, "image_size=16"),
        ("mar_tiny", {}, {"buffer_size": 64}, "buffer_size=64"),
        ("var_tiny", {}, {"pn": "1_2_3"}, r"patch_nums=\(1, 2, 3\)"),
        ("var_tiny", {}, {"anorm": False}, "attn_l2_norm=False"),
    ],
)
@pytest.mark.parametrize("kind", [argparse.Namespace, dict])
def test_what_a_file_says_about_itself_is_compared(tmp_path: Path, preset, overrides, args, says, kind):
    path = tmp_path / "w.pt"
    model = arcore.create_model(preset)
    torch.save({"model": model.state_dict(), "args": kind(**args)}, path)
    with pytest.raises(ValueError, match=rf"were made with .*{says}.* but the model has .*: pass .*{says}"):
        arcore.create_model(preset, weights=path, **overrides)


def test_settings_that_agree_are_no_fault(tmp_path: Path):
    model = arcore.create_model("acdit_tiny", nd_split=(3, 1))
    args = argparse.Namespace(block_size=4, num_frames=1, patch_size=2, vae_latent_size=1, nd_split="3_1")
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "w.pt")
    made = arcore.create_model("acdit_tiny", weights=tmp_path / "w.pt", nd_split="3_1")
    assert same(made, model)
    args = argparse.Namespace(nd_split=None, num_frames=1)
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "w.pt")
    assert same(arcore.create_model("acdit_tiny", weights=tmp_path / "w.pt"), model)


@pytest.fixture
def folder(model, tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "run" / "last", {"model": model})
    return tmp_path / "run" / "last"


def test_settings_of_our_own_checkpoints_are_compared(folder: Path):
    with pytest.raises(
        ValueError, match=r"made with depth=1, embed_dim=16, num_heads=1 but the model has depth="
    ):
        arcore.create_model("var_tiny", weights=folder)
    folder.rename(folder.parent / "step-00000010")
    with pytest.raises(ValueError, match=r"is the folder of a run, not a checkpoint: .*step-00000010"):
        arcore.create_model("var_tiny", weights=folder.parent)
    with pytest.raises(ValueError, match=r"is the folder of a run, not a checkpoint: .*step-00000010"):
        arcore.create_model("var", weights=folder.parent)


def test_folders_of_model_hubs_are_not_damaged(model, tmp_path: Path):
    content = {"model_type": "other", "architectures": ["Other"], "hidden_size": 3}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"has a config.json as model hubs do but no weights beside it"):
        load_weights(small(), tmp_path)
    with pytest.raises(
        ValueError, match=r"config.json is that of a model hub, not of a checkpoint of arcore"
    ):
        load_checkpoint(tmp_path)
    safetensors.save_file(model.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    other = small()
    load_weights(other, tmp_path)
    assert same(other, model)
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / "my.safetensors")
    load_weights(small(), tmp_path)
    torch.save(model.state_dict(), tmp_path / "second.pt")
    with pytest.raises(ValueError, match=r"several files of weights \(my.safetensors, second.pt\)"):
        load_weights(small(), tmp_path)


def test_configs_of_model_hubs_are_compared(tmp_path: Path):
    model = arcore.create_model("mamba_tiny")
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    content = {"model_type": "mamba", "hidden_size": 128, "num_hidden_layers": 4, "vocab_size": 256}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert same(arcore.create_model("mamba_tiny", weights=tmp_path), model)
    (tmp_path / "config.json").write_text(json.dumps({**content, "layer_norm_epsilon": 1e-6}))
    for place in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(ValueError, match=r"made with norm_eps=1e-06 but the model has norm_eps=1e-05"):
            arcore.create_model("mamba_tiny", weights=place)
    assert same(arcore.create_model("mamba_tiny", weights=tmp_path, norm_eps=1e-6), model)


def tables():
    """What published files hold besides weights, by preset."""
    dit, ar, forcing, roma = (
        arcore.create_model(name)
        for name in ("dit_tiny", "ar_diffusion_tiny", "diffusion_forcing_tiny", "roma_tiny")
    )
    side, width = roma.config.side, roma.config.embed_dim
    levels = torch.tensor([[k for k, patches in enumerate((1, 2, 3, 4)) for _ in range(patches**2)]])
    from arcore.nn import sincos_positions

    return [
        ("dit_tiny", dit, "pos_embed", dit.positions),
        ("ar_diffusion_tiny", ar, "pos_embed", ar.positions),
        ("ar_diffusion_tiny", ar, "diffusion_model.betas", ar.schedule.betas),
        (
            "diffusion_forcing_tiny",
            forcing,
            "diffusion_model.alphas_cumprod",
            forcing.schedule.alphas_cumprod,
        ),
        ("roma_tiny", roma, "pos_embed", sincos_positions(side, width)),
        ("var_tiny", arcore.create_model("var_tiny"), "lvl_1L", levels),
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_storage_precision_never_matters(dtype: torch.dtype):
    for preset, made, name, table in tables():
        stored = table.to(dtype)
        made.from_official({name: stored})
        for wrong in (stored * 1.5 + 0.3, stored[..., :-1]):
            with pytest.raises(ValueError, match=r"(not|other)"):
                made.from_official({name: wrong})
                pytest.fail(f"{preset} took a wrong {name}")


def test_ends_of_texts_come_with_weights(tmp_path: Path):
    model = arcore.create_model("mamba_tiny")
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert eos_beside(tmp_path, 256) == ()

    def write(name: str, content: object) -> None:
        (tmp_path / name).write_text(json.dumps(content))

    write("tokenizer.json", {"added_tokens": [{"id": 7, "content": "<|end|>"}, {"id": 8, "content": "x"}]})
    write("tokenizer_config.json", {"eos_token": {"content": "<|end|>"}})
    assert eos_beside(tmp_path, 256) == (7,)
    write("generation_config.json", {"eos_token_id": [3, 5, 999]})
    assert eos_beside(tmp_path, 256) == (3, 5)
    made = arcore.create_model("mamba_tiny", weights=tmp_path)
    assert made.eos_ids == (3, 5)
    prompt = torch.tensor([[1, 2]])
    endless = generate(made, prompt, max_new_tokens=40, temperature=5.0, eos=())
    assert endless.lengths.tolist() == [40]
    ended = generate(made, prompt.repeat(64, 1), max_new_tokens=40, temperature=5.0)
    assert (ended.lengths < 40).any()
    for row in ended.rows():
        assert not {3, 5} & set(row[:-1])
