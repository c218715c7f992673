"""``config.json`` of a Hugging Face folder: which decoder it describes, or why glowplug does not run it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import msgspec

from guests.llama_assets import LlamaConfig
from worker.build.errors import MalformedModelError, UnsupportedModelError
from worker.build.rope import SUPPORTED_ROPE, RopeScaling

ARCHITECTURES: Final = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
#: What transformers assumes where config.json leaves a field out.
DEFAULT_EPS: Final = 1e-6
DEFAULT_CONTEXT_TOKENS: Final = 2048
DEFAULT_WINDOW_TOKENS: Final = 4096
DEFAULT_MAX_WINDOW_LAYERS: Final = 28
DEFAULT_QWEN3_HEAD_DIM: Final = 128


class HfConfig(msgspec.Struct, frozen=True):
    """The fields of config.json that shape a decoder; all others carry no meaning for inference."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    architectures: list[str] | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = DEFAULT_CONTEXT_TOKENS
    rms_norm_eps: float = DEFAULT_EPS
    tie_word_embeddings: bool | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = DEFAULT_WINDOW_TOKENS
    use_sliding_window: bool = False
    max_window_layers: int = DEFAULT_MAX_WINDOW_LAYERS
    layer_types: list[str] | None = None
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None  # transformers 5 writes theta and scaling in here
    partial_rotary_factor: float = 1.0
    quantization_config: dict[str, Any] | None = None
    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None


class _ModelType(msgspec.Struct, frozen=True):
    model_type: str = "(none)"


def decode_config(data: bytes) -> HfConfig:
    """Parse config.json; the architecture is judged before any other field.

    Raises:
        UnsupportedModelError: another architecture than the supported ones.
        MalformedModelError: not JSON, or a field that is missing or of another type.
    """
    try:
        model_type = msgspec.json.decode(data, type=_ModelType).model_type
        if model_type not in ARCHITECTURES:
            raise UnsupportedModelError(_refusal(model_type))
        config = msgspec.json.decode(data, type=HfConfig)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedModelError(f"config.json: {error}") from error
    if config.architectures and ARCHITECTURES[model_type] not in config.architectures:
        raise UnsupportedModelError(_refusal(config.architectures[0]))
    return config


def _refusal(seen: str) -> str:
    supported = ", ".join(f"{name} ({architecture})" for name, architecture in ARCHITECTURES.items())
    return f"architecture {seen!r}: supported are {supported}"


def read_decoder(config: HfConfig) -> LlamaConfig:
    """The decoder that ``config`` describes; ``rope_scale`` is left to :func:`worker.build.rope.compute_rope`.

    Raises:
        UnsupportedModelError: a variant that the guest does not have.
        MalformedModelError: sizes that make no model.
    """
    if config.hidden_act != "silu":
        raise UnsupportedModelError(f"activation {config.hidden_act!r}: only silu is supported")
    if config.quantization_config is not None:
        method = config.quantization_config.get("quant_method")
        raise UnsupportedModelError(
            f"weights quantised with {method!r}: give the F32, F16 or BF16 checkpoint, or a GGUF file"
        )
    if config.num_attention_heads <= 0:
        raise MalformedModelError(f"config.json: num_attention_heads is {config.num_attention_heads}")
    window, from_layer = _read_sliding_window(config)
    return LlamaConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=_read_head_dim(config),
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        tie_embeddings=bool(config.tie_word_embeddings),
        qkv_bias=config.model_type == "qwen2" or config.attention_bias,
        output_bias=config.attention_bias and config.model_type in ("llama", "qwen3"),
        mlp_bias=config.mlp_bias and config.model_type == "llama",
        qk_norm=config.model_type == "qwen3",
        sliding_window=window,
        sliding_window_from_layer=from_layer,
    )


def _read_head_dim(config: HfConfig) -> int:
    if config.head_dim:
        return config.head_dim
    if config.model_type == "qwen3":
        return DEFAULT_QWEN3_HEAD_DIM
    return config.hidden_size // config.num_attention_heads


def _read_sliding_window(config: HfConfig) -> tuple[int, int]:
    """Window in tokens (0: none) and the first layer it applies to.

    Raises:
        UnsupportedModelError: layers that alternate between full and windowed attention.
    """
    window = config.sliding_window or 0
    applies = config.model_type == "mistral" or (config.model_type in ("qwen2", "qwen3") and config.use_sliding_window)
    if not applies or window <= 0 or window >= config.max_position_embeddings:
        return 0, 0
    if config.model_type == "mistral":
        return window, 0
    if config.layer_types is None:
        return window, config.max_window_layers
    windowed = [kind == "sliding_attention" for kind in config.layer_types]
    from_layer = windowed.index(True) if any(windowed) else len(windowed)
    if not all(windowed[from_layer:]) or len(windowed) != config.num_hidden_layers:
        raise UnsupportedModelError(
            "layer_types that alternate between full and sliding attention: supported is a sliding window "
            "from one layer on"
        )
    return window, from_layer


def read_rope(config: HfConfig) -> RopeScaling:
    """Rotary parameters, from ``rope_theta`` and ``rope_scaling`` or from transformers 5's ``rope_parameters``.

    Raises:
        UnsupportedModelError: a kind of scaling, or partial rotation, that is not supported.
        MalformedModelError: a parameter that is no number.
    """
    parameters = {**(config.rope_scaling or {}), **(config.rope_parameters or {})}
    kind = str(parameters.get("rope_type", parameters.get("type", "default")))
    if kind not in SUPPORTED_ROPE:
        raise UnsupportedModelError(f"rope scaling {kind!r}: supported are {', '.join(SUPPORTED_ROPE)}")

    def number(key: str, default: float) -> float:
        value = parameters.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise MalformedModelError(f"config.json: rope parameter {key} is {value!r}: expected a number")
        return float(value)

    if number("partial_rotary_factor", config.partial_rotary_factor) != 1.0:
        raise UnsupportedModelError("partial_rotary_factor: only rotation of whole heads is supported")
    return RopeScaling(
        kind=kind,
        theta=number("rope_theta", config.rope_theta or 10_000.0),
        factor=number("factor", 1.0) if kind != "dynamic" else 1.0,
        original_context=int(number("original_max_position_embeddings", config.max_position_embeddings)),
        low_freq_factor=number("low_freq_factor", 1.0),
        high_freq_factor=number("high_freq_factor", 4.0),
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        attention_factor=_read_attention_factor(number),
        truncate=parameters.get("truncate", True) is not False,
    )


def _read_attention_factor(number: Callable[[str, float], float]) -> float | None:
    """YaRN's factor where the file states it, or the ratio of its two magnitude scales; None: the usual one."""
    stated = number("attention_factor", math.nan)
    if not math.isnan(stated):
        return stated
    factor, scale, scale_all = number("factor", 1.0), number("mscale", 0.0), number("mscale_all_dim", 0.0)
    if factor <= 1 or not scale or not scale_all:
        return None
    return (0.1 * scale * math.log(factor) + 1) / (0.1 * scale_all * math.log(factor) + 1)
