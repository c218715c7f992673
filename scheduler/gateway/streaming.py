"""A streamed call: headers at once, comments while the model wakes, then tokens as they are sampled."""

from __future__ import annotations

import time
from typing import Final

import structlog
from aiohttp import web

from scheduler.contract.errors import ErrorCode, ErrorInfo
from scheduler.contract.messages import StageEvent, StepFrame
from scheduler.contract.telemetry import Mark
from scheduler.gateway import sse
from scheduler.gateway.chunks import make_chunk_writer
from scheduler.gateway.event_ids import EventIds
from scheduler.gateway.event_stream import EventStream
from scheduler.gateway.exchange import Exchange
from scheduler.gateway.exchange_part import Part
from scheduler.gateway.gateway import Gateway
from scheduler.gateway.responses import build_usage
from scheduler.gateway.traces import COLD_START_NAMES, format_server_timing

FIRST_STAGE: Final = "queued"


class StreamedCall:
    """One streamed call from its headers to ``[DONE]``. Used once, by its handler."""

    def __init__(self, request: web.Request, gateway: Gateway, exchange: Exchange, seen: tuple[int, ...] = ()) -> None:
        """``seen``: the events that the client has already, of a call that it resumes."""
        self._gateway = gateway
        self._exchange = exchange
        self._model = exchange.call.card.name
        settings = gateway.settings
        self._stream = EventStream(
            request, gateway.writes, settings.max_write_buffer_bytes, settings.write_limit_s, self._on_written
        )
        ids = EventIds(exchange.request_id, len(exchange.parts), seen)
        self._chunks = make_chunk_writer(exchange.call, exchange.request_id, exchange.created_at_s, ids)
        self._begun: set[int] = set()  # prompts whose first events were made
        self._unwritten_mono_ns: list[int] = []  # when the tokens were sampled that were pushed and not yet written
        self._silent_parts = list(exchange.parts)  # those with no first byte yet
        self._stage = StageEvent(self._model, FIRST_STAGE)
        self._log = structlog.get_logger()

    async def run(self) -> web.StreamResponse:
        """Serve the call.

        Raises:
            GlowplugError: refused before anything was sent (queue full, Redis down).
            ConnectionResetError: the client went away while headers or end were written.
        """
        gateway = self._gateway
        is_hot = gateway.directory.is_hot(self._model)
        unwatch = gateway.hub.watch_stages(self._model, self._on_stage)
        try:
            await self._exchange.start(self._on_step)
            first = sse.comment("ok") if is_hot else self._waking_comment()
            response = await self._stream.open(first + self._chunks.opening())
            self._stream.push(await self._serve())
            await self._stream.finish()
        finally:
            unwatch()
        if self._stream.cut_for_slowness:
            self._log.warning("slow_client_cut", request_id=self._exchange.request_id, model=self._model)
        return response

    async def _serve(self) -> bytes:
        """Until the exchange is done; what is left to send then."""
        try:
            await self._wait()
            self._stream.flush()  # the trace tells when
            return await self._ending()
        except Exception:  # the headers are out: our bug must end this stream as an event, not start a second response
            self._log.exception("stream_failed", request_id=self._exchange.request_id)
            self._exchange.fail(ErrorInfo(ErrorCode.INTERNAL, "the gateway failed while streaming; see its log"))
            return self._error_event()

    # --- while it runs ------------------------------------------------------------------------------------------

    async def _wait(self) -> None:
        """Until the exchange is done; comments meanwhile, so that no proxy or client gives up."""
        exchange, settings = self._exchange, self._gateway.settings
        silent_s = settings.silent_comment_every_s
        while not await exchange.wait_done(silent_s if exchange.has_frames else settings.wake_comment_every_s):
            overdue = await exchange.find_overdue(streamed=True)
            if overdue is not None:
                exchange.fail(overdue)
            elif not exchange.has_frames:
                self._stream.push(self._waking_comment())
            elif time.monotonic() - exchange.last_frame_mono_s >= silent_s:
                self._stream.push(sse.comment_line(f"waiting model={self._model}"))

    def _on_step(self, part: Part, frame: StepFrame) -> None:
        if self._stream.is_cut:
            self._exchange.fail(ErrorInfo(ErrorCode.CANCELLED, "the client is gone or reads too slowly"))
            return
        beginning = (
            b"" if part.index in self._begun else self._begin(part)
        )  # first: events are numbered as they are made
        tokens = beginning + self._chunks.tokens(frame.events, part.index)
        if tokens:
            self._unwritten_mono_ns.append(frame.sampled_mono_ns)
            self._stream.push(tokens)

    def _on_written(self) -> None:
        if not self._unwritten_mono_ns:  # a comment
            return
        written_mono_ns = time.monotonic_ns()
        if self._silent_parts:
            heard = [part for part in self._silent_parts if part.index in self._begun]
            for part in heard:
                part.marks.setdefault(Mark.FIRST_BYTE, written_mono_ns)
                self._silent_parts.remove(part)
        self._gateway.metrics.on_delivery(self._unwritten_mono_ns, written_mono_ns)
        self._unwritten_mono_ns.clear()

    def _begin(self, part: Part) -> bytes:
        if part.index in self._begun:
            return b""
        self._begun.add(part.index)
        return self._chunks.begin(part.index)

    def _on_stage(self, event: StageEvent) -> None:
        self._gateway.directory.invalidate()
        changed = event.stage != self._stage.stage
        self._stage = event
        if changed and not self._exchange.has_frames:
            self._stream.push(self._waking_comment())

    def _waking_comment(self) -> bytes:
        waited_ms = (time.monotonic() - self._exchange.started_mono_s) * 1e3
        eta_ms = self._stage.eta_ms
        if eta_ms < 0:
            eta_ms = self._gateway.directory.estimate_wake_ms(self._model, waited_ms)
        return sse.comment(f"waking model={self._model} stage={self._stage.stage} eta_ms={eta_ms}")

    # --- the end ------------------------------------------------------------------------------------------------

    async def _ending(self) -> bytes:
        exchange = self._exchange
        if exchange.error is not None:
            return self._error_event()
        trace = await exchange.record()
        pieces = [self._begin(part) for part in exchange.parts]
        usages = [part.terminal.usage for part in exchange.parts if part.terminal is not None]
        pieces.append(self._chunks.ending(build_usage(usages)))
        pieces.append(sse.comment_line(f"X-Cold-Start: {COLD_START_NAMES[trace.cold_tier]}"))
        pieces.append(sse.comment_line(f"Server-Timing: {format_server_timing(trace.phases_ms)}"))
        pieces.append(self._chunks.done())
        return b"".join(pieces)

    def _error_event(self) -> bytes:
        error = self._exchange.error
        return b"" if error is None else self._chunks.error(error)
