"""RoMA: the paper's claim, and the published checkpoints' names, shapes and arithmetic."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.data import adaptive_rotation, load_digits, load_photos
from arcore.models import RoMA, RoMAConfig, load_weights
from arcore.nn.patches import cluster_order, patchify
from arcore.objectives import next_cluster_loss, next_cluster_targets

pytest.importorskip("sklearn")

SMALL = {
    "embed_dim": 24,
    "depth": 6,
    "decoder_dim": 128,
    "image_size": 24,
    "patch_size": 4,
    "cluster": 2,
    "block": 3,
    "d_state": 4,
}


def shaken_model(**changes: object) -> RoMA:
    model = RoMA(RoMAConfig(**SMALL | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def official_shapes(config: RoMAConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the files that the authors publish."""
    c, d, n, states = config.embed_dim, config.decoder_dim, config.side**2, config.d_state
    length, hidden, rank = n - config.cluster**2, c * 8 // 3, math.ceil(c / 16)
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, n, c),
        "angle_embed": (1, 1, c),
        "ar_token": (1, 1, d),
        "dec_pos_embed": (1, n, d),
        "mask": (length, length),
        "patch_embed.proj.weight": (c, config.in_channels, config.patch_size, config.patch_size),
        "patch_embed.proj.bias": (c,),
        "enc2dec.weight": (4 * d, 4 * c),
        "enc2dec.bias": (4 * d,),
        "ar_norm.weight": (d,),
        "ar_norm.bias": (d,),
        "ar_pred.weight": (config.patch_values, d),
        "ar_pred.bias": (config.patch_values,),
    }
    for tap in range(1, 5):
        shapes |= {f"norm_{tap}.{part}": (c,) for part in ("weight", "bias")}
    for i in range(config.depth):
        layer = {
            "mixer.A_log": (c, states),
            "mixer.D": (c,),
            "mixer.in_proj.weight": (2 * c, c),
            "mixer.conv1d.weight": (c, 1, 4),
            "mixer.conv1d.bias": (c,),
            "mixer.x_proj.weight": (rank + 2 * states, c),
            "mixer.dt_proj.weight": (c, rank),
            "mixer.dt_proj.bias": (c,),
            "mixer.out_proj.weight": (c, c),
            "mlp.w1.weight": (hidden, c),
            "mlp.w1.bias": (hidden,),
            "mlp.w2.weight": (hidden, c),
            "mlp.w2.bias": (hidden,),
            "mlp.w3.weight": (c, hidden),
            "mlp.w3.bias": (c,),
        }
        layer |= {f"norm{k}.{part}": (c,) for k in (1, 2) for part in ("weight", "bias")}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    for j in range(4):
        block = {
            "attn2.q.weight": (d, d),
            "attn2.q.bias": (d,),
            "attn2.kv.weight": (2 * d, d),
            "attn2.kv.bias": (2 * d,),
            "attn2.proj.weight": (d, d),
            "attn2.proj.bias": (d,),
            "mlp.fc1.weight": (4 * d, d),
            "mlp.fc1.bias": (4 * d,),
            "mlp.fc2.weight": (d, 4 * d),
            "mlp.fc2.bias": (d,),
        }
        block |= {f"norm2{k}.{part}": (d,) for k in ("", "_1", "_2") for part in ("weight", "bias")}
        shapes |= {f"dec_block.{j}.{name}": shape for name, shape in block.items()}
    return shapes


