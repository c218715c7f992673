"""The request fields that become :class:`SamplingParams`, shared by chat and legacy completions."""

from __future__ import annotations

import secrets
from typing import Final

from scheduler.contract.messages import ModelCard, SamplingParams
from scheduler.gateway.errors import bad_field
from scheduler.gateway.field_reader import FieldReader, check_number, json_type
from scheduler.gateway.output_format import read_output_grammar

MAX_STOP_STRINGS: Final = 16
MAX_STOP_CHARS: Final = 256
MAX_TOP_LOGPROBS: Final = 20
MAX_TEMPERATURE: Final = 2.0
MAX_PENALTY: Final = 2.0
MAX_REPETITION_PENALTY: Final = 10.0
MAX_LOGIT_BIAS: Final = 100.0
INT64_MAX: Final = 2**63 - 1
INT32_MAX: Final = 2**31 - 1
#: What ``top_p: 0`` means: only the most likely token. A positive number, so that the nucleus is never empty.
TINY_TOP_P: Final = 1e-9


def read_sampling(
    reader: FieldReader, card: ModelCard, *, default_max_tokens: int, num_top_logprobs: int | None
) -> SamplingParams:
    """How the tokens of this request are chosen; a seed is drawn if the client gave none.

    Raises:
        GlowplugError: a field has a wrong type or is out of range; names it.
    """
    max_tokens = _read_max_tokens(reader, card, default_max_tokens)
    seed = reader.integer("seed", low=-INT64_MAX - 1, high=INT64_MAX)
    top_k = reader.integer("top_k", low=-1, high=INT32_MAX) or 0
    return SamplingParams(
        seed=secrets.randbits(63) if seed is None else seed,
        max_tokens=max_tokens,
        temperature=reader.number("temperature", default=1.0, low=0.0, high=MAX_TEMPERATURE),
        top_p=reader.number("top_p", default=1.0, low=0.0, high=1.0) or TINY_TOP_P,
        top_k=max(top_k, 0),  # -1 is vLLM's word for off
        min_p=reader.number("min_p", default=0.0, low=0.0, high=1.0),
        frequency_penalty=reader.number("frequency_penalty", default=0.0, low=-MAX_PENALTY, high=MAX_PENALTY),
        presence_penalty=reader.number("presence_penalty", default=0.0, low=-MAX_PENALTY, high=MAX_PENALTY),
        repetition_penalty=reader.number(
            "repetition_penalty", default=1.0, low=0.0, high=MAX_REPETITION_PENALTY, above_low=True
        ),
        logit_bias=_read_logit_bias(reader, card),
        stop=_read_stop(reader),
        num_top_logprobs=num_top_logprobs,
        min_tokens=reader.integer("min_tokens", low=0, high=max_tokens) or 0,
        ignore_eos=reader.boolean("ignore_eos", default=False),
        grammar=read_output_grammar(reader),
    )


def read_chat_logprobs(reader: FieldReader) -> int | None:
    """Chat form: ``logprobs`` switches them on, ``top_logprobs`` says how many candidates besides the chosen one."""
    wanted = reader.boolean("logprobs", default=False)
    num_top = reader.integer("top_logprobs", low=0, high=MAX_TOP_LOGPROBS)
    if num_top is not None and not wanted:
        raise bad_field("top_logprobs", "needs logprobs to be true")
    return (num_top or 0) if wanted else None


def read_completion_logprobs(reader: FieldReader) -> int | None:
    """Legacy form: ``logprobs`` is the number of candidates."""
    return reader.integer("logprobs", low=0, high=MAX_TOP_LOGPROBS)


def _read_max_tokens(reader: FieldReader, card: ModelCard, default: int) -> int:
    """``max_completion_tokens``, else ``max_tokens``, else ``default``; never more than the model's context holds."""
    high = card.context_length or INT32_MAX
    older = reader.integer("max_tokens", low=1, high=high)
    newer = reader.integer("max_completion_tokens", low=1, high=high)
    if newer is not None and older is not None and newer != older:
        raise bad_field("max_completion_tokens", f"{newer} contradicts max_tokens {older}; send one of them")
    chosen = newer if newer is not None else older
    return default if chosen is None else chosen


def _read_stop(reader: FieldReader) -> tuple[str, ...]:
    value = reader.raw("stop")
    if value is None:
        return ()
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise bad_field("stop", f"expected a string or an array of strings, got {json_type(value)}")
    if len(value) > MAX_STOP_STRINGS:
        raise bad_field("stop", f"{len(value)} stop strings; at most {MAX_STOP_STRINGS} are accepted")
    for text in value:
        if not isinstance(text, str):
            raise bad_field("stop", f"expected strings, got {json_type(text)}")
        if not 0 < len(text) <= MAX_STOP_CHARS:
            raise bad_field("stop", f"a stop string has {len(text)} characters; expected 1 to {MAX_STOP_CHARS}")
    return tuple(value)


def _read_logit_bias(reader: FieldReader, card: ModelCard) -> dict[int, float]:
    found: dict[int, float] = {}
    for key, value in (reader.mapping("logit_bias") or {}).items():
        if not key.isascii() or not key.isdigit() or len(key) > 10:
            raise bad_field("logit_bias", f'"{key[:40]}" is not a token id')
        token_id = int(key)
        if card.vocab_size and token_id >= card.vocab_size:
            raise bad_field("logit_bias", f"token id {token_id} is out of range; {card.name} has {card.vocab_size}")
        found[token_id] = check_number("logit_bias", value, low=-MAX_LOGIT_BIAS, high=MAX_LOGIT_BIAS)
    return found
