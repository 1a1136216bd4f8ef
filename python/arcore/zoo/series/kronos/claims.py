"""What Kronos is held to."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from arcore.catalog.claims import Claim, Row, at_least, at_most, equals, shaken, steps


def claim(*, quick: bool) -> Claim:
    """Nothing leaks, cached paths are those without a cache; with training, what coarse tokens tell, and the speed."""
    from arcore.zoo.series.kronos import Kronos, kronos_tiny
    from arcore.zoo.series.kronos_tokenizer import KronosTokenizer, kronos_tokenizer_tiny

    model = shaken(Kronos(kronos_tiny())).eval()
    tokenizer = shaken(KronosTokenizer(kronos_tokenizer_tiny())).eval()
    rows = [*_leaks(model), *_same_paths(model, tokenizer)]
    if quick:
        return Claim(tuple(rows))
    trained, held_out, draw = _trained(rows)
    del trained, held_out
    rows.append(_speed())
    return Claim(tuple(rows), draw, (9.0, 3.5))


@torch.no_grad()
def _leaks(model: Any) -> list[Row]:
    s1, s2, following = torch.randint(64, (3, 2, 24))
    dates = torch.zeros(2, 24, 5, dtype=torch.int64)
    rows = []
    for mode in ("official_generate", "causal_rope"):
        before = model(s1, s2, dates, following, mode)
        worst = 0.0
        for t in (1, 13, 23):
            others = [one.clone() for one in (s1, s2, following)]
            for one in others:
                one[:, t:] = (one[:, t:] + 1) % 64
            after = model(others[0], others[1], dates, others[2], mode)
            worst = max(
                worst, *(float((a - b)[:, :t].abs().max()) for a, b in zip(after, before, strict=True))
            )
        rows.append(at_most(f"change of earlier logits when later tokens change, {mode}", worst, 1e-5))
    return rows


def _same_paths(model: Any, tokenizer: Any) -> list[Row]:
    from arcore.zoo.series.kronos.generating import generate_paths

    values, dates = torch.randn(2, 40, 6), torch.zeros(2, 48, 5, dtype=torch.int64)
    found = [
        generate_paths(model, tokenizer, values, dates, 8, paths=5, cached=cached) for cached in (True, False)
    ]
    same = torch.stack([found[0].s1 == found[1].s1, found[0].s2 == found[1].s2]).float().mean()
    return [
        equals("share of tokens that are the same with and without the cache", same, 1),
        at_most("difference of their candles", (found[0].values - found[1].values).abs().max(), 1e-4),
    ]


def _trained(rows: list[Row]) -> tuple[Any, Tensor, Any]:
    """Train both networks on the first part of the stock prices; append rows on held-out ones."""
    from arcore.zoo.series.kronos import Kronos, kronos_tiny
    from arcore.zoo.series.kronos.generating import generate_paths
    from arcore.zoo.series.kronos_tokenizer.recipe import stock_batch, stock_windows, trained_on_stocks

    tokenizer, held_out = trained_on_stocks()
    with torch.no_grad():
        out = tokenizer(held_out)
    coarse, full = (float((one - held_out).square().mean()) for one in (out.coarse, out.full))
    rows += [
        at_least("squared error of s1 alone less that of all bits", coarse - full, 1e-3),
        at_most(
            "squared error of s1 alone over half the variance", coarse / (0.5 * float(held_out.var())), 1
        ),
    ]
    torch.manual_seed(0)
    model = Kronos(kronos_tiny())
    windows = stock_windows(model.context, model.horizon, "train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=150, pct_start=0.1)
    for step in steps(150, "training the language model"):
        values, dates = stock_batch(windows, 16, seed=step)
        coarse, fine = tokenizer.encode(values)
        loss, _ = model.objective(coarse, fine, dates)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    values, dates = stock_batch(stock_windows(model.context, model.horizon, "test"), 128, seed=1)
    s1, s2 = tokenizer.encode(values)
    with torch.no_grad():
        hidden = model.hidden(s1[:, :-1], s2[:, :-1], dates[:, :-1])
        shuffled = s1[:, 1:].flatten()[torch.randperm(s1[:, 1:].numel())].view_as(s1[:, 1:])
        errors = [
            float(cross_entropy(model.fine(hidden, given).flatten(0, 1), s2[:, 1:].flatten()))
            for given in (s1[:, 1:], shuffled)
        ]
    rows.append(at_least("cross entropy of s2, s1 shuffled less s1 true", errors[1] - errors[0], 0.5))
    past = model.context
    found = generate_paths(model, tokenizer, values[:1, :past], dates[:1], model.horizon, paths=32)

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        close = found.values[:, 0, :, 3]
        after = range(past, past + model.horizon)
        axis.plot(range(past), values[0, :past, 3], color="black", linewidth=1, label="close, normalised")
        axis.plot(after, close.T, color="C0", linewidth=0.4, alpha=0.5)
        axis.plot(after, close.mean(0), color="C0", label="mean of 32 paths")
        axis.plot(after, values[0, past:, 3], color="black", linestyle=":", label="what came")
        axis.legend(fontsize=8)

    return model, held_out, draw


def _speed() -> Row:
    """Time per candle of 32 paths at 400 rows, without a cache over with the shared one."""
    from arcore.zoo.series.kronos import Kronos, kronos_mini
    from arcore.zoo.series.kronos.generating import generate_paths
    from arcore.zoo.series.kronos_tokenizer import KronosTokenizer, kronos_tokenizer_2k

    model, tokenizer = Kronos(kronos_mini()).eval(), KronosTokenizer(kronos_tokenizer_2k()).eval()
    values, dates = torch.randn(1, 400, 6), torch.zeros(1, 402, 5, dtype=torch.int64)
    spent = []
    for cached in (True, False):
        start = time.process_time()
        generate_paths(model, tokenizer, values, dates, 2, paths=32, cached=cached)
        spent.append(time.process_time() - start)
    return at_least("time of 2 candles x 32 paths at 400 rows, uncached over cached", spent[1] / spent[0], 5)
