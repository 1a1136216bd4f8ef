"""CoDe: two next-scale models share the scales of one image (collaborative decoding, arXiv:2411.17787).

Most tokens, and most memory of the key-value cache, belong to the last scales, which need little capacity: they add
fine texture. So a large drafter draws the first N scales, and a small refiner the others. The refiner reads what the
drafter made in one pass, which fills its cache and gives the logits of scale N too; nothing is trained anew, though
both may be tuned to their scales. LANTERN and SJD speed up models of single tokens; here no draft is ever verified, so
the law of the images is a mix of two models' laws.

Legend: B rows, K scales, N scales of the drafter, z code width.

Left out: the paper's tuning of the pair, and inpainting. Seeds mean other images than in the released code, whose
refiner draws tokens for the drafter's scales and throws them away.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arcore.catalog import System, create_model, load_checkpoint, model_info
from arcore.catalog.claims import Claim, at_least, at_most, equals, shaken
from arcore.catalog.running import Report, check_bounds
from arcore.decoding import generate_next_scale
from arcore.decoding._arguments import check_drawn, check_guidance, check_kind, check_labels, dtype_of
from arcore.decoding._evaluating import evaluating
from arcore.decoding.draws import row_seeds
from arcore.nn.kinds import check_kinds
from arcore.nn.protocols import ScaleTokenizer
from arcore.ops import filter_probs, sample
from arcore.zoo.next_scale.var import VAR, VARConfig

SYSTEM = System(
    name="code",
    title="CoDe",
    paper="arXiv:2411.17787",
    paper_title="Collaborative Decoding Makes Visual Auto-Regressive Modeling Efficient",
    topic="next_scale",
    kind="decoder",
    builds_on=("var", "msvq"),
    ops=("block_sparse_attention", "sample"),
    summary="A large next-scale model draws the first scales of an image and a small one the rest; lossy, less memory.",
    claim="With equal weights nothing changes; the pair's caches need at most 0.65 of the large model's memory.",
    checked_on="random weights",
)

# The released settings of 10 scales, at every scale alike but for the temperature.
TOP_K, TOP_P = 600, 0.95
TEMPERATURES = (1.1,) * 7 + (1.0,) * 3


@dataclass(frozen=True)
class CollaborativeOutput:
    """What `decode_together` made.

    Attributes:
        images: `[B, C, H, W]` in [-1, 1].
        indices: codes of each scale, int64 `[B, p_k^2]`.
        peak_cache_bytes: the larger of the two caches, which never exist at one time.
        calls: passes of the drafter and of the refiner.
    """

    images: Tensor
    indices: list[Tensor]
    peak_cache_bytes: int
    calls: tuple[int, int]


@torch.no_grad()
@check_kinds
def decode_together(
    drafter: VAR,
    refiner: VAR,
    tokenizer: ScaleTokenizer,
    labels: Tensor,
    *,
    draft_scales: int = 8,
    cfg_scale: float = 1.5,
    top_k: int | None = TOP_K,
    top_p: float | None = TOP_P,
    temperature: float | Sequence[float] = 1.0,
    seed: int | Sequence[int] = 0,
) -> CollaborativeOutput:
    """Draw images, the first scales by one model and the others by another (section 3.2).

    Args:
        drafter: draws scales 0 to N - 1.
        refiner: draws the others; of the same scales, codes and classes.
        tokenizer: that both were trained with.
        labels: int64 `[B]`.
        draft_scales: N, from 1 to K - 1.
        cfg_scale: of both; see `arcore.decoding.generate_next_scale`.
        top_k, top_p: filters, on the distribution at temperature 1.
        temperature: divides the logits of what the filters kept; one, or one per scale (`TEMPERATURES`).
        seed: one number, or one per row.

    Returns:
        Images and codes. With one model in both places and temperature 1 they are those of `generate_next_scale`.

    Raises:
        ValueError: the models or the tokenizer do not fit each other, or an argument is out of range.
        TypeError: one is of another kind.
    """
    for name, model in (("drafter", drafter), ("refiner", refiner)):
        check_kind(name, model, VAR)
    check_kind("tokenizer", tokenizer, ScaleTokenizer)
    check_labels(labels)
    check_guidance(cfg_scale)
    facts = {
        name: (tuple(part.patch_nums), part.vocab_size)
        for name, part in (("drafter", drafter), ("refiner", refiner), ("tokenizer", tokenizer))
    }
    if len(set(facts.values())) > 1 or drafter.null_class != refiner.null_class:
        raise ValueError(
            "expected drafter, refiner and tokenizer of the same scales, codes and classes but got "
            + "; ".join(f"{name}: patch_nums={sides}, vocab_size={v}" for name, (sides, v) in facts.items())
            + f"; {drafter.null_class} and {refiner.null_class} classes"
        )
    sides = drafter.patch_nums
    last = len(sides) - 1
    if not 1 <= draft_scales <= last:
        raise ValueError(f"expected draft_scales from 1 to {last} but got {draft_scales}")
    temperatures = (
        [float(temperature)] * len(sides) if isinstance(temperature, (int, float)) else list(temperature)
    )
    if len(temperatures) != len(sides):
        raise ValueError(
            f"expected a temperature for each of {len(sides)} scales but got {len(temperatures)}"
        )
    guided = cfg_scale > 0
    rows = torch.cat([labels, torch.full_like(labels, drafter.null_class)]) if guided else labels
    seeds = row_seeds(seed, len(labels), labels.device).unsqueeze(1)
    latent = tokenizer.empty_latent(len(labels))
    indices: list[Tensor] = []
    entered: list[Tensor] = []
    with evaluating(drafter, refiner, tokenizer):
        cache = drafter.make_cache(len(rows), scales=draft_scales)
        peak = cache.nbytes
        for k in range(len(sides)):
            inputs = None
            if k:
                inputs = tokenizer.next_input(k - 1, latent)
                inputs = torch.cat([inputs, inputs]) if guided else inputs
                entered.append(inputs)
            if k < draft_scales:
                given = None if inputs is None else inputs.to(dtype_of(drafter))
                logits = drafter.scale_logits(k, given, rows, cache)
            elif k == draft_scales:
                # The drafter's cache goes before the refiner's comes.
                del cache
                cache = refiner.make_cache(len(rows))
                peak = max(peak, cache.nbytes)
                logits = refiner.prefill(torch.cat(entered, dim=1).to(dtype_of(refiner)), rows, cache)
            else:
                assert inputs is not None
                logits = refiner.scale_logits(k, inputs.to(dtype_of(refiner)), rows, cache)
            codes = _draw(
                logits.float(),
                cfg_scale * k / last if guided else None,
                temperatures[k],
                top_k,
                top_p,
                seeds,
                drafter.scale_starts[k],
            )
            indices.append(codes)
            latent = tokenizer.add_scale(k, codes, latent)
        images = tokenizer.decode_latent(latent)
    check_drawn(images, "the decoded images")
    return CollaborativeOutput(images, indices, peak, (draft_scales, len(sides) - draft_scales))


def _draw(
    logits: Tensor,
    strength: float | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seeds: Tensor,
    start: int,
) -> Tensor:
    """Codes `[B, n]` of logits `[B or 2B, n, V]`: guidance, then filters, then temperature."""
    guidance: dict[str, Any] = {}
    if strength is not None:
        logits, uncond = logits.chunk(2)
        guidance = {"uncond": uncond, "cfg_scale": 1 + strength}
    filters: dict[str, Any] = {"top_k": top_k, "top_p": top_p}
    if temperature != 1.0:
        filtered: Any = filter_probs(logits, **guidance, **filters, return_kept=True)
        filters = {"mask": filtered.kept}
    places = torch.arange(start, start + logits.shape[1], device=logits.device)
    drawn = sample(
        logits, **guidance, **filters, temperature=temperature, seed=seeds, offset=places, check=True
    )
    assert isinstance(drawn, Tensor)
    return drawn


@check_kinds
@dataclass(frozen=True, kw_only=True)
class Options:
    """The pair of models and what is drawn.

    Attributes:
        drafter: preset of the large model.
        refiner: preset of the small model.
        drafter_weights: file, run folder or checkpoint, or hub. A run brings its tokenizer, and the refiner must have
            been trained with it (`arcore train var_mnist_small --tokenizer RUN/tokenizer`).
        refiner_weights: likewise.
        tokenizer_weights: file or hub; not for runs.
        draft_scales: scales that the drafter draws.
        label: class of the pictures.
        count: pictures.
        cfg: strength of guidance at the finest scale.
        seed: of the first picture.
        judge: run of a classifier, such as roma_classifier: the share of pictures that it takes for their class, of the
            pair and of the drafter alone, of `judged` pictures of each class.
        judged: pictures of each class for the classifier.
    """

    drafter: str = "var_d30"
    refiner: str = "var_d16"
    drafter_weights: str = "hub"
    refiner_weights: str = "hub"
    tokenizer_weights: str = "hub"
    draft_scales: int = 8
    label: int = 207
    count: int = 4
    cfg: float = 1.5
    seed: int = 0
    judge: Path | None = None
    judged: int = 10

    def __post_init__(self) -> None:
        check_bounds(self, least={"draft_scales": 1, "label": 0, "count": 1, "judged": 1})


def run(options: Options) -> Report:
    """Draw pictures with a pair of models."""
    presets = {info.name: info for info in model_info(options.drafter).presets}
    tokenizer_name = presets[options.drafter].tokenizer if options.drafter in presets else None
    if tokenizer_name is None:
        raise ValueError(
            f"expected drafter to be a preset of a model of codes, such as var_d30, but got {options.drafter}"
        )
    if options.count < 1:
        raise ValueError(f"expected count to be at least 1 but got {options.count}")
    drafter, refiner, tokenizer, names = _networks(options, tokenizer_name)
    out = decode_together(
        drafter,
        refiner,
        tokenizer,
        torch.full((options.count,), options.label),
        draft_scales=options.draft_scales,
        cfg_scale=options.cfg,
        seed=[options.seed + i for i in range(options.count)],
    )
    # A model without a cache, such as HMAR, has no ratio.
    alone = drafter.make_cache(2 * options.count if options.cfg > 0 else options.count).nbytes

    def draw(figure: Any) -> None:
        for i, image in enumerate(out.images):
            axes = figure.add_subplot(1, options.count, i + 1)
            shown = (image.float().clamp(-1, 1) + 1).permute(1, 2, 0).squeeze(-1) / 2
            axes.imshow(shown.cpu().numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set_axis_off()

    told, found = (
        ("", {}) if options.judge is None else _accuracies(options, drafter, refiner, tokenizer, names)
    )
    ratio = out.peak_cache_bytes / alone if alone else float("nan")
    text = (
        f"{options.count} pictures of class {options.label}: {out.calls[0]} scales by {options.drafter}, "
        f"{out.calls[1]} by {options.refiner}; cache at most {out.peak_cache_bytes / 2**20:.3g} MiB"
        + (f", {ratio:.3f} of the drafter's alone" if alone else "")
        + told
    )
    values = {"peak_cache_bytes": out.peak_cache_bytes, **found} | ({"ratio": ratio} if alone else {})
    return Report(text, values, draw, (2.5 * options.count, 2.6))


def _networks(options: Options, tokenizer_name: str) -> tuple[Any, Any, Any, list[str] | None]:
    """Drafter, refiner, tokenizer, and the names of the classes where a run says them.

    Raises:
        ValueError: a run is of another preset's system, or the two were trained with different tokenizers.
    """
    from arcore.training import checkpoint

    found: list[Any] = []
    tokenizers: list[Any] = []
    names = None
    for name, weights in (
        (options.drafter, options.drafter_weights),
        (options.refiner, options.refiner_weights),
    ):
        if weights == "hub" or not Path(weights).is_dir():
            found.append(create_model(name, weights=weights))
            continue
        networks, facts = load_checkpoint(checkpoint.find(Path(weights)))
        if not {"model", "tokenizer"} <= networks.keys():
            raise ValueError(f"{weights} is no run of a model of codes: it holds {', '.join(networks)}")
        found.append(networks["model"])
        tokenizers.append(networks["tokenizer"])
        names = facts.get("class_names", names)
    if not tokenizers:
        return (*found, create_model(tokenizer_name, weights=options.tokenizer_weights), names)  # type: ignore[return-value]
    if len(tokenizers) == 1:
        raise ValueError(
            "give drafter and refiner both as runs, or both as files: a run brings its own tokenizer"
        )
    first, second = (part.state_dict() for part in tokenizers)
    same = first.keys() == second.keys() and all(
        torch.equal(value, second[key]) for key, value in first.items() if key not in tokenizers[0].statistics
    )
    if not same:
        raise ValueError(
            f"{options.drafter_weights} and {options.refiner_weights} were trained with different tokenizers: train "
            f"the second with --tokenizer {Path(options.drafter_weights) / 'tokenizer'}"
        )
    return found[0], found[1], tokenizers[0], names


def _accuracies(
    options: Options, drafter: Any, refiner: Any, tokenizer: Any, names: list[str] | None
) -> tuple[str, dict[str, float]]:
    """What a classifier says of pictures of the pair and of each model alone."""
    from arcore.recipes._rejection import open_judge

    assert options.judge is not None
    judge = open_judge(options.judge)
    judge.check(names, drafter.null_class - 1, options.judge)
    asked = torch.arange(drafter.null_class).repeat(options.judged)
    draws = {
        "pair": lambda: decode_together(
            drafter,
            refiner,
            tokenizer,
            asked,
            draft_scales=options.draft_scales,
            cfg_scale=options.cfg,
            seed=options.seed,
        ),
        options.drafter: lambda: _alone(drafter, tokenizer, asked, options),
        options.refiner: lambda: _alone(refiner, tokenizer, asked, options),
    }
    found = {
        f"accuracy_{name}": float((judge.chances(draw().images).argmax(-1) == asked).float().mean())
        for name, draw in draws.items()
    }
    shown = ", ".join(f"{name.removeprefix('accuracy_')} {value:.3f}" for name, value in found.items())
    return f"; taken for their class, of {len(asked)} pictures: {shown}", found


def _alone(model: Any, tokenizer: Any, asked: Tensor, options: Options) -> Any:
    return generate_next_scale(
        model, tokenizer, asked, cfg_scale=options.cfg, top_k=TOP_K, top_p=TOP_P, seed=options.seed
    )


def small_pair(seed: int = 1) -> tuple[VAR, VAR]:
    """Random models of different depth on `msvq_tiny`'s scales and codes."""
    sizes: dict[str, Any] = {
        "num_heads": 2,
        "num_classes": 5,
        "vocab_size": 128,
        "z_channels": 16,
        "patch_nums": (1, 2, 3, 4),
    }
    large, small = (VARConfig(depth=depth, embed_dim=width, **sizes) for depth, width in ((3, 64), (2, 32)))
    return shaken(VAR(large), seed=seed).eval(), shaken(VAR(small), seed=seed + 1).eval()


