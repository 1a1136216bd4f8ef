"""X-Omni: the sequence, the layers of images, the decoder's loss, rewards, and runs from the command line."""

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
from arcore.zoo.multimodal.xomni.decoder import FlowDecoder
from arcore.zoo.multimodal.xomni.model import BEGIN, END, EOM, IGNORED, IMAGE, SOM, TEXT, XOmni
from arcore.zoo.multimodal.xomni.rewarding import reward_updates

SETTINGS = {"steps": 2, "batch_size": 32, "checkpoint_every": 2, "accelerator": "cpu", "warmup": 0}


class Protocol:
    """How the model contract drives it."""

    def __init__(self, preset: str) -> None:
        self.config = arcore.models.get_config(preset)
        self.codes = torch.randint(self.config.vocab_size, (3, 49))
        self.captions = ["one", "two", "six"]
        self.images = torch.rand(3, 1, 28, 28) * 2 - 1
        self.vectors = torch.randn(3, 49, 8)

    def ids(self, model: Any) -> Tensor:
        return model.sequences(self.captions, self.codes)

    def forward(self, model: Any) -> Tensor:
        return model(self.ids(model))

    def expected_shape(self) -> tuple[int, ...]:
        # BEGIN, three letters, SOM, "7 7", IMAGE, the codes, EOM, END
        return (3, 1 + 3 + 5 + 49 + 2, TEXT + self.config.vocab_size)

    def loss(self, model: Any) -> Tensor:
        torch.manual_seed(0)
        return model.loss(self.ids(model)) + model.decoder.loss(self.images, self.vectors)

    def stepwise(self, model: Any) -> tuple[Tensor, Tensor]:
        ids, language = self.ids(model), model.language
        cache = language.make_cache(3, ids.shape[1])
        parts = [language.prefill(ids[:, :6], cache)]
        parts += [language.step(ids[:, i], cache) for i in range(6, ids.shape[1])]
        return model(ids)[:, 5:], torch.stack(parts, 1)

    def generate(self, model: Any, rows: list[int]) -> tuple[list[Tensor], Tensor]:
        captions = [self.captions[row] for row in rows]
        codes = model.draw(captions, seed=[7 + row for row in rows])
        return [codes], model.code_logits(captions, codes).softmax(-1)


@pytest.fixture
def model() -> XOmni:
    return shaken(create_model("xomni_tiny"), scale=0.2).eval()


def test_sequences_have_the_published_order(model: XOmni):
    codes = torch.arange(98).view(2, 49)
    first, second = model.sequences(["a", "bcd"], codes).tolist()
    picture = [SOM, *b"7 7", IMAGE, *(TEXT + i for i in range(49)), EOM]
    assert first == [BEGIN, 97, *picture, END, IGNORED, IGNORED]
    assert second == [BEGIN, *b"bcd", *(i + 49 if i >= TEXT else i for i in picture), END]
    [reverse] = model.sequences(["a"], codes[:1], image_first=True).tolist()
    assert reverse == [BEGIN, *picture, 97, END]
    with pytest.raises(ValueError, match="at most 48 bytes but one has 49"):
        model.sequences(["x" * 49], codes[:1])
    with pytest.raises(ValueError, match="2 and 1"):
        model.sequences(["a", "b"], codes[:1])


def test_the_loss_compares_codes_with_codes_and_text_with_text(model: XOmni):
    ids = model.sequences(["a", "bcd"], torch.randint(256, (2, 49)))
    logits, total, count = model(ids.clamp(min=0)), 0.0, 0
    for row in range(2):
        for place in range(1, ids.shape[1]):
            wanted = int(ids[row, place])
            if wanted == IGNORED:
                continue
            part = logits[row, place - 1, TEXT:] if wanted >= TEXT else logits[row, place - 1, :TEXT]
            total -= part.double().log_softmax(-1)[wanted - TEXT if wanted >= TEXT else wanted].item()
            count += 1
    assert model.loss(ids).item() == pytest.approx(total / count, rel=1e-5)


def test_text_passes_the_layers_of_images(model: XOmni):
    ids = model.sequences(["seven"], torch.randint(256, (1, 49)))
    language, seen = model.language, []
    assert language.of_images == {0, 3}
    hook = language.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(ids)
    hook.remove()
    entered, text = language.embed(ids), ids[0] < TEXT
    assert torch.equal(seen[0][0, text], entered[0, text])
    assert (seen[0][0, ~text] - entered[0, ~text]).abs().min(0).values.max() > 0


