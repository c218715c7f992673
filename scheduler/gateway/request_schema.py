"""From a decoded JSON body to a validated call: the fields of both endpoints, their limits and what is refused.

Unknown fields are ignored. A known field of ours with a wrong type or range is a 400 that names it. A field that would
change the answer and that we cannot honour is a 400 too, rather than an answer that ignores it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final

from msgspec import structs

from scheduler.contract.chat_template import ChatTemplates
from scheduler.contract.errors import ErrorCode, GlowplugError
from scheduler.contract.messages import EmbeddingInputs, ModelCard, SamplingParams
from scheduler.contract.states import Priority
from scheduler.gateway.chat_messages import read_messages
from scheduler.gateway.errors import bad_field
from scheduler.gateway.field_reader import FieldReader, json_type
from scheduler.gateway.ignored_fields import check_ignored_fields
from scheduler.gateway.sampling_fields import read_chat_logprobs, read_completion_logprobs, read_sampling
from scheduler.gateway.tool_calls import ToolUse
from scheduler.gateway.tool_fields import read_tools

MAX_CHOICES: Final = 16  # prompts times n
MAX_MODEL_CHARS: Final = 256
MAX_USER_CHARS: Final = 512
LEGACY_MAX_TOKENS: Final = 16  # OpenAI's default of /v1/completions
UNLIMITED_TOKENS: Final = 2**31 - 1

Prompt = str | tuple[int, ...]


class Endpoint(StrEnum):
    """Which of the endpoints that wake a model was called; also a metrics label."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    EMBEDDINGS = "embeddings"
    RESPONSES = "responses"
    MESSAGES = "messages"
    TOKENIZE = "tokenize"
    DETOKENIZE = "detokenize"
    COUNT = "count_tokens"

    @property
    def prompt_field(self) -> str:
        """The request field that holds the prompt."""
        return PROMPT_FIELDS.get(self, "prompt")

    @property
    def is_resumable(self) -> bool:
        """Whether a stream's events follow from its token log alone, so that any gateway can make them again."""
        return self in (Endpoint.CHAT, Endpoint.COMPLETIONS)


PROMPT_FIELDS: Final = {
    Endpoint.CHAT: "messages",
    Endpoint.MESSAGES: "messages",
    Endpoint.DETOKENIZE: "tokens",
    Endpoint.EMBEDDINGS: "input",
    Endpoint.RESPONSES: "input",
}


@dataclass(frozen=True, slots=True)
class Call:
    """One validated HTTP call. ``prompts`` has one element for chat; each gives ``num_choices`` choices."""

    endpoint: Endpoint
    card: ModelCard
    prompts: tuple[Prompt, ...]
    sampling: SamplingParams
    num_choices: int
    stream: bool
    include_usage: bool
    echo: bool
    priority: Priority
    user: str | None
    embedding: EmbeddingInputs | None = None  # set: this is what is asked for, and no text
    as_base64: bool = False
    tools: ToolUse | None = None  # set: the text may hold calls
    text_only: bool = False  # the tokenizer alone answers
    add_special: bool = False  # the tokenizer's own marks around the prompt; a chat's template writes them
    parse_special: bool = True  # text such as <|im_end|> in the prompt is that token
    echoed: Mapping[str, Any] | None = None  # what the answer repeats of its request

    @property
    def total_choices(self) -> int:
        return len(self.prompts) * self.num_choices


def read_model_name(body: dict[str, Any]) -> str:
    """The model that the call is for.

    Raises:
        GlowplugError: missing, empty or not a string.
    """
    name = FieldReader(body).string("model", max_chars=MAX_MODEL_CHARS)
    if not name:
        raise bad_field("model", "is required; GET /v1/models lists the models")
    return name


def read_chat_call(body: dict[str, Any], card: ModelCard, templates: ChatTemplates) -> Call:
    """A chat call, its messages rendered to a prompt.

    Raises:
        GlowplugError: a field is wrong, the template refuses the messages, or the prompt cannot fit.
    """
    reader = FieldReader(body)
    check_ignored_fields(reader)
    tools = read_tools(reader, card, templates)
    num_top_logprobs = read_chat_logprobs(reader)
    default_max_tokens = card.context_length or UNLIMITED_TOKENS
    sampling = read_sampling(reader, card, default_max_tokens=default_max_tokens, num_top_logprobs=num_top_logprobs)
    if tools is not None:
        sampling = structs.replace(sampling, grammar=tools.build_grammar(sampling.grammar))
    definitions = None if tools is None else tools.definitions
    prompt = templates.render(card, read_messages(reader.raw("messages")), definitions)
    call = _build_call(reader, card, Endpoint.CHAT, (prompt,), sampling, echo=False)
    return call if tools is None else replace(call, tools=tools.use)


def read_completion_call(body: dict[str, Any], card: ModelCard) -> Call:
    """A legacy completion call.

    Raises:
        GlowplugError: a field is wrong, or a prompt cannot fit.
    """
    reader = FieldReader(body)
    check_ignored_fields(reader)
    _refuse_unsupported_completion(reader)
    num_top_logprobs = read_completion_logprobs(reader)
    default_max_tokens = min(LEGACY_MAX_TOKENS, card.context_length or LEGACY_MAX_TOKENS)
    sampling = read_sampling(reader, card, default_max_tokens=default_max_tokens, num_top_logprobs=num_top_logprobs)
    prompts = read_prompts(reader.raw("prompt"), card)
    echo = reader.boolean("echo", default=False)
    if echo and num_top_logprobs is not None:
        raise bad_field("echo", "log-probabilities of the prompt are not computed; drop echo or logprobs")
    if echo and not all(isinstance(prompt, str) for prompt in prompts):
        raise bad_field("echo", "needs a text prompt; a prompt of token ids is not echoed")
    return _build_call(reader, card, Endpoint.COMPLETIONS, prompts, sampling, echo=echo)


