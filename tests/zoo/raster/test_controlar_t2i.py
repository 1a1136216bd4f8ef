"""ControlAR for captions: the released layout, DINOv2 against transformers, decoding, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.catalog.claims import shaken
from arcore.cli import main
from arcore.decoding import AboveDrafter, generate, jacobi, speculative_tree
from arcore.zoo.raster.controlar.dinov2 import Dinov2
from arcore.zoo.raster.controlar_t2i import ControlARText, ControlARTextConfig
from arcore.zoo.raster.llamagen_t2i import LlamaGenText, LlamaGenTextConfig
from tests.zoo.raster.test_llamagen_t2i import Protocol as TextProtocol
from tests.zoo.raster.test_llamagen_t2i import published as published_text
from tests.zoo.raster.test_llamagen_t2i import transcription

CONFIG = ControlARTextConfig(
    dim=64, num_layers=3, num_heads=4, vocab_size=32, side=4, caption_tokens=7, caption_dim=24, encoder_dim=12,
    encoder_layers=2, encoder_heads=3, encoder_grid=5,
)  # fmt: skip


class Protocol(TextProtocol):
    """Codes in raster order behind captions, with control images."""

    def __init__(self, preset: str) -> None:
        super().__init__(preset)
        self.control = torch.randint(2, (3, 3, 128, 128)).float() * 2 - 1

    def forward(self, model: Any) -> Tensor:
        return model(self.codes, self.captions, self.mask, self.control)

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        bound = model.captioned(self.captions, self.mask).controlled(self.control)
        cache = bound.make_cache(3, self.config.caption_tokens + self.length)
        parts = [bound.prefill(bound.prompt(torch.zeros(3)), cache, self.mask)]
        parts += [bound.step(self.codes[:, i], cache) for i in range(self.length - 1)]
        return self.forward(model), torch.stack(parts, dim=1)


# What transformers calls the projections since version 5, and in the released files.
RENAMED = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}


def released(name: str, back: bool = False) -> str:
    """The name of a parameter of DINOv2 in the released files, or the other way round."""
    for new, old in RENAMED.items():
        name = name.replace(old, new) if back else name.replace(new, old)
    return name


def theirs_from(encoder: Any, state: dict[str, Tensor]) -> Any:
    """Transformers' model with weights under the released names."""
    back = "attention.q_proj" in "".join(encoder.state_dict())
    encoder.load_state_dict({released(name, True) if back else name: value for name, value in state.items()})
    return encoder.eval()


def published(config: ControlARTextConfig) -> dict[str, Tensor]:
    """Random weights under the released names, with those of transformers' DINOv2."""
    transformers = pytest.importorskip("transformers")
    state = published_text(config)
    dim, inner = config.dim, config.encoder_dim
    encoder = transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=inner, num_hidden_layers=config.encoder_layers, num_attention_heads=config.encoder_heads,
            patch_size=14, image_size=14 * config.encoder_grid,
        )
    )  # fmt: skip
    for name, value in encoder.state_dict().items():
        state[f"adapter.model.{released(name)}"] = 0.3 * torch.randn_like(value)
    for name, shape in {
        "adapter_mlp.fc1.weight": (dim, inner),
        "adapter_mlp.fc2.weight": (dim, dim),
        "condition_mlp.cap_proj.fc1.weight": (dim, dim),
        "condition_mlp.cap_proj.fc2.weight": (dim, dim),
        "condition_mlp.uncond_embedding": (16, dim),
        "condition_embeddings.weight": (config.vocab_size, dim),
        **{f"condition_layers.{j}.fc{k}.weight": (dim, dim) for j in range(3) for k in (1, 2)},
    }.items():
        state[name] = 0.2 * torch.randn(shape)
    return state


