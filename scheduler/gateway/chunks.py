"""From token events to the bytes of a stream: chat chunks and legacy chunks."""

from __future__ import annotations

from typing import Protocol

import msgspec

from scheduler.contract.errors import ErrorInfo
from scheduler.contract.messages import TokenEvent
from scheduler.gateway import sse
from scheduler.gateway.anthropic_events import MessageEventWriter
from scheduler.gateway.errors import encode_error
from scheduler.gateway.event_ids import EventIds
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
    build_chat_delta,
    build_chat_token,
    empty_legacy_logprobs,
    fingerprint,
    finish_word,
)
from scheduler.gateway.responses_events import ResponseEventWriter
from scheduler.gateway.text_mould import TextMould
from scheduler.gateway.tool_calls import ToolCallParser, choice_seed, read_deltas

_encoder = msgspec.json.Encoder()


class ChunkWriter(Protocol):
    """Makes the events of one call's stream; each method's result is ready to be pushed.

    Every event that a client may go on after has an id. Those that it has already come out empty.
    """

    def opening(self) -> bytes:
        """What goes out with the headers."""

    def begin(self, part: int) -> bytes:
        """What goes before the first token of prompt ``part``."""

    def tokens(self, events: tuple[TokenEvent, ...], part: int) -> bytes:
        """What one step added; empty when all its text is held back."""

    def ending(self, usage: UsageBody) -> bytes:
        """The last events of a call that ended well."""

    def done(self) -> bytes:
        """What ends the stream, behind the comments."""

    def error(self, error: ErrorInfo) -> bytes:
        """The event that ends a stream which failed."""


def make_chunk_writer(call: Call, request_id: str, created_at_s: int, ids: EventIds) -> ChunkWriter:
    """The writer for ``call``'s endpoint."""
    match call.endpoint:
        case Endpoint.CHAT:
            return ChatChunkWriter(call, request_id, created_at_s, ids)
        case Endpoint.RESPONSES:
            return ResponseEventWriter(call, request_id, created_at_s)
        case Endpoint.MESSAGES:
            return MessageEventWriter(call, request_id)
        case _:
            return LegacyChunkWriter(call, request_id, created_at_s, ids)


class CompletionChunkWriter:
    """What the streams of both completion endpoints share: how they begin, fail and end."""

    def opening(self) -> bytes:
        return b""

    def done(self) -> bytes:
        return sse.DONE

    def error(self, error: ErrorInfo) -> bytes:
        return sse.event(encode_error(error))


