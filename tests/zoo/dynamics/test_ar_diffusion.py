"""AR-Diffusion: the paper's claims, its published weights, the released quirks, its shapes and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.models import ARDiffusion
from arcore.schedules import add_noise

from ..conftest import shaken

RELEASED = {"temporal_causal": False, "residual_from_normed": True, "unit_tokens": True}


def make(**overrides: Any) -> ARDiffusion:
    torch.manual_seed(0)
    return shaken(arcore.create_model("ar_diffusion_tiny", **overrides)).eval()


def batch(model: ARDiffusion, rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shape = (rows, model.num_frames, *model.frame_shape)
    clean, eps = (torch.randn(shape, generator=generator) for _ in range(2))
    t = model.training_times(rows, generator=generator)
    return add_noise(model.schedule, clean, eps, t), t, torch.arange(rows)


@torch.no_grad()
@pytest.mark.parametrize("temporal_causal", [True, False])
def test_the_released_mask_leaks_the_future(temporal_causal):
    model = make(temporal_causal=temporal_causal)
    x, t, labels = batch(model)
    before = model(x, t, labels)
    assert before.std() > 0.1
    for changed in range(1, model.num_frames):
        other = x.clone()
        other[:, changed] += 1
        after = model(other, t, labels)
        assert torch.equal(after[:, :changed], before[:, :changed]) == temporal_causal
        assert (after[:, changed:] != before[:, changed:]).any(dim=(0, 2, 3)).all()
        later = t.clone()
        later[:, changed] = 999 - t[:, changed]
        assert torch.equal(model(x, later, labels)[:, :changed], before[:, :changed]) == temporal_causal


@torch.no_grad()
def test_one_block_does_not_leak():
    """The leak goes through the context, so it takes two blocks: under either mask a row sees no later frame."""
    model = make(temporal_causal=False, depth=1)
    x, t, labels = batch(model)
    other = x.clone()
    other[:, -1] += 1
    assert torch.equal(model(other, t, labels)[:, :-1], model(x, t, labels)[:, :-1])


def test_masks():
    context, tokens, frames = 4, 16, 8
    place = torch.arange(context + frames * tokens)
    frame = torch.where(place < context, -1, (place - context) // tokens)
    looks_back = frame[:, None] >= frame
    assert torch.equal(make().mask.to_bool()[0, 0], looks_back)
    assert torch.equal(make(temporal_causal=False).mask.to_bool()[0, 0], looks_back | (frame[:, None] < 0))


@torch.no_grad()
def test_behind_a_cache_nothing_changes():
    """Any split into kept and merely denoised frames; what is only denoised leaves the cache as it was."""
    model = make()
    x, t, labels = batch(model)
    whole = model(x, t, labels)
    cache = model.make_cache(2)
    model.start(labels, cache)
    for first, last, keep in ((0, 3, 1), (1, 2, 0), (1, 6, 3), (4, 8, 4)):
        part = model.denoise(x[:, first:last], t[:, first:last], cache, keep=keep)
        assert (part - whole[:, first:last]).abs().max() <= 1e-5
        assert cache.length == 4 + 16 * (first + keep)


@torch.no_grad()
def test_a_clean_frame_is_read_at_the_cleanest_time():
    model = make()
    x, t, labels = batch(model)
    t[:, 0] = 0
    expected = model(x, t, labels)
    t[:, 0] = -1
    assert torch.equal(model(x, t, labels), expected)


def official(model: ARDiffusion, state: dict[str, Tensor], x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """The released architecture from its formulas, on a checkpoint by its own names, with a square bool mask."""
    config = model.config
    rows, frames, length, _ = x.shape
    heads, width = config.num_heads, config.embed_dim // config.num_heads
    first = context.shape[1]

    def linear(name, x):
        return F.linear(
            x, state[f"diffusion_model.model.{name}.weight"], state[f"diffusion_model.model.{name}.bias"]
        )

    def normed(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

    total = first + frames * length
    allowed = torch.ones(total, total, dtype=torch.bool)
    for q in range(first, total):
        for k in range(first, total):
            allowed[q, k] = (k - first) // length <= (q - first) // length
    waves = t.double()[..., None] * torch.exp(-math.log(1e4) * torch.arange(128, dtype=torch.float64) / 128)
    waves = torch.cat([waves.cos(), waves.sin()], -1).float()
    cond = F.silu(linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", waves))))
    video = linear("x_embedder", x.flatten(1, 2)) + state["diffusion_model.model.pos_embed"]
    y = torch.cat([linear("c_embedder", context), video], dim=1)
    for layer in range(config.depth):
        name = f"blocks.{layer}"
        vectors = linear(f"{name}.adaLN_modulation.1", cond).repeat_interleave(length, dim=1)
        blank = torch.zeros(rows, first, vectors.shape[-1])
        shift1, scale1, gate1, shift2, scale2, gate2 = torch.cat([blank, vectors], dim=1).chunk(6, -1)
        gate1, gate2 = gate1.clone(), gate2.clone()
        gate1[:, :first] = gate2[:, :first] = 1
        y = normed(y)
        qkv = linear(f"{name}.attn.qkv", y * (1 + scale1) + shift1)
        q, k, v = qkv.reshape(rows, total, 3, heads, width).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / width**0.5).masked_fill(~allowed, -math.inf).softmax(-1)
        y = y + gate1 * linear(f"{name}.attn.proj", (weights @ v).transpose(1, 2).reshape(y.shape))
        y = normed(y)
        z = linear(f"{name}.mlp.fc1", y * (1 + scale2) + shift2)
        y = y + gate2 * linear(f"{name}.mlp.fc2", F.gelu(z, approximate="tanh"))
    return linear("final_layer.1", normed(y[:, first:])).reshape(x.shape)


def official_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Learned weights of the published layout, without the prefix."""
    dim, hidden = config.embed_dim, round(config.embed_dim * config.mlp_ratio)
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.weight": (dim, config.channels),
        "t_embedder.mlp.0.weight": (dim, 256),
        "t_embedder.mlp.2.weight": (dim, dim),
        "c_embedder.weight": (dim, config.context_dim),
        "final_layer.1.weight": (config.channels, dim),
    }
    for layer in range(config.depth):
        for part, shape in {
            "attn.qkv": (3 * dim, dim),
            "attn.proj": (dim, dim),
            "mlp.fc1": (hidden, dim),
            "mlp.fc2": (dim, hidden),
            "adaLN_modulation.1": (6 * dim, dim),
        }.items():
            shapes[f"blocks.{layer}.{part}.weight"] = shape
    biases = {key.replace("weight", "bias"): shape[:1] for key, shape in shapes.items()}
    return shapes | biases


