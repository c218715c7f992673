"""Messages in Anthropic's dialect, the events that build one up, and its errors.

``message_start`` goes out with the headers, before anybody has counted the prompt: its ``input_tokens`` are 0, and
``message_delta`` has them, as the official clients expect of it.
"""

from __future__ import annotations

import json
from typing import Any, Final

import msgspec

from scheduler.contract.errors import ErrorInfo
from scheduler.contract.states import FinishReason
from scheduler.gateway import sse
from scheduler.gateway.dialect_events import DialectEventWriter
from scheduler.gateway.request_schema import Call
from scheduler.gateway.responses import UsageBody
from scheduler.gateway.tool_calls import (
    ArgumentsDelta,
    CallDelta,
    Delta,
    TextDelta,
    ToolCall,
    choice_seed,
    read_items,
)

PATH: Final = "/v1/messages"
#: Error types by HTTP status; others are ``api_error``.
ERROR_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def is_anthropic(path: str) -> bool:
    """Whether answers on ``path`` are in Anthropic's dialect."""
    return path == PATH or path.startswith(PATH + "/")


def encode_anthropic_error(status: int, message: str, request_id: str) -> bytes:
    """An error body, also the data of an ``error`` event."""
    error = {"type": ERROR_TYPES.get(status, "api_error"), "message": message}
    return msgspec.json.encode({"type": "error", "error": error, "request_id": request_id})


def build_message(
    call: Call, request_id: str, content: list[dict[str, Any]], stop: dict[str, str | None], usage: UsageBody | None
) -> dict[str, Any]:
    """A message object; ``stop`` is what :func:`build_stop` gives, or nothing while it is being written."""
    return {
        "id": f"msg_{request_id}",
        "type": "message",
        "role": "assistant",
        "model": call.card.name,
        "content": content,
        "stop_reason": stop.get("stop_reason"),
        "stop_sequence": stop.get("stop_sequence"),
        "usage": build_message_usage(usage),
    }


def build_message_usage(usage: UsageBody | None) -> dict[str, int]:
    """Tokens under this dialect's names: ``input_tokens`` are those that were not cached."""
    cached = 0 if usage is None else usage.prompt_tokens_details.cached_tokens
    return {
        "input_tokens": 0 if usage is None else usage.prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": 0 if usage is None else usage.completion_tokens,
    }


def build_finished_message(
    call: Call, request_id: str, text: str, reason: FinishReason, stop_sequence: str | None, usage: UsageBody
) -> dict[str, Any]:
    """The message of a call that is not streamed."""
    items = read_items(text, call.tools, choice_seed(request_id, 0))
    num_calls = sum(isinstance(item, ToolCall) for item in items)
    content = [_make_block(item) for item in items]
    return build_message(call, request_id, content, build_stop(reason, stop_sequence, num_calls), usage)


def _make_block(item: str | ToolCall) -> dict[str, Any]:
    if isinstance(item, str):
        return {"type": "text", "text": item}
    try:
        given = json.loads(item.arguments or "{}")
    except (ValueError, RecursionError):
        given = None
    # Arguments that were cut short are no object, and the dialect has no other place for them.
    return {
        "type": "tool_use",
        "id": item.call_id,
        "name": item.name,
        "input": given if isinstance(given, dict) else {},
    }


def build_stop(reason: FinishReason, stop_sequence: str | None, num_calls: int) -> dict[str, str | None]:
    """Why a message ended, in this dialect's words. ``stop_sequence`` is the client's string that ended it, if any."""
    if reason is FinishReason.LENGTH:
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if stop_sequence is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": stop_sequence}
    return {"stop_reason": "tool_use" if num_calls else "end_turn", "stop_sequence": None}


class MessageEventWriter(DialectEventWriter):
    """The events of one streamed message. Implements :class:`scheduler.gateway.chunks.ChunkWriter`."""

    def __init__(self, call: Call, request_id: str) -> None:
        super().__init__(call, request_id)
        self._num_blocks = 0
        self._num_calls = 0
        self._open: str | None = None  # the type of the block that is open

    def opening(self) -> bytes:
        return _event("message_start", message=build_message(self._call, self._request_id, [], {}, None))

    def ending(self, usage: UsageBody) -> bytes:
        delta = build_stop(self._reason, self._stop_sequence, self._num_calls)
        return _event("message_delta", delta=delta, usage=build_message_usage(usage)) + _event("message_stop")

    def error(self, error: ErrorInfo) -> bytes:
        return sse.named_event(
            "error", encode_anthropic_error(error.disposition.status, error.message, self._request_id)
        )

    def _tell(self, delta: Delta) -> bytes:
        match delta:
            case TextDelta(text):
                opened = b"" if self._open == "text" else self._open_block({"type": "text", "text": ""})
                return opened + self._block_delta({"type": "text_delta", "text": text})
            case CallDelta(_, call_id, name):
                self._num_calls += 1
                return self._open_block({"type": "tool_use", "id": call_id, "name": name, "input": {}})
            case ArgumentsDelta(_, text):
                return self._block_delta({"type": "input_json_delta", "partial_json": text})

    def _open_block(self, block: dict[str, Any]) -> bytes:
        closed, self._open = self._close_last(), block["type"]
        self._num_blocks += 1
        return closed + _event("content_block_start", index=self._num_blocks - 1, content_block=block)

    def _block_delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._num_blocks - 1, delta=delta)

    def _close_last(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return _event("content_block_stop", index=self._num_blocks - 1)


def _event(kind: str, **fields: Any) -> bytes:
    return sse.named_event(kind, msgspec.json.encode({"type": kind, **fields}))
