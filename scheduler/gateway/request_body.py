"""Reading a request's JSON body, bounded, with errors that say what to send instead."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import msgspec
from aiohttp import web

from scheduler.contract.errors import ErrorCode, GlowplugError
from scheduler.gateway.errors import HttpError
from scheduler.gateway.field_reader import json_type
from scheduler.gateway.gateway import GATEWAY
from scheduler.gateway.settings import GatewaySettings

MAX_JSON_DEPTH: Final = 64
TOO_DEEP: Final = f"the request body is nested too deeply: at most {MAX_JSON_DEPTH} levels"


async def read_json_body(request: web.Request, settings: GatewaySettings) -> dict[str, Any]:
    """The JSON object that the client sent.

    Raises:
        HttpError: 415, another media type; 408, a client that sends too slowly.
        GlowplugError: 413, larger than the settings allow; 400, not a JSON object; 503, too many are being read.
    """
    if request.content_type != "application/json" and "Content-Type" in request.headers:
        raise HttpError(
            415,
            f"expected Content-Type: application/json, got {request.content_type[:100]}; "
            "with curl, add -H 'Content-Type: application/json'",
            code="unsupported_media_type",
        )
    gateway = request.app[GATEWAY]
    announced, max_body_bytes = request.content_length, settings.max_body_bytes
    if announced is not None and announced > max_body_bytes:
        raise GlowplugError(
            ErrorCode.REQUEST_TOO_LARGE,
            f"the request body has {announced} bytes; at most {max_body_bytes} are accepted",
        )
    held_bytes = max_body_bytes if announced is None else announced
    if gateway.bodies_bytes + held_bytes > settings.max_bodies_bytes:
        raise GlowplugError(
            ErrorCode.OVERLOADED,
            f"{settings.max_bodies_bytes} bytes of request bodies are being read already: try again",
            retry_after_s=1,
        )
    gateway.bodies_bytes += held_bytes
    try:
        async with asyncio.timeout(settings.body_limit_s):
            body = await request.read()
    except TimeoutError as error:
        message = f"the request body did not arrive within {settings.body_limit_s:g} s"
        raise HttpError(408, message, code="request_timeout", headers={"Connection": "close"}) from error
    except web.RequestPayloadError as error:  # chunks or an encoding that do not decode
        message = "the request body cannot be decoded: check Transfer-Encoding and Content-Encoding"
        raise HttpError(400, message, code="malformed_body", headers={"Connection": "close"}) from error
    finally:
        gateway.bodies_bytes -= held_bytes
    return parse_json_object(body)


def parse_json_object(body: bytes) -> dict[str, Any]:
    """The JSON object in ``body``.

    Raises:
        GlowplugError: not JSON, nested too deep, or not an object.
    """
    if not body.strip():
        raise GlowplugError(ErrorCode.INVALID_REQUEST, "the request body is empty; expected a JSON object")
    try:
        found = msgspec.json.decode(body)
    except RecursionError as error:
        raise GlowplugError(ErrorCode.INVALID_REQUEST, TOO_DEEP) from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise GlowplugError(ErrorCode.INVALID_REQUEST, f"the request body is not valid JSON: {error}") from error
    if body.count(b"[") + body.count(b"{") > MAX_JSON_DEPTH and is_deeper(found, MAX_JSON_DEPTH):
        raise GlowplugError(ErrorCode.INVALID_REQUEST, TOO_DEEP)
    if not isinstance(found, dict):
        raise GlowplugError(
            ErrorCode.INVALID_REQUEST, f"the request body must be a JSON object, not {json_type(found)}"
        )
    return found


def is_deeper(value: Any, limit: int) -> bool:
    """Whether ``value`` is nested more than ``limit`` levels. Level by level: never recurses."""
    level = [value]
    for _ in range(limit):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner.extend(child for child in one.values() if isinstance(child, dict | list))
            elif isinstance(one, list):
                inner.extend(child for child in one if isinstance(child, dict | list))
        if not inner:
            return False
        level = inner
    return True