def textbook_positions(side: int, dim: int) -> Tensor:
    """Sine and cosine of the column, then of the row, at rates 10000^(-k / (dim / 4))."""
    rates = [10000 ** (-4 * k / dim) for k in range(dim // 4)]
    rows = [
        [wave(place * rate) for place in (column, row) for wave in (math.sin, math.cos) for rate in rates]
        for row in range(side)
        for column in range(side)
    ]
    return torch.tensor(rows).unsqueeze(0)


def official_weights(config: RoMAConfig) -> dict[str, Tensor]:
    """Random weights in that form."""
    state = {name: 0.3 * torch.randn(shape) for name, shape in official_shapes(config).items()}
    state["pos_embed"] = textbook_positions(config.side, config.embed_dim)
    state["dec_pos_embed"] = textbook_positions(config.side, config.decoder_dim)
    blocks = torch.full((config.side**2 // config.cluster**2 - 1,) * 2, -math.inf).triu(1)
    tokens = config.cluster**2
    state["mask"] = blocks.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    return state


def textbook_forward(w: dict[str, Tensor], config: RoMAConfig, images: Tensor, marked: Tensor) -> Tensor:
    """The published forward pass from its formulas: a dense mask, and the scan token by token.

    `marked` is bool `[B, G, G]`: the patches that the angle embedding is added to.
    """

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        out = x @ w[f"{name}.weight"].T
        return out + w[f"{name}.bias"] if f"{name}.bias" in w else out

    def silu(x: Tensor) -> Tensor:
        return x * x.sigmoid()

    def mamba(x: Tensor, name: str) -> Tensor:
        u, z = linear(x, f"{name}.in_proj").chunk(2, -1)
        taps = w[f"{name}.conv1d.weight"][:, 0]
        early = F.pad(u, (0, 0, 3, 0))
        u = silu(sum(early[:, k : k + x.shape[1]] * taps[:, k] for k in range(4)) + w[f"{name}.conv1d.bias"])
        rank, states = w[f"{name}.dt_proj.weight"].shape[1], w[f"{name}.A_log"].shape[1]
        low, b, c = linear(u, f"{name}.x_proj").split([rank, states, states], -1)
        delta = (1 + linear(low, f"{name}.dt_proj").exp()).log()
        a = -w[f"{name}.A_log"].exp()
        state, out = torch.zeros(len(x), *a.shape, dtype=x.dtype), []
        for t in range(x.shape[1]):
            step = delta[:, t, :, None]
            state = (step * a).exp() * state + step * b[:, t, None] * u[:, t, :, None]
            out.append((state * c[:, t, None]).sum(-1) + w[f"{name}.D"] * u[:, t])
        return linear(torch.stack(out, 1) * silu(z), f"{name}.out_proj")

    side, s, d = config.side, config.cluster, config.decoder_dim
    order = [
        (s * row + i) * side + s * column + j
        for row in range(side // s)
        for column in range(side // s)
        for i in range(s)
        for j in range(s)
    ]
    pixels = images.unfold(2, config.patch_size, config.patch_size).unfold(
        3, config.patch_size, config.patch_size
    )
    pixels = pixels.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = pixels @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"] + w["pos_embed"]
    x = (x + marked.flatten(1)[:, :, None] * w["angle_embed"])[:, order[: -s * s]]
    taps = {12: (6, 8, 10, 12), 24: (12, 16, 20, 24), 6: (3, 4, 5, 6)}[config.depth]
    tapped = []
    for i in range(config.depth):
        x = x + mamba(norm(x, f"layers.{i}.norm1"), f"layers.{i}.mixer")
        h = norm(x, f"layers.{i}.norm2")
        gated = silu(linear(h, f"layers.{i}.mlp.w1")) * linear(h, f"layers.{i}.mlp.w2")
        x = x + linear(gated, f"layers.{i}.mlp.w3")
        if i + 1 in taps:
            tapped.append(norm(x, f"norm_{len(tapped) + 1}"))
    features = linear(torch.cat(tapped, -1), "enc2dec")
    q = (w["ar_token"] + w["dec_pos_embed"])[:, order[s * s :]].expand(len(images), -1, -1)
    for j in range(4):
        b = f"dec_block.{j}"

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (d // 64, 64)).transpose(1, 2)

        kv = norm(features[..., j::4], f"{b}.norm2_2")
        keys, values = map(heads, linear(kv, f"{b}.attn2.kv").chunk(2, -1))
        scores = heads(linear(norm(q, f"{b}.norm2_1"), f"{b}.attn2.q")) @ keys.transpose(-1, -2) / 8
        mixed = (scores + w["mask"]).softmax(-1) @ values
        q = q + linear(mixed.transpose(1, 2).flatten(2), f"{b}.attn2.proj")
        h = linear(norm(q, f"{b}.norm2"), f"{b}.mlp.fc1")
        q = q + linear(h * 0.5 * (1 + (h / math.sqrt(2)).erf()), f"{b}.mlp.fc2")
    return linear(norm(q, "ar_norm"), "ar_pred")


def cluster_pixels(config: RoMAConfig, cluster: int) -> tuple[slice, slice]:
    """Where the pixels of a cluster are."""
    side = config.cluster * config.patch_size
    top, left = (side * part for part in divmod(cluster, config.image_size // side))
    return slice(top, top + side), slice(left, left + side)


def train(model: RoMA, images: Tensor, *, steps: int, batch_size: int, lr: float) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10) * (1 - step / steps)
        batch = images[torch.randint(len(images), (batch_size,), generator=generator)]
        seen = adaptive_rotation(batch, 4, generator=generator)
        loss = next_cluster_loss(model(seen.images, seen.windows), batch, patch_size=4).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()


@torch.no_grad()
def held_out_error(model: RoMA, images: Tensor) -> float:
    model.eval()
    return next_cluster_loss(model(images), images, patch_size=4).patches.item()


def _clusters(config: RoMAConfig) -> list[tuple[slice, slice]]:
    return [cluster_pixels(config, cluster) for cluster in range((config.side // config.cluster) ** 2)]


@pytest.mark.slow
def test_predictions_beat_the_best_that_ignores_the_image():
    """The mean patch of each place, over all training images, is what a model without context could know."""
    model = arcore.create_model("roma_tiny")
    images, test = (load_digits(split, image_size=48).images for split in ("train", "test"))
    train(model, images, steps=300, batch_size=32, lr=3e-3)
    targets = next_cluster_targets(test, patch_size=4)
    of_the_place = (targets - next_cluster_targets(images, patch_size=4).mean(0)).square().mean().item()
    assert held_out_error(model, test) < 0.5 * of_the_place


@pytest.mark.parametrize("quirks", [False, True])
def test_no_gradient_from_the_future(quirks: bool):
    """The loss of cluster s + 1 depends on input pixels of clusters 0..s, and exactly not on later ones."""
    model = shaken_model(official_quirks=quirks)
    photos = load_photos("test", image_size=24).images[::100]
    windows = torch.tensor([[1, 0, 3]] * len(photos))
    clusters = _clusters(model.config)
    targets = next_cluster_targets(photos, patch_size=4, cluster=2)
    for segment in range(8):
        images = photos.clone().requires_grad_()
        tokens = slice(4 * segment, 4 * segment + 4)
        (model(images, windows)[:, tokens] - targets[:, tokens]).square().mean().backward()
        for cluster, (rows, columns) in enumerate(clusters):
            gradient = images.grad[:, :, rows, columns]
            if cluster > segment:
                assert not gradient.any(), (segment, cluster)
            else:
                assert gradient.abs().amax((1, 2, 3)).min() > 0, (segment, cluster)


@pytest.mark.parametrize(
    ("preset", "millions", "encoder", "keys"),
    [
        ("arm_tiny_pz16", 19.9, 5.2, 313),
        ("arm_small_pz16", 36.6, 20.3, 313),
        ("arm_base_pz16", 99.4, 80.0, 313),
        ("arm_large_pz16", 303.9, 282.5, 541),
        ("arm_huge_pz16", 659.4, 633.7, 541),
    ],
)
def test_published_sizes(preset: str, millions: float, encoder: float, keys: int):
    with torch.device("meta"):
        model = arcore.create_model(preset)
    shapes = official_shapes(model.config)
    assert len(shapes) == keys
    assert model.mask.nq == model.mask.nk == 128
    assert model.mask.density == 0.5625
    # The authors count the fixed positions as parameters.
    counts = {name: value.numel() for name, value in model.state_dict().items()}
    assert sum(counts.values()) / 1e6 == pytest.approx(millions, abs=0.05)
    own = sum(
        n for name, n in counts.items() if name.startswith(("layers.", "patch_embed.", "pos_", "angle"))
    )
    assert own / 1e6 == pytest.approx(encoder, abs=0.1)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    for name in ("mask", "pos_embed", "dec_pos_embed"):
        state.pop(name)
    renamed = model.from_official(state) | {
        "pos_embed": model.pos_embed,
        "dec_pos_embed": model.dec_pos_embed,
    }
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in model.state_dict().items()}


def save_official(weights: dict[str, Tensor], file: Path) -> None:
    """As the authors' trainer saves."""
    args = argparse.Namespace(model="arm_base_pz16", lr=None, blr=1.5e-4, use_fm=[-1], dist_on_itp=False)
    optimizer = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}},
        "param_groups": [{"lr": 0.1, "params": [0]}],
    }
    scaler = {"scale": 65536.0, "growth_tracker": 4}
    torch.save({"model": weights, "optimizer": optimizer, "epoch": 3, "scaler": scaler, "args": args}, file)


@torch.no_grad()
@pytest.mark.parametrize("quirks", [False, True])
def test_published_checkpoint_gives_published_arithmetic(tmp_path: Path, quirks: bool):
    config = RoMAConfig(**SMALL, official_quirks=quirks)
    weights = official_weights(config)
    save_official(weights, tmp_path / "checkpoint-3.pth")
    model = RoMA(config).eval()
    load_weights(model, tmp_path / "checkpoint-3.pth")
    images = load_photos("test", image_size=24).images[::180][:4]
    windows = torch.tensor([[0, 2, 3], [3, 3, 2], [0, 0, 0], [4, 1, 1]])
    marked = torch.zeros(len(images), 6, 6, dtype=torch.bool)
    for row, (top, left, size) in enumerate(windows.tolist()):
        if quirks:
            # The released code divides the corner by the patch size again, and its index is the sum of both offsets.
            for i in range(size):
                marked[row].view(-1)[(left // 4 + i) * 6 + top // 4 + i] = True
        else:
            marked[row, top : top + size, left : left + size] = True
    double = {name: value.double() for name, value in weights.items()}
    expected = textbook_forward(double, config, images.double(), marked)
    assert expected.std() > 0.1
    out = model(images, windows)
    assert out.dtype == torch.float32
    tolerance = 2e-5 * expected.abs().max().item()
    torch.testing.assert_close(out, expected.float(), rtol=0, atol=tolerance)
    # The embedding matters, so marking other patches would show.
    assert (model(images) - out).abs().amax((1, 2))[0] > 100 * tolerance


def test_published_checkpoint_of_another_model_is_refused(tmp_path: Path):
    config = RoMAConfig(**SMALL)
    weights, file = official_weights(config), tmp_path / "checkpoint-3.pth"
    save_official(weights | {"mask": torch.zeros(32, 32)}, file)
    with pytest.raises(ValueError, match=r"checkpoint-3\.pth do not fit: they are for another mask"):
        load_weights(RoMA(config), file)
    save_official(weights | {"pos_embed": weights["pos_embed"].flip(1)}, file)
    with pytest.raises(ValueError, match="pos_embed is not the table of 6 x 6 positions"):
        load_weights(RoMA(config), file)
    save_official({k: v for k, v in weights.items() if k != "norm_3.bias"}, file)
    with pytest.raises(ValueError, match=r"1 missing \(tap_norms\.2\.bias\)"):
        load_weights(RoMA(config), file)
    save_official(weights, file)
    with pytest.raises(ValueError, match="do not fit"):
        load_weights(RoMA(RoMAConfig(**SMALL | {"embed_dim": 32})), file)


def test_a_checkpoint_may_hold_a_namespace_but_no_other_object(tmp_path: Path):
    config = RoMAConfig(**SMALL)
    weights, file = official_weights(config), tmp_path / "checkpoint-3.pth"
    torch.save({"model": weights, "args": argparse.Namespace(path=Path("x"), lr=0.1)}, file)
    load_weights(RoMA(config), file)
    torch.save({"model": weights, "args": argparse.Namespace(path=range(3).__iter__())}, file)
    with pytest.raises(ValueError, match="hold more than tensors and plain values, which is not read"):
        load_weights(RoMA(config), file)


@torch.no_grad()
def test_a_perfect_prediction_is_drawn_as_the_image():
    model = shaken_model()
    photos = load_photos("test", image_size=24).images[:3]
    drawn = model.reconstruct(photos, next_cluster_targets(photos, patch_size=4, cluster=2))
    torch.testing.assert_close(drawn, photos, rtol=0, atol=1e-5)
    flat = model.reconstruct(photos, torch.zeros(3, 32, 48))
    assert torch.equal(flat[:, :, :8, :8], photos[:, :, :8, :8])
    means = patchify(photos, 4)[:, cluster_order(6, 2)[4:]].mean(-1)
    torch.testing.assert_close(patchify(flat, 4)[:, cluster_order(6, 2)[4:]].mean(-1), means)


@torch.no_grad()
def test_images_are_read_cluster_by_cluster():
    model = shaken_model()
    photos = load_photos("test", image_size=24).images[:2]
    windows = torch.tensor([[0, 2, 3], [1, 1, 4]])
    cache = model.make_cache(2)
    parts = [
        model.predict_next(photos[:, :, rows, columns], cache, windows)
        for rows, columns in _clusters(model.config)[:-1]
    ]
    torch.testing.assert_close(torch.cat(parts, 1), model(photos, windows), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="at most 8 clusters: the last one predicts nothing"):
        model.predict_next(photos[:, :, 16:, 16:], cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
@torch.no_grad()
def test_half_precision_weights_give_float32_predictions(dtype: torch.dtype):
    model = RoMA(RoMAConfig(**SMALL)).eval()
    images = load_photos("test", image_size=24).images[:2]
    expected = model(images)
    out = model.to(dtype)(images.to(dtype))
    assert out.dtype == torch.float32
    assert (out - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize(
    ("shape", "dtype", "windows", "kind", "message"),
    [
        ((2, 3, 24, 20), torch.float32, None, ValueError, r"images of shape \('B', 3, 24, 24\)"),
        ((2, 1, 24, 24), torch.float32, None, ValueError, r"got \(2, 1, 24, 24\)"),
        ((2, 3, 24, 24), torch.uint8, None, TypeError, "floating dtype but got uint8; scale them"),
        ((2, 3, 24, 24), torch.float64, None, TypeError, "dtype float32 but got float64"),
        (
            (2, 3, 24, 24),
            torch.float32,
            torch.zeros(1, 3, dtype=torch.int64),
            ValueError,
            r"windows of shape \(2, 3\)",
        ),
    ],
)
def test_bad_arguments(
    shape: tuple, dtype: torch.dtype, windows: Tensor | None, kind: type[Exception], message: str
):
    with pytest.raises(kind, match=message):
        RoMA(RoMAConfig(**SMALL))(torch.zeros(shape, dtype=dtype), windows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 30}, "embed_dim to be a multiple of 4 but got 30"),
        ({"depth": 8}, "depth to be a multiple of 6 but got 8"),
        ({"depth": 0}, "depth to be a multiple of 6 but got 0"),
        ({"decoder_dim": 96}, "decoder_dim to be a multiple of 64"),
        ({"in_channels": 0}, "in_channels to be at least 1"),
        ({"image_size": 28}, "clusters of 2 x 2 patches to tile the image"),
        ({"block": 4}, "blocks of 4 x 4 patches to tile"),
        ({"block": 1}, "block >= cluster"),
        ({"block": 6}, "several blocks of 6 x 6"),
    ],
)
def test_bad_configs(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        RoMAConfig(**SMALL | change)