def official_state(model: ARDiffusion, context: str) -> dict[str, Tensor]:
    """Random weights with all that a published file holds, written down independently of our renaming."""
    config, generator = model.config, torch.Generator().manual_seed(4)

    def draw(shape):
        return torch.randn(shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) > 1 else 5)

    prefix = "diffusion_model."
    state = {f"{prefix}model.{key}": draw(shape) for key, shape in official_shapes(config).items()}
    place = torch.arange(config.frames * config.tokens, dtype=torch.float64)[:, None]
    half = config.embed_dim // 2
    angles = place / 10000 ** (torch.arange(half, dtype=torch.float64) / half)
    state[f"{prefix}model.pos_embed"] = torch.cat([angles.sin(), angles.cos()], 1)[None].float()
    rows = () if context == "context_emb" else (config.num_classes + 1,)
    state[context] = draw((*rows, config.context_tokens, config.context_dim))
    betas = torch.linspace(1e-4**0.5, 0.02**0.5, 1000, dtype=torch.float64) ** 2
    bars = (1 - betas).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), bars[:-1]])
    posterior = betas * (1 - before) / (1 - bars)
    for key, table in {
        "betas": betas,
        "alphas_cumprod": bars,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": bars.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - bars).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - bars).log(),
        "sqrt_recip_alphas_cumprod": (1 / bars).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / bars - 1).sqrt(),
        "posterior_variance": posterior,
        "posterior_log_variance_clipped": posterior.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - bars),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - bars),
        "logvar": torch.zeros(1000),
    }.items():
        state[prefix + key] = table.float()
    state["vae.encoder.latent_tokens"] = torch.randn(32, 8)
    return state


