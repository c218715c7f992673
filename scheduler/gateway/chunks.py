"""From token events to the bytes of a stream: chat chunks and legacy chunks."""

from __future__ import annotations

from typing import Protocol

import msgspec

from scheduler.contract.messages import TokenEvent
from scheduler.gateway import sse
from scheduler.gateway.request_schema import Call, Endpoint
from scheduler.gateway.responses import (
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    Delta,
    LegacyChoice,
    LegacyCompletion,
    UsageBody,
    append_legacy_token,
    build_chat_token,
    empty_legacy_logprobs,
    fingerprint,
)

_encoder = msgspec.json.Encoder()


class ChunkWriter(Protocol):
    """Makes the events of one call's stream; each method's result is ready to be pushed."""

    def begin(self) -> bytes:
        """What goes before the first token."""

    def tokens(self, events: tuple[TokenEvent, ...], choice_offset: int) -> bytes:
        """What one step added; empty when all its text is held back."""

    def usage(self, usage: UsageBody) -> bytes:
        """The usage event."""


def make_chunk_writer(call: Call, request_id: str, created_at_s: int) -> ChunkWriter:
    """The writer for ``call``'s endpoint."""
    kind = ChatChunkWriter if call.endpoint is Endpoint.CHAT else LegacyChunkWriter
    writer: ChunkWriter = kind(call, request_id, created_at_s)
    return writer


class ChatChunkWriter:
    """``chat.completion.chunk`` events. With ``include_usage`` every chunk but the last has ``usage: null``."""

    def __init__(self, call: Call, request_id: str, created_at_s: int) -> None:
        self._call = call
        self._id = f"chatcmpl-{request_id}"
        self._created_at_s = created_at_s
        self._fingerprint = fingerprint(call.card)

    def begin(self) -> bytes:
        return b"".join(
            self._chunk([ChatChunkChoice(index, Delta(role="assistant", content=""))])
            for index in range(self._call.total_choices)
        )

    def tokens(self, events: tuple[TokenEvent, ...], choice_offset: int) -> bytes:
        pieces = []
        for event in events:
            index = choice_offset + event.choice
            logprobs = None if event.logprob is None else ChatLogprobs([build_chat_token(event.logprob)])
            if event.text or logprobs is not None:
                pieces.append(self._chunk([ChatChunkChoice(index, Delta(content=event.text), logprobs)]))
            if event.finish_reason is not None:
                pieces.append(self._chunk([ChatChunkChoice(index, Delta(), None, event.finish_reason.value)]))
        return b"".join(pieces)

    def usage(self, usage: UsageBody) -> bytes:
        return self._chunk([], usage)

    def _chunk(self, choices: list[ChatChunkChoice], usage: UsageBody | None = None) -> bytes:
        chunk = ChatChunk(self._id, self._created_at_s, self._call.card.name, self._fingerprint, choices)
        if self._call.include_usage:
            chunk.usage = usage
        return sse.event(_encoder.encode(chunk))


class LegacyChunkWriter:
    """``text_completion`` events. An echoed prompt is the first text of each of its choices."""

    def __init__(self, call: Call, request_id: str, created_at_s: int) -> None:
        self._call = call
        self._id = f"cmpl-{request_id}"
        self._created_at_s = created_at_s
        self._fingerprint = fingerprint(call.card)
        self._num_chars = [0] * call.total_choices

    def begin(self) -> bytes:
        call = self._call
        if not call.echo:
            return b""
        return b"".join(
            self._chunk([LegacyChoice(index, str(call.prompts[index // call.num_choices]))])
            for index in range(call.total_choices)
        )

    def tokens(self, events: tuple[TokenEvent, ...], choice_offset: int) -> bytes:
        pieces = []
        for event in events:
            index = choice_offset + event.choice
            logprobs = None
            if event.logprob is not None:
                logprobs = empty_legacy_logprobs()
                append_legacy_token(logprobs, event.logprob, self._num_chars[index])
            self._num_chars[index] += len(event.text)
            if event.text or logprobs is not None:
                pieces.append(self._chunk([LegacyChoice(index, event.text, logprobs)]))
            if event.finish_reason is not None:
                pieces.append(self._chunk([LegacyChoice(index, "", None, event.finish_reason.value)]))
        return b"".join(pieces)

    def usage(self, usage: UsageBody) -> bytes:
        return self._chunk([], usage)

    def _chunk(self, choices: list[LegacyChoice], usage: UsageBody | None = None) -> bytes:
        chunk = LegacyCompletion(self._id, self._created_at_s, self._call.card.name, self._fingerprint, choices)
        if self._call.include_usage:
            chunk.usage = usage
        return sse.event(_encoder.encode(chunk))