@torch.no_grad()
def test_the_published_layout_gives_the_numbers_of_a_transcription(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    state = published(CONFIG)
    torch.save(state, tmp_path / "t2i.pt")
    fields = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
    model: Any = arcore.create_model("controlar_t2i_tiny", weights=tmp_path / "t2i.pt", **fields).eval()
    codes, captions = torch.randint(32, (2, 16)), torch.randn(2, 7, 24)
    mask = torch.arange(7) >= torch.tensor([[0], [4]])
    control = torch.randint(2, (2, 3, 64, 64)).float() * 2 - 1
    encoder = transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=12, num_hidden_layers=2, num_attention_heads=3, patch_size=14, image_size=70
        )
    )
    prefix = "adapter.model."
    theirs_from(encoder, {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    seen = encoder(F.interpolate(control, size=(56, 56), mode="nearest")).last_hidden_state[:, 1:].double()

    def mlp(x: Tensor, name: str) -> Tensor:
        inner = F.gelu(x @ state[f"{name}.fc1.weight"].double().T, approximate="tanh")
        return inner @ state[f"{name}.fc2.weight"].double().T

    shared = mlp(mlp(seen, "adapter_mlp"), "condition_mlp.cap_proj")
    added = [{j: mlp(row, f"condition_layers.{j}") for j in range(3)} for row in shared]
    text = {k: v for k, v in state.items() if not k.startswith(("adapter", "condition"))}
    expected = torch.stack(
        [transcription(text, CONFIG, *row) for row in zip(codes, captions, mask, added, strict=True)]
    )
    assert (model(codes, captions, mask, control) - expected).abs().max() <= 1e-5 * expected.abs().max()
    bound = model.captioned(captions, mask).controlled(control)
    prompt = bound.prompt(torch.zeros(2))
    cache = bound.make_cache(2, 7 + 16)
    parts = [bound.prefill(prompt, cache, mask)] + [bound.step(codes[:, i], cache) for i in range(15)]
    assert (torch.stack(parts, 1) - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("side", [5, 4, 7])
def test_dinov2_is_that_of_transformers_at_any_size(side: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, patch_size=14, image_size=70
    )
    theirs = shaken(transformers.Dinov2Model(config)).eval()
    ours = Dinov2(12, 2, 3, grid=5).eval()
    ours.load_state_dict({released(name): value for name, value in theirs.state_dict().items()})
    images = torch.randn(2, 3, 14 * side, 14 * side)
    expected = theirs(images).last_hidden_state[:, 1:]
    torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_drafts_and_guidance_follow_the_control() -> None:
    model: Any = shaken(ControlARText(CONFIG)).eval()
    captions, mask = torch.randn(2, 7, 24), torch.arange(7) >= torch.tensor([[1], [5]])
    control = torch.randint(2, (2, 3, 64, 64)).float() * 2 - 1
    bound = model.captioned(captions, mask).controlled(control)
    prompt = bound.prompt(torch.zeros(2))
    options: dict[str, Any] = {"mask": mask, "max_new_tokens": 16, "top_k": 3, "seed": 1}
    for one in (bound, bound.guided(2.0)):
        plain = generate(one, prompt, **options).ids
        assert torch.equal(jacobi(one, prompt, window=4, coupling="common", **options).ids, plain)
        assert torch.equal(speculative_tree(one, AboveDrafter(4, 3), prompt, **options).ids, plain)
    other = model.captioned(captions, mask).controlled(-control)
    assert not torch.equal(generate(other, prompt, **options).ids, generate(bound, prompt, **options).ids)
    none = model.captioned(captions, mask)
    weak = none.controlled(control, 0.0)
    assert torch.equal(generate(weak, prompt, **options).ids, generate(none, prompt, **options).ids)


def test_a_new_model_is_its_base_and_sizes_are_the_published_ones() -> None:
    base = shaken(
        LlamaGenText(
            LlamaGenTextConfig(
                dim=64, num_layers=3, num_heads=4, vocab_size=32, side=4, caption_tokens=7, caption_dim=24
            )
        )
    ).eval()
    model: Any = ControlARText(CONFIG).eval()
    model.start_from(base)
    codes, captions = torch.randint(32, (2, 16)), torch.randn(2, 7, 24)
    control = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(codes, captions, None, control), base(codes, captions))
    with torch.device("meta"):
        large = ControlARText(arcore.models.get_config("controlar_t2i_canny"))
    assert large.adapter_mlp.fc1.weight.shape == (1280, 384)
    assert large.config.control_layers == (0, 12, 24)
    assert sum(p.numel() for p in large.adapter.parameters()) / 1e6 == pytest.approx(22.06, abs=0.1)


def test_refuses_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ControlARText(CONFIG)
    codes, captions = torch.zeros(1, 16, dtype=torch.int64), torch.zeros(1, 7, 24)
    with pytest.raises(ValueError, match="control images of shape"):
        model(codes, captions, None, torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="a control image for each of 1 rows but got 2"):
        model(codes, captions, None, torch.zeros(2, 3, 64, 64))
    with pytest.raises(ValueError, match="resize to be nearest or bicubic"):
        arcore.models.get_config("controlar_t2i_tiny", resize="linear")
    tokenizer = arcore.create_model("vq16_tiny")
    fields = {"vocab_size": tokenizer.vocab_size, "side": tokenizer.side}
    run = tmp_path / "run"
    made = shaken(ControlARText(arcore.models.get_config("controlar_t2i_tiny", **fields)))
    arcore.models.save_checkpoint(run, {"model": made, "tokenizer": tokenizer}, {})
    torch.save({"captions": torch.randn(1, 6, 16)}, tmp_path / "one.pt")
    image = pytest.importorskip("PIL.Image")
    size = made.image_size
    image.new("L", (size, size), 255).save(tmp_path / "edge.png")
    image.new("L", (9, 9), 255).save(tmp_path / "small.png")
    asked = [
        "sample",
        str(run),
        "--captions",
        str(tmp_path / "one.pt"),
        "-n",
        "2",
        "--out",
        str(tmp_path / "x.png"),
    ]
    assert main([*asked, "--control", str(tmp_path / "edge.png")]) == 0
    assert main([*asked, "--control", str(tmp_path / "small.png")]) == 2
    assert "scale it" in capsys.readouterr().err
    assert main(asked) == 2
    assert "--control FILE" in capsys.readouterr().err
