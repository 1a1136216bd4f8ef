"""What loops ask of a model may be a layer, a parameter or a buffer of it, whatever the Python."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from arcore.nn.protocols import BlockModel, DraftableModel, MaskedModel, TokenModel


class Masked(nn.Module):
    token_shape = (4, 2)
    null_class = 3

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)

    def forward(self, tokens: Tensor, visible: Tensor, labels: Tensor) -> Tensor:
        return tokens


def test_attributes_that_are_layers_are_offered() -> None:
    model = Masked()
    assert isinstance(model, MaskedModel)
    del model.head
    assert not isinstance(model, MaskedModel)
    model.register_buffer("head", torch.ones(1))
    assert isinstance(model, MaskedModel)


def test_what_is_lacking_is_not() -> None:
    for protocol in (BlockModel, TokenModel, DraftableModel):
        assert not isinstance(Masked(), protocol)
        assert not isinstance(3, protocol)
