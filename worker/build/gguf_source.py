"""Importer of ``.gguf`` files: metadata to configuration, tensors to canonical weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from guests.llama_assets import LlamaConfig
from worker.build.errors import BuildError, MalformedModelError, UnsupportedModelError
from worker.build.gguf_file import GgufFile
from worker.build.gguf_tokenizer import read_gguf_tokenizer
from worker.build.rope import RopeScaling, compute_rope
from worker.build.source import ImportedModel, ModelSource, SpecialTexts, validate_config
from worker.build.weight_layout import CheckpointNames, arrange_tensors

ROPE_FREQUENCIES: Final = "rope_freqs.weight"
#: GGUF's names for rope scaling, mapped to ours.
ROPE_KINDS: Final = {"none": "default", "linear": "linear", "yarn": "yarn"}


@dataclass(frozen=True, slots=True)
class _Architecture:
    """What the architecture's name alone decides."""

    interleaved_qk: bool = False
    qk_norm: bool = False


ARCHITECTURES: Final = {
    "llama": _Architecture(interleaved_qk=True),  # Llama 2 and 3, Mistral, SmolLM2
    "qwen2": _Architecture(),
    "qwen3": _Architecture(qk_norm=True),
}


def _checkpoint_names(architecture: _Architecture) -> CheckpointNames:
    return CheckpointNames(
        embed="token_embd", norm="output_norm", lm_head="output", layer="blk.{i}.",
        attn_norm="attn_norm", q="attn_q", k="attn_k", v="attn_v", q_norm="attn_q_norm", k_norm="attn_k_norm",
        o="attn_output", mlp_norm="ffn_norm", gate="ffn_gate", up="ffn_up", down="ffn_down",
        ignored=(ROPE_FREQUENCIES,), interleaved_qk=architecture.interleaved_qk,
    )  # fmt: skip


@contextmanager
def open_gguf(path: Path) -> Iterator[ModelSource]:
    """The model in ``path``, checked; tensors can be read inside the ``with`` block.

    Raises:
        MalformedModelError: truncated, or a header that contradicts the file.
        UnsupportedModelError: an architecture, tensor type, tokeniser or rope scaling that glowplug does not run.
    """
    with GgufFile(path) as file:
        try:
            model = _read_model(file)
        except BuildError as error:
            raise _with_path(error, path) from error
        yield model


def _with_path(error: BuildError, path: Path) -> BuildError:
    return error if str(path) in str(error) else type(error)(f"{path}: {error}")


def _read_model(file: GgufFile) -> ImportedModel:
    architecture = file.value("general.architecture", str)
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"architecture {architecture!r}: supported in GGUF files are {', '.join(ARCHITECTURES)} "
            "(llama covers Llama 2 and 3, Mistral and SmolLM2)"
        )
    config = _read_config(file, architecture)
    validate_config(config)
    inv_freq, rope_scale = compute_rope(_read_rope(file, architecture, config.head_dim), config.head_dim)
    config = replace(config, rope_scale=rope_scale)
    tokenizer = read_gguf_tokenizer(file, config.vocab_size)
    tensors = arrange_tensors(file, _checkpoint_names(ARCHITECTURES[architecture]), config, inv_freq)
    return ImportedModel(
        architecture,
        config,
        tokenizer,
        file.value("tokenizer.chat_template", str, "") or None,
        SpecialTexts(_token_text(file, "bos"), _token_text(file, "eos")),
        tensors,
    )


def _read_config(file: GgufFile, architecture: str) -> LlamaConfig:
    def number(key: str, default: int | None = None) -> int:
        value = file.value(f"{architecture}.{key}", int, default)
        if value < 0:
            raise MalformedModelError(f"metadata {architecture}.{key} is {value}")
        return value

    if number("expert_count", 0) > 0:
        raise UnsupportedModelError(f"a mixture of {number('expert_count')} experts: only dense models are supported")
    hidden_size, num_heads = number("embedding_length"), number("attention.head_count")
    if num_heads == 0 or hidden_size == 0:
        raise MalformedModelError(f"{num_heads} heads and an embedding of {hidden_size}")
    head_dim = number("attention.key_length", hidden_size // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if number(key, head_dim) != head_dim:
            raise UnsupportedModelError(
                f"{architecture}.{key} is {number(key)}: only equal to the head width ({head_dim}) is supported"
            )
    present = set(file.names())
    vocab_size = file.shape("token_embd.weight")[0] if "token_embd.weight" in present else 0
    context_length, window = number("context_length"), number("attention.sliding_window", 0)
    return LlamaConfig(
        num_layers=number("block_count"),
        hidden_size=hidden_size,
        intermediate_size=number("feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=number("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        vocab_size=vocab_size,
        context_length=context_length,
        rms_norm_eps=file.value(f"{architecture}.attention.layer_norm_rms_epsilon", float),
        tie_embeddings="output.weight" not in present,
        qkv_bias="blk.0.attn_q.bias" in present,
        output_bias="blk.0.attn_output.bias" in present,
        mlp_bias="blk.0.ffn_gate.bias" in present,
        qk_norm=ARCHITECTURES[architecture].qk_norm,
        sliding_window=window if window < context_length else 0,
    )


def _read_rope(file: GgufFile, architecture: str, head_dim: int) -> RopeScaling:
    prefix = f"{architecture}.rope."
    kind = file.value(prefix + "scaling.type", str, "none")
    factor = file.value(prefix + "scaling.factor", float, file.value(prefix + "scale_linear", float, 1.0))
    if prefix + "scaling.type" not in file.metadata and factor != 1.0:
        kind = "linear"  # files from before scaling.type existed
    if kind not in ROPE_KINDS:
        raise UnsupportedModelError(f"rope scaling {kind!r}: supported in GGUF are {', '.join(ROPE_KINDS)}")
    divisors = None
    if ROPE_FREQUENCIES in file.names():
        if file.shape(ROPE_FREQUENCIES) != (head_dim // 2,):
            raise MalformedModelError(
                f"tensor {ROPE_FREQUENCIES} has shape {file.shape(ROPE_FREQUENCIES)}: expected ({head_dim // 2},)"
            )
        divisors = file.read_rows(ROPE_FREQUENCIES, 0, head_dim // 2)
    attention_factor = None
    if kind == "yarn" and prefix + "scaling.attn_factor" in file.metadata:
        # ggml multiplies its own magnitude scale by this factor.
        default = 0.1 * float(np.log(factor)) + 1.0
        attention_factor = file.value(prefix + "scaling.attn_factor", float) * default
    return RopeScaling(
        kind=ROPE_KINDS[kind],
        theta=file.value(prefix + "freq_base", float, 10_000.0),
        factor=factor,
        original_context=file.value(prefix + "scaling.original_context_length", int, 0),
        attention_factor=attention_factor,
        divisors=divisors,
    )


def _token_text(file: GgufFile, role: str) -> str | None:
    tokens: list[str] = file.value("tokenizer.ggml.tokens", list)
    token_id = file.value(f"tokenizer.ggml.{role}_token_id", int, -1)
    return tokens[token_id] if 0 <= token_id < len(tokens) else None
