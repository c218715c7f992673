"""From a decoded JSON body of ``POST /v1/embeddings`` to a validated call."""

from __future__ import annotations

from typing import Any, Final

from scheduler.contract.errors import ErrorCode, GlowplugError
from scheduler.contract.messages import EmbeddingInputs, ModelCard, SamplingParams
from scheduler.contract.states import Priority, Task
from scheduler.gateway.errors import bad_field
from scheduler.gateway.field_reader import FieldReader, json_type
from scheduler.gateway.request_schema import MAX_USER_CHARS, UNLIMITED_TOKENS, Call, Endpoint

MAX_INPUTS: Final = 2048
#: What each task's requests are sent to.
ENDPOINTS: Final = {
    Task.GENERATE: "generates text: use POST /v1/chat/completions or /v1/completions",
    Task.EMBED: "makes embeddings: use POST /v1/embeddings",
}

Input = str | tuple[int, ...]


def require_task(card: ModelCard, task: Task) -> None:
    """Refuse a request to a model that does something else.

    Raises:
        GlowplugError: names the endpoint that the model serves.
    """
    if card.task is not task:
        raise GlowplugError(ErrorCode.INVALID_REQUEST, f'model "{card.name}" {ENDPOINTS[card.task]}', param="model")


def read_embedding_call(body: dict[str, Any], card: ModelCard) -> Call:
    """A call for embeddings; all its inputs are one request.

    Raises:
        GlowplugError: the model makes none, a field is wrong, or an input of token ids cannot fit.
    """
    require_task(card, Task.EMBED)
    reader = FieldReader(body)
    dimensions = reader.integer("dimensions", low=1, high=card.vector_size or UNLIMITED_TOKENS) or 0
    as_base64 = reader.one_of("encoding_format", ("float", "base64"), default="float") == "base64"
    return Call(
        endpoint=Endpoint.EMBEDDINGS,
        card=card,
        prompts=("",),
        sampling=SamplingParams(seed=0, max_tokens=0),
        num_choices=1,
        stream=False,
        include_usage=False,
        echo=False,
        priority=Priority(reader.one_of("priority", ("interactive", "batch"), default="interactive")),
        user=reader.string("user", max_chars=MAX_USER_CHARS),
        embedding=EmbeddingInputs(read_inputs(reader.raw("input"), card), dimensions),
        as_base64=as_base64,
    )


def read_inputs(value: Any, card: ModelCard) -> tuple[Input, ...]:
    """``input`` as a text, several texts, token ids, or several lists of token ids.

    Raises:
        GlowplugError: none of these, empty, too many, too long, or a token id out of range; names the element.
    """
    if value is None:
        raise bad_field("input", "is required")
    if isinstance(value, str):
        return (_read_one("input", value, card),)
    if not isinstance(value, list):
        raise bad_field("input", f"expected a string, strings, or token ids, got {json_type(value)}")
    if not value:
        raise bad_field("input", "is empty")
    if _is_token_id(value[0]):
        return (_read_one("input", value, card),)
    if len(value) > MAX_INPUTS:
        raise bad_field("input", f"{len(value)} inputs; at most {MAX_INPUTS} in a call")
    return tuple(_read_one(f"input[{index}]", one, card) for index, one in enumerate(value))


def _read_one(name: str, value: Any, card: ModelCard) -> Input:
    if isinstance(value, str):
        if not value:
            raise bad_field(name, "is empty; send at least one character")
        return value
    if not isinstance(value, list) or not value:
        seen = "an empty array" if value == [] else json_type(value)
        raise bad_field(name, f"expected a string or token ids, got {seen}")
    if card.context_length and len(value) > card.context_length:
        raise GlowplugError(
            ErrorCode.CONTEXT_LENGTH_EXCEEDED,
            f'{name} has {len(value)} tokens; the context of "{card.name}" holds {card.context_length}',
            param=name,
        )
    high = card.vocab_size or UNLIMITED_TOKENS
    for token_id in value:
        if not _is_token_id(token_id):
            raise bad_field(name, f"expected token ids, got {json_type(token_id)}")
        if not 0 <= token_id < high:
            raise bad_field(name, f"token id {token_id} is out of range; {card.name} has {card.vocab_size} tokens")
    return tuple(value)


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
