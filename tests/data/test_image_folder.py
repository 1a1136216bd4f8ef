from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from arcore.data import ImageFolder, InMemoryImages, image_folder, open_dataset

Image = pytest.importorskip("PIL.Image")
TiffImagePlugin = pytest.importorskip("PIL.TiffImagePlugin")


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


def noise(side: int = 64, bands: int = 3) -> object:
    values = np.random.default_rng(0).integers(0, 256, (side, side, bands), dtype=np.uint8)
    return Image.fromarray(values.squeeze())


SUFFIXES = ["bmp", "gif", "jpg", "pgm", "png", "ppm", "tif", "webp"]


def save_as(path: Path, suffix: str) -> None:
    lossless = {"lossless": True} if suffix == "webp" else {}
    noise(bands=1 if suffix in ("pgm", "gif") else 3).save(path, **lossless)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("small", [True, False])
def test_truncated_files_are_named_before_training(tmp_path: Path, monkeypatch, suffix: str, small: bool):
    if not small:
        monkeypatch.setattr(image_folder, "SMALL_FOLDER", 0)
    write(tmp_path / "c" / "a.png")
    path = tmp_path / "c" / f"b.{suffix}"
    save_as(path, suffix)
    assert len(ImageFolder(tmp_path, image_size=8)) == 2
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(ValueError, match=rf"b\.{suffix}"):
        ImageFolder(tmp_path, image_size=8)
    with pytest.warns(UserWarning, match=rf"1 entry of .* left out: .*b\.{suffix}"):
        images = ImageFolder(tmp_path, image_size=8, skip_bad=True)
    assert [file.name for file in images.files] == ["a.png"]
    assert [path.name for path, _ in images.skipped] == [f"b.{suffix}"]


def test_damage_inside_a_file_is_found(folder: Path, monkeypatch):
    path = folder / "cats" / "3.png"
    noise().save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"cannot read the image .*3\.png"):
        ImageFolder(folder, image_size=8)
    # In a large folder only the end of a file is looked at; `check` reads all of it.
    monkeypatch.setattr(image_folder, "SMALL_FOLDER", 0)
    images = ImageFolder(folder, image_size=8)
    assert [found.name for found, _ in images.check()] == ["3.png"]
    with pytest.raises(ValueError, match=r"cannot read the image .*3\.png"):
        images[images.files.index(path)]


def test_every_file_may_be_bad(tmp_path: Path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match="no usable images"):
        ImageFolder(tmp_path, image_size=8, skip_bad=True)


@pytest.mark.parametrize(("option", "value"), [("channels", 2), ("image_size", 0)])
def test_bad_options(folder: Path, option: str, value: int):
    with pytest.raises(ValueError, match=f"{option} must be"):
        ImageFolder(folder, **{"image_size": 8, option: value})


@pytest.mark.parametrize("size", [2.5, "8", True, None])
def test_sizes_are_whole_numbers(folder: Path, size: object):
    with pytest.raises(TypeError, match="image_size must be a whole number of pixels"):
        ImageFolder(folder, image_size=size)


def read(path: Path, **options: object) -> torch.Tensor:
    """The first image of a folder, in [0, 1]."""
    return (ImageFolder(path.parent.parent, **{"image_size": 32, "channels": 1, **options})[0][0] + 1) / 2


RAMP = np.tile(np.linspace(0, 1, 32), (32, 1))
MODES = ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I;16B", "F", "LA"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_ramp_stays_a_ramp_in_every_mode(tmp_path: Path, mode: str, channels: int):
    path = tmp_path / "c" / "a.tif"
    path.parent.mkdir()
    grey = Image.fromarray((RAMP * 255).astype(np.uint8))
    if mode == "F":
        picture = Image.fromarray(RAMP.astype(np.float32))
    elif mode.startswith("I;16"):
        picture = Image.fromarray((RAMP * 65535).astype(">u2" if mode.endswith("B") else "<u2"))
    elif mode == "LAB":
        cms = pytest.importorskip("PIL.ImageCms")
        picture = cms.profileToProfile(
            grey.convert("RGB"), cms.createProfile("sRGB"), cms.createProfile("LAB"), outputMode="LAB"
        )
    else:
        picture = grey.convert("RGB").convert(mode)
    picture.save(path)
    with Image.open(path) as image:
        assert image.mode == mode or mode == "I;16B"
    pixels = read(path, channels=channels)
    assert pixels.shape == (channels, 32, 32)
    assert float((pixels.mean((0, 1)) - torch.tensor(RAMP[0])).abs().max()) < {"1": 0.6, "P": 0.06}.get(
        mode, 0.02
    )
    assert float(pixels.mean()) == pytest.approx(0.5, abs=0.02)


