"""What the event writers of ``/v1/responses`` and ``/v1/messages`` share: deltas in, events with names out."""

from __future__ import annotations

from abc import ABC, abstractmethod

from scheduler.contract.messages import TokenEvent
from scheduler.contract.states import FinishReason
from scheduler.gateway.request_schema import Call
from scheduler.gateway.tool_calls import Delta, choice_seed, make_parser, read_deltas


class DialectEventWriter(ABC):
    """The events of one streamed answer, which has one choice. A :class:`scheduler.gateway.chunks.ChunkWriter`, less
    its opening, ending and error.
    """

    def __init__(self, call: Call, request_id: str) -> None:
        self._call = call
        self._request_id = request_id
        self._parser = make_parser(call.tools, choice_seed(request_id, 0))
        self._reason = FinishReason.STOP
        self._stop_sequence: str | None = None

    def begin(self, part: int) -> bytes:
        return b""

    def tokens(self, events: tuple[TokenEvent, ...], part: int) -> bytes:
        pieces = []
        for event in events:
            pieces += [self._tell(delta) for delta in read_deltas(self._parser, event)]
            if event.finish_reason is not None:
                self._reason, self._stop_sequence = event.finish_reason, event.stop_sequence
                pieces.append(self._close_last())
        return b"".join(pieces)

    def done(self) -> bytes:
        return b""

    @abstractmethod
    def _tell(self, delta: Delta) -> bytes:
        """Events that add ``delta``."""

    @abstractmethod
    def _close_last(self) -> bytes:
        """Events that end what is open; the answer has its last token."""
