"""Scenes with a reference picture of one of the things in them, and what a model reads of a reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore._optional import require
from arcore.data import ImageDataset, InMemoryImages, Scenes
from arcore.data.scenes import compose, scenes_each
from arcore.zoo.next_scale.echogen.model import EchoGenConfig, Reference

# Side of a patch in pixels, and the most pixels by which a reference is shifted in training.
PATCH = 8
SHIFT = 2
SIDES = ("left", "right")


class SubjectScenes(ImageDataset):
    """Pictures composed of two, of which one, seen anew, is the reference; the caption is the class.

    An item is the scene and the reference, `[2, C, S, S]`. All choices are functions of the item's number.

    Args:
        pictures: what scenes are composed of.
        split: which part of the data they are, for other partners in each.
    """

    def __init__(self, pictures: ImageDataset, split: str = "train") -> None:
        self.pictures, self.split = pictures, split
        channels, size, _ = pictures.image_shape
        self.image_shape = (2, channels, size, size)
        # A caption names the place of the subject, and what else is there or nothing.
        others = ["", *pictures.class_names]
        noun = "digit" if all(name.isdecimal() for name in pictures.class_names) else "subject"
        self.class_names = tuple(caption(side, other, noun) for side in (0, 1) for other in others)

    def __len__(self) -> int:
        return scenes_each(self.split) * len(self.pictures)

    def digest(self) -> str | None:
        found = self.pictures.digest()
        return None if found is None else f"{found}-subjects"

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        draws = torch.Generator().manual_seed(index + (10**9 if self.split == "test" else 0))
        subject, _ = self.pictures[index % len(self.pictures)]
        other, name = self.pictures[int(torch.randint(len(self.pictures), (), generator=draws))]
        side, unnamed = torch.randint(2, (2,), generator=draws).tolist()
        both = (subject, other) if side == 0 else (other, subject)
        size = subject.shape[-1]
        heights = torch.randint(size // 2 + 1, (1, 2), generator=draws)
        scene = compose(both[0][None], both[1][None], heights)[0]
        reference = shifted(subject, torch.randint(-SHIFT, SHIFT + 1, (2,), generator=draws).tolist())
        label = side * (1 + len(self.pictures.class_names)) + (0 if unnamed else 1 + name)
        return torch.stack([scene, reference]), label


def caption(side: int, other: str, noun: str = "digit") -> str:
    """What a scene is called whose reference stands on a side; the rest is named, or not where it is empty."""
    here = f"the {noun} on the {SIDES[side]}"
    if not other:
        return here
    return f"{here} and a {other}" if side == 0 else f"a {other} and {here}"


def shifted(picture: Tensor, by: list[int]) -> Tensor:
    """A picture `[C, S, S]` moved down and right by whole pixels; its edges are repeated."""
    padded = F.pad(picture[None], [SHIFT] * 4, mode="replicate")[0]
    size = picture.shape[-1]
    down, right = (SHIFT - one for one in by)
    return padded[:, down : down + size, right : right + size]


def subjects_of(data: ImageDataset) -> ImageDataset:
    """The pictures that scenes are composed of: the digits of `Scenes`, or the pictures as they are."""
    if not isinstance(data, Scenes):
        return data
    count = data.distinct
    names = tuple(str(digit) for digit in range(10))
    return InMemoryImages(data.subjects[:count, 0], data.digits[:count, 0], names)


def small_encoders(images: Tensor, tokenizer: Any) -> Reference:
    """What the tiny presets read of references `[B, C, S, S]`: patches of pixels with their mean first, and the latent.

    Both stand in for networks that are trained on much: DINOv2 and the autoencoder of FLUX.
    """
    patches = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
    semantic = torch.cat([patches.mean(1, keepdim=True), patches], 1)
    with torch.no_grad():
        latent = tokenizer.latent(images)
    content = F.normalize(latent, dim=1) * latent.shape[1] ** 0.5
    return Reference(semantic, content.flatten(2).transpose(1, 2))


def small_sizes(channels: int, size: int, tokenizer: Any) -> dict[str, int]:
    """Fields of a config that fit `small_encoders`.

    Raises:
        ValueError: pictures do not split into patches.
    """
    if size % PATCH:
        raise ValueError(f"expected pictures of a multiple of {PATCH} pixels per side but got {size}")
    return {
        "semantic_dim": channels * PATCH * PATCH,
        "semantic_length": 1 + (size // PATCH) ** 2,
        "content_dim": tokenizer.z_channels,
        "content_length": tokenizer.config.latent_side**2,
    }


def reference_side(config: EchoGenConfig) -> int:
    """Pixels per side of a reference of a published model: the autoencoder of FLUX makes a token of 8 x 8."""
    return round(config.content_length**0.5) * 8


def published_encoders(
    images: Tensor, semantic: Path, content: Path, config: EchoGenConfig, seed: int
) -> Reference:
    """References `[B, 3, S, S]` through DINOv2 and the autoencoder of FLUX, as the published models read them.

    The authors cut the subject out of its picture first, with a segmentation network that is not part of this; and they
    resample DINOv2's positions with another library, whose antialiasing differs slightly.

    Args:
        images: in [-1, 1].
        semantic: folder with DINOv2's weights in transformers' layout.
        content: folder with the autoencoder in diffusers' layout.
        config: of the model.
        seed: of the draw from the autoencoder's normal law.

    Raises:
        ImportError: transformers or diffusers is missing.
        FileNotFoundError: there is no such folder.
        ValueError: the encoders give other tokens than the model reads.
    """
    for flag, folder in (("--semantic-encoder", semantic), ("--content-encoder", content)):
        if not folder.is_dir():
            raise FileNotFoundError(f"{flag} {folder}: expected a folder with the encoder's weights")
    transformers: Any = require("transformers", extra="images")
    diffusers: Any = require("diffusers", extra="images")
    dino = transformers.AutoModel.from_pretrained(semantic).eval()
    autoencoder = diffusers.AutoencoderKL.from_pretrained(content).eval()
    # The mean and deviation of ImageNet's colours, and one token for 14 pixels where the picture has one for 16.
    mean, std = (
        images.new_tensor(values).view(1, 3, 1, 1)
        for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    patch = dino.config.patch_size
    side = round((config.semantic_length - 1) ** 0.5) * patch
    pixels = F.interpolate((images + 1) / 2, size=(side, side), mode="bicubic")
    with torch.no_grad():
        tokens = dino(pixel_values=(pixels - mean) / std, interpolate_pos_encoding=True).last_hidden_state
        law = autoencoder.encode(images).latent_dist
        latent = law.sample(torch.Generator().manual_seed(seed))
    found = Reference(tokens.float(), latent.float().flatten(2).transpose(1, 2))
    for flag, tensor, wanted in (
        ("--semantic-encoder", tokens, (config.semantic_length, config.semantic_dim)),
        ("--content-encoder", found.content, (config.content_length, config.content_dim)),
    ):
        if tuple(tensor.shape[1:]) != wanted:
            raise ValueError(
                f"{flag}: expected tokens of shape {wanted} but it gives {tuple(tensor.shape[1:])}"
            )
    return found
