"""Importer of Hugging Face style folders: config.json, safetensors, tokenizer.json, chat template."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec

from worker.build.errors import BuildError, MalformedModelError
from worker.build.hf_config import HfConfig, decode_config, read_decoder, read_rope
from worker.build.hf_tokenizer import SpecialIds, read_hf_tokenizer
from worker.build.rope import compute_rope
from worker.build.safetensors_file import SafetensorsCheckpoint, read_capped, resolve_inside
from worker.build.source import ImportedModel, ModelSource, SpecialTexts, TensorFile, validate_config
from worker.build.weight_layout import CheckpointNames, arrange_tensors

NAMES: Final = CheckpointNames(
    embed="model.embed_tokens", norm="model.norm", lm_head="lm_head", layer="model.layers.{i}.",
    attn_norm="input_layernorm", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj",
    q_norm="self_attn.q_norm", k_norm="self_attn.k_norm", o="self_attn.o_proj",
    mlp_norm="post_attention_layernorm", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj",
    ignored=(".rotary_emb.inv_freq",),
)  # fmt: skip
TEMPLATE_FILE: Final = "chat_template.jinja"


class _TokenizerConfig(msgspec.Struct, frozen=True):
    bos_token: str | dict[str, Any] | None = None
    eos_token: str | dict[str, Any] | None = None
    chat_template: str | list[dict[str, str]] | None = None


class _GenerationConfig(msgspec.Struct, frozen=True):
    eos_token_id: int | list[int] | None = None


@contextmanager
def open_hugging_face(folder: Path) -> Iterator[ModelSource]:
    """The model in ``folder``, checked; tensors can be read inside the ``with`` block.

    Raises:
        MalformedModelError: a file is missing, damaged, or outside the folder.
        UnsupportedModelError: an architecture, tensor type, tokeniser or rope scaling that glowplug does not run.
    """
    config = decode_config(read_capped(resolve_inside(folder, "config.json")))
    with SafetensorsCheckpoint(folder) as checkpoint:
        try:
            model = _read_model(folder, config, checkpoint)
        except BuildError as error:
            raise error if str(folder) in str(error) else type(error)(f"{folder}: {error}") from error
        yield model


def _read_model(folder: Path, hf_config: HfConfig, checkpoint: TensorFile) -> ImportedModel:
    config = read_decoder(hf_config)
    validate_config(config)
    inv_freq, rope_scale = compute_rope(read_rope(hf_config), config.head_dim)
    config = replace(config, rope_scale=rope_scale)
    tokenizer_config = _read_optional(folder, "tokenizer_config.json", _TokenizerConfig) or _TokenizerConfig()
    texts = SpecialTexts(_token_text(tokenizer_config.bos_token), _token_text(tokenizer_config.eos_token))
    tokenizer = read_hf_tokenizer(
        read_capped(resolve_inside(folder, "tokenizer.json")),
        _special_ids(folder, hf_config, texts),
        config.vocab_size,
    )
    if texts.bos_token is None and tokenizer.bos_id >= 0:
        texts = replace(texts, bos_token=tokenizer.tokens[tokenizer.bos_id].decode(errors="replace"))
    return ImportedModel(
        hf_config.model_type,
        config,
        tokenizer,
        _chat_template(folder, tokenizer_config),
        texts,
        arrange_tensors(checkpoint, NAMES, config, inv_freq),
    )


def _read_optional(folder: Path, name: str, kind: type[Any]) -> Any:
    if not (folder / name).exists():
        return None
    try:
        return msgspec.json.decode(read_capped(resolve_inside(folder, name)), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedModelError(f"{folder / name}: {error}") from error


def _token_text(token: str | dict[str, Any] | None) -> str | None:
    """A special token as tokenizer_config.json writes it: a text, or an object with the text in ``content``."""
    if isinstance(token, dict):
        content = token.get("content")
        return content if isinstance(content, str) else None
    return token


def _special_ids(folder: Path, config: HfConfig, texts: SpecialTexts) -> SpecialIds:
    generation = _read_optional(folder, "generation_config.json", _GenerationConfig)
    eos_ids = [*_as_list(generation.eos_token_id if generation else None), *_as_list(config.eos_token_id)]
    return SpecialIds(
        bos_text=texts.bos_token,
        bos_id=config.bos_token_id if isinstance(config.bos_token_id, int) else -1,
        eos_texts=(texts.eos_token,) if texts.eos_token else (),
        eos_ids=tuple(eos_ids),
    )


def _as_list(ids: int | list[int] | None) -> list[int]:
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]


def _chat_template(folder: Path, tokenizer_config: _TokenizerConfig) -> str | None:
    if (folder / TEMPLATE_FILE).exists():
        data = read_capped(resolve_inside(folder, TEMPLATE_FILE))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise MalformedModelError(f"{folder / TEMPLATE_FILE} is not UTF-8") from error
    template = tokenizer_config.chat_template
    if isinstance(template, list):  # named templates; "default" is the one for plain chat
        named = {entry.get("name"): entry.get("template") for entry in template}
        return named.get("default")
    return template
