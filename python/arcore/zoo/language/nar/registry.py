"""The methods, and where the zoo has the groups of the survey."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from arcore.nn.checks import came
from arcore.nn.kinds import check_kinds
from arcore.zoo.language.nar.methods import at, cmlm, ctc, dag, glat, insertion, levenshtein


@dataclass(frozen=True)
class Method:
    """A way to train and to decode.

    Attributes:
        title: name in the literature.
        paper: arXiv number.
        group: of the survey.
        summary: one sentence.
        heads: makes the method's own layers from a config.
        loss: `(model, source, target, progress)` to a scalar and figures; progress runs from 0 to 1.
        write: `(model, source, iterations)` to rows of target tokens and the calls of the decoder.
        iterations: calls that decoding takes unless told otherwise; None where the method decides.
    """

    title: str
    paper: str
    group: str
    summary: str
    heads: Callable[[Any], nn.ModuleDict]
    loss: Callable[[Any, Any, Any, float], tuple[Tensor, dict[str, Tensor]]]
    write: Callable[[Any, Any, int], tuple[list[list[int]], int]]
    iterations: int | None = 1


METHODS: dict[str, Method] = {
    "at": Method(
        "Autoregressive teacher", "1706.03762", "teacher", "One token per call; the targets of distillation.",
        at.heads, at.loss, at.write, None,
    ),
    "cmlm": Method(
        "Mask-predict (CMLM)", "1904.09324", "modelling: iterative",
        "Masked places are filled; the least sure ones are masked again.", cmlm.heads, cmlm.loss, cmlm.write, 4,
    ),
    "glat": Method(
        "Glancing (GLAT)", "2008.07905", "objective", "One call, learned with parts of the target in sight.",
        glat.heads, glat.loss, glat.write, 1,
    ),
    "ctc": Method(
        "CTC", "1811.04719", "modelling: latent alignment", "One call; a sum over alignments with repeats and blanks.",
        ctc.heads, ctc.loss, ctc.write, 1,
    ),
    "insertion": Method(
        "Insertion Transformer", "1902.03249", "modelling: iterative", "Tokens are inserted into all gaps at once.",
        insertion.heads, insertion.loss, insertion.write, 10,
    ),
    "levenshtein": Method(
        "Levenshtein Transformer", "1905.11006", "modelling: iterative", "Deletes, makes room and fills, by turns.",
        levenshtein.heads, levenshtein.loss, levenshtein.write, 10,
    ),
    "dag": Method(
        "Directed acyclic transformer (DAG)", "2205.07459", "modelling: latent alignment",
        "One call; a sum over paths through more vertices than tokens.", dag.heads, dag.loss, dag.write, 1,
    ),
}  # fmt: skip

# Groups of the survey, and systems of the zoo that stand for them beside the methods here.
GROUPS: dict[str, tuple[str, ...]] = {
    "data manipulation: distillation": ("nar",),
    "modelling: iterative": ("hmar",),
    "modelling: latent alignment": (),
    "modelling: latent variable (length)": ("nar",),
    "objective": (),
    "decoding: semi-autoregressive": ("sjd", "hydra", "lantern"),
    "pre-training and other fields": ("ernie3", "xtrimopglm", "crossnovo", "mar", "var"),
}


def taxonomy() -> str:
    """The survey's groups with what runs here, as a page of Markdown."""
    lines = [
        "# Non-autoregressive generation",
        "",
        "The groups of the survey ([arXiv:2204.09269](https://arxiv.org/abs/2204.09269)), and what stands for them "
        "here. All methods share one encoder-decoder: `arcore train nar --method NAME`.",
        "",
        "| group | method | paper | what it does | calls | command |",
        "|---|---|---|---|---|---|",
    ]
    for name, method in METHODS.items():
        calls = "as many as tokens" if method.iterations is None else str(method.iterations)
        lines.append(
            f"| {method.group} | {method.title} | [arXiv:{method.paper}](https://arxiv.org/abs/{method.paper}) | "
            f"{method.summary} | {calls} | `arcore train nar --method {name}` |"
        )
    lines += [
        "| data manipulation: distillation | sequence-level distillation | "
        "[arXiv:1606.07947](https://arxiv.org/abs/1606.07947) | Targets are those of an autoregressive teacher. | as "
        "its method | `arcore train nar --method cmlm --kd out/teacher` |",
        "",
        "Other systems of the zoo that belong to a group:",
        "",
        "| group | systems |",
        "|---|---|",
    ]
    for group, systems in GROUPS.items():
        if systems:
            lines.append(f"| {group} | {', '.join(f'`{system}`' for system in systems)} |")
    return "\n".join(lines) + "\n"


@torch.no_grad()
@check_kinds
def translate(
    model: Any, rows: list[list[int]], iterations: int | None = None
) -> tuple[list[list[int]], int]:
    """Targets of sources.

    Args:
        model: a `Nar`.
        rows: source tokens, each row with at least one.
        iterations: most calls of the decoder, or rounds of edits; the method's default when None.

    Returns:
        Target tokens of each row, and the calls of the decoder.

    Raises:
        TypeError: the model is no `Nar`.
        ValueError: a row is empty or too long, or `iterations` is below 1.
    """
    from arcore.zoo.language.nar.network import Batch

    if not hasattr(getattr(model, "method", None), "write"):
        raise TypeError(f"arcore.translate: expected model to be a Nar but got {came(model)}")
    if not rows or not all(rows):
        raise ValueError(
            "expected at least one source, each of at least one token, but there is none or an empty one"
        )
    count = model.method.iterations if iterations is None else iterations
    if count is not None and count < 1:
        raise ValueError(f"expected iterations of at least 1 but got {iterations}")
    device = next(model.parameters()).device
    source = Batch(*(part.to(device) for part in Batch.of(rows)))
    training = model.training
    model.eval()
    try:
        found: tuple[list[list[int]], int] = model.method.write(model, source, count or 1)
    finally:
        model.train(training)
    return found