def _build_call(
    reader: FieldReader,
    card: ModelCard,
    endpoint: Endpoint,
    prompts: tuple[Prompt, ...],
    sampling: SamplingParams,
    *,
    echo: bool,
) -> Call:
    stream = reader.boolean("stream", default=False)
    num_choices = reader.integer("n", low=1, high=MAX_CHOICES) or 1
    if len(prompts) * num_choices > MAX_CHOICES:
        raise bad_field("n", f"{len(prompts)} prompts times n {num_choices}; at most {MAX_CHOICES} choices in a call")
    for prompt in prompts:
        check_prompt_length(prompt, card, param=endpoint.prompt_field)
    return Call(
        add_special=endpoint is Endpoint.COMPLETIONS,
        endpoint=endpoint,
        card=card,
        prompts=prompts,
        sampling=sampling,
        num_choices=num_choices,
        stream=stream,
        include_usage=_read_include_usage(reader, stream=stream),
        echo=echo,
        priority=Priority(reader.one_of("priority", ("interactive", "batch"), default="interactive")),
        user=reader.string("user", max_chars=MAX_USER_CHARS),
    )


def _read_include_usage(reader: FieldReader, *, stream: bool) -> bool:
    options = reader.mapping("stream_options")
    if options is None:
        return False
    if not stream:
        raise bad_field("stream_options", "only allowed when stream is true")
    wanted = options.get("include_usage")
    if wanted is not None and not isinstance(wanted, bool):
        raise bad_field("stream_options.include_usage", f"expected a boolean, got {json_type(wanted)}")
    return bool(wanted)


# --- prompts ----------------------------------------------------------------------------------------------------


def check_prompt_length(prompt: Prompt, card: ModelCard, *, param: str) -> None:
    """Refuse a prompt that cannot fit the context, whatever the tokenizer makes of it.

    Cheap and one-sided: a text has at least its bytes divided by the longest token's bytes. The worker, which
    tokenises, finds the rest.

    Raises:
        GlowplugError: CONTEXT_LENGTH_EXCEEDED with both numbers.
    """
    if not card.context_length:
        return
    if isinstance(prompt, str):
        if not card.max_token_bytes:
            return
        num_tokens = -(-len(prompt.encode()) // card.max_token_bytes)
        counted = f"at least {num_tokens} tokens"
    else:
        num_tokens = len(prompt)
        counted = f"{num_tokens} tokens"
    if num_tokens >= card.context_length:
        raise GlowplugError(
            ErrorCode.CONTEXT_LENGTH_EXCEEDED,
            f'the prompt has {counted}; the context of "{card.name}" holds {card.context_length}, '
            "prompt and completion together; shorten the prompt",
            param=param,
        )


def read_prompts(value: Any, card: ModelCard) -> tuple[Prompt, ...]:
    """``prompt`` as a text, several texts, token ids, or several lists of token ids.

    Raises:
        GlowplugError: none of these, empty, too many, or a token id out of range.
    """
    if value is None:
        raise bad_field("prompt", "is required")
    if isinstance(value, str):
        return (_check_text(value),)
    if not isinstance(value, list):
        raise bad_field("prompt", f"expected a string, strings, or token ids, got {json_type(value)}")
    if not value:
        raise bad_field("prompt", "is empty")
    if _is_token_id(value[0]):
        return (read_token_ids(value, card, param="prompt"),)
    if len(value) > MAX_CHOICES:
        raise bad_field("prompt", f"{len(value)} prompts; at most {MAX_CHOICES} in a call")
    return tuple(
        _check_text(one) if isinstance(one, str) else read_token_ids(one, card, param="prompt") for one in value
    )


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_text(text: str) -> str:
    if not text:
        raise bad_field("prompt", "is empty; send at least one character")
    return text


def read_token_ids(value: Any, card: ModelCard, *, param: str) -> tuple[int, ...]:
    """A list of token ids of the model.

    Raises:
        GlowplugError: something else, or none.
    """
    if not isinstance(value, list) or not value:
        seen = "an empty array" if value == [] else json_type(value)
        raise bad_field(param, f"expected token ids, got {seen}")
    high = card.vocab_size or UNLIMITED_TOKENS
    for token_id in value:
        if not _is_token_id(token_id):
            raise bad_field(param, f"expected token ids, got {json_type(token_id)}")
        if not 0 <= token_id < high:
            raise bad_field(param, f"token id {token_id} is out of range; {card.name} has {card.vocab_size} tokens")
    return tuple(value)


# --- what we cannot honour --------------------------------------------------------------------------------------


def _refuse_unsupported_completion(reader: FieldReader) -> None:
    if reader.raw("suffix"):
        raise bad_field("suffix", "fill-in-the-middle is not supported by this server; leave it out")
    best_of = reader.integer("best_of", low=1, high=MAX_CHOICES)
    if best_of is not None and best_of != (reader.integer("n", low=1, high=MAX_CHOICES) or 1):
        raise bad_field("best_of", "must equal n; ranking of candidates is not supported by this server")