def test_a_sixteen_bit_pgm_and_png_are_scaled(tmp_path: Path):
    for name in ("a.png", "a.pgm"):
        path = tmp_path / name[-3:] / "c" / name
        path.parent.mkdir(parents=True)
        Image.fromarray((RAMP * 65535).astype(np.uint16)).save(path)
        assert float((read(path)[0, 0] - torch.tensor(RAMP[0])).abs().max()) < 0.01


def test_white_is_zero_and_twelve_bits(tmp_path: Path):
    path = tmp_path / "c" / "a.tif"
    path.parent.mkdir()
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    Image.fromarray((RAMP * 65535).astype(np.uint16)).save(path, tiffinfo=tags)
    with Image.open(path) as image:
        if image.tag_v2[262] != 0:
            pytest.skip("Pillow did not write the tag")
    assert float((read(path)[0, 0] - torch.tensor(1 - RAMP[0])).abs().max()) < 0.01


def twelve_bits(values: np.ndarray) -> bytes:
    """A little-endian grey TIFF of 12 bits per pixel, two pixels in three bytes."""
    flat = values.astype(np.uint16).reshape(-1, 2)
    packed = np.stack([flat[:, 0] >> 4, ((flat[:, 0] & 15) << 4) | (flat[:, 1] >> 8), flat[:, 1] & 255], 1)
    data = packed.astype(np.uint8).tobytes()
    height, width = values.shape
    entries = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 0), (277, 1), (278, height)]
    entries.append((279, len(data)))
    offset = 8 + 2 + 12 * len(entries) + 4
    entries = [(tag, offset if tag == 273 else value) for tag, value in entries]
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + b"\0\0\0\0" + data


def test_twelve_bits(tmp_path: Path):
    path = tmp_path / "c" / "a.tif"
    path.parent.mkdir()
    path.write_bytes(twelve_bits(np.round(RAMP * 4095)))
    assert float((read(path)[0, 0] - torch.tensor(RAMP[0])).abs().max()) < 0.01


@pytest.mark.parametrize(
    ("array", "says"),
    [
        ((RAMP * 255).astype(np.float32), "floats run from 0 to 255"),
        ((RAMP - 0.5).astype(np.float32), "floats run from -0.5 to 0.5"),
        ((RAMP * 255).astype(np.int32), "integers of more than 16 bits.* run from 0 to 255"),
        (np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), "NaN"),
    ],
)
def test_unknown_ranges_are_refused_by_name(tmp_path: Path, array: np.ndarray, says: str):
    path = tmp_path / "c" / "a.tif"
    path.parent.mkdir()
    Image.fromarray(array).save(path)
    with pytest.raises(ValueError, match=rf"cannot use the image .*a\.tif: .*{says}"):
        ImageFolder(tmp_path, image_size=8)
    if np.isnan(array).any():
        return
    low, high = float(array.min()), float(array.max())
    pixels = read(path, value_range=(low, high))
    assert float((pixels[0, 0] - torch.tensor(RAMP[0])).abs().max()) < 0.01


def test_ranges_must_grow(folder: Path):
    with pytest.raises(ValueError, match="value_range must be two growing"):
        ImageFolder(folder, image_size=8, value_range=(1, 0))


def test_transparent_grey_of_sixteen_bits_becomes_white(tmp_path: Path):
    path = tmp_path / "c" / "a.png"
    path.parent.mkdir()
    Image.fromarray((RAMP * 65535).astype(np.uint16)).save(path, transparency=0)
    assert float(read(path)[0, 0, 0]) == 1


