"""A policy that writes an action as several tokens, and the critic beside it.

Legend: B rows, K tokens of an action, V bins of a token, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from arcore.ops import token_logprobs


class ActionPolicy(nn.Module):
    """Reads an observation once and writes the tokens of an action, each from those before it.

    Args:
        encoder: observations to `[B, C]`.
        width: C.
        bins: values V of a token.
        tokens: K of an action.
        autoregressive: False draws all tokens from the observation alone, the factorised head of the comparison.
    """

    def __init__(
        self, encoder: nn.Module, *, width: int, bins: int, tokens: int = 2, autoregressive: bool = True
    ) -> None:
        super().__init__()
        self.encoder, self.bins, self.tokens, self.autoregressive = encoder, bins, tokens, autoregressive
        self.written = nn.ModuleList(nn.Embedding(bins, width) for _ in range(tokens - 1))
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, bins)) for _ in range(tokens)
        )
        value = nn.Linear(width, 1)
        nn.init.zeros_(value.weight)
        nn.init.zeros_(value.bias)
        self.critic = nn.Sequential(nn.Linear(width, width), nn.GELU(), value)

    def logits(self, hidden: Tensor, actions: Tensor) -> Tensor:
        """`[B, C]` and int64 `[B, K]` (the last token is not read) to `[B, K, V]`."""
        out = [self.heads[0](hidden)]
        for k in range(1, self.tokens):
            if self.autoregressive:
                hidden = hidden + self.written[k - 1](actions[:, k - 1])
            out.append(self.heads[k](hidden))
        return torch.stack(out, 1)

    def score(
        self, observations: Tensor, actions: Tensor, *, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities `[B, K]` of the tokens of actions, and values `[B]`, which do not move the encoder."""
        hidden = self.encoder(observations)
        logp = token_logprobs(self.logits(hidden, actions), actions, temperature=temperature).logp
        return logp, self.critic(hidden.detach())[:, 0]

    @torch.no_grad()
    def act(
        self, observations: Tensor, generator: torch.Generator, *, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw actions `[B, K]`, with their tokens' log-probabilities `[B, K]` and the values `[B]`."""
        hidden = self.encoder(observations)
        actions = torch.zeros(len(hidden), self.tokens, dtype=torch.int64)
        for k in range(self.tokens):
            law = (self.logits(hidden, actions)[:, k] / temperature).softmax(-1)
            actions[:, k] = law.multinomial(1, generator=generator)[:, 0]
        logp = token_logprobs(self.logits(hidden, actions), actions, temperature=temperature).logp
        return actions, logp, self.critic(hidden)[:, 0]


class SymbolEncoder(nn.Module):
    """A row of symbols, each with its own place, to one vector: embeddings, summed words, and two layers.

    Args:
        symbols: how many different ones.
        places: of a row that mean something by where they stand.
        words: places behind them whose order does not matter.
        width: C.
    """

    def __init__(self, symbols: int, places: int, words: int, width: int) -> None:
        super().__init__()
        self.places = places
        self.embedding = nn.Embedding(symbols, 12)
        self.words = nn.Embedding(symbols, width) if words else None
        self.mix = nn.Linear(12 * places, width) if places else None
        self.body = nn.Sequential(
            nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width)
        )

    def forward(self, rows: Tensor) -> Tensor:
        """int64 `[B, places + words]` to `[B, C]`."""
        total: Tensor | float = 0.0
        if self.mix is not None:
            total = total + self.mix(self.embedding(rows[:, : self.places]).flatten(1))
        if self.words is not None:
            # Products of scene and mission let one word select among several objects.
            said = self.words(rows[:, self.places :]).sum(1)
            total = said if self.mix is None else total * torch.tanh(said) + total + said
        out: Tensor = self.body(total)
        return out
