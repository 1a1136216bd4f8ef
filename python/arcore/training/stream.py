"""The order of training images and the random numbers of each step, as pure functions of the seed.

Nothing has to be saved to continue a run: batch `b` of a run is the same images and the same random draws whether
the run reached `b` at one go or was resumed just before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler


def derive_seed(*keys: int | str) -> int:
    """A 63-bit seed for the given keys; different keys give unrelated seeds."""
    digest = hashlib.blake2b("/".join(map(str, keys)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class StreamSampler(Sampler[list[Any]]):
    """Batches cut from an endless stream of shuffled epochs.

    Epochs follow each other without a gap, so every batch is full. Batch `b` of rank `r` is piece `b * world_size + r`
    of the stream; hence `k` accumulated batches of `n` images are the same images as one batch of `k * n`, and `k`
    devices see what one device with a `k` times larger batch sees.

    Args:
        num_images: size of the dataset.
        batch_size: images per batch and rank.
        start: first batch.
        stop: one past the last batch.
        seed: decides the order.
        rank: this process.
        world_size: number of processes.
        places: yield pairs of an item and its place in the stream, for datasets whose items depend on it.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        start: int,
        stop: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        places: bool = False,
    ) -> None:
        if num_images < 1:
            raise ValueError("the dataset holds no images")
        self.num_images = num_images
        self.batch_size = batch_size
        self.start = start
        self.stop = stop
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.places = places
        self._epoch = -1
        self._order: list[int] = []

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Any]]:
        for batch in range(self.start, self.stop):
            first = (batch * self.world_size + self.rank) * self.batch_size
            stretch = range(first, first + self.batch_size)
            if self.places:
                yield [(self._item_at(position), position) for position in stretch]
            else:
                yield [self._item_at(position) for position in stretch]

    def _item_at(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_images)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", epoch))
            self._order = torch.randperm(self.num_images, generator=generator).tolist()
            self._epoch = epoch
        return self._order[offset]


class RandomStream(StreamSampler):
    """Items drawn at random, with repetition: for datasets of overlapping pieces, where epochs mean little.

    Place p of the stream is a function of the seed and p alone, so the promises of `StreamSampler` hold too.
    """

    def _item_at(self, position: int) -> int:
        return derive_seed(self.seed, "item", position) % self.num_images
