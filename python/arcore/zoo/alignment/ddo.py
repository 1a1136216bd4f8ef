"""DDO: a likelihood model is tuned as the discriminator against its own frozen copy (arXiv:2503.01103).

The likelihood ratio of a model and its reference says how much likelier a picture is as data than as a draw of the
reference. So with d = beta (log p - log p_ref) the loss of a GAN's discriminator,
-E_data log sigmoid(d) - alpha E_ref log sigmoid(-d), trains the model itself: no second network, no change in sampling.
For alpha = beta = 1 its optimum is the data's law. For beta < 1 it is p_ref^(1 - 1/beta) p_data^(1/beta), normalised,
at one value of alpha. GenARM's pairs compare answers with each other; here data are compared with the model's own.

Condition contrastive alignment (CCA, arXiv:2410.09347) is the same loss with the data under wrong labels in place of
the reference's draws: see `contrastive_labels`.

Legend: B rows, L tokens, V codes.

Left out: the diffusion form, and the choice of the best of several alphas and betas.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from arcore.catalog import System, load_checkpoint, save_checkpoint
from arcore.catalog.claims import Claim, at_least, at_most, equals
from arcore.catalog.running import Report, check_bounds
from arcore.decoding import generate_next_scale
from arcore.nn.kinds import check_kinds
from arcore.ops import token_logprobs

SYSTEM = System(
    name="ddo",
    title="DDO",
    paper="arXiv:2503.01103",
    paper_title="Direct Discriminative Optimization: Your Likelihood-Based Visual Generative Model is "
    "Secretly a GAN Discriminator",
    topic="alignment",
    kind="objective",
    builds_on=("var",),
    ops=("token_logprobs", "sample"),
    summary="Tunes a model of image codes as a GAN discriminator against its own frozen copy, by likelihood ratios.",
    claim="The loss is least at the closed-form optimum, which is the data's law for alpha = beta = 1.",
    checked_on="closed form",
)


# For some tens of tokens. Log-ratios grow with their number: the paper has alpha 10 to 100 and beta 0.02 for 680.
FEW_TOKENS: dict[str, Any] = {"alpha": 1.0, "beta": 0.1}


def ddo_terms(
    logp: Tensor, ref: Tensor, own: Tensor, own_ref: Tensor, *, beta: float
) -> tuple[Tensor, Tensor]:
    """Both terms of the loss (section 3.1, equation 8), row by row.

    Args:
        logp, ref: `[B]`, log-probabilities of data, in nats, under the model and under the reference.
        own, own_ref: `[B']`, likewise of the reference's draws.
        beta: factor on the log-ratio, positive; about 0.02 for pictures of 680 tokens, whose log-ratios are large.

    Returns:
        `-log sigmoid(d)` of data `[B]` and `-log sigmoid(-d)` of draws `[B']`.

    Raises:
        ValueError: shapes or beta do not fit.
    """
    if beta <= 0:
        raise ValueError(f"expected beta > 0 but got {beta}")
    if logp.shape != ref.shape or own.shape != own_ref.shape:
        raise ValueError(
            "expected the reference's log-probabilities of the shapes of the model's, "
            f"{tuple(logp.shape)} and {tuple(own.shape)}, but got {tuple(ref.shape)} and {tuple(own_ref.shape)}"
        )
    return F.softplus(-beta * (logp - ref)), F.softplus(beta * (own - own_ref))


@check_kinds
def ddo_loss(
    logp: Tensor,
    ref: Tensor,
    own: Tensor,
    own_ref: Tensor,
    *,
    alpha: float,
    beta: float,
    labelled: Tensor | None = None,
    mask: Tensor | None = None,
    own_mask: Tensor | None = None,
) -> Tensor:
    """The loss of log-probabilities token by token.

    Args:
        logp, ref: `[B, L]`, of the tokens of data, under the model and under the reference.
        own, own_ref: `[B', L']`, likewise of the reference's draws.
        alpha: weight of the draws, >= 0; 10 to 100 with beta 0.02.
        beta: factor on the log-ratio.
        labelled: bool `[B']`; draws without a label count nothing (alpha 0), so that what guidance subtracts stays what
            it was.
        mask, own_mask: bool, tokens that count.

    Returns:
        Scalar: the mean over data plus alpha times the mean over draws.

    Raises:
        ValueError: shapes, alpha or beta do not fit.
    """
    if alpha < 0:
        raise ValueError(f"expected alpha >= 0 but got {alpha}")
    sums = []
    for ours, theirs, kept in ((logp, ref, mask), (own, own_ref, own_mask)):
        if kept is not None and kept.shape != ours.shape:
            raise ValueError(f"expected a mask of shape {tuple(ours.shape)} but got {tuple(kept.shape)}")
        for x in (ours, theirs):
            sums.append((x if kept is None else x.masked_fill(~kept, 0.0)).sum(-1))
    of_data, of_draws = ddo_terms(*sums, beta=beta)
    if labelled is not None:
        if labelled.shape != of_draws.shape:
            raise ValueError(
                f"expected labelled of shape {tuple(of_draws.shape)} but got {tuple(labelled.shape)}"
            )
        of_draws = of_draws.masked_fill(~labelled, 0.0)
    return of_data.mean() + alpha * of_draws.mean()


@check_kinds
def optimum(data: Tensor, ref: Tensor, beta: float) -> tuple[Tensor, float]:
    """The law that the loss is least at, and the alpha that it is for (section 3.2).

    Args:
        data, ref: float64 `[S]`, laws over S outcomes, positive.
        beta: in (0, 1].

    Returns:
        `[S]`, and alpha.
    """
    log = (1 - 1 / beta) * ref.log() + data.log() / beta
    return log.softmax(0), float((beta * log.logsumexp(0)).exp())


@check_kinds
def contrastive_labels(labels: Tensor) -> Tensor:
    """Labels of the next row, for CCA: each picture under a label that is likely wrong."""
    return labels.roll(1, 0)


@check_kinds
def code_logprobs(model: Any, tokenizer: Any, indices: list[Tensor], labels: Tensor) -> Tensor:
    """Log-probabilities of the codes of all scales, float32 `[B, L]`, under a next-scale model in evaluation mode."""
    inputs = tokenizer.scale_inputs(indices).to(next(model.parameters()).dtype)
    return token_logprobs(model(inputs, labels), torch.cat(list(indices), dim=1))[0]


def self_play(
    model: Any,
    tokenizer: Any,
    images: Tensor,
    labels: Tensor,
    *,
    rounds: int = 3,
    steps_per_round: int = 50,
    batch_size: int = 32,
    alpha: float = 10.0,
    beta: float = 0.02,
    lr: float = 1e-4,
    label_drop: float = 0.1,
    contrastive: bool = False,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Tune a next-scale model in place; the reference of each round is the model at its start (section 3.3).

    The reference draws without guidance. Labels are dropped row by row, the same for model and reference; nothing else
    is random in their passes.

    Args:
        model: a `ScaleModel` with a pass over all scales, such as VAR.
        tokenizer: that it was trained with; stays as it is.
        images: `[N, C, H, W]` in [-1, 1].
        labels: int64 `[N]`.
        rounds: of self-play.
        steps_per_round: optimiser steps.
        batch_size: pictures of data, and draws, per step.
        alpha, beta: see `ddo_loss`.
        lr: learning rate of AdamW.
        label_drop: share of rows without a label.
        contrastive: CCA: data under other labels instead of the reference's draws.
        seed: of batches and draws.
        progress: told the step and the loss.

    Returns:
        The loss of each step.

    Raises:
        ValueError: a count is below 1, or there are fewer labels or pictures than the other.
    """
    if min(rounds, steps_per_round, batch_size) < 1 or len(images) != len(labels) or not len(images):
        raise ValueError(
            "expected rounds, steps_per_round and batch_size of at least 1 and a label for each picture but got "
            f"{rounds}, {steps_per_round}, {batch_size}, {len(images)} pictures and {len(labels)} labels"
        )
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    tokenizer.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
    losses: list[float] = []
    for _ in range(rounds):
        reference = copy.deepcopy(model).requires_grad_(False)
        for _ in range(steps_per_round):
            rows = torch.randint(len(images), (batch_size,), generator=generator)
            dropped = torch.rand(batch_size, generator=generator) < label_drop
            null = torch.tensor(model.null_class)
            shown = torch.where(dropped, null, labels[rows])
            with torch.no_grad():
                codes = tokenizer.encode(images[rows])
            if contrastive:
                own, asked = codes, torch.where(dropped, null, contrastive_labels(labels[rows]))
            else:
                asked = shown
                first = seed + batch_size * len(losses)
                own = generate_next_scale(
                    reference, tokenizer, asked, cfg_scale=0.0, seed=list(range(first, first + batch_size))
                ).indices
            with torch.no_grad():
                ref = code_logprobs(reference, tokenizer, codes, shown)
                own_ref = code_logprobs(reference, tokenizer, own, asked)
            loss = ddo_loss(
                code_logprobs(model, tokenizer, codes, shown),
                ref,
                code_logprobs(model, tokenizer, own, asked),
                own_ref,
                alpha=alpha,
                beta=beta,
                labelled=~dropped,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if progress is not None:
                progress(len(losses), losses[-1])
    return losses


@check_kinds
@dataclass(frozen=True, kw_only=True)
class Options:
    """The model that is tuned.

    Attributes:
        checkpoint: run folder or checkpoint of a trained next-scale model.
        data: images and classes: a folder, digits, mnist, ... Default: what the model was trained on.
        out: folder of the tuned one. Default: out/ddo.
        rounds: of self-play.
        steps: optimiser steps per round.
        alpha: weight of the model's own draws; 10 to 100 for the paper's 680 tokens, where beta is 0.02.
        beta: factor on the log-ratio, the smaller the more tokens a picture has.
        lr: learning rate.
        contrastive: condition contrastive alignment: other labels instead of own draws.
        judge: run of a classifier, such as roma_classifier, that says how many draws are of their class before and
            after. Default: a small network that is trained on the data first.
        draws: pictures per class that it looks at; 0 asks no classifier.
        seed: of batches and draws.
    """

    checkpoint: Path | None = None
    data: str | None = None
    out: Path = Path("out/ddo")
    rounds: int = 3
    steps: int = 50
    alpha: float = FEW_TOKENS["alpha"]
    beta: float = FEW_TOKENS["beta"]
    lr: float = 1e-4
    contrastive: bool = False
    judge: Path | None = None
    draws: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        check_bounds(
            self, least={"rounds": 1, "steps": 1, "draws": 1, "alpha": 0}, above={"beta": 0, "lr": 0}
        )


def run(options: Options) -> Report:
    """Tune a trained model and save it as a checkpoint like the one that came."""
    from arcore.data import open_dataset
    from arcore.training import checkpoint

    if options.checkpoint is None:
        raise ValueError(
            "expected a checkpoint of a trained next-scale model: make one with `arcore train var_tiny` and give it "
            "with --checkpoint"
        )
    networks, meta = load_checkpoint(checkpoint.find(options.checkpoint))
    if not {"model", "tokenizer"} <= networks.keys():
        raise ValueError(
            f"expected a checkpoint with a model and its tokenizer but {options.checkpoint} holds {', '.join(networks)}"
        )
    model: Any = networks["model"]
    tokenizer: Any = networks["tokenizer"]
    source = options.data or meta.get("data")
    if source is None:
        raise ValueError("the checkpoint does not say what it was trained on: name the images with --data")
    data = open_dataset(source, image_size=tokenizer.config.image_size, channels=tokenizer.config.in_channels)
    names = meta.get("class_names", list(data.class_names))
    if list(data.class_names) != list(names):
        raise ValueError(
            f"--data {source}: its classes are {', '.join(data.class_names[:10])} but the model's "
            f"{', '.join(names[:10])}"
        )
    images = torch.stack([data[i][0] for i in range(len(data))])
    labels = torch.tensor([data[i][1] for i in range(len(data))])
    judge = _judge(options, images, labels, list(names)) if options.draws else None
    before = judge(model, tokenizer) if judge else None
    losses = self_play(
        model,
        tokenizer,
        images,
        labels,
        rounds=options.rounds,
        steps_per_round=options.steps,
        alpha=options.alpha,
        beta=options.beta,
        lr=options.lr,
        contrastive=options.contrastive,
        seed=options.seed,
    )
    save_checkpoint(options.out, networks, meta)
    last = losses[-options.steps :]
    text = (
        f"{len(losses)} steps in {options.rounds} rounds: loss {losses[0]:.4f} at first, {sum(last) / len(last):.4f} "
        f"in the last round on average; saved in {options.out}"
    )
    values: dict[str, Any] = {"losses": losses}
    if judge is not None:
        after = judge(model, tokenizer)
        text += f"\nunguided draws that a classifier takes for their class: {before:.3f} before, {after:.3f} after"
        values |= {"accuracy_before": before, "accuracy_after": after}
    return Report(text, values)


def _judge(options: Options, images: Tensor, labels: Tensor, names: list[str]) -> Callable[[Any, Any], float]:
    """Share of a model's draws, the same number of each class and without guidance, that are taken for their class."""
    from arcore.recipes._rejection import open_judge
    from arcore.zoo.raster._digits import train_classifier

    sure: Callable[[Tensor], Tensor]
    if options.judge is not None:
        given = open_judge(options.judge)
        given.check(names, len(names) - 1, options.judge)
        sure = given.chances
    else:
        network = train_classifier(images, labels, classes=len(names), count=300)
        sure = lambda pictures: network(pictures).softmax(-1)  # noqa: E731
    asked = torch.arange(len(names)).repeat(options.draws)

    @torch.no_grad()
    def judged(model: Any, tokenizer: Any) -> float:
        drawn = generate_next_scale(model, tokenizer, asked, cfg_scale=0.0, seed=options.seed + 1).images
        return float((sure(drawn).argmax(-1) == asked).float().mean())

    return judged


def fitted(data: Tensor, ref: Tensor, alpha: float, beta: float, iterations: int) -> Tensor:
    """The law that the loss leads to when expectations are exact, float64 `[S]`, from the reference on."""
    logits = ref.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=iterations,
        history_size=20,
        tolerance_grad=1e-14,
        tolerance_change=1e-18,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logp = logits.log_softmax(0)
        of_data, of_draws = ddo_terms(logp, ref.log(), logp, ref.log(), beta=beta)
        loss = (data * of_data).sum() + alpha * (ref * of_draws).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(0)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL divergence of q from p in nats."""
    return (p * (p.log() - q.log())).sum()


def claim(*, quick: bool) -> Claim:
    """Minima of the loss over laws of 32 outcomes, beside the closed form, for four pairs of alpha and beta."""
    count = 32
    data = torch.randn(count, dtype=torch.float64).softmax(0)
    # A reference that is as far from the data as a trained model may be.
    ref = (0.6 * data.log() + 0.4 * torch.randn(count, dtype=torch.float64)).softmax(0)
    rows = [at_least("KL divergence of the reference from the data", divergence(data, ref), 0.05)]
    iterations = 2000 if quick else 20000
    for beta in (1.0, 0.5, 0.2, 0.05):
        best, alpha = optimum(data, ref, beta)
        if beta == 1.0:
            rows.append(equals("alpha at beta 1", alpha, 1.0, tolerance=1e-12))
            rows.append(
                at_most("distance of that optimum from the data's law", (best - data).abs().max(), 1e-12)
            )
        found = fitted(data, ref, alpha, beta, iterations)
        rows.append(
            at_most(
                f"KL divergence from the optimum at alpha {alpha:.3g}, beta {beta:g}",
                divergence(best, found),
                1e-4,
            )
        )
    # The comparison can fail: at another alpha the minimum is elsewhere.
    best, alpha = optimum(data, ref, 0.5)
    wrong = fitted(data, ref, 10 * alpha, 0.5, iterations)
    rows.append(at_least("the same at ten times that alpha, beta 0.5", divergence(best, wrong), 1e-3))
    if not quick:
        before, after = tuned_digits()
        rows += [
            at_least("trained on 8 x 8 digits: draws that a classifier takes for their class", before, 0.5),
            at_least("the same after a round, less before", after - before, 0.0),
        ]
    return Claim(tuple(rows))


def tuned_digits() -> tuple[float, float]:
    """Share of unguided draws of their class before and after a round, of a model that is trained first."""
    from arcore.data import open_dataset
    from arcore.recipes import train

    with tempfile.TemporaryDirectory() as folder:
        found = train(
            "var_tiny",
            out=Path(folder) / "run",
            data="digits",
            tokenizer_steps=400,
            # Few steps, so that there is something to gain.
            settings={"steps": 150, "lr": 3e-3, "batch_size": 64},
            show_progress=False,
        )
        networks, _ = load_checkpoint(found.checkpoint)
    model: Any = networks["model"]
    tokenizer: Any = networks["tokenizer"]
    data = open_dataset("digits", image_size=tokenizer.config.image_size, channels=1)
    images, labels = (
        torch.stack([torch.as_tensor(data[i][part]) for i in range(len(data))]) for part in (0, 1)
    )
    judge = _judge(Options(draws=100), images, labels, list(data.class_names))
    before = judge(model.eval(), tokenizer)
    self_play(model, tokenizer, images, labels, rounds=1, **FEW_TOKENS)
    return before, judge(model, tokenizer)
