"""VAR: the paper's claim, and the published checkpoints' names, shapes and arithmetic."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore import masks
from arcore.catalog.claims import shaken
from arcore.decoding import generate_next_scale
from arcore.models import VAR, VARConfig, load_weights

SMALL = {
    "depth": 2,
    "embed_dim": 32,
    "num_heads": 2,
    "num_classes": 5,
    "vocab_size": 24,
    "z_channels": 8,
    "patch_nums": (1, 2, 3),
}


def official_shapes(config: VARConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the files that the authors publish."""
    c, heads, length = config.embed_dim, config.num_heads, sum(p * p for p in config.patch_nums)
    shapes: dict[str, tuple[int, ...]] = {
        "pos_start": (1, config.patch_nums[0] ** 2, c),
        "pos_1LC": (1, length, c),
        "lvl_1L": (1, length),
        "attn_bias_for_masking": (1, 1, length, length),
        "word_embed.weight": (c, config.z_channels),
        "word_embed.bias": (c,),
        "class_emb.weight": (config.num_classes + 1, c),
        "lvl_embed.weight": (len(config.patch_nums), c),
        "head_nm.ada_lin.1.weight": (2 * c, c),
        "head_nm.ada_lin.1.bias": (2 * c,),
        "head.weight": (config.vocab_size, c),
        "head.bias": (config.vocab_size,),
    }
    if config.shared_adaln:
        shapes |= {"shared_ada_lin.1.weight": (6 * c, c), "shared_ada_lin.1.bias": (6 * c,)}
    for i in range(config.depth):
        block: dict[str, tuple[int, ...]] = {
            "attn.scale_mul_1H11": (1, heads, 1, 1),
            "attn.q_bias": (c,),
            "attn.v_bias": (c,),
            "attn.zero_k_bias": (c,),
            "attn.mat_qkv.weight": (3 * c, c),
            "attn.proj.weight": (c, c),
            "attn.proj.bias": (c,),
            "ffn.fc1.weight": (4 * c, c),
            "ffn.fc1.bias": (4 * c,),
            "ffn.fc2.weight": (c, 4 * c),
            "ffn.fc2.bias": (c,),
        }
        block |= (
            {"ada_gss": (1, 1, 6, c)}
            if config.shared_adaln
            else {"ada_lin.1.weight": (6 * c, c), "ada_lin.1.bias": (6 * c,)}
        )
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes


def official_weights(config: VARConfig) -> dict[str, Tensor]:
    """Random weights in that form."""
    state = {name: 0.3 * torch.randn(shape) for name, shape in official_shapes(config).items()}
    levels = torch.tensor([k for k, p in enumerate(config.patch_nums) for _ in range(p * p)])
    state["lvl_1L"] = levels.unsqueeze(0)
    state["attn_bias_for_masking"] = torch.where(levels[:, None] >= levels[None, :], 0.0, -math.inf)[
        None, None
    ]
    for name, value in state.items():
        if name.endswith("zero_k_bias"):
            value.zero_()
    return state


