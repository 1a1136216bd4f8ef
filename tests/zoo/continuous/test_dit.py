"""DiT: identities at initialisation, published weights, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.decoding import generate_blocks
from arcore.models import DiT
from arcore.schedules import DDPM

from ..conftest import shaken


def make(**overrides) -> DiT:
    torch.manual_seed(0)
    return shaken(arcore.create_model("dit_tiny", **overrides)).eval()


def batch(model: DiT, rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, *model.block_shape, generator=generator)
    return x, torch.randint(1000, (rows,), generator=generator), torch.arange(rows)


def official(model: DiT, state: dict[str, Tensor], x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """The released architecture from its formulas, on a checkpoint by its own names."""
    config = model.config
    dim, heads, p = config.embed_dim, config.num_heads, config.patch_size

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, shift, scale):
        return F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    h = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=p)
    side = h.shape[-1]
    h = h.flatten(2).transpose(1, 2) + state["pos_embed"]
    waves = t.double()[:, None] * torch.exp(-math.log(1e4) * torch.arange(128, dtype=torch.float64) / 128)
    waves = torch.cat([waves.cos(), waves.sin()], -1).float()
    cond = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", waves)))
    cond = F.silu(cond + state["y_embedder.embedding_table.weight"][labels])
    for layer in range(config.depth):
        name = f"blocks.{layer}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{name}.adaLN_modulation.1", cond).chunk(6, 1)
        q, k, v = (
            linear(f"{name}.attn.qkv", norm(h, shift1, scale1))
            .reshape(len(x), -1, 3, heads, dim // heads)
            .permute(2, 0, 3, 1, 4)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(h.shape)
        h = h + gate1[:, None] * linear(f"{name}.attn.proj", y)
        y = F.gelu(linear(f"{name}.mlp.fc1", norm(h, shift2, scale2)), approximate="tanh")
        h = h + gate2[:, None] * linear(f"{name}.mlp.fc2", y)
    shift, scale = linear("final_layer.adaLN_modulation.1", cond).chunk(2, 1)
    y = linear("final_layer.linear", norm(h, shift, scale)).reshape(len(x), side, side, p, p, -1)
    return torch.einsum("nhwpqc->nchpwq", y).reshape(len(x), -1, side * p, side * p)


def official_state(model: DiT) -> dict[str, Tensor]:
    config, generator = model.config, torch.Generator().manual_seed(4)
    dim, p, c = config.embed_dim, config.patch_size, config.in_channels
    side = config.image_size // p
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (dim, c, p, p),
        "x_embedder.proj.bias": (dim,),
        "y_embedder.embedding_table.weight": (config.num_classes + 1, dim),
    }
    linears = {
        "t_embedder.mlp.0": (dim, 256),
        "t_embedder.mlp.2": (dim, dim),
        "final_layer.linear": (p * p * 2 * c, dim),
        "final_layer.adaLN_modulation.1": (2 * dim, dim),
    }
    for layer in range(config.depth):
        for part, shape in {
            "attn.qkv": (3 * dim, dim),
            "attn.proj": (dim, dim),
            "mlp.fc1": (4 * dim, dim),
            "mlp.fc2": (dim, 4 * dim),
            "adaLN_modulation.1": (6 * dim, dim),
        }.items():
            linears[f"blocks.{layer}.{part}"] = shape
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    state = {
        key: torch.randn(shape, generator=generator) / (math.prod(shape[1:]) ** 0.5 if len(shape) > 1 else 5)
        for key, shape in shapes.items()
    }
    # First half: sine then cosine of the column; second half: of the row.
    rates = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    waves = [place.reshape(-1, 1) * rates for place in (columns, rows)]
    table = torch.cat([part for wave in waves for part in (wave.sin(), wave.cos())], 1)
    return {"pos_embed": table.float()[None], **state}


@torch.no_grad()
def test_published_weights_and_predictions(tmp_path):
    """The layout of the released checkpoints loads strictly and gives the same prediction and variance."""
    state = official_state(make(in_channels=4, learn_sigma=True))
    torch.save(state, tmp_path / "DiT.pt")
    overrides = {"in_channels": 4, "learn_sigma": True}
    model = arcore.create_model("dit_tiny", weights=tmp_path / "DiT.pt", **overrides).eval()
    inputs = batch(model)
    expected = official(model, state, *inputs)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(*inputs), expected, rtol=1e-4, atol=1e-5)
    torch.save({"ema": state, "opt": {}}, tmp_path / "trainer.pt")
    again = arcore.create_model("dit_tiny", weights=tmp_path / "trainer.pt", **overrides).eval()
    assert torch.equal(again(*inputs), model(*inputs))
    state["pos_embed"] = state["pos_embed"].flip(1)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="positions are not those of 4 patches per side"):
        arcore.create_model("dit_tiny", weights=tmp_path / "other.pt", **overrides)


@pytest.mark.parametrize(
    ("name", "millions"), [("dit_s_2", 33.0), ("dit_b_2", 130.5), ("dit_l_2", 458.1), ("dit_xl_2", 675.1)]
)
def test_published_sizes(name, millions):
    """The paper's counts hold the fixed positions, which are no weights here."""
    [info] = [info for info in arcore.model_info(name).presets if info.name == name]
    positions = 256 * info.config.embed_dim
    assert (info.parameters + positions) / 1e6 == pytest.approx(millions, abs=0.25)


def test_ancestral_samples_use_the_learned_variance():
    model = make(in_channels=4, learn_sigma=True)
    labels, times = torch.tensor([1, 2]), model.schedule.grid(4, "linspace")
    solver = DDPM(model.schedule, variance="learned")
    images = model.to_pixels(generate_blocks(model, labels, solver=solver, times=times, cfg_scale=2.0))
    assert images.shape == (2, 4, 8, 8)
    assert images.isfinite().all()
    fixed = generate_blocks(model, labels, solver=DDPM(model.schedule), times=times, cfg_scale=2.0)
    assert not torch.equal(model.to_pixels(fixed), images)
    # The released sampler guides three of four channels.
    quirk = generate_blocks(model, labels, times=times, cfg_scale=2.0, guided_channels=3)
    plain = generate_blocks(model, labels, times=times, cfg_scale=1.0)
    guided = generate_blocks(model, labels, times=times, cfg_scale=2.0)
    assert not torch.equal(quirk, plain)
    assert not torch.equal(quirk, guided)


def test_bad_inputs():
    model = make()
    x, t, labels = batch(model)
    with pytest.raises(ValueError, match=r"images of shape \('B', 1, 8, 8\)"):
        model(torch.randn(2, 4, 8, 8), t, labels)
    with pytest.raises(TypeError, match="float32 but got float16"):
        model(x.half(), t, labels)
    with pytest.raises(ValueError, match="t from -1 to 999"):
        model(x, t + 1000, labels)
    with pytest.raises(ValueError, match="patches that tile 9 x 9"):
        arcore.create_model("dit_tiny", image_size=9)
    with pytest.raises(ValueError, match="one block"):
        model.commit(x, model.make_cache(2))
