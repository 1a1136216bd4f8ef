"""Texts with deletions: made, read in one pass, and written."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arcore.decoding import Sampling, Session
from arcore.masks import IntervalMask
from arcore.nn.causal import CausalDecoder
from arcore.nn.kinds import check_kinds


class History(NamedTuple):
    """A text with what was written and deleted on the way.

    Attributes:
        raw: int64 `[B, N]`, tokens and backspaces in the order in which they were written.
        wanted: int64 `[B, N]`, the right action after each of them.
        follows: bool `[B, N]`, whether the right action is the one that was taken next.
    """

    raw: Tensor
    wanted: Tensor
    follows: Tensor


@check_kinds
def noisy(ids: Tensor, backspace: int, rate: float, generator: torch.Generator | None = None) -> History:
    """Texts with random tokens put in, each deleted at once; all cut to the length of the texts.

    Args:
        ids: int64 `[B, N + 1]`.
        backspace: the action; other tokens are below it.
        rate: chance of a wrong token in front of each token but the first.
        generator: of the random tokens.
    """
    count = ids.shape[1] - 1
    wrong = torch.rand(ids.shape, generator=generator) < rate
    tokens = torch.randint(backspace, ids.shape, generator=generator)
    raw, wanted, follows = [], [], []
    for row, errors, random in zip(ids.tolist(), wrong.tolist(), tokens.tolist(), strict=True):
        own, right, taken = [row[0]], [], []
        for i in range(1, len(row)):
            if errors[i] and random[i] != row[i]:
                own += [random[i], backspace]
                right += [row[i], backspace]
                taken += [False, True]
            own.append(row[i])
            right.append(row[i])
            taken.append(True)
        raw.append(own[:count])
        wanted.append(right[:count])
        follows.append(taken[:count])
    return History(torch.tensor(raw), torch.tensor(wanted), torch.tensor(follows))


def contexts(raw: list[int], backspace: int) -> list[list[int]]:
    """The text that is left after each token of a row; a backspace on nothing deletes nothing."""
    text: list[int] = []
    out = []
    for token in raw:
        text = text[:-1] if token == backspace else [*text, token]
        out.append(text)
    return out


@check_kinds
def edited_hidden(model: Any, raw: Tensor, backspace: int) -> Tensor:
    """States of a model behind each token of edit histories, `[B, N, C]`, as if each edited text were read anew.

    At a backspace stands the last token that is left, at its own position, which sees the text and not itself twice. So
    what comes out depends on the edited text only.

    Args:
        model: a `CausalDecoder`.
        raw: int64 `[B, N]`; a backspace never deletes the first token.
        backspace: the action.

    Raises:
        ValueError: a backspace deletes the first token of a row.
    """
    batch, count = raw.shape
    ids, places = raw.clone(), torch.zeros_like(raw)
    stop = torch.arange(1, count + 1).expand(batch, -1).clone()
    seen_by = (
        torch.stack([torch.arange(count), torch.full((count,), count)], -1).expand(batch, -1, -1).clone()
    )
    for row, tokens in enumerate(raw.tolist()):
        left: list[int] = []
        for i, token in enumerate(tokens):
            if token != backspace:
                left.append(i)
                places[row, i] = len(left) - 1
                continue
            if len(left) < 2:
                raise ValueError(
                    f"expected a text before every backspace but that at {i} of row {row} deletes the first token"
                )
            seen_by[row, left.pop(), 1] = i
            ids[row, i] = tokens[left[-1]]
            places[row, i] = len(left) - 1
            # The token itself lies in the keys already; nobody sees its copy.
            stop[row, i] = i
            seen_by[row, i] = 0
    bounds = torch.stack([torch.zeros_like(stop), stop], -1).unsqueeze(1)
    mask = IntervalMask(bounds, count, key_bounds=seen_by).to(raw.device)
    hidden: Tensor = model.run(model.embed(ids), model.rotary.at(places), mask)
    return hidden


@check_kinds
def with_backspace(model: Any) -> Any:
    """A copy of a Llama with one more token, the last one, whose weights are the mean of the others.

    Raises:
        TypeError: the model is no Llama.
    """
    from arcore.zoo.language.llama import Llama

    if not isinstance(model, Llama):
        raise TypeError(f"expected a Llama, such as llama_tiny, but got {type(model).__name__}")
    size = model.vocab_size
    made = Llama(dataclasses.replace(model.config, vocab_size=size + 1))
    state = {}
    for name, value in model.state_dict().items():
        if name in ("embedding.weight", "lm_head.weight"):
            value = torch.cat([value[:size], value[:size].mean(0, keepdim=True)])
        state[name] = value
    made.load_state_dict(state)
    return made


class Edited(NamedTuple):
    """A text that was written with deletions.

    Attributes:
        text: new tokens that are left.
        raw: tokens and backspaces in the order in which they were written.
        calls: calls of the model.
    """

    text: list[int]
    raw: list[int]
    calls: int


@check_kinds
def write_with_backspace(
    model: CausalDecoder,
    prompt: list[int],
    backspace: int,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    allowed: bool = True,
) -> Edited:
    """Continue a prompt; a drawn backspace takes the last new token back, by cutting the cache.

    Args:
        model: a `DraftableModel` whose last token is the backspace.
        prompt: tokens; it is never deleted.
        backspace: the action.
        max_new_tokens: of the text that is left; at most four times as many actions are taken.
        sampling: how actions are drawn.
        seed: of the draws.
        allowed: False draws tokens only.

    Raises:
        ValueError: the prompt is empty or has a backspace.
    """
    if backspace in prompt:
        raise ValueError("expected a prompt without backspaces; apply them first")
    session = Session(
        model, [prompt], max_length=len(prompt) + max_new_tokens + 1, device=next(model.parameters()).device
    )
    raw: list[int] = []
    seeds = torch.tensor([seed], device=session.logits.device)
    while len(session.texts[0]) - len(prompt) < max_new_tokens and len(raw) < 4 * max_new_tokens:
        logits = session.logits[:, : model.vocab_size].clone()
        if not allowed or len(session.texts[0]) == len(prompt):
            logits[:, backspace] = -torch.inf
        # Each action has a number of its own: that of its place would draw the deleted token again.
        drawn = sampling.draw(logits, seeds, torch.full_like(seeds, len(raw)))
        assert isinstance(drawn, Tensor)
        raw.append(int(drawn))
        if raw[-1] == backspace:
            session.rewind([len(session.texts[0]) - 1])
        else:
            session.feed([[raw[-1]]])
    return Edited(session.texts[0][len(prompt) :], raw, session.calls)
