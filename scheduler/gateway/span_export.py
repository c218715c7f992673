"""Spans to a collector, over OTLP/HTTP. The only module that imports OpenTelemetry; loaded only where it is asked for.

Spans are handed to the SDK when they have ended, with the ids that were drawn before: they went through the queue and
to the client. A thread of the SDK sends them in batches; its queue is bounded (OTEL_BSP_MAX_QUEUE_SIZE), so a collector
that is slow or away costs spans, never a request.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Final

import structlog
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    TraceState,
    set_span_in_context,
)

from scheduler.gateway.request_span import RequestSpan
from scheduler.gateway.span_tree import SpanRecord

FLUSH_LIMIT_S: Final = 2.0
TROUBLE_EVERY_S: Final = 60.0
MAX_TROUBLE_CHARS: Final = 300
SDK_LOGGER: Final = "opentelemetry"
NAME: Final = "glowplug"  # of the service, where nobody gives it another, and of the scope of all spans


class _DrawnIds(IdGenerator):
    """Gives out the ids that were drawn when the request began."""

    def __init__(self) -> None:
        self.trace_id = self.span_id = 0

    def generate_trace_id(self) -> int:
        return self.trace_id

    def generate_span_id(self) -> int:
        return self.span_id

    def is_trace_id_random(self) -> bool:
        return True


class SpanExport:
    """Where ended spans go. Event loop only; nothing here waits but :meth:`aclose`.

    Raises:
        ValueError: a variable of the exporter (OTEL_BSP_*, OTEL_EXPORTER_OTLP_*) is malformed.
    """

    def __init__(self, gateway_id: str) -> None:
        self._trouble = _TroubleLog()
        logging.getLogger(SDK_LOGGER).addHandler(self._trouble)
        logging.getLogger(SDK_LOGGER).propagate = False
        self._ids = _DrawnIds()
        self._exporter = OTLPSpanExporter()
        self._processor = BatchSpanProcessor(self._exporter)
        resource = Resource.create({SERVICE_VERSION: version(NAME)})  # with what OTEL_RESOURCE_ATTRIBUTES adds
        given = str(resource.attributes.get(SERVICE_NAME, ""))
        name = NAME if given.startswith("unknown_service") else given
        self._gateway = self._make_tracer(resource, {SERVICE_NAME: name, SERVICE_INSTANCE_ID: gateway_id})
        self._worker = self._make_tracer(resource, {SERVICE_NAME: f"{name}-worker"})

    def _make_tracer(self, resource: Resource, attributes: dict[str, str]) -> Tracer:
        # Everything that comes here was sampled when its request began.
        merged = resource.merge(Resource(attributes))
        provider = TracerProvider(ALWAYS_ON, merged, shutdown_on_exit=False, id_generator=self._ids)
        provider.add_span_processor(self._processor)
        return provider.get_tracer(NAME, version(NAME))

    def emit(self, span: RequestSpan, records: Sequence[SpanRecord]) -> None:
        """Send ``records``, of the request of ``span``. About 15 us each; never waits."""
        self._ids.trace_id = int(span.trace_id, 16)
        state = TraceState.from_header([span.tracestate]) if span.tracestate else None
        for record in records:
            self._ids.span_id = int(record.span_id, 16)
            made = (self._worker if record.by_worker else self._gateway).start_span(
                record.name,
                self._parent_context(span, record, state),
                SpanKind.SERVER if record.is_server else SpanKind.INTERNAL,
                record.attributes,
                start_time=record.start_ns,
            )
            if record.error is not None:
                made.set_status(Status(StatusCode.ERROR, record.error))
            made.end(record.end_ns)

    def _parent_context(self, span: RequestSpan, record: SpanRecord, state: TraceState | None) -> Context:
        if not record.parent_id:
            return Context()
        is_remote = span.parent is not None and record.parent_id == span.parent.span_id
        parent = SpanContext(self._ids.trace_id, int(record.parent_id, 16), is_remote, TraceFlags(span.flags), state)
        return set_span_in_context(NonRecordingSpan(parent), Context())

    async def aclose(self) -> None:
        """Send what is left, for at most a bounded time; then drop it."""
        done = asyncio.Event()
        loop = asyncio.get_running_loop()

        def shut_down() -> None:
            self._processor.shutdown()  # type: ignore[no-untyped-call]  # of the SDK
            try:
                loop.call_soon_threadsafe(done.set)
            except RuntimeError:  # the loop did not wait so long
                pass

        threading.Thread(target=shut_down, name="span export end", daemon=True).start()
        try:
            async with asyncio.timeout(FLUSH_LIMIT_S):
                await done.wait()
        except TimeoutError:
            threading.Thread(target=self._exporter.shutdown, name="span export cut", daemon=True).start()
            structlog.get_logger().warning("spans_dropped", reason="the collector did not take them in time")
        logging.getLogger(SDK_LOGGER).removeHandler(self._trouble)


class _TroubleLog(logging.Handler):
    """What the SDK complains of, as our log lines: one a minute, with how many there were. Any thread."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._log = structlog.get_logger()
        self._told_mono_s = -TROUBLE_EVERY_S
        self._num_untold = 0

    def emit(self, record: logging.LogRecord) -> None:
        self._num_untold += 1
        now_mono_s = time.monotonic()
        if now_mono_s - self._told_mono_s < TROUBLE_EVERY_S:
            return
        self._told_mono_s, count, self._num_untold = now_mono_s, self._num_untold, 0
        self._log.warning("trace_export_trouble", message=record.getMessage()[:MAX_TROUBLE_CHARS], count=count)
