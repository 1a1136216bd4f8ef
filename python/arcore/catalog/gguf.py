"""Reads GGUF files, the format of llama.cpp: metadata, tokenizer and weights in one file.

    model = arcore.create_model("llama", weights="model.gguf")

The file is mapped, not read: a tensor is taken from it when it is asked for, and comes as float32 whatever it is stored
as, or in the blocks of 8 or 4 bits in which it is stored (`create_model(..., stored=True)`). Layout: the magic "GGUF",
version, counts, typed metadata, a table of tensors, then their data at aligned offsets
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Dimensions stand in the file innermost first.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arcore.nn.block_weight import BlockWeight
from arcore.nn.decoder import pairs_to_halves
from arcore.nn.kinds import check_kinds
from arcore.ops import block_values

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Storage:
    """How values of a tensor are stored: in blocks of so many values and bytes."""

    name: str
    values: int
    size: int


STORAGES = {
    0: Storage("F32", 1, 4),
    1: Storage("F16", 1, 2),
    2: Storage("Q4_0", 32, 18),
    3: Storage("Q4_1", 32, 20),
    8: Storage("Q8_0", 32, 34),
    30: Storage("BF16", 1, 2),
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor stands.

    Attributes:
        name: as in the file.
        shape: outermost first, as in PyTorch.
        storage: of its values.
        start: byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    storage: Storage
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.storage.values * self.storage.size


@check_kinds
class GGUF:
    """A GGUF file.

    Args:
        path: of the file.

    Attributes:
        path: as given.
        metadata: values by name.
        tensors: by name, in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another version, or holds tensors of a type that is not supported.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"the weights {self.path} do not exist")
        size = self.path.stat().st_size
        if size < 24:
            raise ValueError(
                f"the weights {self.path} are damaged or truncated: {size} bytes are no GGUF file"
            )
        with self.path.open("rb") as file:
            # A private mapping may be written to, so that torch takes it without a warning; nothing does.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._bytes = torch.frombuffer(mapped, dtype=torch.uint8)
        self._view = memoryview(mapped)
        self._at = 0
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError, OverflowError, MemoryError, KeyError) as error:
            raise ValueError(f"the weights {self.path} are damaged or truncated: {error}") from error

    @property
    def architecture(self) -> str:
        """E.g. `"llama"`."""
        return str(self.metadata.get("general.architecture", ""))

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name in the file, as float32.

        Raises:
            KeyError: there is none of that name.
        """
        info = self.tensors[name]
        raw = self._bytes[info.start : info.start + info.nbytes]
        kind = info.storage.name
        if kind == "F32":
            values = _typed(raw, torch.float32).clone()
        elif kind in ("F16", "BF16"):
            values = _typed(raw, torch.float16 if kind == "F16" else torch.bfloat16).float()
        else:
            values = block_values(self._blocks(info))
        return values.view(info.shape)

    def _blocks(self, info: TensorInfo) -> Tensor:
        """A copy of the blocks of a tensor: uint8 `[M, K / 32, S]`, M the product of all dimensions but the last."""
        raw = self._bytes[info.start : info.start + info.nbytes]
        rows = math.prod(info.shape[:-1])
        return raw.view(rows, info.shape[-1] // info.storage.values, info.storage.size).clone()

    def stored(self, name: str) -> Tensor:
        """A tensor by its name in the file: a `BlockWeight` where it is a matrix in blocks, else as float32.

        Raises:
            KeyError: there is none of that name.
        """
        info = self.tensors[name]
        if info.storage.values == 1 or len(info.shape) != 2:
            return self.tensor(name)
        return BlockWeight(self._blocks(info))

    def state(self, *, stored: bool = False) -> dict[str, Tensor]:
        """The weights of a Llama-like model under the names and in the layout that transformers has.

        llama.cpp stores rows of Llama's query and key projections so that rotary pairs stand together; that is undone.

        Args:
            stored: keep matrices in blocks, each a `BlockWeight`.

        Raises:
            ValueError: the architecture is another, or a tensor has a name that is not known.
        """
        heads = self._heads()
        outer = {
            "token_embd.weight": "model.embed_tokens.weight",
            "output_norm.weight": "model.norm.weight",
            "output.weight": "lm_head.weight",
        }
        inner = {
            "attn_norm": "input_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        }
        state = {}
        read = self.stored if stored else self.tensor
        for name in self.tensors:
            if name == "rope_freqs.weight":
                continue
            if name in outer:
                state[outer[name]] = read(name)
                continue
            block, _, rest = name.removeprefix("blk.").partition(".")
            part, _, kind = rest.partition(".")
            if not name.startswith("blk.") or part not in inner or kind not in ("weight", "bias"):
                raise ValueError(f"the weights {self.path} have a tensor {name!r}, which no Llama has")
            value = read(name)
            if part in heads and self.architecture == "llama":
                if isinstance(value, BlockWeight):
                    rows = pairs_to_halves(value.blocks.flatten(1), heads[part])
                    value = BlockWeight(rows.view_as(value.blocks))
                else:
                    value = pairs_to_halves(value, heads[part])
            state[f"model.layers.{block}.{inner[part]}.{kind}"] = value
        return state

    def config(self) -> dict[str, Any]:
        """What the metadata say about a Llama-like model, as the config.json of transformers would.

        Raises:
            ValueError: the architecture is another, or an entry is missing.
        """
        self._heads()
        first = self.architecture

        def get(name: str, default: Any = None) -> Any:
            found = self.metadata.get(f"{first}.{name}", default)
            if found is None:
                raise ValueError(
                    f"the weights {self.path} are damaged: their metadata have no {first}.{name}"
                )
            return found

        heads = get("attention.head_count")
        width = get("embedding_length")
        if "rope_freqs.weight" in self.tensors or get("rope.scaling.type", "none") != "none":
            raise ValueError(
                f"the weights {self.path} ask for stretched rotary rates, which are read from no GGUF file"
            )
        return {
            "model_type": first,
            "hidden_size": width,
            "num_hidden_layers": get("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": get("attention.head_count_kv", heads),
            "head_dim": get("attention.key_length", width // heads),
            "intermediate_size": get("feed_forward_length"),
            "vocab_size": self.tensors["token_embd.weight"].shape[0],
            "max_position_embeddings": get("context_length"),
            "rms_norm_eps": float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),
            "rope_theta": get("rope.freq_base", 10000.0),
            "tie_word_embeddings": "output.weight" not in self.tensors,
        }

    def _heads(self) -> Mapping[str, int]:
        if self.architecture not in ("llama", "qwen2"):
            raise ValueError(
                f"the weights {self.path} are of the architecture {self.architecture!r}; llama and qwen2 can be read"
            )
        heads = self.metadata.get(f"{self.architecture}.attention.head_count", 1)
        return {
            "attn_q": heads,
            "attn_k": self.metadata.get(f"{self.architecture}.attention.head_count_kv", heads),
        }

    def _read_header(self) -> None:
        if bytes(self._view[:4]) != MAGIC:
            raise ValueError(f"the weights {self.path} are no GGUF file: they do not start with {MAGIC!r}")
        self._at = 4
        version = self._scalar("I")
        if version not in VERSIONS:
            raise ValueError(
                f"the weights {self.path} are GGUF of version {version}; versions 2 and 3 can be read"
            )
        num_tensors, num_entries = self._scalar("Q"), self._scalar("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            name = self._string()
            self.metadata[name] = self._value(self._scalar("I"))
        found = []
        for _ in range(num_tensors):
            name = self._string()
            shape = tuple(self._scalar("Q") for _ in range(self._scalar("I")))[::-1]
            kind, offset = self._scalar("I"), self._scalar("Q")
            if kind not in STORAGES:
                known = ", ".join(storage.name for storage in STORAGES.values())
                raise ValueError(
                    f"the weights {self.path} store {name} as type {kind} of ggml; types that can be read: {known}"
                )
            found.append((name, shape, STORAGES[kind], offset))
        alignment = self.metadata.get("general.alignment", 32)
        base = -(-self._at // alignment) * alignment
        self.tensors: dict[str, TensorInfo] = {}
        for name, shape, storage, offset in found:
            info = TensorInfo(name, shape, storage, base + offset)
            if not shape or shape[-1] % storage.values:
                raise ValueError(
                    f"the weights {self.path} are damaged: {name} of shape {shape} is not whole {storage.name} blocks"
                )
            if info.start + info.nbytes > len(self._view):
                raise ValueError(
                    f"the weights {self.path} are damaged or truncated: {name} ends behind the file"
                )
            self.tensors[name] = info

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._view, self._at)
        self._at += struct.calcsize(f"<{code}")
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        if self._at + length > len(self._view):
            raise struct.error("a text ends behind the file")
        text = bytes(self._view[self._at : self._at + length]).decode()
        self._at += length
        return text

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        inner, count = self._scalar("I"), self._scalar("Q")
        if count > len(self._view):
            raise struct.error("a list ends behind the file")
        if inner in _SCALARS:
            values = list(struct.unpack_from(f"<{count}{_SCALARS[inner]}", self._view, self._at))
            self._at += struct.calcsize(f"<{count}{_SCALARS[inner]}")
            return values
        return [self._value(inner) for _ in range(count)]


def _typed(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers; the mapped file is little-endian, like the machines that torch runs on."""
    if raw.storage_offset() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype)