def test_links_are_followed_but_not_in_circles(tmp_path: Path):
    store = tmp_path / "store"
    for name in ("x.png", "y.png"):
        write(store / "deep" / name)
    root = tmp_path / "root"
    write(root / "c" / "a.png")
    (root / "c" / "more").symlink_to(store)
    (root / "linked").symlink_to(store)
    (root / "c" / "again").symlink_to(root)
    (store / "deep" / "up").symlink_to("..")
    images = ImageFolder(root, image_size=8)
    assert images.class_names == ("c", "linked")
    assert [path.relative_to(root).as_posix() for path in images.files] == [
        "c/a.png",
        "c/more/deep/x.png",
        "c/more/deep/y.png",
        "linked/deep/x.png",
        "linked/deep/y.png",
    ]
    assert any("3 links back to folders around them not followed" in note for note in images.notes)


@pytest.mark.parametrize("place", ["c/gone.png", "gone", "c/loop"])
def test_dangling_links_are_named(tmp_path: Path, place: str):
    write(tmp_path / "c" / "a.png")
    (tmp_path / place).symlink_to("loop" if place == "c/loop" else "/nowhere/at/all")
    with pytest.raises(ValueError, match=rf"{place}: the target of the link does not exist"):
        ImageFolder(tmp_path, image_size=8)
    with pytest.warns(UserWarning, match=f"1 entry of .* left out: .*{place}: the target"):
        assert len(ImageFolder(tmp_path, image_size=8, skip_bad=True)) == 1


def test_what_is_not_read_is_counted(folder: Path):
    (folder / "README.md").write_text("about")
    (folder / ".git").mkdir()
    os.mkfifo(folder / "cats" / "pipe")
    Image.new("L", (8, 8)).save(
        folder / "cats" / "z.gif", save_all=True, append_images=[Image.new("L", (8, 8), 9)]
    )
    notes = "\n".join(ImageFolder(folder, image_size=8).notes)
    assert "1 file beside the class folders not read" in notes
    assert "1 hidden entry skipped" in notes
    assert "1 entry that is no regular file skipped" in notes
    assert "1 file of which only the first frame is used" in notes
    assert "the class ants has fewer than 10 images, too few to hold any out" in notes


def test_what_systems_put_beside_files_is_no_data(folder: Path):
    (folder / "cats" / "Thumbs.db").write_bytes(b"x")
    (folder / "desktop.ini").write_bytes(b"x")
    (folder / "__MACOSX" / "cats").mkdir(parents=True)
    images = ImageFolder(folder, image_size=8)
    assert images.class_names == ("ants", "cats")
    assert len(images) == 4
    (note,) = (note for note in images.notes if "hidden" in note)
    assert note.startswith("3 hidden entries skipped: ")
    assert all(name in note for name in ("Thumbs.db", "desktop.ini", "__MACOSX"))


