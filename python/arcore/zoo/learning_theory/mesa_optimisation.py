"""Mesa-optimisation: a linear transformer, trained to predict the next state, that does gradient descent (Zheng et al.,
arXiv:2405.16845).

States follow x_{t+1} = W x_t with W diagonal and unitary, another W in every sequence. Tokens are e_t = (x_t, x_{t-1}).
One layer of causal linear attention predicts::

    y_t = P E_t E_t^H Q e_t / (t - 1),     P = [b I, 0],   Q = [[0, 0], [a I, 0]]

which is one step of gradient descent, with step size a b, on the least-squares problem of W whose examples stand in
the context. Trained from a, b > 0, gradient flow ends at the a b that minimises the loss. That is known in closed form
from moments of the first state. Whether the layer then recovers W is decided by the first state: with states of one
non-zero coordinate it does; with Gaussian ones a prediction is one fifth of the truth, however long the context.

Nearest neighbour here: `icl_gradient_descent`, where the examples are given and not a sequence's own past.

Legend: M sequences, T states of a sequence, d width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from arcore.catalog import System
from arcore.catalog.claims import Claim, at_most, equals, steps
from arcore.catalog.running import Report
from arcore.nn.kinds import check_kinds

SYSTEM = System(
    name="mesa_optimisation",
    title="Mesa-optimisation",
    paper="arXiv:2405.16845",
    paper_title="On Mesa-Optimization in Autoregressively Trained Transformers: Emergence and Capability",
    topic="learning_theory",
    kind="theory",
    builds_on=("icl_gradient_descent",),
    summary="A linear transformer on linear dynamics that learns one step of gradient descent on its own past.",
    claim=(
        "Training ends at the least-squares optimum of a b, which has a closed form; from dense first states the "
        "prediction stays below the truth, from sparse ones it reaches it."
    ),
    checked_on="closed form",
)

Start = Literal["ones", "gaussian", "sparse"]


@check_kinds
def draw_sequences(
    count: int, *, dim: int, length: int, start: Start, scale: float, generator: torch.Generator
) -> Tensor:
    """Sequences of linear dynamics, complex128 `[M, T, d]`.

    Args:
        count: sequences M.
        dim: width d.
        length: states T.
        start: first state: all entries `scale`; real normal of that deviation; or one entry of plus or minus `scale`.
        scale: of the first state.
        generator: of the draws.
    """
    if start not in get_args(Start):
        raise ValueError(f"expected start to be one of {', '.join(get_args(Start))} but got {start!r}")
    angles = torch.rand(count, 1, dim, generator=generator, dtype=torch.float64) * (2 * torch.pi)
    if start == "ones":
        first = torch.full((count, 1, dim), scale, dtype=torch.float64)
    elif start == "gaussian":
        first = scale * torch.randn(count, 1, dim, generator=generator, dtype=torch.float64)
    else:
        place = torch.randint(dim, (count,), generator=generator)
        sign = torch.randint(2, (count, 1), generator=generator) * 2 - 1
        first = (scale * sign * nn.functional.one_hot(place, dim)).double().unsqueeze(1)
    return torch.polar(first.abs(), angles * torch.arange(length)[:, None]) * first.sign()


def best_product(dim: int, length: int, start: Start, scale: float) -> float:
    """The a b of least expected loss, `k1 / (k2 + k3 mean_t 1 / (t - 1))`.

    k1, k2, k3 are the sums of E x_j^4, of E x_j^6, and over j != k of E x_j^2 x_k^4, of the first state x.
    """
    inverse = sum(1 / n for n in range(1, length - 1)) / (length - 2)
    pairs = dim * (dim - 1)
    k1, k2, k3 = {
        "ones": (dim, dim, pairs),
        "gaussian": (3 * dim, 15 * dim, 3 * pairs),
        "sparse": (1, 1, 0),
    }[start]
    return k1 / (k2 + k3 * inverse) / scale**2


class Contexts:
    """What a layer reads at each t from 2 to T - 1, with sums over the past computed once.

    Args:
        x: `[M, T, d]` complex.

    Attributes:
        tokens: e_t, `[M, T - 2, 2 d]`.
        gram: E_t E_t^H / (t - 1), `[M, T - 2, 2 d, 2 d]`.
        target: x_{t+1}, `[M, T - 2, d]`.
    """

    def __init__(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[1] < 3:
            raise ValueError(f"expected sequences [M, T, d] of at least 3 states but got {tuple(x.shape)}")
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        tokens = torch.cat([x, before], -1)
        outer = tokens.unsqueeze(-1) * tokens.conj().unsqueeze(-2)
        counts = torch.arange(1, x.shape[1] - 1, dtype=torch.float64)
        self.gram = outer.cumsum(1)[:, 1:-1] / counts[:, None, None]
        self.tokens, self.target = tokens[:, 1:-1], x[:, 2:]


class LinearLayer(nn.Module):
    """One layer of causal linear attention on tokens (x_t, x_{t-1}).

    Args:
        dim: width d.
        a: of the keys and queries at the start of training.
        b: of the values and the projection.
        free: all entries of both matrices are trained, not only a and b.
    """

    def __init__(self, dim: int, a: float = 0.1, b: float = 0.1, *, free: bool = False) -> None:
        super().__init__()
        self.dim, self.free = dim, free
        eye = torch.eye(dim, dtype=torch.complex128)
        none = torch.zeros(dim, dim, dtype=torch.complex128)
        self.register_buffer(
            "keys_pattern", torch.cat([torch.cat([none, none], 1), torch.cat([eye, none], 1)])
        )
        self.register_buffer("values_pattern", torch.cat([eye, none], 1))
        if free:
            self.keys = nn.Parameter(a * self.keys_pattern)
            self.values = nn.Parameter(b * self.values_pattern)
        else:
            self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))
            self.b = nn.Parameter(torch.tensor(b, dtype=torch.float64))

    keys_pattern: Tensor
    values_pattern: Tensor

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Q `[2 d, 2 d]` and P `[d, 2 d]`."""
        if self.free:
            return self.keys, self.values
        return self.a * self.keys_pattern, self.b * self.values_pattern

    def product(self) -> float:
        """a b; of free matrices the mean of the products of the entries that stand for a and b."""
        keys, values = (matrix.detach() for matrix in self.matrices())
        return float((keys[self.dim :, : self.dim] * values[:, : self.dim]).diagonal().real.mean())

    def forward(self, contexts: Contexts) -> Tensor:
        """Predictions of the next states, `[M, T - 2, d]`."""
        keys, values = self.matrices()
        read = contexts.gram @ (contexts.tokens @ keys.T).unsqueeze(-1)
        return read.squeeze(-1) @ values.T


