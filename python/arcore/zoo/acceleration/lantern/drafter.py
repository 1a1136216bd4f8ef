"""The drafter: one layer that goes on from the model's hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arcore.catalog import preset
from arcore.decoding import Context, Draft, TreeShape
from arcore.masks import TreeMask
from arcore.nn import DecoderLayer, GatedMLP, GroupedAttention
from arcore.nn.causal import CausalDecoder
from arcore.nn.kinds import check_kinds

# Uniform noise on the states that are read in training, to both sides, and the share of the cross entropy.
NOISE, CROSS_ENTROPY = 0.2, 0.1
DEEPEST = 4


@check_kinds
@dataclass(frozen=True, kw_only=True)
class DrafterConfig:
    """Settings of `FeatureDrafter`.

    Attributes:
        dim: width C of the model that it serves.
        vocab_size: its codes V.
        num_heads: heads of the layer.
        hidden_dim: width of its feed-forward network.

    Raises:
        ValueError: a size is below 1, or heads do not divide the width.
    """

    dim: int
    vocab_size: int
    num_heads: int
    hidden_dim: int

    def __post_init__(self) -> None:
        for name in ("dim", "vocab_size", "num_heads", "hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1 but got {getattr(self, name)}")
        if self.dim % self.num_heads:
            raise ValueError(f"expected num_heads to divide dim={self.dim} but got {self.num_heads}")


@check_kinds
class FeatureDrafter(CausalDecoder):
    """Predicts the model's hidden state behind a code from the state before it and the code.

    The layer has no norm in front of its attention and none behind itself, as the released one. Embeddings, rotary
    angles and the last layer are those of the model.

    Args:
        config: settings.
    """

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size, self.max_length = config.vocab_size, 1 << 30
        self.join = nn.Linear(2 * config.dim, config.dim)
        layer = DecoderLayer(
            config.dim,
            attention=GroupedAttention(
                config.dim,
                num_heads=config.num_heads,
                num_kv_heads=config.num_heads,
                head_dim=config.dim // config.num_heads,
            ),
            mlp=GatedMLP(config.dim, config.hidden_dim),
            norm_eps=1e-5,
        )
        layer.norm1 = nn.Identity()  # type: ignore[assignment]
        self.layers = nn.ModuleList([layer])
        self.norm = nn.Identity()
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and not parameter.is_meta:
                if name.endswith(("out.weight", "down.weight")):
                    nn.init.zeros_(parameter)
                else:
                    nn.init.normal_(parameter, std=0.02)
        if not self.join.weight.is_meta:
            # At first the state is handed on as it is.
            with torch.no_grad():
                self.join.weight[:, config.dim :].add_(torch.eye(config.dim))
                self.join.bias.zero_()

    def check(self, model: Any) -> None:
        """Raise ValueError unless this fits the model."""
        width = model.embedding.weight.shape[1]
        if (width, model.vocab_size) != (self.config.dim, self.config.vocab_size):
            raise ValueError(
                f"the drafter is made for a model of width {self.config.dim} with {self.config.vocab_size} tokens but "
                f"this one has width {width} and {model.vocab_size} tokens; train one for it"
            )

    @check_kinds
    def forward(self, model: Any, states: Tensor, ids: Tensor) -> Tensor:
        """Predicted states.

        Args:
            model: the model.
            states: `[B, N, C]`, of the model behind tokens 0 to N - 1.
            ids: int64 `[B, N]`, tokens 1 to N.

        Returns:
            `[B, N, C]`, of tokens 1 to N.
        """
        x = self.join(torch.cat([model.embed(ids), states], dim=-1))
        self.rotary = model.rotary
        mask, angles = self.behind((0,), ids.shape[1], ids.device)
        return self.run(x, angles, mask)

    def drafter(self, model: Any, count: int) -> TreeDrafter:
        """What proposes `count` tokens at a time, of which some are alternatives, for a model."""
        return TreeDrafter(self, model, tree_of(count, model.vocab_size))


def feature_loss(drafter: FeatureDrafter, model: Any, ids: Tensor, *, noise: float = NOISE) -> Tensor:
    """EAGLE's training loss: smooth L1 of states, and a tenth of the cross entropy with the model's distributions.

    Args:
        drafter: trained.
        model: frozen.
        ids: int64 `[B, L]`, prompts and codes.
        noise: to both sides of the states that are read, uniform.

    Returns:
        Scalar.
    """
    with torch.no_grad():
        states = model.hidden(ids)
        read = states[:, :-1] + noise * (2 * torch.rand_like(states[:, :-1]) - 1)
        wanted = states[:, 1:]
        law = model.logits(wanted).softmax(-1)
    found = drafter(model, read, ids[:, 1:])
    entropy = F.cross_entropy(model.logits(found).flatten(0, 1), law.flatten(0, 1))
    return F.smooth_l1_loss(found, wanted) + CROSS_ENTROPY * entropy


def tree_of(count: int, vocab_size: int) -> TreeShape:
    """The `count` paths of ranks that are likeliest to hit, when a rank's chance falls like 1 / (rank + 1)^2."""
    paths: list[tuple[int, ...]] = []
    open_: dict[tuple[int, ...], float] = {(0,): 1.0}
    while open_ and len(paths) < count:
        path = min(open_, key=lambda one: (-open_[one], one))
        chance = open_.pop(path)
        paths.append(path)
        rank = path[-1]
        if rank + 1 < vocab_size:
            open_[(*path[:-1], rank + 1)] = chance * ((rank + 1) / (rank + 2)) ** 2
        if len(path) < DEEPEST:
            open_[(*path, 0)] = 0.9 * chance
    return TreeShape.from_paths(paths)


