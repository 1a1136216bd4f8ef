"""Training a tokenizer with judges, and codes as files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from arcore.catalog import create_model, load_checkpoint
from arcore.recipes.tokenizer import TokenizerOptions, TokenizerTask
from arcore.training import TrainConfig, train

SIZES = {"image_size": 16, "data": "digits"}
SETTINGS = {
    "steps": 4,
    "batch_size": 32,
    "checkpoint_every": 2,
    "accelerator": "cpu",
    "warmup": 0,
    "final_lr": 1.0,
}


def run(out, **options):
    return train("msvq_tiny", out=out, show_progress=False, **{"settings": SETTINGS, **SIZES, **options})


def test_each_network_learns_from_its_own_loss():
    torch.manual_seed(0)
    tokenizer = create_model("msvq_tiny", **create_model("msvq_tiny").config.for_images(16, 1))
    task = TokenizerTask(TrainConfig(), {"tokenizer": tokenizer}, {})
    task.add_judges(TokenizerOptions(adversarial_weight=0.5), None)
    type(task).step = property(lambda self: 0)
    try:
        images = torch.rand(4, 1, 16, 16) * 2 - 1
        tokenizer.eval()  # no code restarts between two passes
        total, figures = task.loss(images, torch.zeros(4))
        total.backward()
        assert {"mse", "vq", "judge", "adversarial"} == set(figures)
        judge = task.discriminator
        found = [parameter.grad.clone() for parameter in judge.parameters()]
        judge.zero_grad()
        drawn = tokenizer(images).reconstruction.detach()
        real, fake = judge(images), judge(drawn)
        ((1 - real).clamp(min=0).mean() / 2 + (1 + fake).clamp(min=0).mean() / 2).backward()
        for ours, parameter in zip(found, judge.parameters(), strict=True):
            torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6)
        # The verdict reaches the tokenizer, with a gradient as long as half that of the pixels at the last layer.
        tokenizer.zero_grad()
        last = tokenizer.decoder.conv_out.weight
        drawn = tokenizer(images).reconstruction
        pixels, verdict = (drawn - images).square().mean(), -judge(drawn).mean()
        one, two = (
            torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (pixels, verdict)
        )
        assert task._balance(pixels, verdict).item() == pytest.approx(
            (0.5 * one / (two + 1e-4)).item(), rel=1e-4
        )
    finally:
        del type(task).step


def test_a_run_with_a_discriminator_goes_on_bit_for_bit(tmp_path):
    judged = {"adversarial_weight": 0.5}
    run(tmp_path / "run", settings=SETTINGS | {"steps": 2}, **judged)
    resumed = train(
        "msvq_tiny", out=tmp_path / "run", resume=tmp_path / "run", settings={"steps": 4}, show_progress=False
    ).checkpoint
    whole = run(tmp_path / "whole", **judged).checkpoint
    plain = run(tmp_path / "plain").checkpoint
    for name in ("tokenizer", "discriminator"):
        first, second = (load_file(path / f"{name}.safetensors") for path in (resumed, whole))
        assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert not (plain / "discriminator.safetensors").exists()
    assert set(load_checkpoint(whole)[0]) == {"tokenizer"}
    ours, theirs = (load_file(path / "tokenizer.safetensors") for path in (whole, plain))
    assert not torch.equal(ours["decoder.conv_out.weight"], theirs["decoder.conv_out.weight"])


def test_judges_of_small_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 16 pixels"):
        train("msvq_tiny", out=tmp_path, show_progress=False, settings=SETTINGS, adversarial_weight=1.0)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(tmp_path / "x", perceptual=tmp_path / "nowhere.pth")


def test_codes_go_to_a_file_and_back(tmp_path, capsys):
    from PIL import Image

    from arcore.cli import main

    run(tmp_path / "run")
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for number, name in enumerate(("a.png", "deep/b.png", "c.jpg")):
        Image.new("L", (20, 16 + number), 80 * number).save(tmp_path / "photos" / name)
    pictures, codes, sheet, back = (
        tmp_path / name for name in ("photos", "codes.safetensors", "sheet.png", "back.safetensors")
    )
    base = ["sample", str(tmp_path / "run")]
    assert main([*base, "--images", str(pictures), "--out", str(codes)]) == 0
    assert main([*base, "--images", str(pictures), "--out", str(sheet), "--batch", "2"]) == 0
    assert main([*base, "--codes", str(codes), "--out", str(back)]) == 0
    tokenizer = load_checkpoint(next((tmp_path / "run").glob("step-*4")))[0]["tokenizer"].eval()
    found = load_file(codes)
    parts = [found[f"codes.{k}"] for k in range(len(found))]
    assert [part.shape for part in parts] == [(3, side * side) for side in tokenizer.patch_nums]
    with torch.no_grad():
        torch.testing.assert_close(load_file(back)["images"], tokenizer.decode(parts))
    with Image.open(sheet) as picture:
        assert picture.size[0] > 3 * 16
    capsys.readouterr()
    for wrong, words in (
        (["--images", str(tmp_path / "none")], "there is no picture"),
        (["--codes", str(sheet)], "holds no codes"),
        ([], "give pictures with --images"),
    ):
        assert main([*base, *wrong, "--out", str(tmp_path / "x.png")]) == 2
        assert words in capsys.readouterr().err
