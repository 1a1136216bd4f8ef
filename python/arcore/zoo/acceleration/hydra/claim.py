"""The check of the claim."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore.catalog import create_model
from arcore.catalog.claims import Claim, at_least, equals, steps
from arcore.decoding import TreeShape, exact, generate, speculative_tree, typical
from arcore.ops import verify_typical
from arcore.zoo.acceleration.hydra.drafter import HydraDrafter
from arcore.zoo.acceleration.hydra.heads import HydraConfig, HydraHeads, hydra_loss


def train_base(tokens: Tensor, vocab_size: int, *, count: int, context: int, batch: int = 8) -> Any:
    """A small Llama of width 64, trained on tokens `[N]` for `count` steps; for the claims of this topic."""
    model = create_model(
        "llama_tiny",
        dim=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        hidden_dim=176,
        vocab_size=vocab_size,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    for _ in steps(count, "training the model"):
        ids = _crops(tokens, batch, context + 1)
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def train_heads(
    heads: HydraHeads,
    model: Any,
    tokens: Tensor,
    *,
    count: int,
    context: int,
    batch: int = 8,
    teacher: bool = False,
) -> HydraHeads:
    """Train heads on tokens `[N]` for `count` steps, with the text as target or, as Hydra++, the model's own law."""
    heads.start_from(model)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=2e-3)
    for _ in steps(count, f"training {heads.config.kind} heads"):
        ids = _crops(tokens, batch, context)
        loss = hydra_loss(heads, model, ids, lm=float(not teacher), teacher=float(teacher))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return heads.eval()


def _crops(tokens: Tensor, batch: int, length: int) -> Tensor:
    starts = torch.randint(len(tokens) - length, (batch,)).tolist()
    return torch.stack([tokens[start : start + length] for start in starts]).long()


def claim(*, quick: bool) -> Claim:
    """Heads on a small model of bytes of the King James Bible: same text, tokens per call, rows, padding."""
    from arcore.data import ByteTokenizer, load_text

    text = load_text("kjv")
    words = ByteTokenizer()
    tokens, held_out = (
        words.tensor(text.train[: 100_000 if quick else 2_000_000]),
        words.tensor(text.test[:20_000]),
    )
    count, context = (30, 40) if quick else (400, 96)
    model = train_base(tokens, 256, count=count, context=context)
    shape = TreeShape.from_paths(
        [(0,), (1,), (2,), (3,), (0, 0), (0, 1), (1, 0), (0, 2), (2, 0), (1, 1), (0, 0, 0), (0, 0, 1), (0, 1, 0),
         (1, 0, 0), (0, 0, 2), (2, 0, 0)]
    )  # fmt: skip
    rows = 4 if quick else 20
    prompts = [held_out[i * 500 : i * 500 + 20 + i].long().tolist() for i in range(rows)]
    options: dict[str, Any] = {"max_new_tokens": 16 if quick else 100, "temperature": 0.0}
    expected = generate(model, prompts, **options).rows()
    speed: dict[str, float] = {}
    wrong = 0
    kinds: dict[str, dict[str, Any]] = {"hydra": {}, "medusa": {"kind": "medusa"}}
    if not quick:
        kinds["hydra++"] = {
            "num_layers": 4,
            "prefix_heads": 4,
            "prefix_kv_heads": 2,
            "prefix_hidden_dim": 176,
        }
    for kind, fields in kinds.items():
        config = HydraConfig(dim=64, vocab_size=256, num_heads=3, **fields)
        heads = train_heads(
            HydraHeads(config), model, tokens, count=count, context=context, teacher=kind == "hydra++"
        )
        for verify in (exact(), typical()):
            out = speculative_tree(model, HydraDrafter(heads, shape), prompts, verify=verify, **options)
            wrong += sum(a != b for a, b in zip(out.rows(), expected, strict=True))
        speed[kind] = out.tokens_per_round
        alone = speculative_tree(model, HydraDrafter(heads, shape), prompts[:1], **options).rows()
        wrong += alone != expected[:1]
    # Padding behind the first node has the token that the model would say next; it must not count as drafted.
    probs = torch.zeros(1, 3, 4)
    probs[0, :, 2] = 1.0
    lucky = verify_typical(probs, torch.tensor([[2, -1]]), [-1, 0]).accepted
    return Claim(
        (
            equals(f"greedy texts of {rows} rows that differ from plain decoding", wrong, 0),
            at_least("tokens per call, Hydra", speed["hydra"], 1.2 if quick else 2.0),
            at_least(
                "tokens per call, Hydra over Medusa", speed["hydra"] / speed["medusa"], 0.95 if quick else 1.0
            ),
            equals("drafts accepted of one and a lucky padding", int(lucky), 1),
            *(
                at_least("tokens per call, Hydra++ over Hydra", value / speed["hydra"], 1.0)
                for kind, value in speed.items()
                if kind == "hydra++"
            ),
        )
    )
