"""In-context learning by gradient descent: a linear transformer that is a step of it (von Oswald et al.,
arXiv:2212.07677).

Tokens hold an example each, (x_j, y_j), and one holds a query, (x, 0). A layer of attention without a softmax, with
keys and queries that read x and values that read y, adds to each y what one step of gradient descent on the linear
regression of the examples changes in it: K such layers are K steps, from zero weights. Trained on random regressions, a
layer finds the same step. With a second matrix that also moves x (GD++), deeper ones do better than as many plain
steps: each layer then improves the conditioning of the data for the next.

Nearest neighbour here: none; it is the zoo's smallest account of what a trained network computes.

Legend: B tasks, N examples, d width of x, K layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arcore.catalog import System
from arcore.catalog.claims import Claim, at_least, at_most, steps
from arcore.catalog.running import Report
from arcore.nn.kinds import check_kinds

SYSTEM = System(
    name="icl_gradient_descent",
    title="ICL by gradient descent",
    paper="arXiv:2212.07677",
    paper_title="Transformers learn in-context by gradient descent",
    topic="learning_theory",
    kind="theory",
    summary="Linear attention layers that are steps of gradient descent on the examples in their context.",
    claim=(
        "K constructed layers are K steps of gradient descent; a trained layer reaches the loss of one tuned step and "
        "depends on the query as it does; two layers that also move x beat two tuned steps."
    ),
    checked_on="closed form",
)


class Tasks(NamedTuple):
    """Linear regressions.

    Attributes:
        x: `[B, N + 1, d]`, uniform in [-1, 1]; the last is the query.
        y: `[B, N + 1]`, `w . x` with w normal, of the query too.
    """

    x: Tensor
    y: Tensor


@check_kinds
def draw_tasks(
    count: int, *, dim: int, context: int, generator: torch.Generator, dtype: Any = torch.float64
) -> Tasks:
    """Random tasks, of `context` examples and one query each."""
    x = torch.rand(count, context + 1, dim, generator=generator, dtype=dtype) * 2 - 1
    w = torch.randn(count, dim, 1, generator=generator, dtype=dtype)
    return Tasks(x, (x @ w).squeeze(-1))


class LinearAttention(nn.Module):
    """Layers of attention without a softmax on tokens (x, y), each with a residual connection.

    With the matrices reduced to what the paper finds them to be, layer k holds two numbers: it changes y by
    `eta_k / N * sum_j (y_j) (x_j . x)` of the examples, with the sign of a descent, and x by `gamma_k` times the same
    of the x_j. The query's y starts at 0 and ends as minus the prediction.

    Args:
        eta: step size of each layer.
        gamma: of each layer, how far x moves; None keeps it, which is plain gradient descent.
        dtype: of the parameters.
    """

    @check_kinds
    def __init__(
        self, eta: Sequence[float], gamma: Sequence[float] | None = None, dtype: torch.dtype = torch.float64
    ) -> None:
        super().__init__()
        if not eta or (gamma is not None and len(gamma) != len(eta)):
            raise ValueError(
                f"expected a step size per layer, and as many gamma, but got {eta!r} and {gamma!r}"
            )
        self.eta = nn.Parameter(torch.tensor(list(eta), dtype=dtype))
        self.gamma = None if gamma is None else nn.Parameter(torch.tensor(list(gamma), dtype=dtype))

    @check_kinds
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Predictions of the queries.

        Args:
            x: `[B, N + 1, d]`.
            y: `[B, N]`, of the examples.

        Returns:
            `[B]`.
        """
        # What a token's y holds is its residual; the query's begins at 0 - 0.
        residual = torch.cat([y, torch.zeros_like(y[:, :1])], dim=1)
        count = y.shape[1]
        for layer in range(len(self.eta)):
            keys = x[:, :-1]
            scores = x @ keys.transpose(1, 2) / count  # [B, N + 1, N]
            change = (scores @ residual[:, :-1, None]).squeeze(-1)
            if self.gamma is not None:
                x = x - self.gamma[layer] * (scores @ keys)
            residual = residual - self.eta[layer] * change
        return -residual[:, -1]


