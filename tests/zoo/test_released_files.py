"""Files of every system whose authors publish some: in any precision, wrapped, with the trainers' words beside them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import arcore
from arcore.catalog import catalog
from arcore.catalog.claims import shaken
from arcore.catalog.hub import published
from arcore.catalog.lookup import model_class
from arcore.models import load_weights

from .conftest import protocol, stem


class Released(NamedTuple):
    """A file of a small model: the preset it is for, what is changed of it, and its table in float32.

    `other_sizes` says that what drives the preset through the contract does not fit.
    """

    preset: str
    overrides: dict[str, Any]
    state: dict[str, Tensor]
    other_sizes: bool = False

    def model(self, **settings: Any) -> Any:
        return arcore.create_model(self.preset, **self.overrides, **settings).eval()


def tests_of(place: str) -> Any:
    return importlib.import_module(f"tests.zoo.{place}")


def settings(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def sized(place: str, preset: str) -> Released:
    """Of test files with `SIZES` and `published()`."""
    module = tests_of(place)
    return Released(preset, module.SIZES, module.published(), True)


def configured(place: str, preset: str) -> Released:
    """Of test files with `CONFIG` and `published(config)`."""
    module = tests_of(place)
    return Released(preset, settings(module.CONFIG), module.published(module.CONFIG), True)


def drawn(place: str, preset: str, **changes: Any) -> Released:
    """Of test files with `official_weights(config)`."""
    config = arcore.create_model(preset, **changes).config
    return Released(preset, changes, tests_of(place).official_weights(config))


def made(place: str, preset: str, **changes: Any) -> Released:
    """Of test files with `official_state(model)`."""
    return Released(preset, changes, tests_of(place).official_state(arcore.create_model(preset, **changes)))


def ours(preset: str, first: str = "", **changes: Any) -> Released:
    """Of systems whose names are the authors' own, but for what stands before them."""
    model = shaken(arcore.create_model(preset, **changes))
    return Released(preset, changes, {f"{first}{key}": v.clone() for key, v in model.state_dict().items()})


def mamba(preset: str) -> Released:
    found = ours(preset, "backbone.")
    return found._replace(
        state=found.state | {"lm_head.weight": found.state["backbone.embedding.weight"].clone()}
    )


def llama() -> Released:
    plain = ours("llama_tiny")
    config = arcore.models.get_config("llama_tiny")
    width = config.dim // config.num_heads
    kv = (config.num_kv_heads or config.num_heads) * width
    state = {}
    for key, value in plain.state.items():
        key = f"model.{key}".replace("embedding.", "embed_tokens.")
        for a, b in (("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm")):
            key = key.replace(a, b)
        key = key.replace("attention.out", "self_attn.o_proj").replace("mlp.down", "mlp.down_proj")
        if "attention.qkv" in key:
            for part, rows in zip("qkv", value.split([config.dim, kv, kv]), strict=True):
                state[key.replace("attention.qkv", f"self_attn.{part}_proj")] = rows
        elif "mlp.gate_up" in key:
            for part, rows in zip(("gate", "up"), value.chunk(2), strict=True):
                state[key.replace("gate_up", f"{part}_proj")] = rows
        else:
            state[key.replace("model.lm_head", "lm_head")] = value
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    return Released("llama_tiny", {}, state)


def multi_scale_bsq() -> Released:
    found, module = ours("msbsq_tiny"), tests_of("tokenizers.test_multi_scale_bsq")
    bits: Any = arcore.models.get_config("msbsq_tiny")
    state = {module.official_names(key): value for key, value in found.state.items()}
    mask = 2 ** torch.arange(bits.z_channels - 1, -1, -1)
    return found._replace(state=state | {"quantizer.lfq.mask": mask})


def titok() -> Released:
    config: Any = arcore.models.get_config("titok_kl_tiny")
    state = tests_of("tokenizers.test_titok_kl").released(config)
    return Released("titok_kl_tiny", {}, {key: value.float() for key, value in state.items()})


def kl() -> Released:
    module = tests_of("tokenizers.test_kl")
    return Released("kl_f8", module.SMALL, module.from_diffusers().state_dict(), True)


