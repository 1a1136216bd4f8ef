"""Training on pictures with masks, labelling pictures of any size, and the scores."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from arcore.catalog import create_model, load_checkpoint, save_checkpoint
from arcore.recipes._pixels import PixelOptions, PixelScores, classify_pixels, pixel_logits
from arcore.recipes.segmentation import SegmentationTask
from arcore.training import TrainConfig, train

image_module = pytest.importorskip("PIL.Image")

SETTINGS = {"steps": 2, "batch_size": 2, "checkpoint_every": 2, "accelerator": "cpu"}
TINY = {"depth": 1, "embed_dim": 16, "image_size": 16, "d_state": 4, "dropout": 0.0}


def write(path: Path, values: torch.Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = values.shape
    bytes_ = values.to(torch.uint8).contiguous().numpy().tobytes()
    image_module.frombytes("L", (width, height), bytes_).save(path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten grey pictures and pairs, white squares on grey; the masks say where."""
    torch.manual_seed(0)
    for number in range(10):
        picture = torch.randint(60, 120, (20 + number, 24))
        other, mask = picture.clone(), torch.zeros_like(picture)
        picture[4:12, 5:15] = 250
        mask[4:12, 5:15] = 1
        for name, values in (("images", picture), ("A", picture), ("B", other), ("masks", mask)):
            write(tmp_path / "data" / name / f"p{number}.png", values)
    (tmp_path / "data" / "classes.txt").write_text("ground\nsquare\n")
    return tmp_path / "data"


def run(preset: str, out: Path, data: Path, **options):
    channels = {"channels": 1}
    return train(
        preset,
        out=out,
        data=str(data),
        show_progress=False,
        **{"settings": SETTINGS, "model_settings": TINY, **channels, **options},
    )


def test_layers_learn_at_rates_of_their_own(tmp_path: Path):
    model = create_model("roma_segmenter_tiny", **TINY | {"depth": 2})
    task = SegmentationTask(TrainConfig(), {"model": model}, {"layer_decay": 0.5, "class_names": ["a"] * 11})
    groups = task.configure_optimizers().param_groups
    rates = {id(value): group["rate"] for group in groups for value in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    assert rates[id(model.decode_head.conv_seg.weight)] == 1
    assert rates[id(model.backbone.layers[1].norm1.weight)] == 0.5
    assert rates[id(model.backbone.layers[0].mlp.w1.weight)] == 0.25
    assert rates[id(model.backbone.pos_embed)] == rates[id(model.backbone.patch_embed.proj.weight)] == 0.125
    assert next(group for group in groups if group["rate"] == 1)["weight_decay"] == TrainConfig().weight_decay


def test_a_run_starts_from_a_pretrained_encoder(data: Path, tmp_path: Path):
    encoder = create_model("roma_tiny", embed_dim=16, d_state=4)
    save_checkpoint(tmp_path / "encoder", {"model": encoder})
    with pytest.raises(ValueError, match=r"does not fit roma_segmenter_tiny: .*depth=1 but got 6"):
        run("roma_segmenter_tiny", tmp_path / "a", data, pretrained=tmp_path / "encoder")
    small = {**TINY, "depth": 6}
    result = run(
        "roma_segmenter_tiny",
        tmp_path / "b",
        data,
        pretrained=tmp_path / "encoder",
        model_settings=small,
        settings=SETTINGS | {"lr": 1e-9},
    )
    state = load_checkpoint(result.checkpoint)[0]["model"].state_dict()
    expected = encoder.state_dict()["layers.4.mlp.w3.weight"]
    torch.testing.assert_close(state["backbone.layers.4.mlp.w3.weight"], expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="encoder says whose weights"):
        run("roma_segmenter_tiny", tmp_path / "c", data, encoder="arm_base_pz16")


class Brightness(nn.Module):
    """Says how bright a pixel is; the window's size is 8."""

    pictures = 1

    def __init__(self) -> None:
        super().__init__()
        self.config = dataclasses.make_dataclass("C", ["image_size", "num_classes", "in_channels"])(8, 2, 1)
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.shape[1:] == (1, 8, 8)
        return torch.cat([-images, images], 1) * self.weight


@pytest.mark.parametrize(("height", "width", "stride"), [(5, 19, None), (8, 8, 3), (21, 13, 8), (17, 9, 99)])
def test_pictures_of_any_size(height: int, width: int, stride: int | None):
    picture = torch.randn(1, 1, height, width)
    logits = pixel_logits(Brightness(), picture, stride)
    torch.testing.assert_close(logits, torch.cat([-picture[0], picture[0]]))


def test_pictures_are_enlarged_and_brought_back(tmp_path: Path):
    values = torch.zeros(6, 7)
    values[2:5, 1:4] = 255
    write(tmp_path / "p.png", values)
    options = PixelOptions(images=tmp_path / "p.png", masks=tmp_path / "p.png")
    for enlarge in (1.0, 4.0):
        found = classify_pixels(
            Brightness(), ["dark", "light"], options, normalize="half", enlarge=enlarge, show=lambda _: None
        )
        assert torch.equal(found.masks[0], (values > 0).to(torch.uint8))
        assert found.scores is not None
        assert found.scores.figures() == {"mIoU": 1.0, "mF1": 1.0, "F1": 1.0}
    with torch.no_grad():
        broken = Brightness()
        broken.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="no finite numbers"):
        classify_pixels(
            broken, ["dark", "light"], options, normalize="half", enlarge=1.0, show=lambda _: None
        )


def test_scores_are_those_of_torchmetrics():
    metrics = pytest.importorskip("torchmetrics.classification")
    torch.manual_seed(0)
    masks = torch.randint(0, 4, (3, 50))
    masks[0, :20] = 255
    classes = torch.where(torch.rand(3, 50) < 0.6, masks.clamp(max=3), torch.randint(0, 4, (3, 50)))
    scores = PixelScores(["a", "b", "c", "d", "never"])
    for row in range(3):
        scores.add(classes[row], masks[row])
    union, f1, there = scores.per_class()
    assert there.tolist() == [True] * 4 + [False]
    more = {"num_classes": 5, "average": None, "ignore_index": 255}
    torch.testing.assert_close(union.float(), metrics.MulticlassJaccardIndex(**more)(classes, masks))
    torch.testing.assert_close(f1.float(), metrics.MulticlassF1Score(**more)(classes, masks))
    assert scores.figures()["mIoU"] == pytest.approx(union[:4].mean().item())
    assert "never  does not occur" in "\n".join(scores.table())
