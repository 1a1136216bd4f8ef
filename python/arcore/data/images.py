"""What a set of labelled images is, and the fixed split into training and held-out images."""

from __future__ import annotations

import hashlib
from abc import abstractmethod

import torch
from torch import Tensor
from torch.utils.data import Dataset

from arcore.nn.checks import check_sequence, check_tensor, check_whole

SPLITS = ("train", "test", "all")


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Map-style dataset of labelled images; derive from it to train on other data.

    Attributes:
        class_names: name of each class, in the order of the class numbers.
        image_shape: `(C, H, W)` of every image, or `(F, C, H, W)` of every video.
    """

    class_names: tuple[str, ...]
    image_shape: tuple[int, ...]

    @abstractmethod
    def __len__(self) -> int: ...

    def digest(self) -> str | None:
        """Identifies the content, so that a run that goes on can tell whether its data are still the same.

        Returns:
            Hexadecimal digits that change when the data do, and not when they only move; None where that is unknown.
        """
        return None


class InMemoryImages(ImageDataset):
    """Images that fit in memory.

    Args:
        images: float tensor `[N, C, H, W]`, or videos `[N, F, C, H, W]`, in [-1, 1].
        labels: int64 tensor `[N]`.
        class_names: name of each class.

    Raises:
        ValueError: the numbers of images and labels differ, or a label has no name.
    """

    def __init__(self, images: Tensor, labels: Tensor, class_names: tuple[str, ...]) -> None:
        for name, value in (("images", images), ("labels", labels)):
            check_tensor(name, value)
        check_sequence("class_names", class_names, "texts")
        if images.ndim not in (4, 5) or labels.shape != images.shape[:1]:
            raise ValueError(
                "expected images [N, C, H, W], or videos [N, F, C, H, W], and labels [N] "
                f"but got {tuple(images.shape)} and {tuple(labels.shape)}"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(class_names):
            raise ValueError(
                f"labels must lie in [0, {len(class_names)}) because there are {len(class_names)} class names, "
                f"but they span [{int(labels.min())}, {int(labels.max())}]"
            )
        self.images = images
        self.labels = labels
        self.class_names = class_names
        self.image_shape = tuple(images.shape[1:])

    def __len__(self) -> int:
        return len(self.images)

    def digest(self) -> str:
        """See `ImageDataset`; of all values, labels and class names."""
        state = hashlib.blake2b(repr((self.class_names, tuple(self.images.shape))).encode(), digest_size=8)
        for values in (self.images, self.labels):
            plain = values.detach().cpu().contiguous().flatten().view(torch.uint8)
            state.update(plain.numpy().data)
        return state.hexdigest()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


def held_out_mask(labels: Tensor, every: int = 5) -> Tensor:
    """Mark every n-th image of each class as held out.

    The choice depends on the order of the images only, so it is the same on every machine, and each class keeps its
    share in both parts.

    Args:
        labels: int64 tensor `[N]`.
        every: one image out of this many is held out; the last of each group.

    Returns:
        bool tensor `[N]`, True for held-out images.
    """
    check_tensor("labels", labels)
    every = check_whole("every", every, 1)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        held_out[members[every - 1 :: every]] = True
    return held_out


def check_split(split: str) -> None:
    """Raise ValueError unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(map(repr, SPLITS))} but got {split!r}")
