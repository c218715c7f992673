"""Reading a request's JSON body, bounded, with errors that say what to send instead."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from scheduler.contract.errors import ErrorCode, GlowplugError
from scheduler.gateway.errors import HttpError
from scheduler.gateway.field_reader import json_type


async def read_json_body(request: web.Request, max_body_bytes: int) -> dict[str, Any]:
    """The JSON object that the client sent.

    Raises:
        HttpError: 415, another media type.
        GlowplugError: 413, larger than ``max_body_bytes``; 400, not a JSON object.
    """
    if request.content_type != "application/json" and "Content-Type" in request.headers:
        raise HttpError(
            415,
            f"expected Content-Type: application/json, got {request.content_type[:100]}; "
            "with curl, add -H 'Content-Type: application/json'",
            code="unsupported_media_type",
        )
    announced = request.content_length
    if announced is not None and announced > max_body_bytes:
        raise GlowplugError(
            ErrorCode.REQUEST_TOO_LARGE,
            f"the request body has {announced} bytes; at most {max_body_bytes} are accepted",
        )
    return parse_json_object(await request.read())


def parse_json_object(body: bytes) -> dict[str, Any]:
    """The JSON object in ``body``.

    Raises:
        GlowplugError: not JSON, nested too deep, or not an object.
    """
    try:
        found = msgspec.json.decode(body)
    except RecursionError as error:
        raise GlowplugError(ErrorCode.INVALID_REQUEST, "the request body is nested too deeply") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise GlowplugError(ErrorCode.INVALID_REQUEST, f"the request body is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise GlowplugError(
            ErrorCode.INVALID_REQUEST, f"the request body must be a JSON object, not {json_type(found)}"
        )
    return found
