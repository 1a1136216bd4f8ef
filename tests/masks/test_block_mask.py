"""To FlexAttention and back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention

from arcore import masks
from arcore.masks import IntervalMask
from arcore.ops import block_sparse_attention

MASKS = {
    "next_scale": masks.next_scale((1, 2, 3, 4, 5, 6, 8)),
    "markov": masks.next_scale_markov((1, 2, 3, 4, 5, 6, 8)),
    "skip_causal": masks.skip_causal(4, 16),
    "skip_causal_ragged": masks.skip_causal(3, 11, order="noisy_first", drop_last_clean=True),
    "cached_step": masks.skip_causal_step(3, 24),
    "window_and_sinks": masks.sliding_window(100, 20, 4),
    "one_row": masks.causal(1, offset=70),
    "empty_rows": IntervalMask(torch.tensor([[0, 0], [3, 40], [0, 0]]), 40),
    "batch": masks.prefix_lm(50, [0, 7, 50]),
    "heads": IntervalMask(torch.cat([masks.causal(50).bounds, masks.sliding_window(50, 9).bounds], 1), 50),
    "padding": masks.causal(50).with_padding([50, 20, 0]),
}


@pytest.fixture(params=MASKS, name="mask")
def _mask(request: pytest.FixtureRequest) -> IntervalMask:
    return MASKS[request.param]


def dense(block_mask: BlockMask) -> Tensor:
    """What a FlexAttention kernel computes: full blocks whole, partial ones where mask_mod allows."""
    batch, heads, blocks = block_mask.kv_num_blocks.shape
    nq, nk = block_mask.seq_lengths
    block_q, block_k = block_mask.BLOCK_SIZE
    allowed = create_mask(block_mask.mask_mod, batch, heads, nq, nk, device="cpu")
    out = torch.zeros(batch, heads, nq, nk, dtype=torch.bool)
    for b, h, m in ((b, h, m) for b in range(batch) for h in range(heads) for m in range(blocks)):
        rows = slice(m * block_q, (m + 1) * block_q)
        for count, indices, whole in (
            (block_mask.kv_num_blocks, block_mask.kv_indices, False),
            (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, True),
        ):
            for n in indices[b, h, m, : int(count[b, h, m])].tolist():
                columns = slice(n * block_k, (n + 1) * block_k)
                out[b, h, rows, columns] = True if whole else allowed[b, h, rows, columns]
    return out


@pytest.mark.parametrize("block_size", [16, (32, 16), 128])
def test_block_mask_holds_the_same_pairs(mask: IntervalMask, block_size: int | tuple[int, int]) -> None:
    assert torch.equal(dense(mask.to_block_mask(block_size)), mask.to_bool())


@pytest.mark.parametrize("block_size", [16, (32, 16), 128])
def test_block_mask_is_the_one_flex_attention_makes(
    mask: IntervalMask, block_size: int | tuple[int, int]
) -> None:
    """Same blocks in the same lists, in both directions."""
    wanted = mask.to_bool()
    made = create_block_mask(
        lambda b, h, q, kv: wanted[b, h, q, kv], *mask.shape, device="cpu", BLOCK_SIZE=block_size
    )
    ours = mask.to_block_mask(block_size)
    assert ours.seq_lengths == (mask.nq, mask.nk)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(made, name)), name
    assert torch.equal(ours.to_dense(), made.to_dense())


def test_round_trip(mask: IntervalMask) -> None:
    again = IntervalMask.from_block_mask(mask.to_block_mask(32))
    if mask.key_bounds is None:
        assert again == mask
    assert torch.equal(again.to_bool(), mask.to_bool())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_computes_the_same(mask: IntervalMask) -> None:
    q, k, v = random_inputs(mask)
    out = flex_attention(q, k, v, block_mask=mask.to_block_mask(32))
    torch.testing.assert_close(out, block_sparse_attention(q, k, v, mask))
    allowed = mask.to_bool()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    torch.testing.assert_close(out, torch.where(allowed.any(-1, keepdim=True), expected, 0.0))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.parametrize("name", ["skip_causal_ragged", "padding"])
def test_compiled_flex_attention_computes_the_same(name: str) -> None:
    mask = MASKS[name]
    q, k, v = random_inputs(mask, dim=16)
    torch.compiler.reset()
    out = torch.compile(flex_attention, dynamic=False)(q, k, v, block_mask=mask.to_block_mask(128))
    seen = mask.to_bool().any(-1)
    torch.testing.assert_close(out[seen], block_sparse_attention(q, k, v, mask)[seen])


def random_inputs(mask: IntervalMask, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    k, v = torch.randn(2, mask.batch, mask.heads, mask.nk, dim)
    return torch.randn(mask.batch, mask.heads, mask.nq, dim), k, v


def documents(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    """As users write it: equality of ids, looked up by position."""
    return (DOCUMENT[q] == DOCUMENT[kv]) & (q >= kv)


DOCUMENT = torch.tensor([0] * 70 + [1] * 200 + [2] * 30)


@pytest.mark.parametrize("block_size", [64, 128])
def test_from_a_mask_mod_that_looks_up_tensors(block_size: int) -> None:
    made = create_block_mask(documents, None, None, 300, 300, device="cpu", BLOCK_SIZE=block_size)
    assert masks.from_block_mask(made) == masks.documents([70, 200, 30])


def test_from_a_mask_mod_of_batch_and_head() -> None:
    prefixes = torch.tensor([[3, 40], [0, 17]])

    def prefix(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv < prefixes[b, h]) | (kv <= q)

    mask = masks.from_block_mask(create_block_mask(prefix, 2, 2, 40, 40, device="cpu", BLOCK_SIZE=16))
    for b in range(2):
        for h in range(2):
            assert torch.equal(mask.to_bool()[b, h], masks.prefix_lm(40, int(prefixes[b, h])).to_bool()[0, 0])


def test_mask_mod_is_not_asked_about_full_blocks() -> None:
    """A full block is allowed whatever mask_mod says, as in the kernels."""
    counts, indices = (
        torch.tensor([[[1]], [[1]]]).int().view(1, 1, 2),
        torch.tensor([0, 1]).int().view(1, 1, 2, 1),
    )
    nothing = torch.zeros(1, 1, 2).int()
    block_mask = BlockMask.from_kv_blocks(
        nothing,
        torch.tensor([[0, 1], [0, 1]]).int().view(1, 1, 2, 2),
        counts,
        torch.cat([indices, 1 - indices], -1),
        BLOCK_SIZE=16,
        mask_mod=lambda b, h, q, kv: q < 0,
        seq_lengths=(32, 20),
    )
    assert masks.from_block_mask(block_mask) == IntervalMask(
        torch.tensor([[0, 16]] * 16 + [[16, 20]] * 16), 20
    )


def test_unlisted_blocks_are_empty() -> None:
    """Blocks that are in no list hold no pair, whatever mask_mod says of them."""
    diagonal = BlockMask.from_kv_blocks(
        torch.ones(1, 1, 3, dtype=torch.int32),
        torch.tensor([[0, 1, 2], [1, 0, 2], [2, 0, 1]]).int().view(1, 1, 3, 3),
        BLOCK_SIZE=16,
        seq_lengths=(40, 40),
    )
    assert masks.from_block_mask(diagonal) == masks.documents([16, 16, 8], causal=False)


def test_without_full_lists() -> None:
    made = masks.causal(40).to_block_mask(16)
    partial = BlockMask.from_kv_blocks(
        made.kv_num_blocks + made.full_kv_num_blocks,
        torch.arange(3).int().expand(1, 1, 3, 3),
        BLOCK_SIZE=16,
        mask_mod=made.mask_mod,
        seq_lengths=(40, 40),
    )
    assert masks.from_block_mask(partial) == masks.causal(40)


def even_keys(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return (kv % 2 == 0) | (q < 21)


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (
            lambda: masks.from_block_mask(torch.ones(3, 3)),
            TypeError,
            "expected a FlexAttention BlockMask but got Tensor",
        ),
        (
            lambda: masks.from_block_mask(
                create_block_mask(even_keys, None, None, 40, 40, device="cpu", BLOCK_SIZE=16)
            ),
            ValueError,
            "from_block_mask: expected at most 2 key ranges per row but row 21 has 20",
        ),
        (
            lambda: masks.causal(0).to_block_mask(),
            ValueError,
            "at least one query and one key but got 0 and 0",
        ),
        (
            lambda: masks.causal(4).to_block_mask(0),
            ValueError,
            "expected block_size to be at least 1 but got 0",
        ),
        (lambda: masks.causal(4).to_block_mask((1, 2, 3)), ValueError, "expected one or two block sizes"),
    ],
)
def test_bad_arguments(build: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        build()
