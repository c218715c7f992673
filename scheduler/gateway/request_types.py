"""The bodies of requests as types: what ``/openapi.json`` says of them. Bounds are those of the readers, by name.

Requests are not decoded with these: the readers name the field, the limit and what was seen. Fields that are not here
are ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from scheduler.gateway.chat_messages import MAX_MESSAGES, MAX_ROLE_CHARS
from scheduler.gateway.embedding_schema import MAX_INPUTS
from scheduler.gateway.ignored_fields import MAX_METADATA_KEYS, MAX_METADATA_VALUE_CHARS
from scheduler.gateway.request_schema import MAX_CHOICES, MAX_MODEL_CHARS, MAX_USER_CHARS
from scheduler.gateway.sampling_fields import (
    INT32_MAX,
    INT64_MAX,
    MAX_LOGIT_BIAS,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_TEMPERATURE,
    MAX_TOP_LOGPROBS,
)
from scheduler.gateway.text_calls import MAX_TEXT_BYTES, MAX_TOKENS
from scheduler.gateway.tool_fields import MAX_TOOL_NAME_CHARS, MAX_TOOLS

Model = Annotated[str, Meta(min_length=1, max_length=MAX_MODEL_CHARS, description="A name from GET /v1/models.")]
Tokens = Annotated[int, Meta(ge=1, description="At most the model's context.")]
Temperature = Annotated[float, Meta(ge=0, le=MAX_TEMPERATURE)]
Share = Annotated[float, Meta(ge=0, le=1)]
TopK = Annotated[int, Meta(ge=-1, le=INT32_MAX, description="0 and -1 switch it off.")]
Penalty = Annotated[float, Meta(ge=-MAX_PENALTY, le=MAX_PENALTY)]
Seed = Annotated[int, Meta(ge=-INT64_MAX - 1, le=INT64_MAX)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
StopStrings = Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)]
TokenId = Annotated[int, Meta(ge=0)]
Priority = Annotated[Literal["interactive", "batch"], Meta(description="Batch waits for interactive requests.")]
Metadata = Annotated[
    dict[str, Annotated[str, Meta(max_length=MAX_METADATA_VALUE_CHARS)]], Meta(max_length=MAX_METADATA_KEYS)
]
ToolName = Annotated[str, Meta(pattern="^[a-zA-Z0-9_-]+$", min_length=1, max_length=MAX_TOOL_NAME_CHARS)]


def _texts(max_items: int) -> Meta:
    """A text, several, token ids, or several lists of them: a union that msgspec has no type for."""
    ids: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
    one: dict[str, Any] = {"type": "string", "minLength": 1}
    several = {"type": "array", "minItems": 1, "maxItems": max_items, "items": {"anyOf": [one, ids]}}
    return Meta(extra_json_schema={"anyOf": [one, ids, several]})


Schema = Annotated[dict[str, Any], Meta(description="A JSON schema.")]


class Sampling(msgspec.Struct, kw_only=True):
    """How tokens are chosen: fields that completions and chats share."""

    model: Model
    max_tokens: Tokens | None = None
    temperature: Temperature | None = 1.0
    top_p: Share | None = 1.0
    top_k: TopK | None = None
    min_p: Share | None = None
    seed: Seed | None = None
    stop: StopString | StopStrings | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=MAX_REPETITION_PENALTY)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-MAX_LOGIT_BIAS, le=MAX_LOGIT_BIAS)]] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    priority: Priority | None = None
    user: Annotated[str, Meta(max_length=MAX_USER_CHARS)] | None = None
    metadata: Metadata | None = None


class StreamOptions(msgspec.Struct, kw_only=True):
    """Only where ``stream`` is true."""

    include_usage: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    """What the text must match; each type has a field of its own."""

    type: Literal["text", "json_object", "json_schema", "regex", "lark"]
    json_schema: JsonSchemaFormat | None = None
    pattern: str | None = None
    grammar: str | None = None


class JsonSchemaFormat(msgspec.Struct, kw_only=True):
    name: ToolName
    schema: Schema | None = None
    strict: bool | None = None


class TextPart(msgspec.Struct, kw_only=True):
    type: Literal["text"]
    text: str


class FunctionCallBody(msgspec.Struct, kw_only=True):
    name: ToolName
    arguments: str


class ToolCallBody(msgspec.Struct, kw_only=True):
    id: Annotated[str, Meta(min_length=1)]
    type: Literal["function"] = "function"
    function: FunctionCallBody


class Message(msgspec.Struct, kw_only=True):
    """Null content is for an assistant that calls; ``tool_call_id`` is required in role ``tool``."""

    role: Annotated[str, Meta(min_length=1, max_length=MAX_ROLE_CHARS)]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCallBody] | None = None
    tool_call_id: str | None = None


class FunctionBody(msgspec.Struct, kw_only=True):
    name: ToolName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class ToolBody(msgspec.Struct, kw_only=True):
    type: Literal["function"]
    function: FunctionBody


class NamedFunction(msgspec.Struct, kw_only=True):
    name: ToolName


class NamedTool(msgspec.Struct, kw_only=True):
    type: Literal["function"]
    function: NamedFunction


class ChatCompletionRequest(Sampling, kw_only=True):
    """A chat. Tools need a model of which GET /v1/models says ``tools``."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[ToolBody], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None


