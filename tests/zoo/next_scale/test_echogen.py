"""EchoGen: the control branch's arithmetic and names, content that is read once, guidance, the command line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arcore.catalog import create_model, load_checkpoint, load_weights
from arcore.catalog.claims import shaken
from arcore.data import load_digits
from arcore.recipes import recipe_for
from arcore.training import train
from arcore.zoo.next_scale.echogen.model import EchoGen, EchoGenConfig, Reference
from arcore.zoo.next_scale.echogen.references import SubjectScenes, published_encoders, reference_side
from arcore.zoo.next_scale.infinity.config import InfinityConfig
from arcore.zoo.next_scale.infinity.draw import draw_bits
from arcore.zoo.next_scale.infinity.model import Infinity, bit_loss
from arcore.zoo.next_scale.infinity.text import Text
from tests.zoo.next_scale import test_infinity as base

SMALL: dict[str, Any] = {
    **base.SMALL,
    "semantic_dim": 10,
    "semantic_length": 4,
    "content_dim": 5,
    "content_length": 6,
}


class Protocol(base.Protocol):
    """How the model contract drives it."""

    def __init__(self, preset: str) -> None:
        super().__init__(preset)
        config = self.config
        self.reference = Reference(
            torch.randn(3, config.semantic_length, config.semantic_dim),
            torch.randn(3, config.content_length, config.content_dim),
        )
        two = torch.tensor([False, False, True])
        self.dropped = (self.dropped, two, two)

    def forward(self, model: Any) -> Tensor:
        return model(self.inputs, self.text, self.reference)

    def loss(self, model: Any) -> Tensor:
        return bit_loss(model(self.inputs, self.text, self.reference, self.dropped), self.bits)

    def told(self, model: Any, rows: list[int]) -> Any:
        reference = Reference(self.reference.semantic[rows], self.reference.content[rows])
        return model.tell(Text(self.text.vectors[rows], self.text.lengths[rows]), None, reference)


def official_shapes(config: EchoGenConfig, chunks: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the file that the authors publish."""
    c, hidden = config.embed_dim, config.mlp_dim
    shapes = base.official_shapes(config, chunks)
    shapes |= {
        "control_features_uncond": (config.semantic_length, config.semantic_dim),
        "control_features_refer_uncond": (config.content_length, config.content_dim),
        "control_proj_for_sos.weight": (c, config.semantic_dim),
        "control_proj_for_sos.bias": (c,),
        "control_pos_start": (1, 1, c),
    }
    for name, width in (
        ("control_proj_for_ca", config.semantic_dim),
        ("control_proj_for_ca_refer", config.content_dim),
    ):
        shapes |= {f"{name}.0.weight": (c, width), f"{name}.0.bias": (c,)}
        shapes |= {f"{name}.2.weight": (c, c), f"{name}.2.bias": (c,)}
    for name in (
        "control_shared_ada_lin",
        "control_shared_ada_lin_refer",
        "control_shared_ada_lin_refer_dino",
    ):
        shapes |= {f"{name}.1.weight": (6 * c, c), f"{name}.1.bias": (6 * c,)}
    block: dict[str, tuple[int, ...]] = {
        "sa.control_scale_mul_1H11": (1, config.num_heads, 1, 1),
        "sa.control_q_bias": (c,),
        "sa.control_v_bias": (c,),
        "sa.control_zero_k_bias": (c,),
        "sa.control_mat_q.weight": (c, c),
        "sa.control_mat_kv.weight": (2 * c, c),
        "sa.control_proj.weight": (c, c),
        "sa.control_proj.bias": (c,),
        "sa.control_attn.weight": (c, c),
        "ca.control_mat_kv.weight": (2 * c, c),
        "ca.control_v_bias": (c,),
        "control_ca.v_bias": (c,),
        "control_ca.zero_k_bias": (c,),
        "control_ca.mat_q.weight": (c, c),
        "control_ca.mat_q.bias": (c,),
        "control_ca.mat_kv.weight": (2 * c, c),
        "control_ca.proj.weight": (c, c),
        "control_ca.proj.bias": (c,),
        "control_ca_norm.weight": (c,),
        "control_ca_norm.bias": (c,),
        "control_ffn.fc1.weight": (hidden, c),
        "control_ffn.fc1.bias": (hidden,),
        "control_ffn.fc2.weight": (c, hidden),
        "control_ffn.fc2.bias": (c,),
        "control_ada_gss": (1, 1, 6, c),
    }
    per = config.depth // chunks
    for i in range(config.depth):
        prefix = f"block_chunks.{i // per}.module.{i % per}" if chunks > 1 else f"blocks.{i}"
        shapes |= {f"{prefix}.{name}": shape for name, shape in block.items()}
    return shapes


