"""Response objects of ``/v1/responses`` and the events that build one up.

Each event has its type twice (SSE's ``event`` and the JSON's ``type``) and a sequence number; no ``[DONE]`` follows.
Source: the openai-openapi specification, schemas Response and ResponseStreamEvent.
"""

from __future__ import annotations

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

COMPLETED: Final = "completed"
IN_PROGRESS: Final = "in_progress"
INCOMPLETE: Final = "incomplete"


def build_response(
    call: Call,
    request_id: str,
    created_at_s: int,
    *,
    status: str,
    output: list[dict[str, Any]],
    usage: UsageBody | None = None,
    error: ErrorInfo | None = None,
) -> dict[str, Any]:
    """A response object."""
    return {
        "id": f"resp_{request_id}",
        "object": "response",
        "created_at": created_at_s,
        "status": status,
        "background": False,
        "error": None if error is None else {"code": error.code.value, "message": error.message},
        "incomplete_details": {"reason": "max_output_tokens"} if status == INCOMPLETE else None,
        "model": call.card.name,
        "output": output,
        "previous_response_id": None,
        "store": False,
        "usage": None if usage is None else build_response_usage(usage),
        **(call.echoed or {}),
    }


def build_response_usage(usage: UsageBody) -> dict[str, Any]:
    """Tokens under the names of this endpoint."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.prompt_tokens_details.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }


def build_finished_response(
    call: Call, request_id: str, created_at_s: int, text: str, reason: FinishReason, usage: UsageBody
) -> dict[str, Any]:
    """The response of a call that is not streamed."""
    status = INCOMPLETE if reason is FinishReason.LENGTH else COMPLETED
    items = read_items(text, call.tools, choice_seed(request_id, 0))
    output = [
        make_text_item(request_id, i, item, status) if isinstance(item, str) else make_call_item(item, status)
        for i, item in enumerate(items)
    ]
    return build_response(call, request_id, created_at_s, status=status, output=output, usage=usage)


def make_text_item(request_id: str, index: int, text: str | None, status: str) -> dict[str, Any]:
    """An output message; without content where ``text`` is None."""
    return {
        "id": f"msg_{request_id}_{index}",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [] if text is None else [make_text_part(text)],
    }


def make_text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def make_call_item(call: ToolCall, status: str) -> dict[str, Any]:
    """An output item that is a call of a function."""
    return {
        "id": f"fc_{call.call_id}",
        "type": "function_call",
        "call_id": call.call_id,
        "name": call.name,
        "arguments": call.arguments,
        "status": status,
    }


class ResponseEventWriter(DialectEventWriter):
    """The events of one streamed response. Implements :class:`scheduler.gateway.chunks.ChunkWriter`."""

    def __init__(self, call: Call, request_id: str, created_at_s: int) -> None:
        super().__init__(call, request_id)
        self._created_at_s = created_at_s
        self._sequence_number = 0
        self._output: list[dict[str, Any]] = []
        self._text: list[str] | None = None  # of the message that is open
        self._tool_call: ToolCall | None = None  # that is open

    def opening(self) -> bytes:
        response = self._build(IN_PROGRESS)
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def ending(self, usage: UsageBody) -> bytes:
        return self._event(f"response.{self._status}", response=self._build(self._status, usage=usage))

    def error(self, error: ErrorInfo) -> bytes:
        told = self._event("error", code=error.code.value, message=error.message, param=error.param)
        return told + self._event("response.failed", response=self._build("failed", error=error))

    # --- items ------------------------------------------------------------------------------------------------------

    @property
    def _status(self) -> str:
        return INCOMPLETE if self._reason is FinishReason.LENGTH else COMPLETED

    def _tell(self, delta: Delta) -> bytes:
        match delta:
            case TextDelta(text):
                opened = b"" if self._text is not None else self._open_text()
                if self._text is not None:
                    self._text.append(text)
                return opened + self._text_event("delta", delta=text, logprobs=[])
            case CallDelta(_, call_id, name):
                closed = self._close_item(COMPLETED)
                self._tool_call = ToolCall(call_id, name)
                return closed + self._item_event("added", make_call_item(self._tool_call, IN_PROGRESS))
            case ArgumentsDelta(_, text):
                if self._tool_call is None:
                    raise RuntimeError("arguments without a call")
                self._tool_call.arguments += text
                return self._arguments_event("delta", self._tool_call, delta=text)

    def _close_last(self) -> bytes:
        return self._close_item(self._status)

    def _open_text(self) -> bytes:
        closed = self._close_item(COMPLETED)
        self._text = []
        item = make_text_item(self._request_id, len(self._output), None, IN_PROGRESS)
        return closed + self._item_event("added", item) + self._part_event("added", "")

    def _close_item(self, status: str) -> bytes:
        """End the item that is open, if one is."""
        if self._text is not None:
            text, self._text = "".join(self._text), None
            ended = self._text_event("done", text=text, logprobs=[]) + self._part_event("done", text)
            item = make_text_item(self._request_id, len(self._output), text, status)
        elif self._tool_call is not None:
            call, self._tool_call = self._tool_call, None
            ended = self._arguments_event("done", call, arguments=call.arguments, name=call.name)
            item = make_call_item(call, status)
        else:
            return b""
        ended += self._item_event("done", item)
        self._output.append(item)
        return ended

    # --- events -----------------------------------------------------------------------------------------------------

    def _build(self, status: str, usage: UsageBody | None = None, error: ErrorInfo | None = None) -> dict[str, Any]:
        return build_response(
            self._call,
            self._request_id,
            self._created_at_s,
            status=status,
            output=list(self._output),
            usage=usage,
            error=error,
        )

    def _item_event(self, what: str, item: dict[str, Any]) -> bytes:
        return self._event(f"response.output_item.{what}", output_index=len(self._output), item=item)

    def _part_event(self, what: str, text: str) -> bytes:
        return self._event(
            f"response.content_part.{what}", **self._place_of_text(), content_index=0, part=make_text_part(text)
        )

    def _text_event(self, what: str, **fields: Any) -> bytes:
        return self._event(f"response.output_text.{what}", **self._place_of_text(), content_index=0, **fields)

    def _arguments_event(self, what: str, call: ToolCall, **fields: Any) -> bytes:
        place = {"item_id": f"fc_{call.call_id}", "output_index": len(self._output)}
        return self._event(f"response.function_call_arguments.{what}", **place, **fields)

    def _place_of_text(self) -> dict[str, Any]:
        return {"item_id": f"msg_{self._request_id}_{len(self._output)}", "output_index": len(self._output)}

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._sequence_number, **fields}
        self._sequence_number += 1
        return sse.named_event(kind, msgspec.json.encode(data))
