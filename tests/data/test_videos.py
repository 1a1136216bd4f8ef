from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from arcore.data import VideoFolder, open_dataset

Image = pytest.importorskip("PIL.Image")


def frame(level: int, side: int = 16) -> object:
    return Image.fromarray(np.full((side, side), level, np.uint8))


def folder_of_frames(path: Path, levels) -> None:
    path.mkdir(parents=True)
    for number, level in enumerate(levels, start=1):
        frame(level).save(path / f"frame{number}.png")


def gif(path: Path, levels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = [frame(level) for level in levels]
    first.save(path, save_all=True, append_images=rest)


def mp4(path: Path, levels) -> None:
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        for level in levels:
            picture = av.VideoFrame.from_ndarray(np.full((16, 16, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


LEVELS = [20 * n for n in range(12)]


def levels(clip: torch.Tensor) -> list[float]:
    return ((clip.mean((1, 2, 3)) + 1) * 127.5).tolist()


@pytest.mark.parametrize("kind", ["frames", "gif", "mp4"])
def test_clips_of_every_kind(tmp_path: Path, kind: str):
    {"frames": folder_of_frames, "gif": gif, "mp4": mp4}[kind](tmp_path / "c" / f"a.{kind}", LEVELS)
    videos = VideoFolder(tmp_path, frames=5, image_size=8, channels=1)
    assert videos.image_shape == (5, 1, 8, 8)
    assert len(videos) == 2
    for number in range(2):
        clip, label = videos[number]
        assert label == 0
        assert clip.shape == (5, 1, 8, 8)
        # Frame 10 comes after frame 2.
        assert levels(clip) == pytest.approx(LEVELS[5 * number : 5 * number + 5], abs=4)
    sparse = VideoFolder(tmp_path, frames=3, image_size=8, step=4)
    assert len(sparse) == 1
    assert levels(sparse[0][0]) == pytest.approx(LEVELS[0:9:4], abs=4)


def test_classes_links_and_split(tmp_path: Path):
    store = tmp_path / "store"
    folder_of_frames(store / "far", LEVELS[:4])
    root = tmp_path / "root"
    for number in range(10):
        gif(root / "b" / f"{number}.gif", [number, 100, 200])
    (root / "a").symlink_to(store)
    (root / "about.txt").write_text("words")
    train, test = (VideoFolder(root, frames=2, image_size=8, channels=1, split=s) for s in ("train", "test"))
    assert train.class_names == ("a", "b")
    assert train.labels.tolist() == [0, 0, *[1] * 9]
    assert [clip.path.name for clip, _ in test.clips] == ["9.gif"]
    assert any("1 file beside the class folders not read" in note for note in train.notes)
    digest = train.digest()
    assert test.digest() == digest
    gif(root / "b" / "0.gif", [7, 100, 200])
    assert VideoFolder(root, frames=2, image_size=8).digest() != digest
    opened = open_dataset(str(root), image_size=8, channels=1, frames=2)
    assert isinstance(opened, VideoFolder)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda c: gif(c / "short.gif", LEVELS[:2]), r"short\.gif has 2 frames but a clip takes 4"),
        (lambda c: (c / "bad.gif").write_bytes(b"GIF89a"), r"bad\.gif"),
        (lambda c: (c / "bad.mp4").write_bytes(b"no video" * 99), r"cannot read the video .*bad\.mp4"),
        (lambda c: (c / "notes.txt").write_text("x"), r"notes\.txt is no video"),
        (lambda c: frame(3).save(c / "loose.png"), r"loose\.png is no video"),
        (lambda c: (c / "gone.gif").symlink_to("/nowhere"), r"gone\.gif: the target of the link"),
        (
            lambda c: (folder_of_frames(c / "sizes", LEVELS[:5]), frame(9, 20).save(c / "sizes" / "x.png")),
            r"frames of .*sizes have several sizes",
        ),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, make, says: str):
    gif(tmp_path / "c" / "good.gif", LEVELS)
    if "mp4" in says:
        pytest.importorskip("av")
    make(tmp_path / "c")
    with pytest.raises(ValueError, match=says):
        VideoFolder(tmp_path, frames=4, image_size=8)
    with pytest.warns(UserWarning, match=f"1 entry of .* left out: .*{says}"):
        videos = VideoFolder(tmp_path, frames=4, image_size=8, skip_bad=True)
    assert {clip.path.name for clip, _ in videos.clips} == {"good.gif"}


def test_truncated_container(tmp_path: Path):
    mp4(tmp_path / "c" / "a.mp4", LEVELS)
    path = tmp_path / "c" / "a.mp4"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"a\.mp4"):
        VideoFolder(tmp_path, frames=4, image_size=8)


def test_bad_options(tmp_path: Path):
    gif(tmp_path / "c" / "good.gif", LEVELS)
    for options, error, says in (
        ({"frames": 2.5}, TypeError, "frames must be a whole number"),
        ({"frames": 0}, ValueError, "frames must be at least 1"),
        ({"step": 0}, ValueError, "step must be at least 1"),
        ({"channels": 2}, ValueError, "channels must be 1 or 3"),
        ({"split": "val"}, ValueError, "split must be one of"),
    ):
        with pytest.raises(error, match=says):
            VideoFolder(tmp_path, **{"frames": 4, "image_size": 8, **options})
    with pytest.raises(FileNotFoundError, match="one subfolder of videos per class"):
        VideoFolder(tmp_path / "gone", frames=4, image_size=8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"the class folder .*empty holds no videos"):
        VideoFolder(tmp_path, frames=4, image_size=8)