def hmar(preset: str = "hmar_tiny", **changes: Any) -> Released:
    model: Any = arcore.create_model(preset, **changes)
    shapes, scales = tests_of("next_scale.test_hmar").official_shapes(model.config), model.config.patch_nums
    state = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    state |= {name: value * 0 for name, value in state.items() if name.endswith("zero_k_bias")}
    state["lvl_1L"] = torch.tensor([[k for k, side in enumerate(scales) for _ in range(side * side)]])
    state["attn_bias_for_masking"] = torch.where(
        arcore.masks.next_scale_markov(scales).to_bool(), 0.0, -torch.inf
    )
    return Released(preset, changes, state)


def hydra(preset: str) -> Released:
    """Heads between which dropout may stand, behind one more layer of the model."""
    model = shaken(arcore.create_model(preset))
    config, state = model.config, {}
    dropout = config.prefix_heads is not None
    for key, value in model.state_dict().items():
        parts = key.split(".")
        if parts[0] == "blocks":
            number = 2 * int(parts[2]) + 1 if dropout else int(parts[2])
            state[f"hydra_mlp.{parts[1]}.{number}.{'.'.join(parts[3:])}"] = value
        elif parts[0] == "lm_heads":
            state[f"hydra_lm_head.{parts[1]}.{'1.' if dropout else ''}{parts[2]}"] = value
        else:
            key = key.replace("prefix.", "prefix_embeding_layer.")
            key = key.replace("attention.out", "self_attn.o_proj").replace("mlp.down", "mlp.down_proj")
            key = key.replace("norm1", "input_layernorm").replace("norm2", "post_attention_layernorm")
            if "attention.qkv" in key:
                width = config.dim // config.prefix_heads
                kv = config.prefix_kv_heads * width
                for part, rows in zip("qkv", value.split([config.dim, kv, kv]), strict=True):
                    state[key.replace("attention.qkv", f"self_attn.{part}_proj")] = rows
            elif "gate_up" in key:
                for part, rows in zip(("gate", "up"), value.chunk(2), strict=True):
                    state[key.replace("gate_up", f"{part}_proj")] = rows
            else:
                state[key] = value
    if dropout:
        state["prefix_embeding_layer.embed_tokens.weight"] = torch.randn(config.vocab_size, config.dim)
        state["prefix_embeding_layer.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    return Released(preset, {}, state)


def infinity() -> Released:
    config: Any = arcore.models.get_config("infinity_tiny")
    chunks = 2 if config.depth % 2 == 0 else 1
    return Released(
        "infinity_tiny", {}, tests_of("next_scale.test_infinity").official_weights(config, chunks)
    )


def roma_classifier() -> Released:
    config: Any = arcore.models.get_config("roma_classifier_tiny")
    shapes = tests_of("representation.test_roma_classifier").official_shapes(config)
    state = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    return Released("roma_classifier_tiny", {}, state)


def roma_change() -> Released:
    config: Any = arcore.models.get_config("roma_change_tiny")
    shapes = tests_of("representation.test_roma_change").official_shapes(config)
    state = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    state |= {name: value.abs() + 0.5 for name, value in state.items() if name.endswith("running_var")}
    state |= {name: torch.tensor(7) for name in state if name.endswith("num_batches_tracked")}
    return Released("roma_change_tiny", {}, state)


def ar_diffusion() -> Released:
    module = tests_of("dynamics.test_ar_diffusion")
    changes = {**module.RELEASED, "null_context": "first"}
    return Released("ar_diffusion_tiny", changes, module.official_state(module.make(**changes), "class_emb"))


def diffusion_forcing() -> Released:
    small = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_dim": 64, "frames": 60}
    network = shaken(tests_of("dynamics.test_diffusion_forcing").Released(20, 32, 2, 2, 64))
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    state = {f"diffusion_model.model.{key}": value for key, value in network.state_dict().items()}
    state |= {"data_mean": torch.tensor([3.5, 3.25]), "data_std": torch.tensor([1.25, 1.5])}
    state["diffusion_model.alphas_cumprod"] = (1 - betas).cumprod(0).float()
    return Released("diffusion_forcing_maze2d_medium", small, state, True)


def glm() -> Released:
    found = ours("glm_tiny")
    names = {key: key.removeprefix("positions.") for key in found.state}
    return found._replace(
        state={
            name if name.startswith("word_") else f"transformer.{name}": found.state[key]
            for key, name in names.items()
        }
    )


RELEASED: dict[str, Callable[[], Released]] = {
    "acdit": lambda: made("continuous.test_acdit", "acdit_tiny", rope_layout="acdit_v0"),
    "ar_diffusion": ar_diffusion,
    "autoformer": lambda: sized("series.test_autoformer", "autoformer_tiny"),
    "controlar_t2i": lambda: configured("raster.test_controlar_t2i", "controlar_t2i_tiny"),
    "diffusion_forcing": diffusion_forcing,
    "dit": lambda: made("continuous.test_dit", "dit_tiny", learn_sigma=True),
    "echogen": lambda: drawn("next_scale.test_echogen", "echogen_tiny"),
    "gpht": lambda: sized("series.test_gpht", "gpht_tiny"),
    "hmar": lambda: hmar(refinement=True),
    "hydra": lambda: hydra("hydra_tiny"),
    "hydra of medusa": lambda: hydra("medusa_tiny"),
    "hydra++": lambda: hydra("hydra_plus_tiny"),
    "infinity": infinity,
    "kl": kl,
    "kronos": lambda: sized("series.test_kronos", "kronos_tiny"),
    "kronos_tokenizer": lambda: sized("series.test_kronos_tokenizer", "kronos_tokenizer_tiny"),
    "llama": llama,
    "llamagen": lambda: configured("raster.test_llamagen", "llamagen_tiny"),
    "llamagen_t2i": lambda: configured("raster.test_llamagen_t2i", "llamagen_t2i_tiny"),
    "mamba": lambda: mamba("mamba_tiny"),
    "mamba2": lambda: mamba("mamba2_tiny"),
    "mamba3": lambda: mamba("mamba3_tiny"),
    "mar": lambda: made("continuous.test_mar", "mar_tiny", learn_variance=True, prediction="eps"),
    "multi_scale_bsq": multi_scale_bsq,
    "multi_scale_vq": lambda: ours("msvq_tiny"),
    "protein_mpnn": lambda: ours("protein_mpnn_tiny"),
    "roma": lambda: drawn("representation.test_roma", "roma_tiny"),
    "roma_classifier": roma_classifier,
    "roma_change": roma_change,
    "st_ssdl": lambda: sized("series.test_st_ssdl", "st_ssdl_tiny"),
    "titok_kl": titok,
    "var": lambda: drawn("next_scale.test_var", "var_tiny"),
    "vq16": lambda: configured("tokenizers.test_vq16", "vq16_tiny"),
    "xtrimopglm": glm,
}
DTYPES = [torch.float16, torch.bfloat16, torch.float64]


def rounded(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What `module.to(dtype)` makes of a table."""
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}


def same(left: Any, right: Any) -> None:
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []
    assert [key for key in left if left[key].dtype != right[key].dtype] == []


@pytest.fixture(scope="module", params=RELEASED)
def released(request: pytest.FixtureRequest) -> Released:
    torch.manual_seed(0)
    return RELEASED[request.param]()


def test_every_system_with_files_is_here():
    wanted = set()
    for name, entry in catalog().items():
        if entry.system.model is not None and "from_official" in vars(model_class(entry)):
            wanted.add(name)
        for preset in entry.presets:
            with contextlib.suppress(ValueError):
                published(preset)
                wanted.add(name)
    assert {stem(name) for name in wanted} - {name.split()[0].rstrip("+") for name in RELEASED} == set()


def test_precision_of_storage_changes_nothing_but_the_rounding(released: Released, tmp_path: Path):
    """A file in half precision, or in double, loads as the same values in float32 do, bit for bit."""
    for dtype in DTYPES:
        stored = rounded(released.state, dtype)
        torch.save(stored, tmp_path / "stored.pt")
        torch.save(rounded(stored, torch.float32), tmp_path / "plain.pt")
        same(released.model(weights=tmp_path / "stored.pt"), released.model(weights=tmp_path / "plain.pt"))
    # Part of it, as trainers keep norms and tables in float32.
    mixed = {
        k: v if i % 2 else rounded({k: v}, torch.bfloat16)[k]
        for i, (k, v) in enumerate(released.state.items())
    }
    torch.save(mixed, tmp_path / "stored.pt")
    torch.save(rounded(mixed, torch.float32), tmp_path / "plain.pt")
    same(released.model(weights=tmp_path / "stored.pt"), released.model(weights=tmp_path / "plain.pt"))


def test_wrapped_files_open(released: Released, tmp_path: Path):
    """The usual wrappers and prefixes, and what lies beside weights in them, around the authors' names."""
    expected, model, path = released.model(), released.model(), tmp_path / "w.pt"
    torch.save(released.state, path)
    load_weights(expected, path)
    numpy = pytest.importorskip("numpy")
    args = argparse.Namespace(
        lr=numpy.float32(0.1), seed=numpy.int64(3), out=PurePosixPath("/x"), data=Path("y")
    )
    other = {key: torch.zeros_like(value) for key, value in released.state.items()}

    def put(prefix: str, state: dict[str, Tensor] = released.state) -> dict[str, Tensor]:
        return {f"{prefix}{key}": value for key, value in state.items()}

    for stored in (
        put("module._orig_mod."),
        {"model": put(""), "optimizer": {"state": {}, "param_groups": []}, "epoch": 3, "args": args},
        {"state_dict": put("model."), "hyper_parameters": {"lr": 0.1, "path": Path("y")}},
        {"ema_state_dict": {"ema_model": put("")}},
    ):
        torch.save(stored, path)
        load_weights(model, path)
        same(model, expected)
        for parameter in model.parameters():
            parameter.data.fill_(7)
    torch.save({"model": other, "net": other, "ema": put("module."), "args": args}, path)
    load_weights(model, f"{path}#ema")
    same(model, expected)


@torch.no_grad()
def test_a_model_in_half_precision_says_what_its_file_says(released: Released, tmp_path: Path):
    """The forward pass from a bfloat16 file differs from that of the float32 file by about its rounding."""
    if released.other_sizes:
        pytest.skip("the precision of a file of other sizes is tested above, bit for bit")
    driver, plain, half = protocol(released.preset), released.model(), released.model()
    torch.save(released.state, tmp_path / "plain.pt")
    torch.save(rounded(released.state, torch.bfloat16), tmp_path / "half.pt")
    load_weights(plain, tmp_path / "plain.pt")
    load_weights(half, tmp_path / "half.pt")
    expected, found = driver.forward(plain), driver.forward(half)
    assert expected.std() > 0
    difference = (found - expected).norm() / expected.norm()
    # Codes of a tokenizer may tip over.
    assert 0 < difference < 0.3


SMALL = {"depth": 3, "embed_dim": 32, "num_heads": 2, "num_classes": 5, "vocab_size": 24}
NARROW: dict[str, Callable[[], Released]] = {
    name: (lambda name=name: drawn("next_scale.test_var", name, **SMALL))
    for name in ("var_d16", "var_d20", "var_d24", "var_d30", "var_d36")
} | {
    name: (lambda name=name: hmar(name, **SMALL, tail=1)) for name in ("hmar_d16", "hmar_d20", "hmar_d24", "hmar_d30")
} | {
    name: (lambda name=name: ours(name, channels=16, norm_groups=8, vocab_size=24, num_res_blocks=1))
    for name in ("msvq_ch160", "msvq_ch160_512")
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", NARROW)
def test_every_published_preset_opens_trainer_files_in_half_precision(name: str, tmp_path: Path):
    """The scales, masks and modulation of the published files, at a small width, as trainers save them."""
    torch.manual_seed(0)
    released = NARROW[name]()
    for dtype in (torch.float16, torch.bfloat16):
        stored = rounded(released.state, dtype)
        trainer = {"var_wo_ddp": stored, "vae_local": stored, "var_opt": {"state": {}}}
        torch.save({"trainer": trainer, "epoch": 3, "args": {}}, tmp_path / "stored.pth")
        torch.save(rounded(stored, torch.float32), tmp_path / "plain.pth")
        entry = "#trainer.var_wo_ddp" if name.startswith("hmar") else ""
        model = released.model(weights=f"{tmp_path / 'stored.pth'}{entry}")
        same(model, released.model(weights=tmp_path / "plain.pth"))
