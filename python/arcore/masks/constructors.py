"""The masks of the field by name.

Rows are queries i, columns keys j; ranges are half-open. Every constructor takes token counts, works without a loop
over tokens, and returns a mask on the CPU (move it with `.to`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from arcore.masks import _arguments as check
from arcore.masks.interval_mask import IntervalMask
from arcore.masks.labels import Labels, Segment, consecutive
from arcore.masks.tree_mask import TreeMask

Range = tuple[Tensor | int, Tensor | int]


def causal(n: int, offset: int = 0) -> IntervalMask:
    """Each token sees itself and what came before.

    Args:
        n: query tokens.
        offset: cached tokens before them, which all queries see; the mask has ``offset + n`` keys.

    Returns:
        ``[n, offset + n]``: row i sees ``[0, offset + i + 1)``.
    """
    n, offset = check.length("causal", "n", n), check.length("causal", "offset", offset)
    check.length("causal", "n + offset", n + offset)
    names = (("cache", "cache"), ("tokens", "tokens"))
    keys = consecutive((offset, n), names) if offset else consecutive((n,), names[1:])
    labels = Labels(consecutive((n,), names[1:]), keys)
    return _from_ranges((0, _arange(n) + offset + 1), nq=n, nk=offset + n, labels=labels)


def full(nq: int, nk: int) -> IntervalMask:
    """Every query sees every key.

    Args:
        nq, nk: query and key tokens.
    """
    nq, nk = check.length("full", "nq", nq), check.length("full", "nk", nk)
    labels = Labels((Segment(0, nq, "queries", "queries"),), (Segment(0, nk, "keys", "keys"),))
    return _from_ranges((0, nk), nq=nq, nk=nk, labels=labels)


def next_scale(scales: Sequence[int]) -> IntervalMask:
    """Training mask of next-scale prediction: a token sees its own scale and all coarser ones.

    VAR (arXiv:2404.02905, section 3.2). A step of cached generation is a slice: with o_k the tokens before scale k,
    ``mask.rows(o_k, o_k + s_k**2, nk=o_k + s_k**2)`` allows everything.

    Args:
        scales: side lengths, coarse to fine; scale k has ``scales[k] ** 2`` tokens, in this order in the sequence.

    Returns:
        ``[N, N]``: row i of scale k sees ``[0, o_{k+1})``.
    """
    sides = check.lengths("next_scale", "scales", scales, 1)
    return _block_causal("next_scale", [side * side for side in sides], _scale_names(sides))


def next_scale_markov(scales: Sequence[int]) -> IntervalMask:
    """Training mask of Markov next-scale prediction: a token sees its own scale only.

    HMAR (arXiv:2506.04421): what coarser scales say reaches a scale through its inputs, not by attention.

    Args:
        scales: side lengths, as in `next_scale`.

    Returns:
        ``[N, N]``: row i of scale k sees ``[o_k, o_{k+1})``.
    """
    sides = check.lengths("next_scale_markov", "scales", scales, 1)
    sizes = [side * side for side in sides]
    stop = _cumulative("next_scale_markov", sizes)
    labels = _square(consecutive(sizes, _scale_names(sides)), ordered=True)
    return _from_ranges(
        (_per_token(stop - torch.tensor(sizes, device="cpu"), sizes), _per_token(stop, sizes)),
        nq=sum(sizes),
        nk=sum(sizes),
        labels=labels,
    )


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
    where = "skip_causal"
    num_blocks, block_size = (
        check.length(where, "num_blocks", num_blocks, 1),
        check.length(where, "block_size", block_size, 1),
    )
    if order not in ("clean_first", "noisy_first"):
        raise ValueError(
            f"arcore.masks.{where}: expected order to be 'clean_first' or 'noisy_first' but got {order!r}"
        )
    num_clean = num_blocks - 1 if drop_last_clean else num_blocks
    n = check.length(where, "the number of tokens", (num_clean + num_blocks) * block_size)
    clean_at, noisy_at = (
        (0, num_clean * block_size) if order == "clean_first" else (num_blocks * block_size, 0)
    )

    clean = _arange(num_clean).repeat_interleave(block_size) * block_size  # start of each clean token's block
    noisy = _arange(num_blocks).repeat_interleave(block_size) * block_size
    nothing = torch.zeros_like(clean)
    clean_rows = torch.stack([nothing + clean_at, clean_at + clean + block_size, nothing, nothing], -1)
    noisy_rows = torch.stack(
        [
            noisy.new_full(noisy.shape, clean_at),
            clean_at + noisy,
            noisy_at + noisy,
            noisy_at + noisy + block_size,
        ],
        -1,
    )
    halves = [clean_rows, noisy_rows] if order == "clean_first" else [noisy_rows, clean_rows]
    segments = [
        *_blocks("clean", num_clean, block_size, clean_at),
        *_blocks("noisy", num_blocks, block_size, noisy_at),
    ]
    return IntervalMask(torch.cat(halves), n, labels=_square(tuple(sorted(segments))))


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
    block, block_size = (
        check.length("skip_causal_step", "block", block),
        check.length("skip_causal_step", "block_size", block_size, 1),
    )
    nk = check.length("skip_causal_step", "the number of keys", (block + 1) * block_size)
    keys = consecutive(
        [block_size] * (block + 1),
        [*(("clean", f"clean {b}") for b in range(block)), ("noisy", f"noisy {block}")],
    )
    if block == 0:
        return _from_ranges((0, nk), nq=block_size, nk=nk, labels=_square(keys))
    row = _arange(2 * block_size)
    stop = torch.where(row < block_size, block * block_size, nk)
    queries = consecutive([block_size] * 2, [("clean", f"clean {block - 1}"), ("noisy", f"noisy {block}")])
    return _from_ranges((0, stop), nq=2 * block_size, nk=nk, labels=Labels(queries, keys))


def prefix_lm(n: int, prefix: int | Sequence[int] | Tensor) -> IntervalMask:
    """A prefix that sees itself in both directions, then causal tokens.

    Prefix language models, and blank infilling (GLM, arXiv:2103.10360) with the corrupted text as prefix
    and the spans after it.

    Args:
        n: tokens.
        prefix: tokens of the prefix, at most n; one number, or one per batch entry.

    Returns:
        ``[n, n]``: row i sees ``[0, max(prefix, i + 1))``. Of batch size B for B prefixes.
    """
    n = check.length("prefix_lm", "n", n)
    if isinstance(prefix, Tensor) and prefix.dim() == 0:
        prefix = int(prefix)
    sizes = check.lengths(
        "prefix_lm", "prefix", prefix if isinstance(prefix, Sequence | Tensor) else [prefix]
    )
    for size in sizes:
        if size > n:
            raise ValueError(f"arcore.masks.prefix_lm: expected prefix to be at most n={n} but got {size}")
    stop = torch.maximum(torch.tensor(sizes, device="cpu").view(-1, 1, 1), _arange(n) + 1)  # [B, 1, n]
    parts = consecutive((sizes[0], n - sizes[0]), (("prefix", "prefix"), ("tokens", "tokens")))
    labels = _square(parts) if len(set(sizes)) == 1 else None
    return IntervalMask(torch.stack([torch.zeros_like(stop), stop], -1), n, labels=labels)


def documents(lengths: Sequence[int] | Tensor, causal: bool = True) -> IntervalMask:
    """Documents packed into one sequence; no token sees another document (variable-length attention).

    Args:
        lengths: tokens of each document, in order; 0 is allowed.
        causal: a token sees only itself and what came before in its document; else the whole document.

    Returns:
        ``[N, N]`` with N the sum of `lengths`: row i of a document ``[a, b)`` sees ``[a, i + 1)`` or ``[a, b)``.
    """
    sizes = check.lengths("documents", "lengths", lengths)
    stop = _cumulative("documents", sizes)
    n = int(stop[-1])
    labels = _square(
        consecutive(sizes, ((f"document {i}", f"document {i}") for i in range(len(sizes)))), ordered=True
    )
    last = _arange(n) + 1 if causal else _per_token(stop, sizes)
    return _from_ranges(
        (_per_token(stop - torch.tensor(sizes, device="cpu"), sizes), last), nq=n, nk=n, labels=labels
    )


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
    window, sinks = (
        check.length("sliding_window", "window", window, 1),
        check.length("sliding_window", "sinks", sinks),
    )
    if sinks > n:
        raise ValueError(f"arcore.masks.sliding_window: expected sinks to be at most n={n} but got {sinks}")
    row = _arange(n)
    names = (("sinks", "sinks"), ("tokens", "tokens"))
    labels = _square(consecutive((sinks, n - sinks), names) if sinks else consecutive((n,), names[1:]))
    recent: Range = ((row - window + 1).clamp(min=0), row + 1)
    return _from_ranges(recent, (0, (row + 1).clamp(max=sinks)), nq=n, nk=n, labels=labels)


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
    return _block_causal("block_causal", blocks, [(f"block {i}", f"block {i}") for i in range(len(blocks))])


def tree(
    parents: Sequence[int] | Sequence[Sequence[int]] | Tensor, prefix: int | Sequence[int] | Tensor
) -> TreeMask:
    """Verification of a token tree after a cached prefix: a node sees the prefix, its ancestors and itself.

    Args:
        parents: ``[m]`` or ``[Bm, m]``, at most 64 nodes; ``parents[i] < i``, or -1 for a root.
        prefix: cached tokens before the tree, one number or one per batch entry.
    """
    return TreeMask.from_parents(parents, prefix)


def _block_causal(where: str, sizes: list[int], names: list[tuple[str, str]]) -> IntervalMask:
    stop = _cumulative(where, sizes)
    n = int(stop[-1])
    labels = _square(consecutive(sizes, names), ordered=True)
    return _from_ranges((0, _per_token(stop, sizes)), nq=n, nk=n, labels=labels)


def _from_ranges(*ranges: Range, nq: int, nk: int, labels: Labels | None) -> IntervalMask:
    edges = [torch.as_tensor(edge, device="cpu").expand(nq) for pair in ranges for edge in pair]
    return IntervalMask(torch.stack(edges, -1), nk, labels=labels)


def _arange(n: int) -> Tensor:
    return torch.arange(n, device="cpu")


def _cumulative(where: str, sizes: list[int]) -> Tensor:
    check.length(where, "the number of tokens", sum(sizes))
    return torch.tensor(sizes, device="cpu").cumsum(0)


def _per_token(values: Tensor, sizes: list[int]) -> Tensor:
    return values.repeat_interleave(torch.tensor(sizes, device="cpu"))


def _scale_names(sides: list[int]) -> list[tuple[str, str]]:
    return [(f"scale {k}", f"{side}×{side}") for k, side in enumerate(sides)]


def _blocks(group: str, count: int, size: int, start: int) -> tuple[Segment, ...]:
    return consecutive([size] * count, ((group, f"{group} {b}") for b in range(count)), start)


def _square(segments: tuple[Segment, ...], ordered: bool = False) -> Labels:
    return Labels(segments, segments, ordered)
