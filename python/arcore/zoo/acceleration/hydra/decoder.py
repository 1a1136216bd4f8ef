"""`arcore sample --decoder hydra --heads FOLDER`."""

from __future__ import annotations

from typing import Any

from arcore.catalog import load_checkpoint
from arcore.decoding import TreeShape
from arcore.recipes.text_decoders import VERIFIED, TextDecoder, TextRequest, Written, draft_with
from arcore.training import checkpoint
from arcore.zoo.acceleration.hydra.heads import HydraDrafter, HydraHeads

# A few paths: on a CPU every node of a tree costs time, unlike on a GPU, which the published tree is made for.
SMALL = TreeShape.from_paths([(0,), (1,), (0, 0), (0, 1), (0, 0, 0), (0, 0, 0, 0)])


def load_heads(folder: str, model: Any) -> HydraHeads:
    """Heads from a run folder, checked against the model that they are to serve.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no draft heads, or those of another model.
    """
    networks, _ = load_checkpoint(checkpoint.find(folder))
    heads = networks.get("model")
    if not isinstance(heads, HydraHeads):
        raise ValueError(
            f"--heads {folder}: expected draft heads but it holds {type(heads).__name__}; train some with "
            "`arcore train hydra_tiny --base FOLDER`"
        )
    heads.check(model)
    return heads.to(next(model.parameters()).device).eval()


def small_shape(heads: HydraHeads) -> TreeShape:
    """The tree for a CPU, cut to the number of heads and of tokens that they propose."""
    count, widest = heads.config.num_heads, heads.config.proposed
    places = [path for level in SMALL.levels for path in (_path(SMALL, i) for i in level)]
    return TreeShape.from_paths([path for path in places if len(path) <= count and max(path) < widest])


def _path(shape: TreeShape, node: int) -> tuple[int, ...]:
    above = shape.parents[node]
    return (*(_path(shape, above) if above >= 0 else ()), shape.ranks[node])


def _write(request: TextRequest) -> Written:
    if request.options.heads is None:
        raise ValueError("--decoder hydra needs trained heads: --heads FOLDER, from `arcore train hydra_...`")
    heads = load_heads(str(request.options.heads), request.base)
    return draft_with(request, HydraDrafter(heads, small_shape(heads), base=request.base))


def text_decoder() -> TextDecoder:
    """Writes with draft heads."""
    return TextDecoder(_write, ("heads", *VERIFIED))
