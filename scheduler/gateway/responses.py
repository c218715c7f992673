"""OpenAI's response bodies and stream chunks as structs, and how token events become them.

Fields that are ``UNSET`` are left out of the JSON; ``None`` is written as null, because clients look for the key.
Source: the openai-openapi specification, schemas CreateChatCompletion(Stream)Response and CreateCompletionResponse.
"""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from scheduler.contract.messages import ModelCard, TokenLogprob, TopLogprob, Usage
from scheduler.contract.states import FinishReason
from scheduler.gateway.tool_calls import ArgumentsDelta, CallDelta, TextDelta, ToolCall, ToolUse, read_items


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class UsageBody(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ChatTop(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[ChatTop]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatToken]
    refusal: None = None


class FunctionDelta(msgspec.Struct):
    """Of a call that begins, the name; then more of its arguments' JSON text."""

    name: str | UnsetType = UNSET
    arguments: str = ""


class ToolCallDelta(msgspec.Struct):
    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


class Delta(msgspec.Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(msgspec.Struct):
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: UsageBody | UnsetType | None = UNSET
    object: str = "chat.completion.chunk"


class FunctionCall(msgspec.Struct):
    name: str
    arguments: str


class ChatToolCall(msgspec.Struct):
    id: str
    function: FunctionCall
    type: str = "function"


class ChatMessage(msgspec.Struct):
    """``content`` is null where the answer is calls alone."""

    content: str | None
    role: str = "assistant"
    refusal: None = None
    tool_calls: list[ChatToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatCompletion(msgspec.Struct):
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageBody
    object: str = "chat.completion"


class LegacyLogprobs(msgspec.Struct):
    """Parallel arrays; ``text_offset`` counts characters from the start of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class LegacyChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: LegacyLogprobs | None = None
    finish_reason: str | None = None


class LegacyCompletion(msgspec.Struct):
    """A whole legacy completion, and also each chunk of a streamed one (they share the ``object``)."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[LegacyChoice]
    usage: UsageBody | UnsetType | None = UNSET
    object: str = "text_completion"


def fingerprint(card: ModelCard) -> str:
    """``fp_`` and the snapshot id: a client can tell that a restore did not change the model."""
    return f"fp_{card.snapshot_id}"


def build_usage(usages: list[Usage]) -> UsageBody:
    """The sum of the usages of one call's prompts."""
    prompt_tokens = sum(usage.prompt_tokens for usage in usages)
    completion_tokens = sum(usage.completion_tokens for usage in usages)
    return UsageBody(
        prompt_tokens,
        completion_tokens,
        prompt_tokens + completion_tokens,
        PromptTokensDetails(sum(usage.cached_tokens for usage in usages)),
    )


def finish_word(reason: FinishReason, num_calls: int) -> str:
    """OpenAI's word for why a choice ended."""
    return "tool_calls" if num_calls and reason is FinishReason.STOP else reason.value


def build_chat_message(text: str, use: ToolUse | None, seed: str) -> ChatMessage:
    """The message of one choice's ``text``; ``seed`` as for :class:`ToolCallParser`."""
    if use is None:
        return ChatMessage(text)
    items = read_items(text, use, seed)
    calls = [item for item in items if isinstance(item, ToolCall)]
    content = "".join(item for item in items if isinstance(item, str))
    if not calls:
        return ChatMessage(content)
    return ChatMessage(
        content or None,
        tool_calls=[ChatToolCall(call.call_id, FunctionCall(call.name, call.arguments)) for call in calls],
    )


def build_chat_delta(delta: TextDelta | CallDelta | ArgumentsDelta) -> Delta:
    """What a chunk says of ``delta``."""
    match delta:
        case TextDelta(text):
            return Delta(content=text)
        case CallDelta(index, call_id, name):
            return Delta(tool_calls=[ToolCallDelta(index, FunctionDelta(name), call_id, "function")])
        case ArgumentsDelta(index, text):
            return Delta(tool_calls=[ToolCallDelta(index, FunctionDelta(arguments=text))])


def build_chat_token(logprob: TokenLogprob) -> ChatToken:
    """One position in the chat form."""
    return ChatToken(
        _token_text(logprob.token_bytes),
        logprob.logprob,
        list(logprob.token_bytes),
        [_chat_top(t) for t in logprob.top],
    )


def append_legacy_token(into: LegacyLogprobs, logprob: TokenLogprob, text_offset: int) -> None:
    """Add one position in the legacy form."""
    into.tokens.append(_token_text(logprob.token_bytes))
    into.token_logprobs.append(logprob.logprob)
    into.top_logprobs.append({_token_text(top.token_bytes): top.logprob for top in logprob.top})
    into.text_offset.append(text_offset)


def empty_legacy_logprobs() -> LegacyLogprobs:
    return LegacyLogprobs([], [], [], [])


def _chat_top(top: TopLogprob) -> ChatTop:
    return ChatTop(_token_text(top.token_bytes), top.logprob, list(top.token_bytes))


def _token_text(token_bytes: bytes) -> str:
    """A token's text; bytes that are part of a character become U+FFFD (``bytes`` has them exactly)."""
    return token_bytes.decode("utf-8", "replace")
