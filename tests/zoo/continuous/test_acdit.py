"""ACDiT: the paper's claims, its published weights, its shapes and errors."""

from __future__ import annotations

import argparse
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore import masks
from arcore.decoding import generate_blocks, row_seeds
from arcore.decoding.draws import RowNormals
from arcore.models import ACDiT
from arcore.schedules import add_noise

from ..conftest import shaken


def make(preset: str = "acdit_tiny", **overrides: Any) -> ACDiT:
    torch.manual_seed(0)
    return shaken(arcore.create_model(preset, **overrides)).eval()


def batch(model: ACDiT, rows: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shape = (rows, model.num_blocks, *model.block_shape)
    clean, eps = (torch.randn(shape, generator=generator) for _ in range(2))
    t = torch.randint(1000, shape[:2], generator=generator)
    return clean, add_noise(model.schedule, clean, eps, t), t, torch.arange(rows)


CASES = [
    ("acdit_tiny", {}),
    ("acdit_tiny", {"block_size": 1}),
    ("acdit_tiny", {"block_size": 16}),
    ("acdit_tiny", {"rope_layout": "acdit_v0"}),
    ("acdit_video_tiny", {}),
    ("acdit_video_tiny", {"block_size": 8}),
]


@torch.no_grad()
def test_a_block_sees_no_later_block():
    model = make()
    clean, noisy, t, labels = batch(model)
    before = model(clean, noisy, t, labels)
    for changed in range(model.num_blocks):
        other = clean.clone()
        other[:, changed] += 1
        after = model(other, noisy, t, labels)
        assert torch.equal(after[:, : changed + 1], before[:, : changed + 1])
        if changed + 1 < model.num_blocks:
            assert (after[:, changed + 1 :] != before[:, changed + 1 :]).any(dim=(0, 2, 3)).all()
        other = noisy.clone()
        other[:, changed] += 1
        after = model(clean, other, t, labels)
        rest = [block for block in range(model.num_blocks) if block != changed]
        assert torch.equal(after[:, rest], before[:, rest])
        assert not torch.equal(after[:, changed], before[:, changed])


@torch.no_grad()
def test_the_clean_cache_depends_neither_on_time_nor_on_class():
    """What the training pass computes of the clean half equals what `commit` caches, whatever t and the labels are."""
    model = make()
    clean, noisy, t, labels = batch(model)
    length = model.config.block_size
    cache = model.make_cache(len(clean))
    for block in range(model.num_blocks - 1):
        model.commit(clean[:, block], cache)
    for times, classes in ((t, labels), (999 - t, labels + 3)):
        seen: list[Tensor] = []
        hooks = [
            block.attn.k_norm.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
            for block in model.blocks
        ]
        model(clean, noisy, times, classes)
        for hook in hooks:
            hook.remove()
        positions = torch.arange(3 * length)
        for layer, keys in enumerate(seen):
            ours = model.rope.rows(positions).apply(keys[:, :, : 3 * length])
            torch.testing.assert_close(ours, cache.keys[layer, :, :, : 3 * length], rtol=0, atol=1e-5)


@torch.no_grad()
def test_guidance_copies_share_one_cache_exactly():
    """Two copies behind one cache predict what two rows with a cache each do, and the cache is not written."""
    model = make()
    clean, noisy, t, labels = batch(model)
    null = torch.full_like(labels, model.null_class)
    shared, double = model.make_cache(2, copies=2), model.make_cache(4)
    assert double.keys.shape[1] == 2 * shared.keys.shape[1]
    for block in range(2):
        model.commit(clean[:, block], shared)
        model.commit(torch.cat([clean[:, block]] * 2), double)
    length = shared.length
    before = shared.keys[:, :, :, :length].clone()
    x, time = noisy[:, 2], t[:, 2]
    together, _ = model.denoise(
        torch.stack([x, x], 1), torch.stack([time, time], 1), torch.stack([labels, null], 1), shared
    )
    apart, _ = model.denoise(
        torch.cat([x, x])[:, None],
        torch.cat([time, time])[:, None],
        torch.cat([labels, null])[:, None],
        double,
    )
    assert (together[:, 0] - apart[:2, 0]).abs().max() <= 1e-5
    assert (together[:, 1] - apart[2:, 0]).abs().max() <= 1e-5
    assert not torch.equal(together[:, 0], together[:, 1])
    assert shared.length == length
    assert torch.equal(shared.keys[:, :, :, :length], before)


@pytest.mark.parametrize("blocks", [1, 2, 4, 7])
def test_share_of_the_mask_that_is_computed(blocks):
    mask = masks.skip_causal(blocks, 8)
    assert mask.density == pytest.approx((blocks + 1) / (4 * blocks))


@torch.no_grad()
def test_one_block_is_a_transformer_without_a_clean_half():
    """Blocks of the whole image: the training pass is the noisy half alone, as in DiT."""
    model = make(block_size=16)
    clean, noisy, t, labels = batch(model)
    assert model.mask.nq == 16
    x, cond = noisy[:, 0], model.time_embed(t) + model.class_embed(labels)[:, None]
    hidden, mask = model.embed(x), masks.full(16, 16)
    for block in model.blocks:
        hidden = block(hidden, cond, mask, rope=model.rope)
    expected = model.head(hidden, cond)
    assert (model(clean, noisy, t, labels)[:, 0] - expected).abs().max() <= 1e-6
    assert torch.equal(model(clean + 1, noisy, t, labels), model(clean, noisy, t, labels))


@torch.no_grad()
def test_the_last_clean_block_is_dead():
    model = make()
    full = make(drop_last_clean=False)
    full.load_state_dict(model.state_dict())
    assert (model.mask.nq, full.mask.nq) == (28, 32)
    inputs = batch(model)
    assert (model(*inputs) - full(*inputs)).abs().max() <= 1e-5


def official(model: ACDiT, state: dict[str, Tensor], clean: Tensor, noisy: Tensor, t: Tensor, labels: Tensor):
    """The released architecture from its formulas, on a checkpoint by its own names, with a square bool mask."""
    config = model.config
    heads, length = config.num_heads, config.block_size
    blocks, width = model.num_blocks, config.embed_dim // config.num_heads

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def rms(name, x):
        return F.rms_norm(x, x.shape[-1:], state[f"{name}.weight"], 1e-6)

    # Positions: squares in raster order, raster order inside; base 100; the halves of a whole head are paired.
    side, square = config.side, math.isqrt(length)
    places = [
        (by * square + y, bx * square + x)
        for by in range(side // square)
        for bx in range(side // square)
        for y in range(square)
        for x in range(square)
    ]
    rates = 100.0 ** -torch.linspace(0, 1, width // 4, dtype=torch.float64)
    angles = torch.tensor(places, dtype=torch.float64)[:, :, None] * rates  # [L, 2, width / 4]
    angles = torch.cat([angles, angles], dim=2).flatten(1)
    angles = torch.cat([angles, angles]).float()  # both halves
    allowed = torch.zeros(2 * blocks, 2 * blocks, dtype=torch.bool)
    for q in range(2 * blocks):
        for k in range(2 * blocks):
            allowed[q, k] = (k <= q if q < blocks else k < q - blocks or k == q) and (k < blocks or k == q)
    allowed = allowed.repeat_interleave(length, 0).repeat_interleave(length, 1)

    x = F.linear(torch.cat([clean.flatten(1, 2), noisy.flatten(1, 2)], 1), state["x_embedder.weight"])
    waves = t.double()[..., None] * torch.exp(-math.log(1e4) * torch.arange(128, dtype=torch.float64) / 128)
    waves = torch.cat([waves.cos(), waves.sin()], -1).float()
    cond = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", waves)))
    cond = cond + state["y_embedder.embedding_table.weight"][labels][:, None]
    half = blocks * length
    per_token = cond.repeat_interleave(length, dim=1)

    def shaped(name, x, shift, scale):
        y = rms(name, x)
        return torch.cat([y[:, :half], y[:, half:] * (1 + scale) + shift], dim=1)

    def turned(x):
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    for layer in range(config.depth):
        name = f"blocks.{layer}"
        parts = linear(f"{name}.adaLN_modulation.1", F.silu(per_token)).chunk(6, -1)
        qkv = linear(f"{name}.attn.qkv", shaped(f"{name}.norm1", x, *parts[:2]))
        q, k, v = qkv.reshape(len(x), 2 * half, 3, heads, width).permute(2, 0, 3, 1, 4)
        q, k = turned(rms(f"{name}.attn.q_norm", q)), turned(rms(f"{name}.attn.k_norm", k))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).reshape(x.shape)
        y = linear(f"{name}.attn.proj", y)
        x = x + torch.cat([y[:, :half], parts[2] * y[:, half:]], 1)
        y = linear(f"{name}.mlp.fc1", shaped(f"{name}.norm2", x, *parts[3:5]))
        y = linear(f"{name}.mlp.fc2", F.gelu(y, approximate="tanh"))
        x = x + torch.cat([y[:, :half], parts[5] * y[:, half:]], 1)
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(per_token)).chunk(2, -1)
    y = rms("final_layer.norm_final", x[:, half:]) * (1 + scale) + shift
    return linear("final_layer.linear", y).reshape(noisy.shape)


def official_state(model: ACDiT) -> dict[str, Tensor]:
    """Random weights of the published layout, written down independently of our renaming."""
    config, generator = model.config, torch.Generator().manual_seed(4)
    dim, values = config.embed_dim, config.in_channels * config.patch_size**2
    shapes: dict[str, tuple[int, ...]] = {
        "t_embedder.mlp.0.weight": (dim, 256),
        "t_embedder.mlp.0.bias": (dim,),
        "t_embedder.mlp.2.weight": (dim, dim),
        "t_embedder.mlp.2.bias": (dim,),
        "y_embedder.embedding_table.weight": (config.num_classes + 1, dim),
        "x_embedder.weight": (dim, values),
        "final_layer.norm_final.weight": (dim,),
        "final_layer.linear.weight": (values, dim),
        "final_layer.linear.bias": (values,),
        "final_layer.adaLN_modulation.1.weight": (2 * dim, dim),
        "final_layer.adaLN_modulation.1.bias": (2 * dim,),
    }
    for layer in range(config.depth):
        for part, shape in {
            "norm1.weight": (dim,),
            "norm2.weight": (dim,),
            "attn.qkv.weight": (3 * dim, dim),
            "attn.qkv.bias": (3 * dim,),
            "attn.q_norm.weight": (dim // config.num_heads,),
            "attn.k_norm.weight": (dim // config.num_heads,),
            "attn.proj.weight": (dim, dim),
            "attn.proj.bias": (dim,),
            "mlp.fc1.weight": (4 * dim, dim),
            "mlp.fc1.bias": (4 * dim,),
            "mlp.fc2.weight": (dim, 4 * dim),
            "mlp.fc2.bias": (dim,),
            "adaLN_modulation.1.weight": (6 * dim, dim),
            "adaLN_modulation.1.bias": (6 * dim,),
        }.items():
            shapes[f"blocks.{layer}.{part}"] = shape
    return {
        key: (1.0 if "norm" in key else 0.0)
        + torch.randn(shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) > 1 else 5)
        for key, shape in shapes.items()
    }


@torch.no_grad()
def test_published_weights_and_predictions(tmp_path):
    """A checkpoint of the released trainer, command line and all, loads strictly and predicts the same noise."""
    plain = make(rope_layout="acdit_v0")
    state = official_state(plain)
    torch.save(
        {"model": state, "ema": state, "opt": {}, "args": argparse.Namespace(model="ACDiT-XL", ar_len=4)},
        tmp_path / "ACDiT.pt",
    )
    model = arcore.create_model("acdit_tiny", rope_layout="acdit_v0", weights=tmp_path / "ACDiT.pt").eval()
    inputs = batch(model)
    expected = official(model, state, *inputs)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(*inputs), expected, rtol=1e-4, atol=1e-5)
    proper = arcore.create_model("acdit_tiny", weights=tmp_path / "ACDiT.pt").eval()
    assert (proper(*inputs) - expected).abs().max() > 1e-3
    del state["blocks.0.attn.q_norm.weight"]
    torch.save({"model": state}, tmp_path / "broken.pt")
    with pytest.raises(ValueError, match=r"1 missing \(blocks.0.attn.q_norm.weight\)"):
        arcore.create_model("acdit_tiny", weights=tmp_path / "broken.pt")


@pytest.mark.parametrize(
    ("name", "millions"), [("acdit_b", 130.3), ("acdit_l", 457.9), ("acdit_xl", 674.9), ("acdit_h", 951.0)]
)
def test_published_sizes(name, millions):
    [info] = [info for info in arcore.model_info(name).presets if info.name == name]
    assert info.parameters / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_blocks_and_images(block_size):
    model = make(block_size=block_size)
    images = torch.arange(64.0).view(1, 1, 8, 8).expand(2, 1, 8, 8)
    blocks = model.to_blocks(images)
    assert blocks.shape == (2, 16 // block_size, block_size, 4)
    assert torch.equal(model.to_pixels(blocks), images)
    if block_size == 4:
        assert sorted(blocks[0, 1].flatten().tolist()) == [8 * y + x for y in range(4) for x in range(4, 8)]
        assert blocks[0, 1, 1].tolist() == [6, 7, 14, 15]


def test_blocks_and_videos():
    model = make("acdit_video_tiny")
    videos = torch.randn(2, 8, 1, 16, 16)
    blocks = model.to_blocks(videos)
    assert torch.equal(model.to_pixels(blocks), videos)
    assert torch.equal(model.to_pixels(blocks[:, :2]), videos[:, :4])


def test_samples_continue_a_context_and_do_not_depend_on_batch_mates():
    model = make()
    labels = torch.tensor([3, 1, 7])
    times = model.schedule.grid(3)
    full = generate_blocks(model, labels, times=times, seed=[5, 6, 7])
    alone = generate_blocks(model, labels[1:2], times=times, seed=[6])
    torch.testing.assert_close(alone, full[1:2], rtol=0, atol=1e-4)
    context = torch.randn(3, 3, 4, 4)
    continued = generate_blocks(model, labels, times=times, context=context)
    assert torch.equal(continued[:, :3], context)
    assert continued.shape == (3, 4, 4, 4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"block_size": 8}, "squares and tile 4 x 4 tokens but got block_size=8; choose one of 1, 4, 16"),
        ({"block_size": 9}, "choose one of 1, 4, 16"),
        ({"block_size": 0}, "block_size to be at least 1"),
        ({"patch_size": 3}, "patches that tile 8 x 8"),
        ({"rope_layout": "rows"}, "rope_layout to be one of 'blockdiag'"),
        ({"num_heads": 5}, "multiple of num_heads"),
    ],
)
def test_bad_configs(overrides, message):
    with pytest.raises(ValueError, match=message):
        arcore.create_model("acdit_tiny", **overrides)


