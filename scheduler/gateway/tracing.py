"""Distributed tracing of this gateway's requests: off, or with an exporter that was asked for."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

import structlog
from aiohttp import web

from scheduler.contract.environment import SettingsError
from scheduler.contract.messages import Trace
from scheduler.gateway.exchange_part import Part
from scheduler.gateway.request_span import RequestSpan, begin_request_span, begin_span
from scheduler.gateway.span_tree import PartFacts, SpanRecord, build_part_spans, build_request_span
from scheduler.gateway.tracing_settings import TracingSettings

if TYPE_CHECKING:
    from scheduler.gateway.request_schema import Call  # which itself needs the gateway
    from scheduler.gateway.span_export import SpanExport  # OpenTelemetry is imported only where it is asked for

#: ``gen_ai.operation.name`` by endpoint; where the conventions have another name for it than we.
OPERATIONS: Final = {"responses": "chat", "messages": "chat", "completions": "text_completion"}

_log = structlog.get_logger()


class Tracing:
    """Begins and ends the spans of one gateway. Event loop only, but for :meth:`ensure_ready`."""

    def __init__(self, settings: TracingSettings | None, gateway_id: str) -> None:
        self._settings = settings
        self._gateway_id = gateway_id
        self._export: SpanExport | None = None

    def ensure_ready(self) -> None:
        """Import OpenTelemetry (about 0.1 s) and start its thread, where traces are asked for. May run in a thread.

        Raises:
            SettingsError: the exporter refuses its settings.
        """
        if self._settings is None or self._export is not None:
            return
        try:
            from scheduler.gateway.span_export import SpanExport

            self._export = SpanExport(self._gateway_id)
        except (ImportError, ValueError) as error:
            raise SettingsError(f"traces cannot be exported: {error}: check the OTEL_ variables") from error

    def begin_request(self, request: web.Request) -> RequestSpan | None:
        """The span of an HTTP request; None where nothing is traced and the client named no trace."""
        return begin_request_span(request, self._settings)

    def begin_line(self) -> RequestSpan | None:
        """The trace of one line of a batch, for which no HTTP request waits."""
        return None if self._settings is None else begin_span(self._settings)

    def end_request(self, span: RequestSpan, method: str, route: str, status: int, error: str | None) -> None:
        """The HTTP request of ``span`` was answered, now; it began when its span did."""
        if span.is_recorded and span.span_id:
            ended_ns = time.time_ns()
            started_ns = ended_ns - (time.monotonic_ns() - span.begun_mono_ns)
            record = build_request_span(span, method, route, status, error, started_ns, ended_ns)
            asyncio.get_running_loop().call_soon(self._emit, span, [record])  # after its parts'

    def end_part_soon(self, span: RequestSpan | None, part: Part, trace: Trace, call: Call, now_mono_ns: int) -> None:
        """One prompt's request ended at ``now_mono_ns``. Its spans are made in the loop's next round, while its trace
        is on the way to Redis."""
        if span is None or not span.is_recorded:
            return
        operation = OPERATIONS.get(call.endpoint.value, call.endpoint.value)
        facts = PartFacts(part.request, trace, part.usage, operation, call.stream, now_mono_ns)
        asyncio.get_running_loop().call_soon(self._end_part, span, part.span_id, facts)

    def _end_part(self, span: RequestSpan, span_id: str, facts: PartFacts) -> None:
        self._emit(span, build_part_spans(span, span_id, facts, time.time_ns() - time.monotonic_ns()))

    def _emit(self, span: RequestSpan, records: list[SpanRecord]) -> None:
        if self._export is None:
            return
        try:
            self._export.emit(span, records)
        except Exception:  # what is only for looking at must not fail a request
            _log.exception("span_not_made", trace_id=span.trace_id)

    async def aclose(self) -> None:
        """Send what is left, for a bounded time. Idempotent."""
        if self._export is not None:
            export, self._export = self._export, None
            await export.aclose()
