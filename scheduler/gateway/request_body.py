"""Reading a request's JSON body, bounded, with errors that say what to send instead."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from aiohttp import web

from scheduler.contract.errors import ErrorCode, GlowplugError
from scheduler.gateway.errors import HttpError
from scheduler.gateway.field_reader import json_type
from scheduler.gateway.settings import GatewaySettings


async def read_json_body(request: web.Request, settings: GatewaySettings) -> dict[str, Any]:
    """The JSON object that the client sent.

    Raises:
        HttpError: 415, another media type; 408, a client that sends too slowly.
        GlowplugError: 413, larger than the settings allow; 400, not a JSON object.
    """
    if request.content_type != "application/json" and "Content-Type" in request.headers:
        raise HttpError(
            415,
            f"expected Content-Type: application/json, got {request.content_type[:100]}; "
            "with curl, add -H 'Content-Type: application/json'",
            code="unsupported_media_type",
        )
    announced, max_body_bytes = request.content_length, settings.max_body_bytes
    if announced is not None and announced > max_body_bytes:
        raise GlowplugError(
            ErrorCode.REQUEST_TOO_LARGE,
            f"the request body has {announced} bytes; at most {max_body_bytes} are accepted",
        )
    try:
        async with asyncio.timeout(settings.body_limit_s):
            body = await request.read()
    except TimeoutError as error:
        message = f"the request body did not arrive within {settings.body_limit_s:g} s"
        raise HttpError(408, message, code="request_timeout", headers={"Connection": "close"}) from error
    return parse_json_object(body)


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
