"""Masks and positions of packed and padded batches, against the rule written out."""

from __future__ import annotations

import pytest
import torch

from arcore.nn.packing import causal_packing, packed_ids


@pytest.mark.parametrize("window", [None, 2])
def test_packing_is_the_rule_written_out(window: int | None) -> None:
    sequence = torch.tensor([[-1, -1, 0, 0, 0, 1], [0, 0, 2, 2, 2, -1], [3, 3, 3, 3, 3, 3]])
    packing = causal_packing(sequence, window)
    length = sequence.shape[1]
    seen = packing.mask.to_bool().expand(3, 1, length, length)
    for b in range(3):
        for i in range(length):
            for j in range(length):
                same = sequence[b, i] == sequence[b, j] >= 0
                near = window is None or i - j < window
                assert bool(seen[b, 0, i, j]) == bool(same and j <= i and near)
            before = (sequence[b, :i] == sequence[b, i]).sum()
            if sequence[b, i] >= 0:
                assert packing.positions[b, i] == before


def test_padding_inside_of_a_sequence_does_not_split_it() -> None:
    packing = causal_packing(torch.tensor([[0, 0, -1, 0, 1]]))
    assert packing.mask.to_bool()[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [1, 1, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    assert packing.positions[0, [0, 1, 3, 4]].tolist() == [0, 1, 2, 0]
    with pytest.raises(ValueError, match="no padding between"):
        causal_packing(torch.tensor([[0, 0, -1, 0, 1]]), window=2)


def test_starts_of_sequences_become_numbers() -> None:
    ids = torch.zeros(1, 5, dtype=torch.int64)
    assert packed_ids(ids, cu_seqlens=torch.tensor([0, 2, 5])).tolist() == [[0, 0, 1, 1, 1]]  # type: ignore[union-attr]
    assert packed_ids(ids) is None
    mask = torch.tensor([[False, True, True, True, True]])
    assert packed_ids(ids, mask=mask).tolist() == [[-1, 0, 0, 0, 0]]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="not both"):
        packed_ids(ids, seq_idx=ids.int(), cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="to rise from 0 to 5"):
        packed_ids(ids, cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="with one row"):
        packed_ids(ids.expand(2, 5), cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(TypeError, match="of dtype bool"):
        packed_ids(ids, mask=ids)
    with pytest.raises(ValueError, match="mask of shape"):
        packed_ids(ids, mask=mask[:, 1:])
