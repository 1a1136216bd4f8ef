"""The rules of `sample`, `filter_probs` and `confidence_mask`, one row at a time in plain PyTorch, to the last bit.

Nothing here is fast. It is the definition that the kernels are tested against for equality: the same float32
operations, the same integer masses (csrc/sample/exact.h), but sorting where the kernels search.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOWEST_TEMPERATURE = 1e-5
LOWEST_EXPONENT = -87.33
LOG2E_HIGH, LOG2E_LOW = float.fromhex("0x1.715476p0"), float.fromhex("0x1.4ae0cp-26")
ROUND = float.fromhex("0x1.8p23")
EXP_POLY = tuple(
    float.fromhex(c)
    for c in (
        "0x1.41d334p-13",
        "0x1.5f456ap-10",
        "0x1.3b2dbcp-7",
        "0x1.c6aed4p-5",
        "0x1.ebfbdap-3",
        "0x1.62e430p-1",
        "1.0",
    )
)
STREAM_SAMPLE, STREAM_CONFIDENCE, STREAM_GUMBEL = 0, 3, 4
COLUMNS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon",
    "eta",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)

# Both ends are allowed. Plain numbers outside are an error, numbers of a tensor make their rows invalid.
RANGES = {
    "temperature": (0.0, 3e38),
    "top_k": (-1.0, math.inf),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "epsilon": (0.0, 1.0),
    "eta": (0.0, 1.0),
    "repetition_penalty": (1e-6, 1e6),
    "presence_penalty": (-3e38, 3e38),
    "frequency_penalty": (-3e38, 3e38),
    "weights": (-3e38, 3e38),
}


class RowInputs(NamedTuple):
    """What the processing of one row needs, float32 and unpacked."""

    logits: list[Tensor]  # [V] each
    settings: dict[str, float]
    weights: list[float]
    bias: Tensor | None  # [V]
    allowed: Tensor | None  # bool [V]
    history: list[int]
    prompt: list[int]
    order: str


class RowResult(NamedTuple):
    """The processed distribution of one row; a token's log-probability is its distance minus log(total)."""

    probs: Tensor  # float32 [V]
    kept: Tensor  # bool [V]
    valid: bool
    logits: Tensor  # [V] the processed ones, before temperature
    distance: Tensor  # [V] to the largest of them, over the temperature; <= 0
    total: float
    entropy: float


def fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """a * b + c with one rounding to float32.

    The product is exact in float64. Its sum with c is rounded to odd, which makes the second rounding harmless.
    """
    product = a.double() * b
    addend = torch.as_tensor(c, dtype=torch.float64).expand_as(product)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(torch.int64)
    away = torch.where((error > 0) == (total > 0), 1, -1)
    odd = torch.where((error != 0) & (bits & 1 == 0) & error.isfinite(), bits + away, bits)
    return odd.view(torch.float64).float()


def exp(t: Tensor) -> Tensor:
    """exp(t) for float32 t <= 0, the kernels' polynomial."""
    capped = t.clamp(min=torch.tensor(LOWEST_EXPONENT))
    shifted = fma(capped, LOG2E_HIGH, ROUND)
    n = shifted - ROUND
    f = fma(capped, LOG2E_LOW, fma(capped, LOG2E_HIGH, -n.double()))
    p = torch.full_like(t, EXP_POLY[0])
    for c in EXP_POLY[1:]:
        p = fma(p, f.double(), c)
    scaled = torch.ldexp(p, n)
    return torch.where(t < torch.tensor(LOWEST_EXPONENT), 0.0, scaled)


def settings_hold(row: RowInputs) -> bool:
    """Whether every setting lies in its range, whose ends belong to it."""
    columns = [(row.settings[name], *RANGES[name]) for name in COLUMNS]
    columns += [(weight, *RANGES["weights"]) for weight in row.weights]
    return all(low <= value <= high for value, low, high in columns)


def mass_bits(vocab: int) -> int:
    return 62 - max(vocab - 1, 0).bit_length()


def philox_bits(seed: int, offset: int, stream: int, index: Tensor) -> Tensor:
    """64 random bits for each entry of the int64 `index`, as int64."""
    low = 0xFFFFFFFF
    c0, c1 = (torch.full_like(index, word) for word in (offset & low, (offset >> 32) & low))
    c2, c3 = stream | (index >> 33) << 8, (index >> 1) & low
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        # Products wrap around in int64; their bits are those of the unsigned ones.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & low) ^ c1 ^ k0, b & low, ((a >> 32) & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    odd = (index & 1).bool()
    return torch.where(odd, c2 | (c3 << 32), c0 | (c1 << 32))


