"""Writes checkpoints for importer tests: the tiny models as GGUF files, folders with one thing changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

DATA = Path(__file__).resolve().parent / "data"
FloatArray = npt.NDArray[np.float32]

#: Hugging Face's names of a layer's tensors, and GGUF's.
LAYER_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def load_checkpoint(name: str) -> dict[str, FloatArray]:
    """Weights of a tiny model under Hugging Face's names, read without any code of the importers."""
    data = (DATA / name / "model.safetensors").read_bytes()
    header_bytes = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + header_bytes])
    header.pop("__metadata__", None)
    weights = {}
    for tensor, entry in header.items():
        start, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
        array = np.frombuffer(data[start:end], ml_dtypes.bfloat16).reshape(entry["shape"])
        weights[tensor] = array.astype(np.float32)
    return weights


def permute_for_ggml(rows: FloatArray, num_heads: int) -> FloatArray:
    """Query or key rows in GGUF's order for ``llama``, as llama.cpp's converter writes them."""
    shape = rows.shape
    return rows.reshape(num_heads, 2, shape[0] // num_heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def gguf_tensors(name: str, *, interleaved: bool) -> dict[str, FloatArray]:
    """Weights of a tiny model under GGUF's names."""
    tensors = {}
    for tensor, values in load_checkpoint(name).items():
        base, _, kind = tensor.rpartition(".")
        if base in TOP_NAMES:
            tensors[f"{TOP_NAMES[base]}.{kind}"] = values
            continue
        _, _, layer, part = base.split(".", 3)
        if interleaved and part in ("self_attn.q_proj", "self_attn.k_proj"):
            values = permute_for_ggml(values, 4 if part.endswith("q_proj") else 2)
        tensors[f"blk.{layer}.{LAYER_NAMES[part]}.{kind}"] = values
    return tensors


def gguf_metadata(name: str, architecture: str) -> dict[str, Any]:
    """Metadata of a tiny model, with its byte-level tokeniser."""
    config = json.loads((DATA / name / "config.json").read_text())
    prefix = f"{architecture}."
    return {
        "general.architecture": architecture,
        prefix + "block_count": config["num_hidden_layers"],
        prefix + "context_length": config["max_position_embeddings"],
        prefix + "embedding_length": config["hidden_size"],
        prefix + "feed_forward_length": config["intermediate_size"],
        prefix + "attention.head_count": config["num_attention_heads"],
        prefix + "attention.head_count_kv": config["num_key_value_heads"],
        prefix + "attention.key_length": config["head_dim"]
        if "head_dim" in config
        else config["hidden_size"] // config["num_attention_heads"],
        prefix + "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        prefix + "rope.freq_base": config["rope_parameters"]["rope_theta"],
        **byte_level_metadata(),
    }


def byte_level_metadata() -> dict[str, Any]:
    """The tiny models' tokeniser as ``tokenizer.ggml.*``."""
    file = json.loads((DATA / "tiny_llama" / "tokenizer.json").read_text())
    by_id = sorted(file["model"]["vocab"].items(), key=lambda item: item[1])
    special = {token["id"] for token in file["added_tokens"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [text for text, _ in by_id],
        "tokenizer.ggml.token_type": [3 if token_id in special else 1 for _, token_id in by_id],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in file["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.chat_template": "{{ messages }}",
    }


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, FloatArray],
    types: Mapping[str, GGMLQuantizationType] | None = None,
) -> Path:
    """A GGUF file; tensors are F32 unless ``types`` says otherwise."""
    writer = GGUFWriter(path, str(metadata["general.architecture"]))
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in metadata.items():
        if key != "general.architecture":
            adders[type(value)](key, value)
    for name, values in tensors.items():
        kind = (types or {}).get(name, GGMLQuantizationType.F32)
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tiny_gguf(path: Path, name: str = "tiny_llama", architecture: str = "llama", **changes: Any) -> Path:
    """A tiny model as GGUF. ``changes`` replace metadata by key, ``__`` for a dot; None removes an entry."""
    metadata = gguf_metadata(name, architecture)
    metadata.update({key.replace("__", "."): value for key, value in changes.items()})
    kept = {key: value for key, value in metadata.items() if value is not None}
    return write_gguf(path, kept, gguf_tensors(name, interleaved=architecture == "llama"))


def copy_folder(target: Path, name: str = "tiny_llama") -> Path:
    """A private copy of a tiny model's folder."""
    shutil.copytree(DATA / name, target)
    return target


def edit_json(path: Path, **changes: Any) -> None:
    """Replace top-level fields of a JSON file; None removes one."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def write_safetensors(path: Path, tensors: Mapping[str, npt.NDArray[Any]], dtype: str = "F32") -> None:
    """A safetensors file of float32, float16 or (as bfloat16 arrays) BF16 tensors."""
    header: dict[str, Any] = {}
    data = b""
    for name, values in tensors.items():
        raw = np.ascontiguousarray(values).tobytes()
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
