"""Errors as HTTP answers, always in OpenAI's shape ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final

import msgspec
from aiohttp import web
from redis.exceptions import RedisError

from scheduler.contract.errors import ErrorCode, ErrorInfo, GlowplugError

#: OpenAI's clients obey ``Retry-After`` only up to this.
MAX_RETRY_AFTER_S: Final = 120
DEFAULT_RETRY_AFTER_S: Final = 5
RETRYABLE_STATUSES: Final = frozenset({429, 503})
#: Trying again cannot help before somebody rebuilds the snapshot.
HOPELESS: Final = frozenset(
    {ErrorCode.SNAPSHOT_SIGNATURE_INVALID, ErrorCode.SNAPSHOT_CORRUPT, ErrorCode.SNAPSHOT_INCOMPATIBLE}
)


class HttpError(Exception):
    """A fault of the HTTP exchange itself (path, method, media type, access), which no contract code describes."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        openai_type: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.openai_type = openai_type
        self.headers = dict(headers or {})


class ErrorDetail(msgspec.Struct):
    """The inside of an error body; all four keys are always there, ``code`` is a string or null."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    """An error body, also sent as the data of a last SSE event."""

    error: ErrorDetail


def encode_error(info: ErrorInfo) -> bytes:
    """The JSON body of a contract error."""
    detail = ErrorDetail(info.message, info.disposition.openai_type, info.param, info.code.value)
    return msgspec.json.encode(ErrorBody(detail))


def retry_headers(info: ErrorInfo) -> dict[str, str]:
    """``Retry-After`` and ``x-should-retry`` where they can help a client."""
    if info.disposition.status in RETRYABLE_STATUSES:
        seconds = DEFAULT_RETRY_AFTER_S if info.retry_after_s is None else info.retry_after_s
        return {"Retry-After": str(max(1, min(MAX_RETRY_AFTER_S, seconds))), "x-should-retry": "true"}
    return {"x-should-retry": "false"} if info.code in HOPELESS else {}


def error_response(info: ErrorInfo) -> web.Response:
    """The HTTP answer to a contract error."""
    return web.Response(
        status=info.disposition.status,
        body=encode_error(info),
        content_type="application/json",
        headers=retry_headers(info),
    )


def http_error_response(error: HttpError) -> web.Response:
    """The HTTP answer to a fault of the exchange."""
    body = ErrorBody(ErrorDetail(error.message, error.openai_type, None, error.code))
    return web.Response(
        status=error.status,
        body=msgspec.json.encode(body),
        content_type="application/json",
        headers=error.headers,
    )


def describe_framework_error(error: web.HTTPException, request: web.Request, max_body_bytes: int) -> HttpError:
    """What aiohttp's router or body reader refused, in our words."""
    match error:
        case web.HTTPNotFound():
            message = f"no such path: {request.method} {request.path[:200]}; {_path_remedy(request)}"
            return HttpError(404, message, code="unknown_path")
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            message = f"{request.method} is not allowed on {request.path[:200]}; use {allowed}"
            return HttpError(405, message, code="method_not_allowed", headers={"Allow": allowed})
        case web.HTTPRequestEntityTooLarge():
            message = f"the request body is larger than {max_body_bytes} bytes"
            return HttpError(413, message, code=ErrorCode.REQUEST_TOO_LARGE.value)
        case _:
            return HttpError(error.status, error.reason or "request refused", code="http_error")


def _path_remedy(request: web.Request) -> str:
    """A base_url without ``/v1``, with it twice, or a slash at the end are what clients get wrong."""
    known = {resource.canonical for resource in request.app.router.resources()}
    path = request.path.rstrip("/")
    for meant in (path, f"/v1{path}", path.removeprefix("/v1")):
        if meant in known:
            return f"did you mean {meant}?"
    return "GET /openapi.json lists the paths"


def describe_refusal(error: GlowplugError | HttpError | web.HTTPException) -> tuple[int, str]:
    """Status and code of the answer that ``error`` becomes."""
    match error:
        case GlowplugError():
            return error.info.disposition.status, error.info.code.value
        case HttpError():
            return error.status, error.code
        case _:
            return error.status, "http_error"


def bad_field(param: str, message: str) -> GlowplugError:
    """A 400 that names the field at fault."""
    return GlowplugError(ErrorCode.INVALID_REQUEST, f"{param}: {message}", param=param)


@asynccontextmanager
async def redis_within(limit_s: float, doing: str) -> AsyncIterator[None]:
    """Turn a Redis that fails, or does not answer within ``limit_s``, into a 503 that says so.

    Raises:
        GlowplugError: BACKEND_UNAVAILABLE.
    """
    try:
        async with asyncio.timeout(limit_s):
            yield
    except (RedisError, TimeoutError) as error:
        raise GlowplugError(
            ErrorCode.BACKEND_UNAVAILABLE,
            f"the queue failed or gave no answer in {limit_s:g} s while {doing} ({type(error).__name__}); try again",
            retry_after_s=2,
        ) from error