def open_uniform(bits: Tensor) -> Tensor:
    """float64 in (0, 1)."""
    return (((bits >> 12) & (2**52 - 1)).double() + 0.5) * 2.0**-52


def mixed_row(row: RowInputs) -> Tensor:
    first, weights = row.logits[0], row.weights
    if weights[0] == 1.0 and not any(weights[1:]):
        return first
    mixed = torch.tensor(weights[0], dtype=torch.float32) * first
    for x, weight in zip(row.logits[1:], weights[1:], strict=True):
        w = torch.tensor(weight, dtype=torch.float32).item()
        if w < 0:
            x = torch.where(x == -math.inf, first, x)
        if w != 0:
            mixed = fma(x, w, mixed.double())
    return torch.where(first == -math.inf, -math.inf, mixed)


def penalise(x: Tensor, row: RowInputs) -> Tensor:
    vocab = len(x)
    seen = [i for i in (*row.prompt, *row.history) if 0 <= i < vocab]
    if not seen:
        return x
    counts = torch.zeros(vocab)
    for i in row.history:
        if 0 <= i < vocab:
            counts[i] += 1
    repetition, frequency, presence = (
        torch.tensor(row.settings[name], dtype=torch.float32)
        for name in ("repetition_penalty", "frequency_penalty", "presence_penalty")
    )
    y = torch.where(x < 0, x * repetition, x / repetition)
    y = y - frequency * counts
    y = y - torch.where(counts > 0, presence, 0.0)
    occurs = torch.zeros(vocab, dtype=torch.bool)
    occurs[seen] = True
    return torch.where(occurs, y, x)


def above(order_by: Tensor, weight: Tensor) -> Tensor:
    """The weight of the entries that are strictly larger, for each entry."""
    ordered, place = order_by.sort(descending=True)
    before = torch.cat([weight.new_zeros(1), weight[place].cumsum(0)])
    first = torch.searchsorted(-ordered, -order_by, right=False)
    return before[first]


def process_row(row: RowInputs) -> RowResult:
    vocab, s = len(row.logits[0]), row.settings
    nothing = torch.zeros(vocab)
    invalid = RowResult(nothing, nothing.bool(), False, nothing, nothing, math.nan, math.nan)
    if not settings_hold(row):
        return invalid
    x = mixed_row(row)
    if row.bias is not None:
        x = x + row.bias
    x = penalise(x, row)
    greedy = s["temperature"] < LOWEST_TEMPERATURE
    if row.allowed is not None:
        x = torch.where(row.allowed, x, -math.inf)
    if vocab == 0 or x.isnan().any() or (x == -math.inf).all():
        return invalid
    if (x == math.inf).any():
        x = torch.where(x == math.inf, 0.0, -math.inf)
    scale = 2.0 ** mass_bits(vocab)
    steepness = torch.tensor(4.0 if greedy else 4.0 / s["temperature"]).float()
    if greedy:
        alive = torch.arange(vocab) == int(x.eq(x.max()).int().argmax())
    else:
        alive = apply_filters(x, steepness, row.order, s, scale)
    d, e, _, total = weigh(x, steepness, alive, scale)
    norm = torch.tensor(scale / total).float()
    entropy = math.log(total / scale) + surprises(e, d, alive, scale) / total
    return RowResult(e * norm, alive, True, x, d, total / scale, entropy)


def weigh(x: Tensor, steepness: Tensor, alive: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, float]:
    """What is left of each logit below the largest one, over the temperature; exp of it, masses, their sum."""
    top = x[alive].max()
    d = torch.where(alive, (0.25 * x - 0.25 * top) * steepness, 0.0)
    e = torch.where(alive, exp(d), 0.0)
    mass = (e.double() * scale).long()
    return d, e, mass, float(mass.sum().item())


def surprises(e: Tensor, d: Tensor, alive: Tensor, scale: float) -> int:
    """The sum of the masses of e * -log(e); beyond 88, where e is 0, the distance may be infinite."""
    product = e * (-d).clamp(max=88.0).masked_fill(~alive, 0.0)
    return int((product.double() * scale).long().sum().item())


