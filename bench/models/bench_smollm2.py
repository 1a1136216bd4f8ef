"""Writing with a language model of SmolLM2's shapes (135 M parameters) beside transformers' `generate`. float32, one
thread, random weights that both share, the same sampling settings; tokens drawn differ, their number does not.

For ours each line also says how much of the time passes outside of the model: drawing tokens, books, the loop. Drafting
loops are there too, with drafts that are always right or always wrong, so that a call that reads several drafts can be
compared with what it saves: `drafts_right` writes DRAFTS + 1 tokens a call, `drafts_wrong` one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import arcore
from arcore.decoding import Context, Draft, generate, speculative_chain

PROMPT, TOKENS, DRAFTS = 4, 13, 3
SAMPLING = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}
BATCHES = (1, 8)
IMPLEMENTATIONS = ("arcore", "transformers", "drafts_right", "drafts_wrong")
# (batch, how many times faster than transformers next_token must be in the same run), and most time outside.
FLOORS = {1: 1.5, 8: 1.5}
OUTSIDE = 0.05


def floors_report(records: list[dict[str, Any]]) -> list[str]:
    found = {(r["batch"], r["impl"]): r for r in records if r.get("op") == "smollm2_135m"}
    lines = []
    for (batch, impl), r in found.items():
        outside = f"; {100 * r['outside']:.1f} % outside of the model" if "outside" in r else ""
        lines.append(f"batch {batch}, {impl:<14} {r['tokens_per_second']:8.1f} tokens/s{outside}")
    for batch, least in FLOORS.items():
        ours, theirs = found.get((batch, "arcore")), found.get((batch, "transformers"))
        if ours and theirs:
            ratio = theirs["seconds"] / ours["seconds"]
            lines.append(
                f"{'ok   ' if ratio >= least else 'BELOW'} batch {batch}: {ratio:.2f} x transformers, floor {least:g}"
            )
        if ours:
            good = ours["outside"] <= OUTSIDE
            lines.append(
                f"{'ok   ' if good else 'ABOVE'} batch {batch}: {100 * ours['outside']:.1f} % outside of the model, "
                f"at most {100 * OUTSIDE:g} %"
            )
        right = found.get((batch, "drafts_right"))
        if ours and right:
            gain, calls = ours["seconds"] / right["seconds"], right["calls"]
            lines.append(
                f"      batch {batch}: {gain:.2f} x plain with {calls} calls instead of {TOKENS}, "
                f"{gain * calls / TOKENS:.2f} of what is saved"
            )
    return lines


@cache
def models() -> tuple[Any, Any]:
    """Ours and theirs, with the same weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours: Any = arcore.create_model("smollm2_135m").eval().requires_grad_(False)
    config = ours.config
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=config.dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            intermediate_size=config.hidden_dim,
            vocab_size=config.vocab_size,
            tie_word_embeddings=True,
            max_position_embeddings=config.max_length,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
        )
    ).eval()
    ours.load_state_dict(ours.from_official(theirs.state_dict()))
    return ours, theirs


@dataclass
class Fixed:
    """Drafts what plain decoding wrote, or the token behind each of those, which is wrong."""

    texts: list[list[int]]
    shift: int

    @property
    def max_nodes(self) -> int:
        return DRAFTS

    def start(self, model: Any, batch: int, max_length: int) -> None: ...

    def propose(self, context: Context) -> Draft:
        rows = [
            full[len(text) : len(text) + DRAFTS] for full, text in zip(self.texts, context.texts, strict=True)
        ]
        size = max(map(len, rows))
        table = torch.tensor([row + [-1] * (size - len(row)) for row in rows]).view(len(rows), size)
        vocab = models()[0].vocab_size
        return Draft(torch.where(table >= 0, (table + self.shift) % vocab, -1))


class Timed:
    """A model whose calls after the prompt are timed."""

    def __init__(self, model: Any) -> None:
        self.model, self.seconds = model, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def prefill(self, *arguments: Any) -> Tensor:
        start = time.process_time()
        out: Tensor = self.model.prefill(*arguments)
        self.seconds += time.process_time() - start
        return out

    def step(self, *arguments: Any) -> Tensor:
        start = time.process_time()
        out: Tensor = self.model.step(*arguments)
        self.seconds += time.process_time() - start
        return out


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def bench_writing(benchmark: Any, batch: int, impl: str) -> None:
    ours, theirs = models()
    prompt = torch.randint(ours.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(1))
    timed = Timed(ours)
    options: dict[str, Any] = {"max_new_tokens": TOKENS, "seed": 1, **SAMPLING}
    if impl == "transformers":
        mask = torch.ones_like(prompt)

        def run() -> Any:
            return theirs.generate(
                prompt, attention_mask=mask, do_sample=True, max_new_tokens=TOKENS, min_new_tokens=TOKENS,
                pad_token_id=0, **SAMPLING,
            )  # fmt: skip
    elif impl == "arcore":

        def run() -> Any:
            timed.seconds = 0.0
            return generate(timed, prompt, **options)
    else:
        plain = generate(ours, prompt, **options).ids
        drafter = Fixed(torch.cat([prompt, plain], 1).tolist(), int(impl == "drafts_wrong"))

        def run() -> Any:
            return speculative_chain(ours, drafter, prompt, **options)

    times, outside = [], []

    def measured() -> None:
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
        outside.append(1 - timed.seconds / times[-1])

    with torch.no_grad():
        benchmark.pedantic(measured, rounds=3, iterations=1, warmup_rounds=1)
    seconds = sorted(times[1:])[1]
    benchmark.extra_info.update(
        op="smollm2_135m", batch=batch, impl=impl, seconds=seconds, tokens_per_second=batch * TOKENS / seconds
    )
    if impl == "arcore":
        benchmark.extra_info["outside"] = sorted(outside[1:])[1]
    if impl.startswith("drafts"):
        benchmark.extra_info["calls"] = run().calls