@torch.no_grad()
@pytest.mark.parametrize(
    ("context", "overrides"),
    [
        ("class_emb", {"null_context": "first"}),
        ("context_emb", {"null_context": "zero", "num_classes": 1}),
    ],
)
def test_published_weights_and_predictions(tmp_path, context, overrides):
    """A file of the released trainer, autoencoder and all, loads strictly and predicts the same frames."""
    safetensors = pytest.importorskip("safetensors.torch")
    state = official_state(make(**overrides), context)
    safetensors.save_file(state, tmp_path / "model.safetensors")
    # The folder is a checkpoint of accelerate.
    model = arcore.create_model("ar_diffusion_tiny", weights=tmp_path, **RELEASED, **overrides).eval()
    x, t, labels = batch(model)
    rows = state[context].view(-1, *state[context].shape[-2:])
    wanted = torch.stack([rows[0] for _ in labels]) if len(rows) == 1 else rows[labels]
    labels = labels.clamp(max=model.config.num_classes - 1)
    expected = official(model, state, x, t, wanted)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(x, t, labels), expected, rtol=1e-4, atol=2e-5)
    null = torch.full_like(labels, model.null_class)
    unconditional = torch.zeros_like(wanted) if context == "context_emb" else rows[torch.zeros_like(labels)]
    expected = official(model, state, x, t, unconditional)
    torch.testing.assert_close(model(x, t, null), expected, rtol=1e-4, atol=2e-5)
    for flag in ("temporal_causal", "residual_from_normed"):
        proper = {**RELEASED, flag: not RELEASED[flag]}
        other = arcore.create_model("ar_diffusion_tiny", weights=tmp_path, **proper, **overrides).eval()
        assert (other(x, t, null) - expected).abs().max() > 1e-3


def test_files_that_do_not_fit(tmp_path):
    model = make()
    state = official_state(model, "class_emb")

    def load(**changes: Tensor | None) -> None:
        content = {key: value for key, value in (state | changes).items() if value is not None}
        torch.save(content, tmp_path / "file.pt")
        arcore.create_model("ar_diffusion_tiny", weights=tmp_path / "file.pt")

    load()
    with pytest.raises(ValueError, match="1 missing"):
        load(**{"diffusion_model.model.blocks.0.attn.qkv.bias": None})
    with pytest.raises(ValueError, match="its betas are not those of 8 frames and 1000 steps"):
        load(**{"diffusion_model.betas": torch.linspace(1e-4, 0.02, 1000)})
    with pytest.raises(ValueError, match="its positions are not those"):
        load(**{"diffusion_model.model.pos_embed": torch.zeros(1, 128, 128)})
    with pytest.raises(ValueError, match="1 unexpected"):
        load(**{"diffusion_model.model.rotary_emb.freqs": torch.zeros(32)})


@pytest.mark.parametrize(("name", "rows"), [("ar_diffusion_xl", 1), ("ar_diffusion_xl_ucf101", 102)])
def test_published_sizes(name, rows):
    [info] = [info for info in arcore.model_info(name).presets if info.name == name]
    learned = sum(math.prod(shape) for shape in official_shapes(info.config).values())
    assert info.parameters == learned + rows * 77 * 768


@torch.no_grad()
@pytest.mark.parametrize(("kind", "rows", "null"), [("learned", 11, 10), ("zero", 10, 10), ("first", 11, 0)])
def test_context_of_no_class(kind, rows, null):
    context = make(null_context=kind).context
    assert (len(context.weight), context.null_class) == (rows, null)
    expected = torch.zeros_like(context.weight[0]) if kind == "zero" else context.weight[null]
    assert torch.equal(context(torch.tensor([null]))[0], expected)
    assert torch.equal(context(torch.tensor([3]))[0], context.weight[3])


