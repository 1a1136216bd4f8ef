"""The masks of the field by name.

Rows are queries i, columns keys j; ranges are half-open. Every constructor works without a loop over tokens and
returns a mask on the CPU; move it with `.to`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from arcore._kinds import check_kinds
from arcore.masks import _arguments as check
from arcore.masks.interval_mask import IntervalMask
from arcore.masks.labels import Labels, Segment, consecutive
from arcore.masks.tree_mask import TreeMask


def causal(n: int, offset: int = 0) -> IntervalMask:
    """Each token sees itself and what came before.

    Args:
        n: query tokens.
        offset: cached tokens before them, which all queries see; the mask has ``offset + n`` keys.

    Returns:
        ``[n, offset + n]``: row i sees ``[0, offset + i + 1)``.
    """
    n = check.length("causal", "n", n)
    offset = check.length("causal", "offset", offset)
    nk = check.length("causal", "offset + n", offset + n)
    labels = Labels(consecutive([n], ["tokens"]), consecutive([offset, n], ["cache", "tokens"]))
    return IntervalMask(_edges(n, 0, offset + _positions(n) + 1), nk, labels=labels)


def full(nq: int, nk: int) -> IntervalMask:
    """Every query sees every key.

    Args:
        nq: query tokens.
        nk: key tokens.
    """
    nq = check.length("full", "nq", nq)
    nk = check.length("full", "nk", nk)
    labels = Labels(consecutive([nq], ["queries"]), consecutive([nk], ["keys"]))
    return IntervalMask(_edges(nq, 0, nk), nk, labels=labels)


def next_scale(scales: Sequence[int]) -> IntervalMask:
    """Training mask of next-scale prediction: a token sees its own scale and all coarser ones.

    VAR (arXiv:2404.02905, section 3.2). A step of cached generation is a slice: with o_k the tokens before scale k,
    ``mask.rows(o_k, o_k + s_k**2, nk=o_k + s_k**2)`` allows everything.

    Args:
        scales: side lengths, coarse to fine; scale k has ``scales[k] ** 2`` tokens, in this order in the sequence.

    Returns:
        ``[N, N]``: row i of scale k sees ``[0, o_{k+1})``.
    """
    sizes, labels = _scales("next_scale", scales)
    return _block_causal(sizes, labels)


def next_scale_markov(scales: Sequence[int]) -> IntervalMask:
    """Training mask of Markov next-scale prediction: a token sees its own scale only.

    HMAR (arXiv:2506.04421): what coarser scales say reaches a scale through its inputs, not by attention.

    Args:
        scales: side lengths, as in `next_scale`.

    Returns:
        ``[N, N]``: row i of scale k sees ``[o_k, o_{k+1})``.
    """
    sizes, labels = _scales("next_scale_markov", scales)
    return _documents(sizes, labels, causal=False)


@check_kinds
def skip_causal(
    num_blocks: int,
    block_size: int,
    order: Literal["clean_first", "noisy_first"] = "clean_first",
    drop_last_clean: bool = False,
) -> IntervalMask:
    """Training mask of blockwise diffusion: a noisy block sees itself and the clean blocks before it.

    The sequence holds a clean and a noisy copy of every block. Clean block b sees clean blocks 0..b; noisy block b
    sees clean blocks 0..b-1 and itself, not its own clean copy. ACDiT (arXiv:2412.07720) puts the clean half first,
    block-diffusion language models (BD3-LM, arXiv:2503.09573) the noisy half.

    Args:
        num_blocks: blocks T.
        block_size: tokens per block B.
        order: "clean_first" for ``[clean; noisy]``, "noisy_first" for ``[noisy; clean]``.
        drop_last_clean: leave the last clean block out, rows and keys. No noisy block sees it, so a model whose loss
            reads noisy rows only computes the same without it.

    Returns:
        ``[2TB, 2TB]``, or ``[(2T-1)B, (2T-1)B]`` without the last clean block.
    """
    num_blocks = check.length("skip_causal", "num_blocks", num_blocks, 1)
    block_size = check.length("skip_causal", "block_size", block_size, 1)
    num_clean = num_blocks - 1 if drop_last_clean else num_blocks
    n = check.length("skip_causal", "the number of tokens", (num_clean + num_blocks) * block_size)
    clean_first = order == "clean_first"
    clean_at = 0 if clean_first else num_blocks * block_size
    noisy_at = num_clean * block_size if clean_first else 0

    # Tokens of a half that come before the block of each of its tokens.
    clean = _positions(num_clean).repeat_interleave(block_size) * block_size
    noisy = _positions(num_blocks).repeat_interleave(block_size) * block_size
    clean_rows = _edges(len(clean), clean_at, clean_at + clean + block_size, 0, 0)
    noisy_rows = _edges(
        len(noisy), clean_at, clean_at + noisy, noisy_at + noisy, noisy_at + noisy + block_size
    )
    rows = [clean_rows, noisy_rows] if clean_first else [noisy_rows, clean_rows]
    segments = [
        *_blocks("clean", num_clean, block_size, clean_at),
        *_blocks("noisy", num_blocks, block_size, noisy_at),
    ]
    return IntervalMask(torch.cat(rows), n, labels=_square(tuple(sorted(segments))))


def skip_causal_step(block: int, block_size: int) -> IntervalMask:
    """Mask of the first denoising step of a block in cached blockwise diffusion.

    The same pass brings the block before, now clean, into the cache (ACDiT, arXiv:2412.07720): queries are
    ``[clean b-1; noisy b]``, keys ``[clean 0 .. clean b-1; noisy b]``. Block 0 has no clean block before it: queries
    and keys are ``[noisy 0]`` and everything is allowed. Later steps ask with the noisy block alone and need no mask.

    Args:
        block: index b of the block, from 0.
        block_size: tokens per block B.

    Returns:
        ``[2B, (b+1)B]``: clean rows see ``[0, bB)``, noisy rows all keys. For block 0, ``[B, B]``.
    """
    block = check.length("skip_causal_step", "block", block)
    block_size = check.length("skip_causal_step", "block_size", block_size, 1)
    nk = check.length("skip_causal_step", "the number of keys", (block + 1) * block_size)
    cached = block * block_size
    keys = (*_blocks("clean", block, block_size), Segment(cached, nk, "noisy", f"noisy {block}"))
    if block == 0:
        return IntervalMask(_edges(block_size, 0, nk), nk, labels=_square(keys))
    last_two = Labels(keys, keys).cut(cached - block_size, nk, nk)
    stop = torch.where(_positions(2 * block_size) < block_size, cached, nk)
    return IntervalMask(_edges(2 * block_size, 0, stop), nk, labels=last_two)


def prefix_lm(n: int, prefix: int | Sequence[int] | Tensor) -> IntervalMask:
    """A prefix that sees itself in both directions, then causal tokens.

    Prefix language models, and blank infilling (GLM, arXiv:2103.10360) with the corrupted text as prefix and the
    spans after it.

    Args:
        n: tokens.
        prefix: tokens of the prefix, at most n; one number, or one per batch entry.

    Returns:
        ``[n, n]``: row i sees ``[0, max(prefix, i + 1))``. Of batch size B for B prefixes.
    """
    n = check.length("prefix_lm", "n", n)
    sizes = check.numbers("arcore.masks.prefix_lm", "prefix", prefix).view(-1, 1, 1)
    if sizes.numel() == 0 or int(sizes.min()) < 0 or int(sizes.max()) > n:
        raise ValueError(
            f"arcore.masks.prefix_lm: expected prefix from 0 to n={n} but got {sizes.flatten().tolist()}"
        )
    stop = torch.maximum(sizes, _positions(n) + 1)  # [B, 1, n]
    first = int(sizes[0])
    shared = bool((sizes == first).all())
    labels = _square(consecutive([first, n - first], ["prefix", "tokens"])) if shared else None
    return IntervalMask(torch.stack([torch.zeros_like(stop), stop], -1), n, labels=labels)


@check_kinds
def documents(lengths: Sequence[int] | Tensor, causal: bool = True) -> IntervalMask:
    """Documents packed into one sequence; no token sees another document (variable-length attention).

    Args:
        lengths: tokens of each document, in order; 0 is allowed.
        causal: a token sees only itself and what came before in its document; else the whole document.

    Returns:
        ``[N, N]`` with N the sum of `lengths`: row i of a document ``[a, b)`` sees ``[a, i + 1)`` or ``[a, b)``.
    """
    sizes = check.lengths("documents", "lengths", lengths)
    titles = [f"document {i}" for i in range(len(sizes))]
    return _documents(sizes, _square(consecutive(sizes, titles), ordered=True), causal)


def sliding_window(n: int, window: int, sinks: int = 0) -> IntervalMask:
    """Each token sees the last `window` tokens, itself included, and the first `sinks` tokens.

    Sinks are causal too: a token sees the sinks up to itself (StreamingLLM, arXiv:2309.17453).

    Args:
        n: tokens.
        window: tokens seen, at least 1.
        sinks: tokens at the start that stay visible, at most n.

    Returns:
        ``[n, n]``: row i sees ``[max(0, i - window + 1), i + 1)`` and ``[0, min(sinks, i + 1))``.
    """
    n = check.length("sliding_window", "n", n)
    window = check.length("sliding_window", "window", window, 1)
    sinks = check.length("sliding_window", "sinks", sinks)
    if sinks > n:
        raise ValueError(f"arcore.masks.sliding_window: expected sinks to be at most n={n} but got {sinks}")
    stop = _positions(n) + 1
    edges = _edges(n, (stop - window).clamp(min=0), stop, 0, stop.clamp(max=sinks))
    return IntervalMask(edges, n, labels=_square(consecutive([sinks, n - sinks], ["sinks", "tokens"])))


def block_causal(sizes: Sequence[int] | Tensor) -> IntervalMask:
    """A token sees its own block and all blocks before it.

    Frames of a video (AR-Diffusion, Magi-1), chunks of an autoregressive diffusion model; `next_scale` is the case of
    square blocks.

    Args:
        sizes: tokens of each block, in order; 0 is allowed.

    Returns:
        ``[N, N]`` with N the sum of `sizes`: row i sees ``[0, end of its block)``.
    """
    blocks = check.lengths("block_causal", "sizes", sizes)
    titles = [f"block {i}" for i in range(len(blocks))]
    return _block_causal(blocks, _square(consecutive(blocks, titles), ordered=True))


def tree(
    parents: Sequence[int] | Sequence[Sequence[int]] | Tensor, prefix: int | Sequence[int] | Tensor
) -> TreeMask:
    """Verification of a token tree after a cached prefix: a node sees the prefix, its ancestors and itself.

    Args:
        parents: ``[m]`` or ``[Bm, m]``, at most 4096 nodes; ``parents[i] < i``, or -1 for a root.
        prefix: cached tokens before the tree, one number or one per batch entry.
    """
    return TreeMask.from_parents(parents, prefix)


def _block_causal(sizes: list[int], labels: Labels) -> IntervalMask:
    size = torch.tensor(sizes, device="cpu")
    n = int(size.sum())
    return IntervalMask(_edges(n, 0, size.cumsum(0).repeat_interleave(size)), n, labels=labels)


def _documents(sizes: list[int], labels: Labels, causal: bool) -> IntervalMask:
    size = torch.tensor(sizes, device="cpu")
    n = int(size.sum())
    end = size.cumsum(0)
    stop = _positions(n) + 1 if causal else end.repeat_interleave(size)
    return IntervalMask(_edges(n, (end - size).repeat_interleave(size), stop), n, labels=labels)


def _edges(n: int, *edges: Tensor | int) -> Tensor:
    """Bounds ``[n, len(edges)]``; each edge is a number or has one entry per row."""
    return torch.stack([torch.as_tensor(edge, device="cpu").expand(n) for edge in edges], -1)


def _positions(n: int) -> Tensor:
    return torch.arange(n, device="cpu")


def _scales(where: str, scales: Sequence[int]) -> tuple[list[int], Labels]:
    """Tokens of each scale, and their labels."""
    sides = check.lengths(where, "scales", scales, 1)
    sizes = [side * side for side in sides]
    check.length(where, "the number of tokens", sum(sizes))
    groups = [f"scale {k}" for k in range(len(sides))]
    return sizes, _square(consecutive(sizes, [f"{side}×{side}" for side in sides], groups), ordered=True)


def _blocks(group: str, count: int, size: int, start: int = 0) -> tuple[Segment, ...]:
    return consecutive([size] * count, [f"{group} {b}" for b in range(count)], [group] * count, start)


def _square(segments: tuple[Segment, ...], ordered: bool = False) -> Labels:
    """Labels of a mask whose queries are its keys."""
    return Labels(segments, segments, ordered)