def textbook_forward(w: dict[str, Tensor], config: VARConfig, inputs: Tensor, labels: Tensor) -> Tensor:
    """The published forward pass, written out from its formulas with dense attention."""

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def heads(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], config.num_heads, -1).transpose(1, 2)

    cond = w["class_emb.weight"][labels]
    silu = cond * cond.sigmoid()
    x = torch.cat([cond[:, None] + w["pos_start"], linear(inputs, "word_embed")], dim=1)
    x = x + w["lvl_embed.weight"][w["lvl_1L"][0]] + w["pos_1LC"]
    for i in range(config.depth):
        b = f"blocks.{i}"
        if config.shared_adaln:
            six = linear(silu, "shared_ada_lin.1").view(-1, 1, 6, config.embed_dim) + w[f"{b}.ada_gss"]
            gate1, gate2, scale1, scale2, shift1, shift2 = six.unbind(2)
        else:
            gate1, gate2, scale1, scale2, shift1, shift2 = linear(silu, f"{b}.ada_lin.1")[:, None].chunk(
                6, -1
            )
        h = norm(x) * (1 + scale1) + shift1
        q, k, v = (h @ w[f"{b}.attn.mat_qkv.weight"].T).chunk(3, -1)
        q, k, v = heads(q + w[f"{b}.attn.q_bias"]), heads(k), heads(v + w[f"{b}.attn.v_bias"])
        q = q / q.norm(dim=-1, keepdim=True) * w[f"{b}.attn.scale_mul_1H11"].clamp(max=math.log(100)).exp()
        k = k / k.norm(dim=-1, keepdim=True)
        weights = (q @ k.transpose(-1, -2) + w["attn_bias_for_masking"]).softmax(-1)
        x = x + gate1 * linear((weights @ v).transpose(1, 2).flatten(2), f"{b}.attn.proj")
        h = linear(norm(x) * (1 + scale2) + shift2, f"{b}.ffn.fc1")
        h = h * 0.5 * (1 + (math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)).tanh())
        x = x + gate2 * linear(h, f"{b}.ffn.fc2")
    scale, shift = linear(silu, "head_nm.ada_lin.1")[:, None].chunk(2, -1)
    return linear(norm(x) * (1 + scale) + shift, "head")


@pytest.mark.parametrize(
    ("preset", "keys", "millions"),
    [
        ("var_d16", 220, 310.28),
        ("var_d20", 272, 600.92),
        ("var_d30", 402, 2010.02),
        ("var_d36", 446, 2353.89),
    ],
)
def test_published_sizes(preset: str, keys: int, millions: float):
    with torch.device("meta"):
        model = arcore.create_model(preset)
    shapes = official_shapes(model.config)
    assert len(shapes) == keys
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    derived = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")
    renamed = model.from_official({k: v for k, v in state.items() if not k.endswith(derived)})
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert [name for name, _ in model.named_buffers()] == []


@torch.no_grad()
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_published_checkpoint_gives_published_arithmetic(tmp_path: Path, nested: bool, shared: bool):
    config = VARConfig(**SMALL, shared_adaln=shared)
    weights = official_weights(config)
    file = tmp_path / "var.pth"
    trainer = {"var_wo_ddp": weights, "vae_local": {"x": torch.zeros(1)}, "var_opt": {"state": {}}}
    torch.save(
        {"trainer": trainer, "args": {"depth": 2, "saln": shared}, "epoch": 3, "iter": 7}
        if nested
        else weights,
        file,
    )
    model = VAR(config).eval()
    load_weights(model, file)
    inputs, labels = torch.randn(2, 13, 8), torch.tensor([1, 5])
    expected = textbook_forward(weights, config, inputs, labels)
    assert expected.std() > 0.1
    torch.testing.assert_close(
        model(inputs, labels), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
    )


def test_published_checkpoint_of_another_model_is_refused(tmp_path: Path):
    config = VARConfig(**SMALL)
    weights = official_weights(config)
    file = tmp_path / "var.pth"
    torch.save(weights, file)
    with pytest.raises(
        ValueError, match=r"var\.pth do not fit: they are for other scales than patch_nums=\(1, 2, 4\)"
    ):
        load_weights(VAR(VARConfig(**SMALL | {"patch_nums": (1, 2, 4)})), file)
    torch.save(weights | {"attn_bias_for_masking": torch.zeros(1, 1, 14, 14)}, file)
    with pytest.raises(ValueError, match="another mask"):
        load_weights(VAR(config), file)
    torch.save(weights | {"blocks.1.attn.zero_k_bias": torch.ones(32)}, file)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.zero_k_bias is not zero"):
        load_weights(VAR(config), file)


