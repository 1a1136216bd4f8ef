"""`TreeMask`: attention of a token tree that is verified after a cached prefix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arcore.masks import _spans
from arcore.masks._arguments import integers, numbers
from arcore.masks._value import Value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_NODES = 64


class TreeMask(Value):
    """Node i of a token tree sees the cached prefix, its ancestors and itself.

    Keys are the prefix followed by the nodes: node j's key of batch entry b is ``prefix[b] + j``. Ancestors are bits:
    bit j of node i's word is set iff node j is an ancestor of node i or node i itself (the 64 bits of an int64 read as
    unsigned). This is the mask of tree verification in Medusa (arXiv:2401.10774) and EAGLE (arXiv:2401.15077).

    A value: immutable, hashable and equal by content (on one device), picklable, moved by ``to(device)``.

    Args:
        words: int64 ``[Bm, m]`` or ``[m]``, the ancestor words, 1 <= m <= 64. Parents come before their children, so
            node i's word has bit i and no higher one. Several roots are allowed.
        prefix: cached tokens before the tree, one number or one per batch entry ``[Bm]``.

    Attributes:
        words: int64 ``[Bm, m]``. Must not be written to.
        prefix: int32 ``[Bm]``. Must not be written to.
        nk: number of keys: the longest prefix and the nodes.

    Raises:
        TypeError: `words` or `prefix` is not made of integers.
        ValueError: the shapes do not fit, or a word is not the ancestors of a node; names the first such node.
    """

    __slots__ = ("nk", "prefix", "words")
    _CONTENT = ("words", "prefix")

    words: Tensor
    prefix: Tensor
    nk: int

    def __init__(self, words: Tensor, prefix: int | Sequence[int] | Tensor) -> None:
        where = "arcore.masks.TreeMask"
        bits = integers(where, "words", words)
        bits = bits.unsqueeze(0) if bits.dim() == 1 else bits
        if bits.dim() != 2 or not 1 <= bits.shape[1] <= MAX_NODES or bits.shape[0] == 0:
            raise ValueError(
                f"{where}: expected words of shape [Bm, m] with 1 to {MAX_NODES} nodes but got {tuple(words.shape)}"
            )
        cached = numbers(where, "prefix", prefix).reshape(-1)
        if cached.numel() == 0 or 1 != cached.numel() != bits.shape[0] != 1:
            raise ValueError(
                f"{where}: expected one prefix or one per batch entry ({bits.shape[0]}) but got {cached.numel()}"
            )
        if int(cached.min()) < 0 or int(cached.max()) > 2**31 - 1 - bits.shape[1]:
            raise ValueError(
                f"{where}: expected prefix lengths from 0 that int32 can hold but got {cached.tolist()}"
            )
        _check_words(bits)
        with torch.inference_mode(False):
            self._freeze(
                words=bits.clone().to(words.device),
                prefix=cached.to(torch.int32).clone().to(words.device),
                nk=int(cached.max()) + bits.shape[1],
            )

    @classmethod
    def from_parents(
        cls, parents: Sequence[int] | Sequence[Sequence[int]] | Tensor, prefix: int | Sequence[int] | Tensor
    ) -> TreeMask:
        """The mask of the tree in which node i hangs under node ``parents[i]``.

        Args:
            parents: ``[m]`` or ``[Bm, m]``; ``parents[i] < i``, or -1 for a root, whose parent is the prefix.
            prefix: as in the constructor.
        """
        where = "arcore.masks.tree"
        table = numbers(where, "parents", parents)
        table = table.unsqueeze(0) if table.dim() == 1 else table
        if table.dim() != 2 or not 1 <= table.shape[1] <= MAX_NODES or table.shape[0] == 0:
            raise ValueError(
                f"{where}: expected parents of shape [m] or [Bm, m] with 1 to {MAX_NODES} nodes but got "
                f"{tuple(table.shape)}"
            )
        node = torch.arange(table.shape[1], device="cpu")
        bad = ((table < -1) | (table >= node)).flatten()
        if bad.any():
            first = int(bad.nonzero()[0])
            raise ValueError(
                f"{where}: expected -1 <= parents[i] < i but node {first % table.shape[1]} of batch "
                f"{first // table.shape[1]} has parent {int(table.flatten()[first])}; list parents before children"
            )
        words = torch.zeros_like(table)
        for i in range(table.shape[1]):
            parent = table[:, i : i + 1]
            inherited = words.gather(1, parent.clamp(min=0)).where(parent >= 0, 0)
            words[:, i] = inherited[:, 0] | _bit(i)
        return cls(words, prefix)

    @property
    def num_nodes(self) -> int:
        """Nodes of the tree, m."""
        return self.words.shape[1]

    @property
    def nq(self) -> int:
        """Number of query rows: the nodes."""
        return self.num_nodes

    @property
    def batch(self) -> int:
        """Batch size of the mask; 1 broadcasts."""
        return max(self.words.shape[0], self.prefix.shape[0])

    @property
    def heads(self) -> int:
        """1: all heads share the mask."""
        return 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(batch, 1, nq, nk)``."""
        return self.batch, 1, self.nq, self.nk

    @property
    def parents(self) -> Tensor:
        """int64 ``[Bm, m]``: each node's parent, -1 for a root."""
        return _parents(_ancestors(self.words))

    @property
    def depth(self) -> Tensor:
        """int64 ``[Bm, m]``: ancestors of each node; a node's position in its sequence is ``prefix + depth``."""
        return _ancestors(self.words).sum(-1)

    @property
    def num_pairs(self) -> int:
        """Exact number of allowed (query, key) pairs over the batch."""

        def compute() -> int:
            inside = (self.depth + 1).sum(1).expand(self.batch)
            return int((inside + self.prefix.to(torch.int64) * self.num_nodes).sum())

        return self._cached("num_pairs", compute)

    @property
    def density(self) -> float:
        """Allowed pairs as a fraction of all pairs."""
        return self.num_pairs / (self.batch * self.nq * self.nk)

    def __repr__(self) -> str:
        prefix = self.prefix.tolist()
        parts = [f"nodes={self.num_nodes}", f"prefix={prefix[0] if len(set(prefix)) == 1 else prefix}"]
        parts += [f"batch={self.batch}"] if self.batch > 1 else []
        parts += [f"depth={int(self.depth.max()) + 1}", f"density={self.density:.3g}"]
        parts += [f"device={self.device}"] if self.device.type != "cpu" else []
        return f"TreeMask({', '.join(parts)})"

    def to_bool(self) -> Tensor:
        """Bool ``[Bm, 1, m, Nk]``, True where the pair is allowed; keys after a shorter prefix's tree are False."""
        key = torch.arange(self.nk, device=self.device)
        node = key - self.prefix.unsqueeze(1)  # [B, Nk]
        bit = self.words.unsqueeze(2) >> node.clamp(0, MAX_NODES - 1).unsqueeze(1) & 1  # [B, m, Nk]
        inside = ((node >= 0) & (node < self.num_nodes)).unsqueeze(1)
        return ((node < 0).unsqueeze(1) | (inside & (bit == 1))).unsqueeze(1)

    def plot(
        self,
        ax: Axes | None = None,
        *,
        batch: int = 0,
        title: str | None = None,
        path: str | Path | None = None,
    ) -> Axes:
        """A picture: nodes down, keys across; prefix, ancestors and the node itself in three colours.

        Args:
            ax: matplotlib axes to draw on; new ones by default.
            batch: which tree to show.
            title: text above the picture.
            path: also write the picture to this file, as PNG, SVG or PDF by its suffix.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from arcore.masks.picture import draw_tree_mask

        return draw_tree_mask(self, ax, batch=batch, title=title, path=path)


def _bit(i: int) -> int:
    """1 << i as int64 holds it: bit 63 is the sign."""
    return 1 << i if i < 63 else -(1 << 63)


def _ancestors(words: Tensor) -> Tensor:
    """bool ``[Bm, m, m]``: entry (i, j) says that node j is a proper ancestor of node i."""
    node = torch.arange(words.shape[1], device=words.device)
    return (words.unsqueeze(2) >> node & 1).bool() & (node < node.unsqueeze(1))


def _parents(ancestors: Tensor) -> Tensor:
    # The last ancestor in order of nodes is the nearest one, as parents come before their children.
    node = torch.arange(ancestors.shape[1], device=ancestors.device)
    return torch.where(ancestors, node, -1).amax(-1)


def _check_words(words: Tensor) -> None:
    """Each word must be the node's own bit and its parent's word."""
    parent = _parents(_ancestors(words))
    own = torch.tensor([_bit(i) for i in range(words.shape[1])], device="cpu")
    inherited = words.gather(1, parent.clamp(min=0)).where(parent >= 0, 0)
    bad = (words != inherited | own).flatten()
    if bad.any():
        first = int(bad.nonzero()[0])
        name = _spans.name_row(first, words.shape[0], 1, words.shape[1]).replace("row", "node")
        raise ValueError(
            f"arcore.masks.TreeMask: expected each word to be the node's own bit and its parent's word but {name} has "
            f"{int(words.flatten()[first]) & (2**64 - 1):#x}; build the mask with arcore.masks.tree(parents, prefix)"
        )
