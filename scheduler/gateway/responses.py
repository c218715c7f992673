"""OpenAI's response bodies and stream chunks as structs, and how token events become them.

Fields that are ``UNSET`` are left out of the JSON; ``None`` is written as null, because clients look for the key.
Source: the openai-openapi specification, schemas CreateChatCompletion(Stream)Response and CreateCompletionResponse.
"""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from scheduler.contract.messages import ModelCard, TokenLogprob, TopLogprob, Usage


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


class Delta(msgspec.Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


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


class ChatMessage(msgspec.Struct):
    content: str
    role: str = "assistant"
    refusal: None = None


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
