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

WORD = 64
MAX_NODES = 4096


class TreeMask(Value):
    """Node i of a token tree sees the cached prefix, its ancestors and itself.

    Keys are the prefix followed by the nodes: node j's key of batch entry b is ``prefix[b] + j``. Ancestors are bits:
    bit j of node i's words is set iff node j is an ancestor of node i or node i itself; word w holds bits 64 w to
    64 w + 63 (an int64 read as unsigned). This is the mask of tree verification in Medusa (arXiv:2401.10774) and EAGLE
    (arXiv:2401.15077). `arcore.ops.block_sparse_attention` takes it.

    A value: immutable, hashable and equal by content (on one device), picklable, moved by ``to(device)``.

    Args:
        words: int64, the ancestor words. ``[Bm, m]`` or ``[m]`` for trees of up to 64 nodes, one word per node;
            ``[Bm, m, W]`` with W = ceil(m / 64) for 1 <= m <= 4096 nodes. Parents come before their children, so node
            i's words have bit i and no higher one. Several roots are allowed.
        prefix: cached tokens before the tree, one number or one per batch entry ``[Bm]``.

    Attributes:
        words: int64 ``[Bm, m]``, or ``[Bm, m, W]`` where a node has several words. Must not be written to.
        prefix: int32 ``[Bm]``. Must not be written to.
        bounds: int32 ``[Bm, 1, m, 2]``, the keys ``[0, prefix + i + 1)`` up to each node; what a node may see lies
            there. Must not be written to.
        nk: number of keys: the longest prefix and the nodes.

    Raises:
        TypeError: `words` or `prefix` is not made of integers.
        ValueError: the shapes do not fit, or a word is not the ancestors of a node; names the first such node.
    """

    __slots__ = ("bounds", "nk", "prefix", "words")
    _CONTENT = ("words", "prefix")

    words: Tensor
    prefix: Tensor
    bounds: Tensor
    nk: int

    def __init__(self, words: Tensor, prefix: int | Sequence[int] | Tensor) -> None:
        where = "arcore.masks.TreeMask"
        bits = integers(where, "words", words)
        bits = bits.unsqueeze(0) if bits.dim() == 1 else bits
        wide = bits.unsqueeze(2) if bits.dim() == 2 else bits
        if (
            wide.dim() != 3
            or not 1 <= wide.shape[1] <= MAX_NODES
            or wide.shape[2] != _words_of(wide.shape[1])
            or wide.shape[0] == 0
        ):
            raise ValueError(
                f"{where}: expected words of shape [Bm, m] with 1 to {WORD} nodes, or [Bm, m, ceil(m / {WORD})] with 1 "
                f"to {MAX_NODES}, but got {tuple(words.shape)}"
            )
        bits = wide[..., 0] if wide.shape[2] == 1 else wide
        cached = numbers(where, "prefix", prefix).reshape(-1)
        if cached.numel() == 0 or 1 != cached.numel() != bits.shape[0] != 1:
            raise ValueError(
                f"{where}: expected one prefix or one per batch entry ({bits.shape[0]}) but got {cached.numel()}"
            )
        if int(cached.min()) < 0 or int(cached.max()) > 2**31 - 1 - bits.shape[1]:
            raise ValueError(
                f"{where}: expected prefix lengths from 0 that int32 can hold but got {cached.tolist()}"
            )
        _check_words(wide)
        with torch.inference_mode(False):
            end = cached.view(-1, 1, 1) + torch.arange(1, bits.shape[1] + 1, device="cpu")  # [Bm, 1, m]
            self._freeze(
                bounds=torch.stack([torch.zeros_like(end), end], -1).to(torch.int32).to(words.device),
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
        words = table.new_zeros(*table.shape, _words_of(table.shape[1]))
        for i in range(table.shape[1]):
            parent = table[:, i].view(-1, 1, 1)
            inherited = words.gather(1, parent.clamp(min=0).expand(-1, 1, words.shape[2]))
            words[:, i] = inherited.where(parent >= 0, 0)[:, 0]
            words[:, i, i // WORD] |= _bit(i)
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
        at = node.clamp(0, self.num_nodes - 1).unsqueeze(1)
        seen = _bits(self.words).expand(self.batch, -1, -1)  # [B, m, m]
        inside = ((node >= 0) & (node < self.num_nodes)).unsqueeze(1)
        bit = seen.gather(2, at.expand(self.batch, self.num_nodes, -1))  # [B, m, Nk]
        return ((node < 0).unsqueeze(1) | (inside & bit)).unsqueeze(1)

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


def _words_of(nodes: int) -> int:
    return -(-nodes // WORD)


def _bit(i: int) -> int:
    """The bit of node i in its word, as int64 holds it: bit 63 is the sign."""
    return 1 << i % WORD if i % WORD < WORD - 1 else -(1 << (WORD - 1))


def _bits(words: Tensor) -> Tensor:
    """bool ``[Bm, m, m]``: entry (i, j) is bit j of node i's words."""
    wide = words.unsqueeze(2) if words.dim() == 2 else words
    node = torch.arange(WORD, device=words.device)
    return (wide.unsqueeze(3) >> node & 1).bool().flatten(2)[:, :, : words.shape[1]]


def _ancestors(words: Tensor) -> Tensor:
    """bool ``[Bm, m, m]``: entry (i, j) says that node j is a proper ancestor of node i."""
    node = torch.arange(words.shape[1], device=words.device)
    return _bits(words) & (node < node.unsqueeze(1))


def _parents(ancestors: Tensor) -> Tensor:
    # The last ancestor in order of nodes is the nearest one, as parents come before their children.
    node = torch.arange(ancestors.shape[1], device=ancestors.device)
    return torch.where(ancestors, node, -1).amax(-1)


def _check_words(words: Tensor) -> None:
    """Each node's words ``[Bm, m, W]`` must be its own bit and its parent's words."""
    parent = _parents(_ancestors(words)).unsqueeze(2)
    expected = words.gather(1, parent.clamp(min=0).expand_as(words)).where(parent >= 0, 0)
    for i in range(words.shape[1]):
        expected[:, i, i // WORD] |= _bit(i)
    bad = (words != expected).any(-1).flatten()
    if bad.any():
        first = int(bad.nonzero()[0])
        name = _spans.name_row(first, words.shape[0], 1, words.shape[1]).replace("row", "node")
        value = sum((int(w) & (2**WORD - 1)) << WORD * i for i, w in enumerate(words.flatten(0, 1)[first]))
        raise ValueError(
            f"arcore.masks.TreeMask: expected each word to be the node's own bit and its parent's word but {name} has "
            f"{value:#x}; build the mask with arcore.masks.tree(parents, prefix)"
        )