class ChatChunkWriter(CompletionChunkWriter):
    """``chat.completion.chunk`` events. With ``include_usage`` every chunk but the last has ``usage: null``."""

    def __init__(self, call: Call, request_id: str, created_at_s: int, ids: EventIds) -> None:
        use = call.tools
        self._parsers = (
            []
            if use is None
            else [ToolCallParser(use, choice_seed(request_id, index)) for index in range(call.total_choices)]
        )
        self._call = call
        self._ids = ids
        self._id = f"chatcmpl-{request_id}"
        self._created_at_s = created_at_s
        self._fingerprint = fingerprint(call.card)
        self._moulds: dict[int, TextMould] = {}  # by choice; made with its first text

    def begin(self, part: int) -> bytes:
        role = Delta(role="assistant", content="")
        return b"".join(self._chunk(part, [ChatChunkChoice(index, role)]) for index in _choices_of(self._call, part))

    def tokens(self, events: tuple[TokenEvent, ...], part: int) -> bytes:
        if len(events) == 1:  # nearly always
            return self._token(events[0], part)
        return b"".join(self._token(event, part) for event in events)

    def _token(self, event: TokenEvent, part: int) -> bytes:
        index = part * self._call.num_choices + event.choice
        if event.text and event.logprob is None and event.finish_reason is None and not self._parsers:
            return self._text_event(part, index, event.text)
        pieces = []
        logprobs = None if event.logprob is None else ChatLogprobs([build_chat_token(event.logprob)])
        num_calls = 0
        if self._parsers:
            parser = self._parsers[index]
            deltas = [build_chat_delta(delta) for delta in read_deltas(parser, event)]
            num_calls = parser.num_calls
        else:
            deltas = [Delta(content=event.text)] if event.text else []
        if not deltas and logprobs is not None:
            deltas.append(Delta(content=""))
        for delta in deltas:
            pieces.append(self._chunk(part, [ChatChunkChoice(index, delta, logprobs)]))
            logprobs = None  # a token's chunk is its first one
        if event.finish_reason is not None:
            reason = finish_word(event.finish_reason, num_calls)
            pieces.append(self._chunk(part, [ChatChunkChoice(index, Delta(), None, reason)]))
        return b"".join(pieces)

    def ending(self, usage: UsageBody) -> bytes:
        if not self._call.include_usage:
            return b""
        return self._chunk(len(self._call.prompts) - 1, [], usage)

    def _text_event(self, part: int, index: int, text: str) -> bytes:
        """Nearly every event of nearly every stream: ``text`` and nothing else."""
        event_id = self._ids.next(part)
        if event_id is None:
            return b""
        mould = self._moulds.get(index)
        if mould is None:
            mould = self._moulds[index] = TextMould(
                lambda text: self._build([ChatChunkChoice(index, Delta(content=text))])
            )
        return mould.event(text, event_id)

    def _chunk(self, part: int, choices: list[ChatChunkChoice], usage: UsageBody | None = None) -> bytes:
        event_id = self._ids.next(part)
        return b"" if event_id is None else sse.event(_encoder.encode(self._build(choices, usage)), event_id)

    def _build(self, choices: list[ChatChunkChoice], usage: UsageBody | None = None) -> ChatChunk:
        chunk = ChatChunk(self._id, self._created_at_s, self._call.card.name, self._fingerprint, choices)
        if self._call.include_usage:
            chunk.usage = usage
        return chunk


class LegacyChunkWriter(CompletionChunkWriter):
    """``text_completion`` events. An echoed prompt is the first text of each of its choices."""

    def __init__(self, call: Call, request_id: str, created_at_s: int, ids: EventIds) -> None:
        self._call = call
        self._ids = ids
        self._id = f"cmpl-{request_id}"
        self._created_at_s = created_at_s
        self._fingerprint = fingerprint(call.card)
        self._num_chars = [0] * call.total_choices

    def begin(self, part: int) -> bytes:
        if not self._call.echo:
            return b""
        prompt = str(self._call.prompts[part])
        return b"".join(self._chunk(part, [LegacyChoice(index, prompt)]) for index in _choices_of(self._call, part))

    def tokens(self, events: tuple[TokenEvent, ...], part: int) -> bytes:
        pieces = []
        for event in events:
            index = part * self._call.num_choices + event.choice
            logprobs = None
            if event.logprob is not None:
                logprobs = empty_legacy_logprobs()
                append_legacy_token(logprobs, event.logprob, self._num_chars[index])
            self._num_chars[index] += len(event.text)
            if event.text or logprobs is not None:
                pieces.append(self._chunk(part, [LegacyChoice(index, event.text, logprobs)]))
            if event.finish_reason is not None:
                pieces.append(self._chunk(part, [LegacyChoice(index, "", None, event.finish_reason.value)]))
        return b"".join(pieces)

    def ending(self, usage: UsageBody) -> bytes:
        if not self._call.include_usage:
            return b""
        return self._chunk(len(self._call.prompts) - 1, [], usage)

    def _chunk(self, part: int, choices: list[LegacyChoice], usage: UsageBody | None = None) -> bytes:
        event_id = self._ids.next(part)
        if event_id is None:
            return b""
        chunk = LegacyCompletion(self._id, self._created_at_s, self._call.card.name, self._fingerprint, choices)
        if self._call.include_usage:
            chunk.usage = usage
        return sse.event(_encoder.encode(chunk), event_id)


def _choices_of(call: Call, part: int) -> range:
    return range(part * call.num_choices, (part + 1) * call.num_choices)
