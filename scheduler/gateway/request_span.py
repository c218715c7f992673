"""The place of one request in a distributed trace: begun by a client's ``traceparent``, or here.

Nothing here needs OpenTelemetry. Without tracing a client's context still goes through the queue and into the logs;
with it, the ids are drawn here, and :mod:`scheduler.gateway.span_export` makes the spans when the request has ended.
"""

from __future__ import annotations

import secrets
import time
from typing import Final

import msgspec
from aiohttp import web

from scheduler.contract.trace_context import (
    NO_SPAN_ID,
    NO_TRACE_ID,
    RANDOM_FLAG,
    SAMPLED_FLAG,
    ParentSpan,
    TraceContext,
    read_headers,
    write_context,
)
from scheduler.gateway.tracing_settings import TracingSettings

TRACEPARENT: Final = "traceparent"
TRACESTATE: Final = "tracestate"


class RequestSpan(msgspec.Struct, frozen=True):
    """One HTTP request (or one line of a batch) in its trace.

    ``span_id`` is that of the request's own span; empty where there is none: its parts are seen under ``parent``.
    """

    trace_id: str
    span_id: str
    flags: int
    parent: ParentSpan | None = None
    is_recorded: bool = False
    begun_mono_ns: int = 0

    @property
    def tracestate(self) -> str:
        """What the client said of its own tracing systems; passed on as it is."""
        return "" if self.parent is None else self.parent.tracestate

    def make_context(self, span_id: str) -> TraceContext | None:
        """What goes into the queue with a part whose own span is ``span_id`` (empty: it has none)."""
        under = span_id or self.span_id or ("" if self.parent is None else self.parent.span_id)
        return write_context(self.trace_id, under, self.flags, self.tracestate) if under else None


def begin_request_span(request: web.Request, tracing: TracingSettings | None) -> RequestSpan | None:
    """The span of an HTTP request; None where nothing is traced and the client named no trace."""
    headers = request.headers
    parent = None
    if TRACEPARENT in headers:
        parent = read_headers(headers.getall(TRACEPARENT), headers.getall(TRACESTATE, []))
    if tracing is None:
        return None if parent is None else RequestSpan(parent.trace_id, "", parent.flags, parent)
    return begin_span(tracing, parent, create_span_id())


def begin_span(tracing: TracingSettings, parent: ParentSpan | None = None, span_id: str = "") -> RequestSpan:
    """A span under ``parent``, or at the root of a new trace."""
    trace_id = create_trace_id() if parent is None else parent.trace_id
    is_sampled = tracing.decide_sampled(trace_id, parent)
    random = RANDOM_FLAG if parent is None else parent.flags & RANDOM_FLAG
    return RequestSpan(
        trace_id, span_id, random | (SAMPLED_FLAG if is_sampled else 0), parent, is_sampled, time.monotonic_ns()
    )


def create_trace_id() -> str:
    """A new trace id, all of it random."""
    while (trace_id := secrets.token_hex(16)) == NO_TRACE_ID:
        pass
    return trace_id


def create_span_id() -> str:
    """A new span id."""
    while (span_id := secrets.token_hex(8)) == NO_SPAN_ID:
        pass
    return span_id