def loss(layer: LinearLayer, contexts: Contexts) -> Tensor:
    """Half the squared errors, summed over places and averaged over sequences."""
    error = layer(contexts) - contexts.target
    return (error.abs().square().sum() / 2) / len(error)


def least_squares_product(contexts: Contexts, dim: int) -> float:
    """The a b of least loss on these sequences, exactly."""
    with torch.no_grad():
        unit = LinearLayer(dim, 1.0, 1.0)(contexts)
        return float((unit.conj() * contexts.target).real.sum() / unit.abs().square().sum())


@check_kinds
@dataclass(frozen=True, kw_only=True)
class Options:
    """A layer trained on linear dynamics.

    Attributes:
        dim: width d of a state.
        length: states T of a sequence.
        sequences: training sequences M.
        start: first state of a sequence: ones, gaussian or sparse.
        scale: of the first state.
        steps: steps of gradient descent.
        lr: step size of training.
        free: train all entries of the matrices, not only a and b.
        seed: decides the sequences.
    """

    dim: int = 3
    length: int = 50
    sequences: int = 2000
    start: Start = "ones"
    scale: float = 1.0
    steps: int = 300
    lr: float = 1e-3
    free: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("dim", 1), ("length", 3), ("sequences", 1), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least} but got {getattr(self, name)}")
        for name in ("scale", "lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"--{name} must be a number above 0 but got {getattr(self, name)}")


@dataclass(frozen=True)
class Trained:
    """What training found.

    Attributes:
        products: a b after each step, the start included.
        optimum: the a b of least loss on the training sequences.
        expected: of least expected loss, in closed form.
        ratio: of the prediction of the last state to the truth on new sequences, mean over entries.
        error: squared error of the last state on new sequences over its squared norm.
    """

    products: tuple[float, ...]
    optimum: float
    expected: float
    ratio: float
    error: float


def train(options: Options) -> Trained:
    """Gradient descent on all sequences at once, from a = b = 0.1.

    Raises:
        ValueError: training diverged.
    """
    generator = torch.Generator().manual_seed(options.seed)

    def sequences(count: int) -> Contexts:
        return Contexts(
            draw_sequences(
                count,
                dim=options.dim,
                length=options.length,
                start=options.start,
                scale=options.scale,
                generator=generator,
            )
        )

    known, new = sequences(options.sequences), sequences(min(options.sequences, 2000))
    layer = LinearLayer(options.dim, free=options.free)
    optimizer = torch.optim.SGD(layer.parameters(), lr=options.lr)
    products = [layer.product()]
    for _ in steps(options.steps, f"training from {options.start}"):
        optimizer.zero_grad()
        value = loss(layer, known)
        value.backward()
        optimizer.step()
        products.append(layer.product())
    if not torch.isfinite(value):
        raise ValueError(
            f"training diverged at --lr {options.lr} with --scale {options.scale}: give a smaller --lr"
        )
    with torch.no_grad():
        predicted, target = layer(new)[:, -1], new.target[:, -1]
    size, moved = target.abs().square().sum(), target.abs() > 0
    return Trained(
        tuple(products),
        least_squares_product(known, options.dim),
        best_product(options.dim, options.length, options.start, options.scale),
        float((predicted[moved] / target[moved]).real.mean()),
        float((predicted - target).abs().square().sum() / size),
    )


def _figure(runs: dict[str, Trained]) -> Any:
    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for number, (name, found) in enumerate(runs.items()):
            axes.plot(found.products, color=f"C{number}", label=f"a b, first states {name}")
            axes.axhline(found.expected, color=f"C{number}", linestyle="--", linewidth=1)
        axes.set(xlabel="step", ylabel="a b (dashed: closed form)")
        axes.legend()

    return draw


def run(options: Options) -> Report:
    """Train a layer and compare a b with the optimum."""
    found = train(options)
    lines = [
        f"a b after training        {found.products[-1]:.5f}",
        f"least squares on the data {found.optimum:.5f}",
        f"closed form               {found.expected:.5f}",
        f"prediction of the last state, relative to the truth: {found.ratio:.3f}; relative error {found.error:.3f}",
    ]
    values = {
        "product": found.products[-1],
        "least_squares": found.optimum,
        "closed_form": found.expected,
        "ratio": found.ratio,
        "error": found.error,
        "products": list(found.products),
    }
    return Report("\n".join(lines), values, _figure({options.start: found}))


def claim(*, quick: bool) -> Claim:
    """a b at d = 3 and T = 50 after training, from each kind of first states."""
    size = 150 if quick else 1000
    count = 60 if quick else 150
    runs = {
        "ones": train(Options(sequences=size, steps=count, lr=5e-3)),
        "sparse": train(Options(sequences=size, steps=count, start="sparse", lr=1e-2)),
        "gaussian": train(Options(sequences=size, steps=2 * count, start="gaussian", lr=2e-4)),
    }
    rows = [
        at_most(
            f"a b from {name} first states against the least-squares optimum, distance",
            abs(found.products[-1] - found.optimum),
            1e-3,
        )
        for name, found in runs.items()
    ]
    rows += [
        at_most(
            f"optimum on data from {name} against the closed form, relative distance",
            abs(runs[name].optimum / runs[name].expected - 1),
            limit if quick else limit / 4,
        )
        for name, limit in (("ones", 0.05), ("sparse", 1e-6), ("gaussian", 0.6))
    ]
    rows += [
        equals(
            "last state from sparse first states, relative to the truth",
            runs["sparse"].ratio,
            1.0,
            tolerance=1e-2,
        ),
        at_most("the same from ones, which is not the identity", runs["ones"].ratio, 0.9),
        at_most("the same from Gaussian ones", runs["gaussian"].ratio, 0.4),
    ]
    if not quick:
        free = train(Options(sequences=500, steps=200, lr=5e-3, free=True))
        rows.append(
            at_most(
                "a b of freely trained matrices against the closed form",
                abs(free.products[-1] - free.expected),
                0.05,
            )
        )
    return Claim(tuple(rows), draw=_figure(runs))