@torch.no_grad()
def test_plain_attention_scale():
    """Without cosine attention the published logits are scaled by 0.25 / sqrt(head_dim)."""
    model = VAR(VARConfig(**SMALL | {"attn_l2_norm": False}))
    attn = model.blocks[0].attn
    assert not any("log_scale" in name for name in model.state_dict())
    x = torch.randn(1, 5, 32)
    q, k, v = (F.linear(x, w).view(1, 5, 2, 16).transpose(1, 2) for w in attn.qkv.weight.chunk(3))
    mixed = (q @ k.transpose(-1, -2) * (0.25 / 4)).softmax(-1) @ v
    expected = attn.proj(mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(attn(x, masks.full(5, 5)), expected)


def test_initial_weights():
    model = VAR(VARConfig(**SMALL | {"embed_dim": 256, "num_heads": 4, "gate_init": 1e-5}))
    std = math.sqrt(1 / 768)
    assert model.word_embed.weight.std().item() == pytest.approx(std, rel=0.05)
    assert model.class_embed.weight.std().item() == pytest.approx(std, rel=0.1)
    assert model.head.linear.weight.std().item() == pytest.approx(0.02 * std, rel=0.05)
    block = model.blocks[1]
    assert block.ffn.fc1.weight.std().item() == pytest.approx(std, rel=0.05)
    assert block.ffn.fc2.weight.std().item() == pytest.approx(std / 2, rel=0.05)
    assert block.attn.proj.weight.std().item() == pytest.approx(std / 2, rel=0.05)
    gates, rest = block.modulation.linear.weight.split([512, 1024])
    assert gates.std().item() == pytest.approx(1e-5 * std, rel=0.05)
    assert rest.std().item() == pytest.approx(0.5 * std, rel=0.05)
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_classes_are_dropped_in_training_only():
    model = VAR(VARConfig(**SMALL | {"class_drop": 1.0}))
    with torch.no_grad():
        model.class_embed.weight.normal_()
        model.head.linear.weight.normal_()
    inputs, labels = torch.randn(2, 13, 8), torch.tensor([0, 3])
    with torch.no_grad():
        assert torch.equal(model(inputs, labels), model(inputs, torch.tensor([5, 5])))
        model.eval()
        assert not torch.equal(model(inputs, labels), model(inputs, torch.tensor([5, 5])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_weights_give_float32_logits(dtype: torch.dtype):
    model = VAR(VARConfig(**SMALL)).eval()
    inputs, labels = torch.randn(2, 13, 8), torch.tensor([0, 3])
    expected = model(inputs, labels)
    half = model.to(dtype)
    out = half(inputs.to(dtype), labels)
    assert out.dtype == torch.float32
    assert (out - expected).abs().max() < 0.05 * expected.abs().max() + 1e-3
    assert half.make_cache(1).keys.dtype == dtype


def test_under_autocast_the_cache_is_of_its_type_and_nothing_else_changes(monkeypatch):
    model = shaken(arcore.create_model("var_tiny")).eval()
    tokenizer = arcore.create_model("msvq_tiny").eval()

    def drawn():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model.make_cache(1).keys.dtype == kept
            return generate_next_scale(model, tokenizer, torch.tensor([3]), seed=2).indices

    kept = torch.bfloat16
    ours = drawn()
    # Kept in float32, keys and values are rounded at each call instead.
    monkeypatch.setattr("arcore.zoo.next_scale.var.storage_dtype", lambda like: like.dtype)
    kept = torch.float32
    assert all(map(torch.equal, ours, drawn()))
    assert model.make_cache(1).keys.dtype == torch.float32


def test_the_modulation_is_made_once_for_an_image(monkeypatch):
    model = shaken(arcore.create_model("var_tiny")).eval()
    tokenizer = arcore.create_model("msvq_tiny").eval()
    counted = []
    for block in model.blocks:
        block.modulation.register_forward_hook(lambda *_: counted.append(1))
    labels = torch.tensor([3, 1])
    ours = generate_next_scale(model, tokenizer, labels, seed=2).indices
    assert len(counted) == len(model.blocks)
    with monkeypatch.context() as patched:
        patched.setattr("arcore.zoo.next_scale.var.modulate_once", lambda cond, cache, make: make(cond))
        assert all(map(torch.equal, ours, generate_next_scale(model, tokenizer, labels, seed=2).indices))
    # Other labels, and other rows, are seen.
    with torch.no_grad():
        cache = model.make_cache(2)
        first = model.scale_logits(0, None, labels, cache)
        cache.truncate(0)
        assert not torch.equal(first, model.scale_logits(0, None, labels.flip(0), cache))
        cache.truncate(0)
        cache.select([1, 0])
        assert not cache.notes
        torch.testing.assert_close(model.scale_logits(0, None, labels, cache), first, rtol=0, atol=0)


def test_autocast_gives_float32_logits_and_gradients():
    model = VAR(VARConfig(**SMALL))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(torch.randn(2, 13, 8), torch.tensor([0, 3]))
    assert out.dtype == torch.float32
    out.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("inputs", "labels", "kind", "message"),
    [
        (
            torch.zeros(2, 12, 8),
            [0, 1],
            ValueError,
            r"expected inputs of shape \(2, 13, 8\).*got \(2, 12, 8\)",
        ),
        (torch.zeros(2, 13, 7), [0, 1], ValueError, r"z_channels=8, but got \(2, 13, 7\)"),
        (torch.zeros(1, 13, 8), [0, 1], ValueError, r"expected inputs of shape \(2, 13, 8\)"),
        (
            torch.zeros(2, 13, 8, dtype=torch.int64),
            [0, 1],
            TypeError,
            "floating dtype but got int64; make them",
        ),
        (torch.zeros(2, 13, 8, dtype=torch.float64), [0, 1], TypeError, "dtype float32 but got float64"),
        (torch.zeros(2, 13, 8), [0, 6], ValueError, r"class ids from 0 to 5 \(5 means no class\) but got 6"),
        (torch.zeros(2, 13, 8), [-1, 2], ValueError, "but got -1"),
        (torch.zeros(2, 13, 8), [0.0, 2.0], TypeError, "labels of dtype int64 but got float32"),
        (torch.zeros(2, 13, 8), [[0], [2]], ValueError, r"labels of shape \[B\] but got \(2, 1\)"),
    ],
)
def test_bad_arguments(inputs: Tensor, labels: list, kind: type[Exception], message: str):
    with pytest.raises(kind, match=message):
        VAR(VARConfig(**SMALL))(inputs, torch.tensor(labels))


def test_bad_steps():
    model, labels = VAR(VARConfig(**SMALL)).eval(), torch.tensor([0])
    cache = model.make_cache(1)
    with pytest.raises(ValueError, match="got scale 1 while the cache holds 0 tokens"):
        model.scale_logits(1, torch.zeros(1, 4, 8), labels, cache)
    with pytest.raises(ValueError, match="got scale -1"):
        model.scale_logits(-1, None, labels, cache)
    with pytest.raises(ValueError, match="scale 0 got some"):
        model.scale_logits(0, torch.zeros(1, 1, 8), labels, cache)
    model.scale_logits(0, None, labels, cache)
    with pytest.raises(ValueError, match="scale 1 got None"):
        model.scale_logits(1, None, labels, cache)
    with pytest.raises(ValueError, match=r"expected inputs of shape \(1, 4, 8\)"):
        model.scale_logits(1, torch.zeros(1, 9, 8), labels, cache)
    with pytest.raises(ValueError, match="B=1"):
        model.scale_logits(1, torch.zeros(2, 4, 8), torch.tensor([0, 1]), cache)
    model.scale_logits(1, torch.zeros(1, 4, 8), labels, cache)
    cache.truncate(1)
    model.scale_logits(1, torch.zeros(1, 4, 8), labels, cache)
    assert cache.length == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "expected depth to be at least 1 but got 0"),
        ({"patch_nums": (1, 3, 2)}, r"growing side lengths, coarse to fine, but got \(1, 3, 2\)"),
        ({"patch_nums": ()}, "growing side lengths"),
        ({"patch_nums": (0, 1)}, "growing side lengths"),
        ({"num_heads": 3}, "multiple of num_heads but got dim=32 and num_heads=3"),
        ({"drop_path": 1.0}, "expected 0 <= rate < 1 but got 1.0"),
        ({"class_drop": -0.1}, "class_drop to be from 0 to 1 but got -0.1"),
    ],
)
def test_bad_configs(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        VAR(VARConfig(**SMALL | change))