@torch.no_grad()
def claim(*, quick: bool) -> Claim:
    """Logits and codes of one model in both places; caches of the published pair, and of a pair that ran."""
    large, small = small_pair()
    tokenizer: Any = shaken(create_model("msvq_tiny")).eval()
    labels, starts = torch.tensor([0, 4, 5]), large.scale_starts
    inputs = torch.randn(3, starts[-1] - 1, 16)
    whole, error, changed = large(inputs, labels), 0.0, 0
    plain = generate_next_scale(large, tokenizer, labels[:2], top_k=TOP_K, top_p=TOP_P, seed=3)
    for count in range(1, len(large.patch_nums)):
        cache = large.make_cache(3)
        part = large.prefill(inputs[:, : starts[count + 1] - 1], labels, cache)
        error = max(error, float((part - whole[:, starts[count] : starts[count + 1]]).abs().max()))
        for k, (start, stop) in list(enumerate(itertools.pairwise(starts)))[count + 1 :]:
            part = large.scale_logits(k, inputs[:, start - 1 : stop - 1], labels, cache)
            error = max(error, float((part - whole[:, start:stop]).abs().max()))
        same = decode_together(large, large, tokenizer, labels[:2], draft_scales=count, seed=3)
        changed += sum(int((a != b).sum()) for a, b in zip(same.indices, plain.indices, strict=True))
    mixed = decode_together(large, small, tokenizer, labels[:2], draft_scales=3, seed=3)
    kept = sum(int((a != b).sum()) for a, b in zip(mixed.indices[:3], plain.indices[:3], strict=True))
    other = int((mixed.indices[3] != plain.indices[3]).sum())
    expected = max(starts[3] * 3 * 64, starts[4] * 2 * 32) * 2 * 4 * 4
    rows = [
        at_most("one model in both places: prefill and steps against one pass", error, 1e-5),
        equals("the same: codes that change", changed, 0),
        equals("two models: codes of the drafter's scales that change", kept, 0),
        at_least("two models: codes of the refiner's scale that change", other, 1),
        equals(
            "two models: bytes of the larger cache beyond those counted", mixed.peak_cache_bytes - expected, 0
        ),
    ]
    with torch.device("meta"):
        published: list[Any] = [create_model(name) for name in ("var_d30", "var_d16")]
    drafter, refiner = published
    for count in (9, 8, 7, 6):
        peak = max(drafter.make_cache(2, scales=count).nbytes, refiner.make_cache(2).nbytes)
        rows.append(
            at_most(
                f"cache of var_d30 with var_d16 over that of var_d30, {count} scales drafted",
                peak / drafter.make_cache(2).nbytes,
                0.65,
            )
        )
    return Claim(tuple(rows))
