"""Around every request: its id, its errors in OpenAI's shape, one log line, one count. Never a prompt."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Final

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

from scheduler.contract.errors import ErrorCode, ErrorInfo, GlowplugError
from scheduler.contract.telemetry import SECURITY_EVENT
from scheduler.gateway.anthropic_events import encode_anthropic_error, is_anthropic
from scheduler.gateway.errors import (
    HttpError,
    describe_framework_error,
    error_response,
    http_error_response,
)
from scheduler.gateway.gateway import GATEWAY, Gateway
from scheduler.gateway.identity import ANONYMOUS, IDENTITY
from scheduler.gateway.request_ids import create_request_id
from scheduler.gateway.request_span import RequestSpan
from scheduler.gateway.response_headers import add_response_headers

CLIENT_GONE_STATUS: Final = 499  # nginx's word for it; only in log and metrics
MAX_CLIENT_ID_CHARS: Final = 64
SECURITY_CODES: Final = frozenset({ErrorCode.SNAPSHOT_SIGNATURE_INVALID, ErrorCode.SNAPSHOT_CORRUPT})

_log = structlog.get_logger()


@dataclass(slots=True)
class RequestFacts:
    """What a handler tells about its request, for log and metrics. ``endpoint`` is set by generating handlers only."""

    request_id: str
    started_mono_s: float = field(default_factory=time.monotonic)
    endpoint: str | None = None
    model: str | None = None  # only of models that exist, so that metric labels stay few
    stream: bool = False
    error_code: str | None = None
    stream_error_status: int | None = None  # of an error that came after a stream's 200
    span: RequestSpan | None = None  # its place in a distributed trace

    def note_exchange(self, error: ErrorInfo | None) -> None:
        """How the exchange ended."""
        if error is not None:
            self.error_code = error.code.value
            self.stream_error_status = error.disposition.status


FACTS: Final = web.RequestKey("facts", RequestFacts)


async def add_standard_headers(request: web.Request, response: web.StreamResponse) -> None:
    """On every response, streamed ones included: the id to quote in a report or to give to ``glowplug trace``."""
    facts = request.get(FACTS)
    if facts is not None:
        response.headers["X-Request-Id"] = facts.request_id
        if facts.span is not None:
            response.headers["X-Trace-Id"] = facts.span.trace_id
    add_response_headers(request, response, request.app[GATEWAY].settings)


@web.middleware
async def observe_request(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Run ``handler``; whatever it raises becomes an answer, except a client that has gone."""
    gateway = request.app[GATEWAY]
    facts = RequestFacts(create_request_id(), span=gateway.tracing.begin_request(request))
    request[FACTS] = facts
    if facts.span is not None:
        structlog.contextvars.bind_contextvars(trace_id=facts.span.trace_id)
    status = CLIENT_GONE_STATUS
    try:
        response = await _answer(request, handler, facts, gateway)
        status = facts.stream_error_status if facts.stream and facts.stream_error_status else response.status
        return response
    finally:
        _finish(request, gateway, facts, status)
        if facts.span is not None:  # the connection's next request has its own
            structlog.contextvars.unbind_contextvars("trace_id")


async def _answer(request: web.Request, handler: Handler, facts: RequestFacts, gateway: Gateway) -> web.StreamResponse:
    try:
        return await handler(request)
    except GlowplugError as error:
        facts.error_code = error.info.code.value
        return _in_dialect(request, error_response(error.info), error.info.message, facts)
    except HttpError as error:
        facts.error_code = error.code
        return _in_dialect(request, http_error_response(error), error.message, facts)
    except web.HTTPException as error:
        described = describe_framework_error(error, request, gateway.settings.max_body_bytes)
        facts.error_code = described.code
        return _in_dialect(request, http_error_response(described), described.message, facts)
    except (asyncio.CancelledError, ConnectionResetError):
        facts.error_code = ErrorCode.CANCELLED.value
        raise
    except Exception:  # the last line: a bug of ours is a 500 in the API's shape and a stack trace in the log
        _log.exception("request_crashed", request_id=facts.request_id, path=request.path)
        facts.error_code = ErrorCode.INTERNAL.value
        message = f"the gateway failed; its log has the details under request id {facts.request_id}"
        return _in_dialect(request, error_response(ErrorInfo(ErrorCode.INTERNAL, message)), message, facts)


def _in_dialect(request: web.Request, response: web.Response, message: str, facts: RequestFacts) -> web.Response:
    """``response``, an error, in the shape that clients of its path read."""
    if is_anthropic(request.path):
        response.body = encode_anthropic_error(response.status, message, facts.request_id)
        response.headers["request-id"] = facts.request_id
    return response


def _finish(request: web.Request, gateway: Gateway, facts: RequestFacts, status: int) -> None:
    if facts.error_code in SECURITY_CODES:
        _log.critical(
            SECURITY_EVENT, kind=facts.error_code, model=facts.model, request_id=facts.request_id, refused="request"
        )
    if facts.endpoint is None:
        _log.debug("request", method=request.method, path=request.path, status=status)
        return
    gateway.metrics.on_request(facts.model, facts.endpoint, status)
    if facts.span is not None:
        gateway.tracing.end_request(facts.span, request.method, _route_of(request), status, facts.error_code)
    client_id = request.headers.get("X-Request-Id")
    identity = request.get(IDENTITY, ANONYMOUS)
    _log.info(
        "request",
        request_id=facts.request_id,
        endpoint=facts.endpoint,
        model=facts.model,
        stream=facts.stream,
        status=status,
        code=facts.error_code,
        duration_ms=round((time.monotonic() - facts.started_mono_s) * 1e3, 1),
        tenant=identity.tenant or None,
        key_id=identity.key_id or None,
        client_request_id=client_id[:MAX_CLIENT_ID_CHARS] if client_id else None,
    )


def _route_of(request: web.Request) -> str:
    """The pattern of the request's path, of which there are few."""
    resource = request.match_info.route.resource
    return "unknown" if resource is None else resource.canonical
