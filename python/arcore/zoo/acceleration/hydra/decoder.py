"""`arcore sample --decoder hydra --heads FOLDER`."""

from __future__ import annotations

from typing import Any

from arcore.catalog import load_checkpoint
from arcore.decoding import TreeShape
from arcore.recipes.text_decoders import VERIFIED, TextDecoder, TextRequest, Written, draft_with
from arcore.training import checkpoint
from arcore.zoo.acceleration.hydra.drafter import HydraDrafter
from arcore.zoo.acceleration.hydra.heads import HydraHeads

# Paths in the order in which they are worth their time on a CPU, where every node of a tree costs some. On a GPU, for
# which the published tree is made, it hardly does.
PATHS = (
    (0,), (0, 0), (1,), (0, 0, 0), (0, 1), (1, 0), (0, 0, 0, 0), (2,), (0, 0, 1), (0, 2), (0, 1, 0), (1, 0, 0), (2, 0),
    (3,), (1, 1), (0, 0, 0, 1),
)  # fmt: skip


def load_heads(folder: str, model: Any) -> HydraHeads:
    """Heads from a run folder, checked against the model that they are to serve, in its precision.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no draft heads, or those of another model.
    """
    networks, _ = load_checkpoint(checkpoint.find(folder))
    heads = networks.get("model")
    if not isinstance(heads, HydraHeads):
        raise ValueError(
            f"--heads {folder}: expected draft heads but it holds {type(heads).__name__}; train some with "
            "`arcore train hydra --base FOLDER`"
        )
    heads.check(model)
    return heads.to(next(model.parameters())).eval()


def small_shape(heads: HydraHeads, nodes: int) -> TreeShape:
    """The tree of so many nodes for a CPU, cut to the number of heads and of tokens that they propose.

    Raises:
        ValueError: there is no such tree.
    """
    if not 1 <= nodes <= len(PATHS):
        raise ValueError(f"--nodes {nodes}: expected 1 to {len(PATHS)} drafts in the tree of heads")
    count, widest = heads.config.num_heads, heads.config.proposed
    return TreeShape.from_paths([path for path in PATHS[:nodes] if len(path) <= count and max(path) < widest])


def _write(request: TextRequest) -> Written:
    if request.options.heads is None:
        raise ValueError("--decoder hydra needs trained heads: --heads FOLDER, from `arcore train hydra`")
    heads = load_heads(str(request.options.heads), request.base)
    return draft_with(
        request, HydraDrafter(heads, small_shape(heads, request.options.nodes), base=request.base)
    )


def text_decoder() -> TextDecoder:
    """Writes with draft heads."""
    return TextDecoder(_write, ("heads", "nodes", *VERIFIED))