def test_what_is_left_out_is_named_once_without_advice(folder: Path):
    (folder / "cats" / "1.png").write_bytes(b"")
    (folder / "cats" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes.txt is not an image file .* --skip-bad \(skip_bad\)$"):
        ImageFolder(folder, image_size=8)
    with pytest.warns(UserWarning) as seen:
        ImageFolder(folder, image_size=8, skip_bad=True, split="all")
    (said,) = (str(warning.message) for warning in seen)
    known = "known endings: .bmp, .gif, .jpeg, .jpg, .pgm, .png, .ppm, .tif, .tiff, .webp"
    assert said == (
        f"2 entries of {folder} left out: {folder}/cats/notes.txt is not an image file ({known}); "
        f"{folder}/cats/1.png is not a readable image"
    )
    (folder / "cats" / "notes.txt").unlink()
    with pytest.raises(
        ValueError, match=r"readable image: mend it or move it away, or leave out all such files"
    ):
        ImageFolder(folder, image_size=8)
    with pytest.warns(UserWarning, match=r"^1 entry of .* \(training part\) left out: .*1.png is not"):
        ImageFolder(folder, image_size=8, skip_bad=True, split="train")
    for number in range(30):
        (folder / "ants" / f"{number}.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="31 entries .*and 11 more, which `arcore data check` names$"):
        ImageFolder(folder, image_size=8, skip_bad=True, split="all")


def test_images_beside_class_folders_are_refused(folder: Path):
    write(folder / "loose.png")
    with pytest.raises(ValueError, match=r"loose\.png is an image beside the class folders"):
        ImageFolder(folder, image_size=8)


def test_nested_classes_are_not_guessed(tmp_path: Path):
    for name in ("animals/cats/1.png", "animals/dogs/1.png", "plants/1.png"):
        write(tmp_path / name)
    with pytest.raises(
        ValueError,
        match=r"animals holds no images itself but 2 folders of images \(cats, dogs\): .* --nested outer",
    ):
        ImageFolder(tmp_path, image_size=8)
    assert ImageFolder(tmp_path, image_size=8, nested="outer").class_names == ("animals", "plants")
    inner = ImageFolder(tmp_path, image_size=8, nested="inner")
    assert inner.class_names == ("animals/cats", "animals/dogs", "plants")
    assert inner.labels.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="nested must be"):
        ImageFolder(tmp_path, image_size=8, nested="yes")


def test_imagenet_layout(tmp_path: Path):
    for name in ("train/a/1.JPEG", "train/b/1.JPEG", "train/b/2.JPEG", "val/b/3.JPEG", "test/a/9.JPEG"):
        write(tmp_path / name)
    train, test, both = (ImageFolder(tmp_path, image_size=8, split=s) for s in ("train", "test", "all"))
    assert train.class_names == test.class_names == ("a", "b")
    assert train.labels.tolist() == [0, 1, 1]
    assert [path.name for path in test.files] == ["3.JPEG"]
    assert test.labels.tolist() == [1]
    assert len(both) == 4
    assert any("folders beside train and val not read: test" in note for note in train.notes)
    write(tmp_path / "val" / "c" / "1.JPEG")
    with pytest.raises(ValueError, match=r"val has classes that .*train has not: c"):
        ImageFolder(tmp_path, image_size=8)


def test_parts_without_classes_are_refused(tmp_path: Path):
    write(tmp_path / "train" / "1.png")
    write(tmp_path / "val" / "1.png")
    with pytest.raises(ValueError, match=r"train, val holds images without class folders"):
        ImageFolder(tmp_path, image_size=8)


def test_digest_is_that_of_the_content(folder: Path, tmp_path_factory, monkeypatch):
    digest = ImageFolder(folder, image_size=8).digest()
    copy = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(folder, copy)
    link = copy.parent / "link"
    link.symlink_to(copy)
    os.utime(copy / "cats" / "1.png", (0, 0))
    for other in (copy, link):
        assert ImageFolder(other, image_size=4, channels=1, split="test").digest() == digest
    for small in (True, False):
        if not small:
            monkeypatch.setattr(image_folder, "SMALL_FOLDER", 0)
        before = ImageFolder(copy, image_size=8).digest()
        data = bytearray((copy / "cats" / "1.png").read_bytes())
        data[20] ^= 1
        (copy / "cats" / "1.png").write_bytes(data)
        with pytest.warns(UserWarning, match="left out"):
            assert ImageFolder(copy, image_size=8, skip_bad=True).digest() != before
        data[20] ^= 1
        (copy / "cats" / "1.png").write_bytes(data)
        assert ImageFolder(copy, image_size=8).digest() == before
        (copy / "cats" / "1.png").rename(copy / "cats" / "one.png")
        assert ImageFolder(copy, image_size=8).digest() != before
        (copy / "cats" / "one.png").rename(copy / "cats" / "1.png")


def test_digest_of_images_in_memory():
    images, labels = torch.zeros(3, 1, 4, 4), torch.tensor([0, 1, 0])
    first = InMemoryImages(images, labels, ("a", "b")).digest()
    assert InMemoryImages(images.clone(), labels.clone(), ("a", "b")).digest() == first
    assert InMemoryImages(images + 1, labels, ("a", "b")).digest() != first
    assert InMemoryImages(images, 1 - labels, ("a", "b")).digest() != first
    assert InMemoryImages(images, labels, ("a", "c")).digest() != first