def apply_filters(x: Tensor, steepness: Tensor, order: str, s: dict[str, float], scale: float) -> Tensor:
    names = ["top_k", "top_p", "min_p", "typical_p", "epsilon", "eta"]
    if order == "vllm":
        names = ["min_p", "top_k", "top_p", "typical_p", "epsilon", "eta"]
    finite = x > -math.inf
    if order == "joint":
        alive = finite.clone()
        for name in names:
            alive &= kept_by(name, x, steepness, finite, s[name], scale)
        return alive if alive.any() else finite & (x == x[finite].max())
    alive = finite
    for name in names:
        alive = alive & kept_by(name, x, steepness, alive, s[name], scale)
    return alive


def kept_by(name: str, x: Tensor, steepness: Tensor, alive: Tensor, value: float, scale: float) -> Tensor:
    """The tokens that one filter keeps of those that are alive."""
    everything = torch.ones_like(alive)
    ranked = torch.where(alive, x, -math.inf)
    if name == "top_k":
        k = int(value)
        return everything if not 1 <= k < len(x) else above(ranked, alive.long()) < k
    if not (value < 1.0 if name in ("top_p", "typical_p") else value > 0.0):
        return everything
    d, e, mass, total = weigh(x, steepness, alive, scale)
    likeliest = alive & (x == x[alive].max())
    if name == "top_p":
        return above(ranked, mass) < max(math.ceil(value * total), 1)
    if name == "min_p":
        return (e.double() >= value) | likeliest
    surprise = surprises(e, d, alive, scale)
    mean = torch.tensor(surprise / total).float()
    if name == "typical_p":
        distance = torch.where(alive, (d + mean).abs(), math.inf)
        return above(-distance, mass) < max(math.ceil(value * total), 1)
    share = total / scale
    least = value
    if name == "eta":
        least = min(value, math.sqrt(value) * (exp(-mean).item() / share))
    return (e.double() >= least * share) | likeliest


def draw_row(result: RowResult, seed: int, offset: int, draws: int, mode: str) -> list[int]:
    if not result.valid:
        return [-1] * draws
    if mode == "greedy":
        return [int(torch.where(result.kept, result.logits, -math.inf).argmax())] * draws
    vocab = len(result.probs)
    if mode == "gumbel":
        tokens = torch.arange(vocab)
        waits = (
            -open_uniform(philox_bits(seed, offset, STREAM_GUMBEL, tokens + d * vocab)).log() / result.probs
            for d in range(draws)
        )
        return [int(torch.where(result.probs > 0, wait, math.inf).argmin()) for wait in waits]
    cumulative = (result.probs.double() * 2.0**62).long().cumsum(0)
    total = int(cumulative[-1])
    bits = philox_bits(seed, offset, STREAM_SAMPLE, torch.arange(draws)).tolist()
    levels = torch.tensor([(b % 2**64) * total >> 64 for b in bits], dtype=torch.int64)
    return list(torch.searchsorted(cumulative, levels, right=True).tolist())


def log_sum_exp(x: Tensor, vocab: int) -> float:
    if x.isnan().any() or (x == math.inf).any():
        return math.nan
    top = x.max().item()
    if math.isinf(top):
        return top
    scale = 2.0 ** mass_bits(vocab)
    total = (exp((x - x.max()).clamp(min=-1e30)).double() * scale).long().sum().item() / scale
    return top + math.log(total)


def select_least(
    confidence: Tensor,
    candidates: Tensor | None,
    count: int,
    seed: int,
    offset: int,
    temperature: float,
    ties: str,
) -> Tensor:
    """bool [N] of float32 `confidence` [N]."""
    length = len(confidence)
    if temperature != 0.0:
        bits = philox_bits(seed, offset, STREAM_CONFIDENCE, torch.arange(length))
        noise = -(-open_uniform(bits).log()).log()
        confidence = (confidence.double() + temperature * noise).float()
    rank = torch.where(confidence.isnan(), -math.inf, confidence)
    chosen = torch.zeros(length, dtype=torch.bool)
    positions = range(length) if candidates is None else candidates.nonzero().flatten().tolist()
    # NaN comes before -inf, lower positions before higher ones.
    queue = sorted(positions, key=lambda i: (not bool(confidence[i].isnan()), rank[i].item(), i))
    count = min(max(count, 0), len(queue))
    if count == 0:
        return chosen

    def level(i: int) -> tuple[bool, float]:
        return bool(confidence[i].isnan()), rank[i].item()

    cut = level(queue[count - 1])
    tied = [i for i in queue if level(i) == cut]
    before = queue[: queue.index(tied[0])]
    if ties == "exact":
        tied = tied[: count - len(before)]
    if ties == "none" and len(before) + len(tied) > count:
        tied = []
    chosen[before + tied] = True
    return chosen