def test_pictures_do_not_depend_on_batch_mates(model: XOmni):
    captions = ["seven", "one", "three and a half"]
    whole = model.draw(captions, seed=[4, 5, 6])
    for row, caption in enumerate(captions):
        assert torch.equal(model.draw([caption], seed=[4 + row])[0], whole[row])
    assert whole.shape == (3, 49)
    assert model.draw([]).shape == (0, 49)
    texts = model.describe(whole)
    assert model.describe(whole[1:2]) == texts[1:2]
    assert model.describe(whole[:0]) == []
    for row, text in enumerate(texts):
        ids, said = model.sequences([""], whole[row : row + 1], image_first=True)[:, :-1], []
        while len(said) < 48:
            token = int(model(ids)[0, -1, :TEXT].argmax())
            if token == END:
                break
            said.append(token)
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
        assert text == bytes(byte for byte in said if byte < BEGIN).decode("utf-8", "replace")


def test_the_flow_loss_is_that_of_its_formula():
    torch.manual_seed(0)
    decoder = FlowDecoder(1, 8, 16, 2)
    images, vectors = torch.rand(3, 1, 8, 8) * 2 - 1, torch.randn(3, 16, 8)
    torch.manual_seed(5)
    loss = decoder.loss(images, vectors)
    torch.manual_seed(5)
    t, noise = torch.rand(3), torch.randn_like(images)
    mixed = (1 - t)[:, None, None, None] * images + t[:, None, None, None] * noise
    torch.testing.assert_close(loss, F.mse_loss(decoder(mixed, t, vectors), noise - images))
    noise = torch.randn(1, 1, 8, 8)
    drawn = decoder.draw(vectors, steps=3, noise=noise)
    x = noise.expand(3, -1, -1, -1)
    with torch.no_grad():
        for k in range(3):
            x = x - decoder(x, torch.full((3,), 1 - k / 3), vectors) / 3
    torch.testing.assert_close(drawn, x.clamp(-1, 1), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="pictures of shape"):
        decoder(torch.zeros(3, 1, 9, 8), t, vectors)


def test_rewards_move_the_language_model_alone():
    tokenizer = create_model("vq16_tiny").eval()
    model = shaken(create_model("xomni_tiny"), scale=0.2).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bright = lambda pictures, wanted: pictures.mean((1, 2, 3))  # noqa: E731
    settings = {"updates": 2, "prompts_per_update": 2, "group": 3, "decoder_steps": 2}
    measured = reward_updates(model, tokenizer, ["one", "two"], bright, **settings)
    assert measured[0].kl == 0
    assert measured[1].kl > 0
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("language.") for name in changed)
    for wrong, words in (
        (lambda p, w: p.mean((1, 2, 3)) * float("nan"), "not finite"),
        (lambda p, w: p.mean(), "6 finite numbers but got shape"),
    ):
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=words):
            reward_updates(model, tokenizer, ["one", "two"], wrong, **settings)
        assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_from_the_command_line(tmp_path: Path, capsys: Any):
    from PIL import Image

    from arcore.cli import main

    quiet = {"data": "digits", "image_size": 8, "show_progress": False}
    tokenizer = train("vq16_tiny", out=tmp_path / "vq", settings=SETTINGS, **quiet).checkpoint
    run = tmp_path / "run"
    train("xomni_tiny", out=run, settings=SETTINGS, tokenizer=tokenizer, **quiet)
    config = load_checkpoint(next(run.glob("step-*")))[0]["model"].config
    assert (config.side, config.factor, config.vocab_size) == (4, 2, 256)
    Image.new("L", (30, 28), 90).save(tmp_path / "x.png")
    capsys.readouterr()
    assert main(["sample", str(run), "--prompt", "3", "--num", "2", "--out", str(tmp_path / "y.png")]) == 0
    assert (tmp_path / "y.png").exists()
    assert main(["sample", str(run), "--images", str(tmp_path / "x.png")]) == 0
    assert str(tmp_path / "x.png") in capsys.readouterr().out
    assert main(["sample", str(run)]) == 2
    assert "--prompt CAPTION" in capsys.readouterr().err
    tuned = ["--checkpoint", str(run), "--updates", "1", "--group", "2", "--out", str(tmp_path / "tuned")]
    assert main(["run", "xomni", *tuned]) == 0
    assert "1 updates: reward" in capsys.readouterr().out
    assert set(load_checkpoint(tmp_path / "tuned")[0]) == {"model", "tokenizer"}
    assert main(["run", "xomni"]) == 2
    assert "arcore train xomni_tiny" in capsys.readouterr().err