class TreeDrafter:
    """Proposes a static tree of the likeliest tokens; a `Drafter` of `arcore.decoding`.

    Args:
        network: the trained layer.
        model: that it was trained for, also where a guided one is decoded.
        shape: of the tree.
    """

    def __init__(self, network: FeatureDrafter, model: Any, shape: TreeShape) -> None:
        network.check(model)
        self.network, self.model, self.shape = network.eval(), model, shape

    @property
    def max_nodes(self) -> int:
        return len(self.shape.parents)

    def start(self, model: Any, batch: int, max_length: int) -> None:
        self.network.rotary = self.model.rotary
        self._cache = self.network.make_cache(batch, max_length + self.max_nodes + 1)
        self._last: Tensor | None = None

    @torch.no_grad()
    def propose(self, context: Context) -> Draft:
        state = self._catch_up(context)
        shape, batch = self.shape, len(context.texts)
        tokens = torch.zeros(batch, self.max_nodes, dtype=torch.int64, device=context.device)
        after = {-1: state}
        levels = shape.levels
        for depth, nodes in enumerate(levels):
            for parent in sorted({shape.parents[i] for i in nodes}):
                children = [i for i in nodes if shape.parents[i] == parent]
                ranks = [shape.ranks[i] for i in children]
                best = self.model.logits(after[parent])[:, : self.model.vocab_size].topk(max(ranks) + 1)
                tokens[:, children] = best.indices[:, ranks]
            if depth + 1 < len(levels):
                count = nodes[-1] + 1
                before = torch.stack([after[shape.parents[i]] for i in range(count)], dim=1)
                x = self.network.join(torch.cat([self.model.embed(tokens[:, :count]), before], dim=-1))
                tree = TreeMask.from_parents(shape.parents[:count], list(self._cache.lengths)).to(x.device)
                places = tree.prefix.long().unsqueeze(1) + tree.depth
                found = self.network.run(x, self.network.rotary.at(places), tree, self._cache)
                after |= {i: found[:, i] for i in nodes}
        return Draft(tokens, torch.tensor(shape.parents, device=context.device))

    def _catch_up(self, context: Context) -> Tensor:
        """Read what was kept since; the predicted state behind each row's last token, `[B, C]`."""
        states, kept = context.states, context.kept
        if states is None or kept is None:
            # A guided model does not give the states of its prompt.
            kept = [len(text) - 1 for text in context.texts]
            ids = [text[:-1] + [0] * (max(kept) - n) for text, n in zip(context.texts, kept, strict=True)]
            states = self.model.hidden(torch.tensor(ids, device=context.device))
        assert states is not None
        width = states.shape[1]
        # A row that ended in the last round holds fewer tokens than were read; what it drafts is not used.
        rows = [
            text[have + 1 : have + 1 + n]
            for text, have, n in zip(context.texts, self._cache.lengths, kept, strict=True)
        ]
        following = [row + [0] * (width - len(row)) for row in rows]
        read = torch.tensor(following, device=context.device)
        x = self.network.join(torch.cat([self.model.embed(read), states], dim=-1))
        mask, angles = self.network.behind(self._cache.lengths, width, context.device)
        found = self.network.run(x, angles, mask, self._cache)
        self._cache.commit(kept)
        places = [max(n - 1, 0) for n in kept]
        last: Tensor = found[torch.arange(len(places), device=found.device), places]
        return last


def config_for(model: Any) -> DrafterConfig:
    """The settings of a drafter for a `LlamaGen`: a layer like the model's own."""
    layer = model.layers[0]
    return DrafterConfig(
        dim=model.embedding.weight.shape[1],
        vocab_size=model.vocab_size,
        num_heads=layer.attention.num_heads,
        hidden_dim=layer.mlp.down.weight.shape[1],
    )


@preset
def lantern_tiny() -> DrafterConfig:
    """Drafts codes for `llamagen_tiny`."""
    return DrafterConfig(dim=96, vocab_size=4, num_heads=4, hidden_dim=256)