def official_weights(config: EchoGenConfig) -> dict[str, Tensor]:
    """Random weights in that form."""
    state = {name: 0.3 * torch.randn(shape) for name, shape in official_shapes(config, 1).items()}
    return {name: value * 0 if name.endswith("zero_k_bias") else value for name, value in state.items()}


class Textbook(base.Textbook):
    """The published forward pass with a reference, written out from its formulas."""

    def joint(self, inputs: Tensor, text: Tensor, semantic: Tensor, content: Tensor) -> Tensor:
        w, config = self.w, self.config
        pooled, context = self.read(text)
        summary = self.linear(semantic[0], "control_proj_for_sos")

        def projected(x: Tensor, name: str) -> Tensor:
            return self.linear(F.gelu(self.linear(x, f"{name}.0"), approximate="tanh"), f"{name}.2")

        patches = projected(semantic[1:], "control_proj_for_ca")
        content = projected(content, "control_proj_for_ca_refer")
        six = lambda x, name: self.linear(F.silu(x), f"{name}.1").view(6, -1)  # noqa: E731
        of_image = six(pooled, "shared_ada_lin") + six(summary, "control_shared_ada_lin")
        of_content = six(pooled, "control_shared_ada_lin_refer")
        of_content = of_content + six(summary, "control_shared_ada_lin_refer_dino")
        front = summary + w["control_pos_start"][0]
        x = torch.cat([front, pooled + w["pos_start"][0], self.linear(inputs, "word_embed")])
        level = self.scales(front=1)
        x = x + w["lvl_embed.weight"][level]
        allowed = torch.where(level[:, None] >= level[None], 0.0, -math.inf)
        places = base.places_of(config.patch_nums, config.grid)
        places = [places[0], *places]
        for i in range(config.depth):
            b = f"blocks.{i}"
            gate1, gate2, scale1, scale2, shift1, shift2 = of_image + w[f"{b}.ada_gss"][0, 0]
            g1, g2, s1, s2, h1, h2 = of_content + w[f"{b}.control_ada_gss"][0, 0]
            q, k, v = self.qkv(base.norm(x) * (1 + scale1) + shift1, b, places)
            h = base.norm(content) * (1 + s1) + h1
            warm = w[f"{b}.sa.control_scale_mul_1H11"][0].clamp(max=math.log(100)).exp()
            q_c = self.heads(self.linear(h, f"{b}.sa.control_mat_q") + w[f"{b}.sa.control_q_bias"])
            k_c, v_c = self.keys(h, f"{b}.sa.control_mat_kv", f"{b}.sa.control_v_bias")
            q_c, k_c = self.unit(q_c) * warm, self.unit(k_c)
            own, read = self.soft(q, k, v, 1.0, allowed), self.soft(q, k_c, v_c, 1.0)
            x = x + gate1 * self.linear(own + self.linear(read, f"{b}.sa.control_attn"), f"{b}.sa.proj")
            content = content + g1 * self.linear(self.soft(q_c, k_c, v_c, 1.0), f"{b}.sa.control_proj")
            of_text = self.keys(context, f"{b}.ca.mat_kv")
            of_patches = self.keys(patches, f"{b}.ca.control_mat_kv", f"{b}.ca.control_v_bias")
            both = [torch.cat(pair, 1) for pair in zip(of_text, of_patches, strict=True)]
            x = x + self.cross(self.affine(x, f"{b}.ca_norm"), f"{b}.ca", both)
            told = self.keys(context, f"{b}.control_ca.mat_kv")
            content = content + self.cross(
                self.affine(content, f"{b}.control_ca_norm"), f"{b}.control_ca", told
            )
            x = x + gate2 * self.ffn(base.norm(x) * (1 + scale2) + shift2, f"{b}.ffn")
            content = content + g2 * self.ffn(base.norm(content) * (1 + s2) + h2, f"{b}.control_ffn")
        return self.logits(x[1:], pooled)


def references(rows: int) -> Reference:
    return Reference(torch.randn(rows, 4, 10), torch.randn(rows, 6, 5))