class CompletionRequest(Sampling, kw_only=True):
    """A text that goes on where its prompt ends; several prompts give several choices."""

    prompt: Annotated[Any, _texts(MAX_CHOICES)]
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    """Vectors of the inputs, of a model that makes them."""

    model: Model
    input: Annotated[Any, _texts(MAX_INPUTS)]
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    priority: Priority | None = None
    user: Annotated[str, Meta(max_length=MAX_USER_CHARS)] | None = None


class InputText(msgspec.Struct, kw_only=True):
    type: Literal["input_text", "output_text", "text"]
    text: str


class InputItem(msgspec.Struct, kw_only=True):
    """A message (the default), a function's call, or its output."""

    type: Literal["message", "function_call", "function_call_output"] | None = None
    role: str | None = None
    content: str | list[InputText] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputText] | None = None


class FlatTool(msgspec.Struct, kw_only=True):
    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class FlatNamedTool(msgspec.Struct, kw_only=True):
    type: Literal["function"]
    name: ToolName


class TextFormat(msgspec.Struct, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    name: ToolName | None = None
    schema: Schema | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, kw_only=True):
    format: TextFormat | None = None


class ResponseRequest(msgspec.Struct, kw_only=True):
    """A response. Nothing is stored: the whole conversation is the input."""

    model: Model
    input: str | Annotated[list[InputItem], Meta(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: Tokens | None = None
    temperature: Temperature | None = 1.0
    top_p: Share | None = 1.0
    text: TextOptions | None = None
    tools: Annotated[list[FlatTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatNamedTool | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    store: Annotated[bool, Meta(description="Only false.")] | None = None
    truncation: Literal["disabled"] | None = None
    metadata: Metadata | None = None
    user: Annotated[str, Meta(max_length=MAX_USER_CHARS)] | None = None


class ContentBlock(msgspec.Struct, kw_only=True):
    """Text, a call (of the assistant), or a call's result (of the user)."""

    type: Literal["text", "tool_use", "tool_result"]
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[TextPart] | None = None


class AnthropicMessage(msgspec.Struct, kw_only=True):
    role: Literal["user", "assistant"]
    content: str | list[ContentBlock]


class AnthropicTool(msgspec.Struct, kw_only=True):
    name: ToolName
    description: str | None = None
    input_schema: Schema


class AnthropicToolChoice(msgspec.Struct, kw_only=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class CountRequest(msgspec.Struct, kw_only=True):
    """A prompt in Anthropic's dialect."""

    model: Model
    messages: Annotated[list[AnthropicMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
    system: str | list[TextPart] | None = None
    tools: Annotated[list[AnthropicTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: AnthropicToolChoice | None = None


class MessageRequest(CountRequest, kw_only=True):
    """A message in Anthropic's dialect."""

    max_tokens: Tokens
    temperature: Temperature | None = 1.0
    top_p: Share | None = None
    top_k: TopK | None = None
    stop_sequences: StopStrings | None = None
    stream: bool | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """One of ``prompt``, ``content`` and ``messages``."""

    model: Model
    prompt: Annotated[str, Meta(max_length=MAX_TEXT_BYTES)] | None = None
    content: Annotated[str, Meta(max_length=MAX_TEXT_BYTES)] | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    parse_special: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    model: Model
    tokens: Annotated[list[TokenId], Meta(max_length=MAX_TOKENS)]


class FileUpload(msgspec.Struct, kw_only=True):
    """A multipart form."""

    purpose: Literal["batch"]
    file: Annotated[str, Meta(extra_json_schema={"format": "binary"})]


class BatchRequest(msgspec.Struct, kw_only=True):
    """Requests of a file, answered when there is room."""

    input_file_id: str
    endpoint: str
    completion_window: str
    run_window: str | None = None  # ours
    metadata: Metadata | None = None
