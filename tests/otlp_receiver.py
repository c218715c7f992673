"""A collector for tests: takes OTLP over HTTP on loopback and keeps the spans, decoded by OpenTelemetry's own types."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from tests.eventually import eventually


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as it came over the wire; ids in hexadecimal."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    tracestate: str
    kind: int
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    is_error: bool


@dataclass
class OtlpReceiver:
    """What has arrived. ``status`` is what it answers with."""

    url: str = ""
    status: int = 200
    num_posts: int = 0
    spans: list[ReceivedSpan] = field(default_factory=list)

    async def take(self, request: web.Request) -> web.Response:
        """Decode one export."""
        self.num_posts += 1
        body = await request.read()
        if self.status != 200:
            return web.Response(status=self.status)
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = _plain(group.resource.attributes)["service.name"]
            for scope in group.scope_spans:
                self.spans += (_read_span(service, span) for span in scope.spans)
        return web.Response(
            body=ExportTraceServiceResponse().SerializeToString(), content_type="application/x-protobuf"
        )

    async def wait_root(self, trace_id: str) -> list[ReceivedSpan]:
        """All spans of a trace, once the HTTP request's own, which is sent last, is there."""

        def found() -> list[ReceivedSpan]:
            spans = [span for span in self.spans if span.trace_id == trace_id]
            return spans if any(span.name.startswith("POST ") for span in spans) else []

        spans: list[ReceivedSpan] = await eventually(found, what=f"the spans of trace {trace_id}")
        return spans


def _plain(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


def _read_span(service: str, span: Any) -> ReceivedSpan:
    return ReceivedSpan(
        service=service,
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        tracestate=span.trace_state,
        kind=span.kind,
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        attributes=_plain(span.attributes),
        is_error=span.status.code == 2,
    )


@contextlib.asynccontextmanager
async def run_receiver() -> AsyncIterator[OtlpReceiver]:
    """A listening receiver, stopped at the end."""
    receiver = OtlpReceiver()
    app = web.Application()
    app.router.add_post("/v1/traces", receiver.take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    receiver.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield receiver
    await runner.cleanup()
