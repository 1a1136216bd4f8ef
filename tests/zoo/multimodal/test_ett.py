"""ETT: gradients through the tokenizer, captions with a cache, runs from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arcore
from arcore.catalog import create_model, load_checkpoint
from arcore.catalog.claims import shaken
from arcore.training import train
from arcore.zoo.multimodal.ett.model import BEGIN, END, caption_loss, read_codes

SETTINGS = {"steps": 2, "batch_size": 32, "checkpoint_every": 2, "accelerator": "cpu", "warmup": 0}


class Protocol:
    """How the model contract drives it."""

    def __init__(self, preset: str) -> None:
        self.config = arcore.models.get_config(preset)
        self.vectors = torch.randn(3, self.config.num_codes, self.config.code_channels)
        self.captions = torch.randint(BEGIN, (3, 9))

    def forward(self, model: Any) -> Tensor:
        return model(self.vectors, self.captions)

    def expected_shape(self) -> tuple[int, ...]:
        return (3, 9, END + 1)

    def loss(self, model: Any) -> Tensor:
        return caption_loss(model, self.vectors, self.captions)

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        language = model.language
        begin = torch.full((3, 1), BEGIN)
        x = torch.cat([model.projector(self.vectors), language.embed(begin)], 1)
        mask, angles = language.behind((0,), x.shape[1], x.device)
        cache = language.make_cache(3, x.shape[1] + 9)
        parts = [language.logits(language.run(x, angles, mask, cache)[:, -1])]
        cache.commit(x.shape[1])
        parts += [language.step(self.captions[:, t], cache) for t in range(8)]
        return self.forward(model), torch.stack(parts, 1)

    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        texts = model.captions(self.vectors[rows])
        drawn = torch.tensor([list(text.ljust(64, b"\0")) for text in texts])
        return [drawn], model(self.vectors[rows], self.captions[rows]).softmax(-1)


def test_captions_are_the_likeliest_bytes_one_by_one():
    model = shaken(create_model("ett_tiny", max_caption=6), scale=0.3).eval()
    vectors = torch.randn(3, 49, 8)
    texts = model.captions(vectors)
    for row in range(3):
        said: list[int] = []
        while len(said) < 6:
            read = torch.tensor([[*said, 0]])
            token = int(model(vectors[row : row + 1], read)[0, -1].argmax())
            said.append(token)
            if token == END:
                break
        assert texts[row] == bytes(byte for byte in said if byte < BEGIN)
    assert model.captions(vectors[:0]) == []


def test_bytes_and_padding():
    model = create_model("ett_tiny", max_caption=6)
    ids = model.encode(["ab", "é"])
    assert ids.tolist() == [[97, 98, END], [0xC3, 0xA9, END]]
    assert model.encode(["a", "abc"]).tolist() == [[97, END, -100, -100], [97, 98, 99, END]]
    with pytest.raises(ValueError, match="at most 5 bytes but one has 6"):
        model.encode(["abcdef"])
    vectors = torch.randn(2, 49, 8)
    padded, plain = model.encode(["a", "abc"]), model.encode(["a"])
    parts = [caption_loss(model, vectors[:1], plain) * 2, caption_loss(model, vectors[1:], padded[1:]) * 4]
    torch.testing.assert_close(caption_loss(model, vectors, padded), sum(parts) / 6)


def test_the_gradient_of_the_caption_passes_the_quantiser():
    torch.manual_seed(0)
    tokenizer, model = create_model("vq16_tiny").eval(), create_model("ett_tiny")
    images = torch.rand(2, 1, 28, 28) * 2 - 1
    captions = model.encode(["one", "two"])
    vectors, drawn, _ = read_codes(tokenizer, images)
    torch.testing.assert_close(
        drawn.clamp(-1, 1), tokenizer.decode(tokenizer.encode(images)), rtol=1e-4, atol=1e-5
    )
    given = vectors.detach().requires_grad_()
    [wanted] = torch.autograd.grad(caption_loss(model, given, captions), given)
    latent = tokenizer.quant_conv(tokenizer.encoder(images)).flatten(2).transpose(1, 2)
    latent = latent.detach().requires_grad_()
    F.normalize(latent, dim=-1).backward(wanted)
    captured = []
    hook = tokenizer.quant_conv.register_full_backward_hook(lambda _, __, grads: captured.append(grads[0]))
    caption_loss(model, read_codes(tokenizer, images)[0], captions).backward()
    hook.remove()
    torch.testing.assert_close(captured[0].flatten(2).transpose(1, 2), latent.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("vectors", "captions", "words"),
    [
        (torch.zeros(2, 48, 8), torch.zeros(2, 3, dtype=torch.int64), "vectors of shape"),
        (torch.zeros(2, 49, 8), torch.zeros(3, 3, dtype=torch.int64), "captions of shape"),
        (torch.zeros(2, 49, 8), torch.full((2, 3), 900), "captions"),
    ],
)
def test_wrong_input_is_named(vectors: Tensor, captions: Tensor, words: str):
    with pytest.raises(ValueError, match=words):
        create_model("ett_tiny")(vectors, captions)


def test_a_run_tunes_both_and_names_pictures(tmp_path: Path, capsys: Any):
    from PIL import Image

    from arcore.cli import main

    quiet = {"data": "digits", "image_size": 8, "show_progress": False}
    tokenizer = train("vq16_tiny", out=tmp_path / "vq", settings=SETTINGS, **quiet).checkpoint
    options = {"tokenizer": tokenizer, **quiet}
    result = train("ett_tiny", out=tmp_path / "run", settings=SETTINGS | {"lr": 1e-2}, **options).checkpoint
    before, after = (load_checkpoint(path)[0]["tokenizer"] for path in (tokenizer, result))
    assert not torch.equal(before.encoder.conv_in.weight, after.encoder.conv_in.weight)
    first = train(
        "ett_tiny", out=tmp_path / "first", settings=SETTINGS, projector_steps=2, **options
    ).checkpoint
    networks = load_checkpoint(first)[0]
    assert torch.equal(before.encoder.conv_in.weight, networks["tokenizer"].encoder.conv_in.weight)
    Image.new("L", (30, 28), 90).save(tmp_path / "x.png")
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "run"), "--images", str(tmp_path / "x.png")]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'x.png'}\t")
    assert main(["sample", str(tmp_path / "run")]) == 2
    assert "give a picture or a folder" in capsys.readouterr().err