@torch.no_grad()
def test_published_checkpoint_gives_published_arithmetic(tmp_path: Path):
    config = EchoGenConfig(**SMALL)
    state = official_weights(config)
    torch.save({"trainer": {"gpt_fsdp": state}}, tmp_path / "echogen.pth")
    model = EchoGen(config).eval()
    load_weights(model, tmp_path / "echogen.pth")
    inputs, vectors, lengths = torch.randn(3, 13, 6), torch.randn(3, 7, 24), torch.tensor([7, 1, 4])
    reference = references(3)
    assert reference.semantic is not None
    book = Textbook(state, config)
    found = model(inputs, Text(vectors, lengths), reference)
    for row, length in enumerate(lengths.tolist()):
        wanted = book.joint(
            inputs[row], vectors[row, :length], reference.semantic[row], reference.content[row]
        )
        torch.testing.assert_close(found[row], wanted, rtol=1e-5, atol=2e-4)


def test_published_sizes():
    with torch.device("meta"):
        model: Any = create_model("echogen_2b")
    state = {
        name: torch.empty(shape, device="meta")
        for name, shape in official_shapes(model.config, 8).items()
        if not name.endswith("zero_k_bias")
    }
    ours = model.from_official(state)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.fixture
def model() -> EchoGen:
    return shaken(EchoGen(EchoGenConfig(**SMALL)), scale=0.3).eval()


@torch.no_grad()
def test_content_is_read_once_and_never_reads_the_picture(model: EchoGen):
    text, reference = Text(torch.randn(2, 3, 24), torch.tensor([3, 2])), references(2)
    read: list[Tensor] = []
    for block in model.blocks:
        block.content_kv.register_forward_hook(lambda *_: read.append(torch.empty(0)))
        hook = block.read_content
        block.read_content = lambda *given, hook=hook: read.append(given[0]) or hook(*given)  # type: ignore[func-returns-value, method-assign]
    told = model.tell(text, None, reference)
    assert told.content is not None
    kept = [tuple(part.clone() for part in keys) for keys in told.content]
    count = len(read)
    assert count == model.config.depth
    cache = model.make_cache(2)
    for k, side in enumerate(model.patch_nums):
        model.scale_logits(k, None if k == 0 else torch.randn(2, side * side, 6), told, cache)
    assert len(read) == count
    for now, before in zip(told.content, kept, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(now, before, strict=True))


@torch.no_grad()
def test_a_silent_content_branch_is_the_base(model: EchoGen):
    text, reference = Text(torch.randn(2, 3, 24), torch.tensor([3, 2])), references(2)
    inputs = torch.randn(2, 13, 6)
    plain = Infinity(InfinityConfig(**base.SMALL)).eval()
    own = plain.state_dict().keys()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name in own})
    alone = Reference(None, reference.content)
    loud = model(inputs, text, alone)
    assert (loud - plain(inputs, text)).abs().max() > 0.01
    for block in model.blocks:
        block.content_attn.weight.zero_()
    assert torch.equal(model(inputs, text, alone), plain(inputs, text))
    # With it silent, only the semantic part of a reference matters.
    assert torch.equal(
        model(inputs, text, reference),
        model(inputs, text, Reference(reference.semantic, reference.content + 1)),
    )
    # A new model starts with the content silent.
    fresh = EchoGen(EchoGenConfig(**SMALL)).eval()
    fresh.start_from(plain)
    assert torch.equal(fresh(inputs, text, alone), plain(inputs, text))
    with pytest.raises(ValueError, match="depth=2 instead of 4"):
        fresh.start_from(Infinity(InfinityConfig(**{**base.SMALL, "depth": 2})))