def test_bad_video_blocks():
    with pytest.raises(ValueError, match="divide the 128 tokens of 8 frames but got block_size=48"):
        arcore.create_model("acdit_video_tiny", block_size=48)


def test_bad_inputs():
    model = make()
    clean, noisy, t, labels = batch(model)
    with pytest.raises(ValueError, match=r"clean and noisy blocks of shape \('B', 4, 4, 4\)"):
        model(clean[:, :3], noisy[:, :3], t[:, :3], labels)
    with pytest.raises(ValueError, match=r"times of shape \(2, 4\)"):
        model(clean, noisy, t[:, 0], labels)
    with pytest.raises(ValueError, match="t from -1 to 999"):
        model(clean, noisy, t + 1000, labels)
    with pytest.raises(ValueError, match=r"class ids from 0 to 10"):
        model(clean, noisy, t, labels + 20)
    with pytest.raises(TypeError, match="weights' dtype float32 but got bfloat16"):
        model(clean.bfloat16(), noisy.bfloat16(), t, labels)
    with pytest.raises(ValueError, match=r"latents of shape \('B', 1, 8, 8\)"):
        model.to_blocks(torch.randn(2, 4, 32, 32))
    cache = model.make_cache(2)
    for block in range(4):
        model.commit(clean[:, block], cache)
    with pytest.raises(ValueError, match="all 4 blocks are in the cache"):
        model.denoise(noisy[:, :1], t[:, :1], labels[:, None], cache)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in diffusers
