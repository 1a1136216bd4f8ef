from __future__ import annotations

from pathlib import Path

import pytest
import torch

from arcore.data import ImageFolder, open_dataset

Image = pytest.importorskip("PIL.Image")


def write(path: Path, size: tuple[int, int] = (8, 8), mode: str = "RGB", color: object = (255, 0, 0)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in (10, 2, 1):
        write(tmp_path / "cats" / f"{number}.png", color=(number, 0, 0))
    write(tmp_path / "ants" / "a.jpg", size=(20, 10), color=(255, 255, 255))
    return tmp_path


def test_order_and_classes_follow_sorted_names(folder: Path):
    (folder / ".cache").mkdir()
    (folder / "cats" / ".DS_Store").write_bytes(b"x")
    images = ImageFolder(folder, image_size=8)
    assert images.class_names == ("ants", "cats")
    assert [path.name for path in images.files] == ["a.jpg", "1.png", "10.png", "2.png"]
    assert [label for _, label in (images[i] for i in range(4))] == [0, 1, 1, 1]
    assert images.image_shape == (3, 8, 8)


def test_pixels_span_minus_one_to_one(folder: Path):
    images = ImageFolder(folder, image_size=8)
    white, _ = images[0]
    assert white.shape == (3, 8, 8)
    assert white.dtype == torch.float32
    assert float(white.min()) > 0.98
    dark, _ = images[2]
    assert torch.equal(dark[1:], torch.full((2, 8, 8), -1.0))
    assert float(dark[0, 0, 0]) == pytest.approx(10 / 127.5 - 1)


def test_shorter_side_is_scaled_and_centre_cropped(tmp_path: Path):
    picture = Image.new("L", (40, 20), 0)
    picture.paste(255, (10, 0, 30, 20))
    (tmp_path / "one").mkdir()
    picture.save(tmp_path / "one" / "wide.png")
    image, _ = ImageFolder(tmp_path, image_size=10, channels=1)[0]
    assert image.shape == (1, 10, 10)
    assert float(image[:, :, 1:-1].min()) > 0.8, "the middle half is white, and only that is kept"


def test_small_images_are_scaled_up(tmp_path: Path):
    write(tmp_path / "one" / "tiny.png", size=(3, 1))
    image, _ = ImageFolder(tmp_path, image_size=16)[0]
    assert image.shape == (3, 16, 16)


def test_transparent_pixels_become_white(tmp_path: Path):
    write(tmp_path / "one" / "clear.png", mode="RGBA", color=(0, 0, 0, 0))
    image, _ = ImageFolder(tmp_path, image_size=8)[0]
    assert torch.equal(image, torch.ones(3, 8, 8))


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path):
    write(tmp_path / "one" / "deep.png", mode="I;16", color=32768)
    image, _ = ImageFolder(tmp_path, image_size=8, channels=1)[0]
    assert float(image.mean()) == pytest.approx(128 / 127.5 - 1, abs=1e-6)


def test_camera_rotation_is_obeyed(tmp_path: Path):
    picture = Image.new("L", (8, 8), 0)
    picture.paste(255, (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 3
    (tmp_path / "one").mkdir()
    picture.save(tmp_path / "one" / "turned.png", exif=exif)
    image, _ = ImageFolder(tmp_path, image_size=8, channels=1)[0]
    assert float(image[0, :4].max()) == -1
    assert float(image[0, 4:].min()) == 1


def test_split_holds_out_every_tenth(tmp_path: Path):
    for number in range(20):
        write(tmp_path / "one" / f"{number:02}.png")
    train = ImageFolder(tmp_path, image_size=8, split="train")
    test = ImageFolder(tmp_path, image_size=8, split="test")
    assert [path.name for path in test.files] == ["09.png", "19.png"]
    assert len(train) == 18
    assert not set(train.files) & set(test.files)


def test_missing_folder(tmp_path: Path):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere does not exist: expected a folder with one subfolder"
    ):
        open_dataset(str(tmp_path / "nowhere"), image_size=8, channels=3)


def test_file_instead_of_folder(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"a\.png is a file"):
        ImageFolder(write(tmp_path / "a.png"), image_size=8)


def test_no_class_folders(tmp_path: Path):
    write(tmp_path / "a.png")
    with pytest.raises(ValueError, match="has no class subfolders: put the images into"):
        ImageFolder(tmp_path, image_size=8)


def test_class_without_images(folder: Path):
    (folder / "dogs").mkdir()
    with pytest.raises(ValueError, match=r"dogs holds no images"):
        ImageFolder(folder, image_size=8)


def test_file_that_is_no_image(folder: Path):
    (folder / "cats" / "notes.txt").write_text("miaow")
    with pytest.raises(ValueError, match=r"notes\.txt is not an image file"):
        ImageFolder(folder, image_size=8)


def test_text_named_as_image(folder: Path):
    (folder / "cats" / "3.png").write_text("miaow")
    with pytest.raises(ValueError, match=r"3\.png is not a readable image"):
        ImageFolder(folder, image_size=8)


def test_truncated_image_is_named_when_read(folder: Path):
    path = folder / "cats" / "3.png"
    torch.manual_seed(0)
    noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8)
    Image.frombytes("RGB", (64, 64), bytes(noise.flatten().tolist())).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    images = ImageFolder(folder, image_size=8)
    with pytest.raises(ValueError, match=r"cannot read the image .*3\.png"):
        images[images.files.index(path)]


@pytest.mark.parametrize(("option", "value"), [("channels", 2), ("image_size", 0)])
def test_bad_options(folder: Path, option: str, value: int):
    with pytest.raises(ValueError, match=f"{option} must be"):
        ImageFolder(folder, **{"image_size": 8, option: value})