class FullLayer(nn.Module):
    """One layer with all of its matrices free, as the paper trains it: `e + P V sum_j e_j (e_j . K^T Q e)`.

    Args:
        dim: d; tokens are d + 1 wide.
        generator: decides the initial weights.
    """

    def __init__(self, dim: int, generator: torch.Generator) -> None:
        super().__init__()

        def matrix() -> nn.Parameter:
            return nn.Parameter(0.05 * torch.randn(dim + 1, dim + 1, generator=generator))

        self.keys_queries, self.values = matrix(), matrix()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Predictions `[B]` of queries; arguments are those of `LinearAttention.forward`."""
        examples = torch.cat([x[:, :-1], y[..., None]], dim=2)
        query = torch.cat([x[:, -1], torch.zeros_like(y[:, :1])], dim=1)
        scores = torch.einsum("bnd,de,be->bn", examples, self.keys_queries, query) / y.shape[1]
        return -(torch.einsum("bn,bnd,d->b", scores, examples, self.values[-1]))


@check_kinds
def gradient_descent(x: Tensor, y: Tensor, eta: Sequence[float]) -> Tensor:
    """Predictions `[B]` of queries by steps of gradient descent on the examples' squared errors, from zero weights.

    Args:
        x: `[B, N + 1, d]`; the last is the query.
        y: `[B, N]`.
        eta: a step size per step; the loss is `sum (w . x - y)^2 / (2 N)`.
    """
    examples, query = x[:, :-1], x[:, -1]
    w = torch.zeros_like(query)
    for step in eta:
        errors = (examples @ w[..., None]).squeeze(-1) - y
        w = w - step * (errors[..., None] * examples).mean(dim=1)
    return (w * query).sum(-1)


def loss(predict: Any, tasks: Tasks) -> Tensor:
    """Half the mean squared error of the queries."""
    return (predict(tasks.x, tasks.y[:, :-1]) - tasks.y[:, -1]).square().mean() / 2


def tuned(layers: int, tasks: Tasks, *, moving: bool, count: int = 60) -> list[LinearAttention]:
    """1, 2, ... `layers` layers with the numbers that are best on some tasks, found by L-BFGS from one layer fewer."""
    models: list[LinearAttention] = []
    for _ in steps(layers, "tuning layers that move x" if moving else "tuning gradient descent"):
        before = models[-1] if models else None
        eta = [*(before.eta.tolist() if before else []), 1.0]
        gamma = [*(before.gamma.tolist() if before and before.gamma is not None else []), 0.0]
        models.append(_fitted(LinearAttention(eta, gamma if moving else None), tasks, count))
    return models


def _fitted(model: LinearAttention, tasks: Tasks, count: int) -> LinearAttention:
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=count, line_search_fn="strong_wolfe")

    def closure() -> Any:
        optimizer.zero_grad()
        value = loss(model, tasks)
        value.backward()
        return value

    optimizer.step(closure)
    return model


def trained(dim: int, context: int, count: int, seed: int) -> FullLayer:
    """One layer with free matrices, trained by Adam on fresh tasks in every step."""
    generator = torch.Generator().manual_seed(seed)
    model = FullLayer(dim, generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
    for _ in steps(count, "training a layer"):
        tasks = draw_tasks(2048, dim=dim, context=context, generator=generator, dtype=torch.float32)
        optimizer.zero_grad()
        loss(model, tasks).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        decay.step()
    return model.double()


def sensitivity_cosine(one: Any, other: Any, tasks: Tasks) -> float:
    """Mean cosine between the gradients of two predictions in the query."""
    slopes: list[Tensor] = []
    for predict in (one, other):
        query = tasks.x[:, -1].detach().clone().requires_grad_()
        x = torch.cat([tasks.x[:, :-1], query[:, None]], dim=1)
        [slope] = torch.autograd.grad(predict(x, tasks.y[:, :-1]).sum(), query)
        slopes.append(slope)
    first, second = slopes
    return torch.cosine_similarity(first, second, dim=-1).mean().item()


@check_kinds
@dataclass(frozen=True, kw_only=True)
class Options:
    """Trained layers beside tuned steps of gradient descent.

    Attributes:
        dim: width d of x.
        context: examples N per task.
        layers: up to so many layers.
        steps: training steps of the layer with free matrices.
        tasks: held-out tasks.
        seed: decides tasks and initial weights.
    """

    dim: int = 10
    context: int = 10
    layers: int = 5
    steps: int = 1500
    tasks: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("dim", "context", "layers", "steps", "tasks"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1 but got {getattr(self, name)}")


@dataclass(frozen=True)
class Comparison:
    """Held-out losses.

    Attributes:
        plain: of tuned gradient descent, by number of steps from 1.
        moving: of as many tuned layers that also move x.
        layer: of the trained layer.
        cosine: between the trained layer's and one tuned step's dependence on the query.
    """

    plain: tuple[float, ...]
    moving: tuple[float, ...]
    layer: float
    cosine: float


def compare(options: Options) -> Comparison:
    """Tune and train on some tasks, and measure on others."""
    generator = torch.Generator().manual_seed(options.seed + 1)
    known, held_out = (
        draw_tasks(count, dim=options.dim, context=options.context, generator=generator)
        for count in (2048, options.tasks)
    )
    plain = tuned(options.layers, known, moving=False)
    moving = tuned(options.layers, known, moving=True)
    layer = trained(options.dim, options.context, options.steps, options.seed)
    with torch.no_grad():
        losses = [
            tuple(loss(model, held_out).item() for model in models) for models in (plain, moving, [layer])
        ]
    return Comparison(losses[0], losses[1], losses[2][0], sensitivity_cosine(layer, plain[0], held_out))


def _figure(found: Comparison) -> Any:
    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        depths = range(1, len(found.plain) + 1)
        axes.plot(depths, found.plain, marker="o", label="gradient descent, tuned")
        axes.plot(depths, found.moving, marker="s", label="layers that also move x (GD++), tuned")
        axes.plot([1], [found.layer], "k*", markersize=12, label="trained layer")
        axes.set(xlabel="steps or layers", ylabel="held-out loss", xticks=list(depths), yscale="log")
        axes.legend()

    return draw


def run(options: Options) -> Report:
    """Losses of gradient descent and of layers, by depth."""
    found = compare(options)
    lines = [f"{'steps':>5}{'gradient descent':>18}{'layers moving x':>17}{'ratio':>8}"]
    for depth, (plain, moving) in enumerate(zip(found.plain, found.moving, strict=True), 1):
        lines.append(f"{depth:5}{plain:18.4f}{moving:17.4f}{moving / plain:8.3f}")
    lines.append(
        f"trained layer {found.layer:.4f}, cosine of its sensitivities with one tuned step's {found.cosine:.4f}"
    )
    values = {
        "gradient_descent": list(found.plain),
        "moving": list(found.moving),
        "trained_layer": found.layer,
        "sensitivity_cosine": found.cosine,
    }
    return Report("\n".join(lines), values, _figure(found))


def claim(*, quick: bool) -> Claim:
    """K layers against K steps at K = 1, 5, 50, and the comparison of `run`."""
    tasks = draw_tasks(64, dim=10, context=10, generator=torch.Generator().manual_seed(0))
    worst = 0.0
    with torch.no_grad():
        for depth in (1, 5, 50):
            eta = [1.0 / (1 + k % 3) for k in range(depth)]
            steps_of_it = gradient_descent(tasks.x, tasks.y[:, :-1], eta)
            layers = LinearAttention(eta)(tasks.x, tasks.y[:, :-1])
            worst = max(worst, (layers - steps_of_it).abs().max().item())
    found = compare(
        Options(layers=2 if quick else 5, steps=300 if quick else 3000, tasks=4096 if quick else 50_000)
    )
    return Claim(
        (
            at_most("K layers against K steps, K = 1, 5, 50, largest difference", worst, 1e-12),
            at_most(
                "trained layer's loss against one tuned step's, relative distance",
                abs(found.layer / found.plain[0] - 1),
                0.05,
            ),
            at_least("cosine of their sensitivities to the query", found.cosine, 0.97),
            at_most(
                "loss of two layers that move x, relative to two tuned steps",
                found.moving[1] / found.plain[1],
                0.8,
            ),
        ),
        draw=_figure(found),
    )
