"""sample, token_logprobs and the verification ops beside torch on a GPU, with memory floor plus one launch.

These run in microseconds: all are timed inside a captured graph over inputs that together exceed the cache.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from report import Report, wrong_result
from timing import Run, copies_for, time_calls, time_graph
from torch import Tensor

from arcore.ops import filter_probs, reference_token_logprobs, sample, token_logprobs, verify_chain

# What sampling aims at: times its floor, times faster than the torch pipeline.
MOST_TIMES_FLOOR, LEAST_TIMES_TORCH = 3.0, 10.0
CFG = 2.5
SAMPLING: dict[str, tuple[int, int, dict[str, Any], bool]] = {
    "llm_8_plain": (8, 128256, {}, False),
    "llm_8_p90": (8, 128256, {"top_p": 0.9}, False),
    "llm_8_k50_p90": (8, 128256, {"top_k": 50, "top_p": 0.9}, False),
    # The largest scale of VAR-256, 16 x 16 tokens, for eight images with guidance.
    "var_scale_16": (2048, 4096, {"top_k": 900, "top_p": 0.96}, True),
}


def _pipeline(logits: Tensor, uncond: Tensor | None, settings: dict[str, Any]) -> Tensor:
    """What decoders do with torch alone: mix, top-k, sort, cumulative sum, scatter back, softmax."""
    if uncond is not None:
        logits = CFG * logits + (1 - CFG) * uncond
    if "top_k" in settings:
        least = logits.topk(settings["top_k"], dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if "top_p" in settings:
        ordered, index = logits.sort(dim=-1)
        gone = ordered.softmax(-1).cumsum(-1) <= 1 - settings["top_p"]
        gone[:, -1:] = False
        logits = logits.masked_fill(gone.scatter(1, index, gone), -torch.inf)
    return logits.softmax(-1)


def run_sample(report: Report) -> None:
    table = SAMPLING if report.gpu else {"tiny": (3, 300, {"top_k": 50, "top_p": 0.9}, True)}
    for name, (rows, vocab, settings, guided) in table.items():
        size = 4 * rows * vocab * (2 if guided else 1)
        copies = copies_for(size, report.device)
        sets = [
            [3 * torch.randn(rows, vocab, device=report.device) for _ in range(2 if guided else 1)]
            for _ in range(copies)
        ]
        seeds = torch.arange(rows, device=report.device)

        def ours(x: list[Tensor], s: Any = settings, seeds: Tensor = seeds) -> Tensor:
            guidance = {"uncond": x[1], "cfg_scale": CFG} if len(x) == 2 else {}
            return sample(x[0], seed=seeds, **s, **guidance)

        def torch_calls(x: list[Tensor], s: Any = settings) -> Tensor:
            return _pipeline(x[0], x[1] if len(x) == 2 else None, s).multinomial(1)

        def check(x: list[Tensor], s: Any = settings) -> None:
            guidance = {"uncond": x[1], "cfg_scale": CFG} if len(x) == 2 else {}
            probs = filter_probs(x[0], **s, **guidance)
            error = (probs - _pipeline(x[0], x[1] if len(x) == 2 else None, s)).abs().max().item()
            if not error <= 1e-3:
                wrong_result(f"probabilities differ by {error:.1e} from torch's")

        floor = (size + 8 * rows) / (report.ceilings.copy_gb_per_s * 1e9) + report.ceilings.launch_seconds
        for impl, function in (("arcore", ours), ("torch", torch_calls)):

            def runs(f: Any = function, sets: Any = sets, check: Any = check) -> list[Run]:
                check(sets[0])
                return [lambda x=x: f(x) for x in sets]

            report.measure(
                runs, graph=True, op="sample", case=name, impl=impl, direction="forward", dtype="float32",
                floor_seconds=floor, times_floor=lambda s, floor=floor: s / floor,
                goal_times_floor=MOST_TIMES_FLOOR,
            )  # fmt: skip
        if report.gpu and report.find(op="sample", case=name, impl="arcore"):
            # What a caller without graphs waits for: the same call with its launches and Python.
            timing = time_calls([lambda x=x, f=ours: f(x) for x in sets], report.device)
            report.add(
                op="sample",
                case=name,
                impl="arcore, no graph",
                direction="forward",
                dtype="float32",
                timing=timing,
            )
            _measure_blocks(report, name, rows, vocab, [lambda x=x, f=ours: f(x) for x in sets])


def _measure_blocks(report: Report, case: str, rows: int, vocab: int, runs: list[Run]) -> None:
    """The same call by other numbers of blocks for each row than it takes by itself: the tokens are the same."""
    for blocks in ("1", "2", "4", "8", "16", "slices"):
        if blocks.isdigit() and (rows * int(blocks) > 8192 or vocab < 1024 * int(blocks)):
            continue
        names = {"op": "sample", "case": case, "impl": f"arcore, blocks {blocks}", "direction": "forward"}
        os.environ["ARCORE_SAMPLE_BLOCKS"] = blocks
        try:
            timing = time_graph(runs, report.device)
        except RuntimeError as error:  # a row that one block cannot hold, a device without such clusters
            report.skip(**names, reason=str(error))
        else:
            report.add(**names, dtype="float32", timing=timing)
        finally:
            del os.environ["ARCORE_SAMPLE_BLOCKS"]


def run_token_logprobs(report: Report) -> None:
    rows, vocab = (4096, 128256) if report.gpu else (5, 300)
    case = f"{rows}x{vocab}"
    sets = [3 * torch.randn(rows, vocab, device=report.device).bfloat16() for _ in range(2)]
    target = torch.randint(vocab, (rows,), device=report.device)
    grad = torch.randn(rows, device=report.device)

    def ours(x: Tensor) -> Tensor:
        return token_logprobs(x, target).logp

    def cross_entropy(x: Tensor) -> Tensor:
        return -torch.nn.functional.cross_entropy(x.float(), target, reduction="none")

    size = 2 * rows * vocab
    for impl, function in (("arcore", ours), ("cross_entropy", cross_entropy)):
        for direction, moved in (("forward", size), ("backward", 2 * size)):

            def runs(f: Any = function, direction: str = direction) -> list[Run]:
                few = sets[0][:8].double().cpu()
                error = (
                    (f(sets[0])[:8].cpu() - reference_token_logprobs(few, target[:8].cpu()).logp).abs().max()
                )
                if not error.item() <= 1e-3:
                    wrong_result(f"log-probabilities are off by {error.item():.1e}")
                if direction == "forward":
                    return [lambda x=x: f(x) for x in sets]
                leaves = [x.detach().requires_grad_() for x in sets]
                outs = [f(x) for x in leaves]
                return [
                    lambda o=o, x=x: torch.autograd.grad(o, x, grad, retain_graph=True)
                    for o, x in zip(outs, leaves, strict=True)
                ]

            floor = moved / (report.ceilings.copy_gb_per_s * 1e9)
            report.measure(
                runs, op="token_logprobs", case=case, impl=impl, direction=direction, dtype="bfloat16",
                floor_seconds=floor, times_floor=lambda s, floor=floor: s / floor,
            )  # fmt: skip


def run_speculative(report: Report) -> None:
    batch, nodes, vocab = (64, 5, 16384) if report.gpu else (3, 2, 40)
    size = 4 * batch * (2 * nodes + 1) * vocab

    def inputs() -> list[Tensor]:
        logits = 3.5 * torch.randn(batch, nodes + 1, vocab, device=report.device)
        draft = (logits[:, :nodes] + 0.8 * torch.randn(batch, nodes, vocab, device=report.device)).softmax(-1)
        tokens = draft.flatten(0, 1).multinomial(1).view(batch, nodes)
        return [logits.softmax(-1), tokens, draft]

    sets = [inputs() for _ in range(copies_for(size, report.device))]
    seeds = torch.arange(batch, device=report.device)
    offsets = torch.zeros_like(seeds)

    def runs() -> list[Run]:
        step = verify_chain(*sets[0], seed=seeds, offset=offsets)
        if not bool(step.valid.all()):
            wrong_result("a row is called no distribution")
        return [lambda x=x: verify_chain(*x, seed=seeds, offset=offsets) for x in sets]

    # At least the rows that decide: two for the residual of the first token that is refused.
    floor = 8 * batch * vocab / (report.ceilings.copy_gb_per_s * 1e9) + report.ceilings.launch_seconds
    report.measure(
        runs, graph=True, op="speculative", case=f"chain_{batch}x{nodes}x{vocab}", impl="arcore",
        direction="forward", dtype="float32", floor_seconds=floor, times_floor=lambda s: s / floor,
    )  # fmt: skip


def verdicts(report: Report) -> list[str]:
    lines = []
    for name in SAMPLING:
        mine = report.find(op="sample", case=name, impl="arcore")
        if mine is None:
            continue
        reached = "ok   " if mine["times_floor"] <= MOST_TIMES_FLOOR else "BELOW"
        lines.append(
            f"{reached} sample {name}: {mine['seconds'] * 1e6:.1f} us = {mine['times_floor']:.2f} x floor, "
            f"goal {MOST_TIMES_FLOOR}"
        )
        peer = report.find(op="sample", case=name, impl="torch")
        if peer is not None:
            ratio = peer["seconds"] / mine["seconds"]
            reached = "ok   " if ratio >= LEAST_TIMES_TORCH else "BELOW"
            lines.append(
                f"{reached} sample {name}: {ratio:.1f} x the torch pipeline, goal {LEAST_TIMES_TORCH}"
            )
    return lines
