"""Branches behind one prompt: packed in one row they are what they are in rows of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import arcore
from arcore.nn import branch_hidden, decoder, pack_branches
from arcore.ops import reference_block_sparse_attention

LENGTHS = ([9, 14, 9, 12, 5, 8], [9, 9, 9, 9, 4, 4], [0, 0, 0, 0, 1, 1])


def rows(vocab: int = 256, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two prompts with four and two branches, one of them empty."""
    generator = torch.Generator().manual_seed(seed)
    lengths, prompts, groups = (torch.tensor(x) for x in LENGTHS)
    tokens = torch.randint(0, vocab, (6, 14), generator=generator)
    for row in range(1, 6):
        if groups[row] == groups[row - 1]:
            tokens[row, : prompts[row]] = tokens[row - 1, : prompts[row]]
    return tokens, lengths, prompts, groups


@pytest.fixture
def llama64(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small Llama in float64, whose attention is the op's reference."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return reference_block_sparse_attention(q, k, v, mask)

    monkeypatch.setattr(decoder, "attend", attend)
    torch.manual_seed(0)
    model = arcore.create_model("llama_tiny", num_layers=2, dim=32, hidden_dim=48).double()
    for part in model.modules():
        for name in ("norm", "norm1", "norm2"):  # ours are computed in float32
            if hasattr(part, name):
                setattr(part, name, torch.nn.RMSNorm(32, dtype=torch.float64))
    # Rotary angles are kept in float32 for any model; in float64 the order of nothing else matters.
    monkeypatch.setattr(type(model.rotary), "at", _angles64)
    monkeypatch.setattr(
        type(model.rotary), "span", lambda self, a, b, device: _angles64(self, torch.arange(a, b))
    )
    return model


def _angles64(self: Any, positions: Tensor) -> Any:
    from arcore.nn import Angles

    turns = positions.unsqueeze(-1).double() * self.rates.double()
    cos, sin = turns.cos(), turns.sin()
    if cos.dim() == 2:
        cos, sin = cos[None], sin[None]

    class Exact(Angles):
        def turn(self, x: Tensor) -> Tensor:
            one, other = x.chunk(2, -1)
            c, s = cos[:, :, None], sin[:, :, None]
            return torch.cat([one * c - other * s, other * c + one * s], -1)

    return Exact(cos, sin)


def test_packed_equals_separate_rows_in_float64(llama64: Any) -> None:
    tokens, lengths, prompts, groups = rows()
    packed = pack_branches(tokens, lengths, prompts, groups)
    assert packed.ids.shape[1] == 9 + 5 + 3 + 4 + 1 + 4  # against 57 tokens in rows of their own
    together = branch_hidden(llama64, packed)[0]
    separate = llama64.hidden(tokens)
    for row in range(6):
        place = packed.place[row, : lengths[row]]
        assert (place >= 0).all()
        assert (packed.place[row, lengths[row] :] == -1).all()
        assert (together[place] - separate[row, : lengths[row]]).abs().max() <= 1e-12
    # Gradients: what all rows sum to.
    weight = torch.randn(6, 14, 32, dtype=torch.float64) * (torch.arange(14) < lengths[:, None])[..., None]
    parameters = list(llama64.parameters())
    real = packed.place >= 0
    ours = torch.autograd.grad(
        (together[packed.place[real]] * weight[real]).sum(), parameters, allow_unused=True
    )
    known = torch.autograd.grad((separate * weight).sum(), parameters, allow_unused=True)
    for one, other in zip(ours, known, strict=True):
        if other is not None:
            assert (one - other).abs().max() <= 1e-12 * other.abs().max().clamp(min=1)


def test_packed_equals_separate_rows_through_the_kernel() -> None:
    torch.manual_seed(0)
    model = arcore.create_model("llama_tiny")
    tokens, lengths, prompts, groups = rows()
    packed = pack_branches(tokens, lengths, prompts, groups)
    together, separate = branch_hidden(model, packed)[0], model.hidden(tokens)
    for row in range(6):
        found = together[packed.place[row, : lengths[row]]]
        torch.testing.assert_close(found, separate[row, : lengths[row]], rtol=1e-4, atol=2e-5)


def test_branches_do_not_see_each_other(llama64: Any) -> None:
    tokens, lengths, prompts, groups = rows()
    before = branch_hidden(llama64, pack_branches(tokens, lengths, prompts, groups))[0]
    changed = tokens.clone()
    changed[1, 9:14] = (changed[1, 9:14] + 1) % 256
    packed = pack_branches(changed, lengths, prompts, groups)
    after = branch_hidden(llama64, packed)[0]
    others = packed.place[torch.tensor([0, 2, 3, 4, 5])]
    others = others[others >= 0]
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[packed.place[1, 9:14]], after[packed.place[1, 9:14]])


def test_mamba_goes_on_from_the_prompts_state() -> None:
    torch.manual_seed(0)
    model = arcore.create_model("mamba_tiny")
    vocab = model.vocab_size
    for length in (1, 7):  # shorter and longer than the convolution
        prompt, branches = torch.randint(0, vocab, (length,)), torch.randint(0, vocab, (3, 5))
        head, logits = model.branches(prompt, branches)
        whole = model(torch.cat([prompt.expand(3, -1), branches], 1))
        torch.testing.assert_close(head, whole[0, :length], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits, whole[:, length:], rtol=1e-4, atol=1e-5)
        weight = torch.randn_like(logits)
        parameters = list(model.parameters())
        ours = torch.autograd.grad((logits * weight).sum(), parameters, allow_unused=True)
        known = torch.autograd.grad((whole[:, length:] * weight).sum(), parameters, allow_unused=True)
        for one, other in zip(ours, known, strict=True):
            if other is not None:
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def test_no_rows_and_rows_without_a_response() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    assert pack_branches(torch.zeros(0, 5, dtype=torch.int64), empty, empty, empty).ids.shape == (1, 0)
    three = torch.tensor([3])
    packed = pack_branches(torch.tensor([[1, 2, 3, 0]]), three, three, torch.tensor([7]))
    assert packed.ids.tolist() == [[1, 2, 3]]
    assert packed.place.tolist() == [[0, 1, 2, -1]]


def test_refuses() -> None:
    tokens, lengths, prompts, groups = rows()
    other = tokens.clone()
    other[1, 0] = (other[1, 0] + 1) % 256
    with pytest.raises(ValueError, match="rows of group 0 to share their prompt but row 1 has"):
        pack_branches(other, lengths, prompts, groups)
    with pytest.raises(ValueError, match="1 <= prompts <= lengths <= T"):
        pack_branches(tokens, lengths, lengths + 1, groups)
    with pytest.raises(ValueError, match=r"expected groups \(6,\) but got \(5,\)"):
        pack_branches(tokens, lengths, prompts, groups[1:])
    packed = pack_branches(tokens, lengths, prompts, groups)
    with pytest.raises(TypeError, match=r"expected a CausalDecoder.*but got Mamba"):
        branch_hidden(arcore.create_model("mamba_tiny"), packed)
    with pytest.raises(ValueError, match="without a sliding window but got window=4"):
        branch_hidden(arcore.create_model("llama_tiny", window=4), packed)
    with pytest.raises(ValueError, match="at most 8 tokens"):
        branch_hidden(arcore.create_model("llama_tiny", max_length=8), packed)
    with pytest.raises(TypeError, match="expected mixers with branches but got Mamba2Mixer"):
        arcore.create_model("mamba2_tiny").branches(tokens[0], tokens)