@torch.no_grad()
def test_guidance_by_text_and_reference():
    tokenizer = shaken(create_model("msbsq_tiny")).eval()
    model: Any = shaken(create_model("echogen_tiny"), scale=0.3).eval()
    protocol = Protocol("echogen_tiny")
    text, reference = protocol.text, protocol.reference
    null, nothing = model.null(text.lengths), model.null_reference(3)
    alone = {
        (1.0, 1.0): model.tell(text, None, reference),
        (0.0, 1.0): model.tell(text, None, nothing),
        (0.0, 0.0): model.tell(null, None, nothing),
    }
    guided = model.guided(text, reference)
    for strengths, told in alone.items():
        both = [draw_bits(model, tokenizer, guided, guidance=strengths, seed=5)]
        both += [draw_bits(model, tokenizer, told, seed=5)]
        same = sum((one == two).sum().item() for one, two in zip(*(out.bits for out in both), strict=True))
        total = sum(part.numel() for part in both[0].bits)
        # Differences of logits near a draw's threshold may flip a bit, and what follows it.
        assert same / total > 0.99
    strong = draw_bits(model, tokenizer, guided, guidance=(2.5, 3.0), temperature=0.0)
    logits = model.scale_logits(0, None, guided, model.make_cache(9))
    full, middle, none = logits.chunk(3)
    mixed = none + 3.0 * (middle - none) + 2.5 * (full - middle)
    assert torch.equal(strong.bits[0], mixed[..., 1] > mixed[..., 0])


def test_scenes_show_the_subject_where_the_caption_says():
    scenes = SubjectScenes(load_digits("test", image_size=32))
    assert len(scenes.class_names) == 22
    for index in range(6):
        both, label = scenes[index]
        again, _ = scenes[index]
        assert torch.equal(both, again)
        scene, reference = both
        side = 0 if "digit on the left" in scenes.class_names[label] else 1
        half = scene[0, :, 16 * side : 16 * side + 16]
        subject = F.interpolate(
            scenes.pictures[index][0][None], size=(16, 16), mode="bilinear", antialias=True
        )[0, 0]
        distances = [(half[top : top + 16] - subject).abs().max().item() for top in range(17)]
        assert min(distances) < 1e-5
        assert reference.shape == scene.shape


def test_references_through_published_encoders(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    diffusers = pytest.importorskip("diffusers")
    dino = transformers.Dinov2Config(
        hidden_size=10, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    transformers.Dinov2Model(dino).save_pretrained(tmp_path / "dino")
    diffusers.AutoencoderKL(
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=5,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
    ).save_pretrained(tmp_path / "vae")
    config = EchoGenConfig(**{**SMALL, "semantic_length": 5, "content_length": 64})
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    found = published_encoders(images, tmp_path / "dino", tmp_path / "vae", config, 0)
    assert found.semantic is not None
    assert (found.semantic.shape, found.content.shape) == ((1, 5, 10), (1, 64, 5))
    with torch.device("meta"):
        sizes = [reference_side(create_model(name).config) for name in ("echogen_125m", "echogen_2b")]
    assert sizes == [256, 512]
    wrong = EchoGenConfig(**{**SMALL, "semantic_length": 5})
    with pytest.raises(ValueError, match=r"--content-encoder: expected tokens of shape \(6, 5\)"):
        published_encoders(images, tmp_path / "dino", tmp_path / "vae", wrong, 0)
    with pytest.raises(FileNotFoundError, match="--semantic-encoder"):
        published_encoders(images, tmp_path / "no", tmp_path / "vae", config, 0)


def test_from_the_command_line(tmp_path: Path, capsys: Any):
    from PIL import Image

    from arcore.cli import main

    first, run = tmp_path / "base", tmp_path / "run"
    data = base.pictures(tmp_path / "data")
    quiet = {"settings": base.SETTINGS, "show_progress": False, "data": data}
    train("infinity_tiny", out=first, tokenizer_steps=1, **quiet)
    train("echogen_tiny", out=run, base=first, **quiet)
    [before], [after] = list(first.glob("step-*")), list(run.glob("step-*"))
    kept, model = (load_checkpoint(folder)[0]["model"] for folder in (before, after))
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in kept.state_dict().items())
    [line] = recipe_for("echogen_tiny").finish(after, run)
    assert f"--reference {run / 'reference.png'} --prompt 'the subject on the left'" in line
    with Image.open(run / "reference.png") as picture:
        assert picture.size == (24, 24)
    Image.new("L", (30, 28), 90).save(tmp_path / "i.png")
    drawn = [
        "sample",
        str(run),
        "--prompt",
        "the subject on the left and a dog",
        "-n",
        "2",
        "--out",
        str(tmp_path / "x.png"),
    ]
    capsys.readouterr()
    assert main([*drawn, "--reference", str(tmp_path / "i.png")]) == 0
    assert "with the subject of" in capsys.readouterr().out
    assert main([*drawn, "--reference", str(tmp_path / "nowhere.png")]) == 2
    assert "nowhere.png" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds no infinity"):
        train("echogen_tiny", out=tmp_path / "z", base=run, **quiet)
