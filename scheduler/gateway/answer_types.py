"""Answers that are built as plain objects, as types: what ``/openapi.json`` says of them."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class ResponseUsage(msgspec.Struct):
    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseAnswer(msgspec.Struct):
    """A response; ``output`` are messages and calls of functions, in order."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: dict[str, str] | None
    incomplete_details: dict[str, str] | None
    model: str
    output: list[dict[str, Any]]
    usage: ResponseUsage | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    temperature: float
    top_p: float
    tools: list[dict[str, Any]]


class MessageUsage(msgspec.Struct):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessageAnswer(msgspec.Struct):
    """A message in Anthropic's dialect."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessageUsage


class AnthropicErrorDetail(msgspec.Struct):
    type: str
    message: str


class AnthropicError(msgspec.Struct):
    """An error on ``/v1/messages``."""

    type: Literal["error"]
    error: AnthropicErrorDetail
    request_id: str


class TokenizeAnswer(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeAnswer(msgspec.Struct):
    """The text, under vLLM's name and llama.cpp's."""

    prompt: str
    content: str


class InputTokens(msgspec.Struct):
    object: str
    input_tokens: int


class Page(msgspec.Struct):
    """A list; ``has_more`` and ids where it has pages."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None


class Deleted(msgspec.Struct):
    id: str
    object: str
    deleted: bool


class Order(msgspec.Struct):
    """An order that was taken."""

    object: Literal["admin.order"]
    act: str
    model: str | None = None
    node: str | None = None
    status: dict[str, Any] | None = None
    reloaded: list[dict[str, Any]] | None = None  # of config:reload: part, member and, if any, needs_restart
    failed: list[dict[str, Any]] | None = None  # part, member, error
    silent: list[dict[str, Any]] | None = None  # did not answer in time


class Health(msgspec.Struct):
    status: str
    reasons: list[str] = []