@torch.no_grad()
def test_classes_are_dropped_in_training_only():
    model = make(class_drop=0.25)
    labels = torch.full((4000,), 3)
    torch.manual_seed(0)
    dropped = (model.context.train()(labels) == model.context.weight[10]).all(dim=(1, 2))
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert not (model.context.eval()(labels) == model.context.weight[10]).all(dim=(1, 2)).any()


def test_videos_and_frames():
    model = make()
    videos = torch.randn(2, 8, 1, 16, 16)
    frames = model.to_frames(videos)
    assert frames.shape == (2, 8, 16, 16)
    assert torch.equal(frames[0, 3, 5].view(4, 4), videos[0, 3, 0, 4:8, 4:8])
    assert torch.equal(model.to_pixels(frames), videos)
    assert torch.equal(model.to_pixels(frames[:, :3]), videos[:, :3])


def test_unit_tokens():
    model = make(unit_tokens=True, patch_size=None)
    tokens = torch.randn(2, 8, 16, 16)
    frames = model.to_frames(tokens)
    torch.testing.assert_close(frames.norm(dim=-1), torch.ones(2, 8, 16))
    torch.testing.assert_close(model.to_pixels(frames).norm(dim=-1), torch.full((2, 8, 16), 2.0))
    torch.testing.assert_close(frames, tokens / tokens.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"frames": 1}, "frames to be at least 2 but got 1"),
        ({"tokens": 0}, "tokens to be at least 1"),
        ({"tokens": 15}, "square number of patches of 4 x 4 pixels but got tokens=15 and channels=16"),
        ({"channels": 24}, "tokens=16 and channels=24"),
        ({"null_context": "none"}, "null_context to be one of 'learned', 'zero', 'first' but got 'none'"),
        ({"class_drop": 1.5}, "class_drop to be from 0 to 1 but got 1.5"),
        ({"num_heads": 5}, "multiple of num_heads"),
    ],
)
def test_bad_configs(overrides, message):
    with pytest.raises(ValueError, match=message):
        arcore.create_model("ar_diffusion_tiny", **overrides)


def test_bad_inputs():
    model = make()
    x, t, labels = batch(model)
    with pytest.raises(ValueError, match=r"frames of shape \('B', 8, 16, 16\) with a time each"):
        model(x[:, :3], t[:, :3], labels)
    with pytest.raises(ValueError, match=r"times of shape \(2,\)"):
        model(x, t[:, 0], labels)
    with pytest.raises(ValueError, match=r"labels of shape \(2,\)"):
        model(x, t, labels[:1])
    with pytest.raises(ValueError, match="t from -1 to 999"):
        model(x, t + 1000, labels)
    with pytest.raises(ValueError, match=r"class ids from 0 to 10 \(10 means no class\)"):
        model(x, t, labels + 20)
    with pytest.raises(TypeError, match="weights' dtype float32 but got bfloat16"):
        model(x.bfloat16(), t, labels)
    with pytest.raises(ValueError, match=r"videos of shape \('B', 'F', 1, 16, 16\)"):
        model.to_frames(torch.randn(2, 8, 3, 16, 16))
    with pytest.raises(ValueError, match="encoder of frames, which arcore does not have"):
        _ = arcore.models.get_config("ar_diffusion_xl").image_size


def test_bad_caches():
    model = make()
    x, t, labels = batch(model)
    cache = model.make_cache(2)
    with pytest.raises(ValueError, match="a cache that `start` has begun"):
        model.denoise(x, t, cache)
    model.start(labels, cache)
    with pytest.raises(ValueError, match="expected an empty cache but it holds 4 tokens"):
        model.start(labels, cache)
    with pytest.raises(ValueError, match="keep from 0 to 8 but got 9"):
        model.denoise(x, t, cache, keep=9)
    model.denoise(x, t, cache, keep=8)
    with pytest.raises(ValueError, match="132 tokens are in the cache and 1 frames follow"):
        model.denoise(x[:, :1], t[:, :1], cache)
    with pytest.raises(ValueError, match="to cache anything, use temporal_causal=True"):
        make(temporal_causal=False).start(labels, cache)