@torch.no_grad()
def test_sampling_as_released():
    """The default solver and times are those of the released sampler, which makes its scheduler of DDIM's defaults."""
    diffusers = pytest.importorskip("diffusers")
    model = make(block_size=16).eval()
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(diffusers.DDIMScheduler().config)
    theirs.set_timesteps(25)
    assert theirs.timesteps[[0, 1, -1]].tolist() == [999, 959, 40]
    labels = torch.tensor([3, 5])
    x = RowNormals(row_seeds(7, 2)).draw(*model.block_shape)
    cache = model.make_cache(2, 2)
    classes = torch.stack([labels, torch.full_like(labels, model.null_class)], dim=1)
    for t in theirs.timesteps:
        rows = x.unsqueeze(1).expand(-1, 2, -1, -1)
        wanted, other = model.denoise(rows, t.expand(2, 2), classes, cache)[0].unbind(1)
        x = theirs.step(other + 1.5 * (wanted - other), t, x).prev_sample
    ours = generate_blocks(model, labels, seed=7)[:, 0]
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=3e-4)


def test_settings_of_the_trainer():
    video = make("acdit_video_tiny", nd_split="1_1_2")
    assert video.config.nd_split == (1, 1, 2)
    assert torch.equal(make(nd_split=(1, 1)).rope.cos, make().rope.cos)
    assert not torch.equal(make(nd_split=(3, 1)).rope.cos, make().rope.cos)
    assert not any("q_norm" in name for name in make(no_qk_norm=True).state_dict())
    for wrong in ("1_1", (1, 1), (0, 1, 1), "a_b_c", 3):
        with pytest.raises((TypeError, ValueError), match=r"nd_split to be (3 shares|a sequence)"):
            make("acdit_video_tiny", nd_split=wrong)
