"""``GET /openapi.json``: every route with every status it can answer, from the types of requests and answers.

Made when it is first asked for: a gateway that nobody asks pays nothing.
"""

from __future__ import annotations

import asyncio
import functools
import re
from importlib import metadata
from typing import Any, Final

import msgspec
from aiohttp import web

from scheduler.gateway.openapi_operations import EVENTS, JSON, Operation, list_operations

VERSION: Final = "3.1.0"
#: What can go wrong anywhere; an answer to a path or method that there is not is none of an operation's.
ALWAYS: Final = (400, 401, 403, 500, 503)
#: Where a body is read.
WITH_BODY: Final = (408, 413, 415)
DESCRIPTIONS: Final = {
    200: "What was asked for.",
    202: "The order was taken; `/admin/status` tells when it has come true.",
    206: "A range of it.",
    304: "Not changed.",
    400: "The request is wrong; `param` names the field.",
    401: "No API key, or one that is not known or no longer valid.",
    403: "The key may not do this, or the model's snapshot was refused.",
    404: "There is no such thing, or not for this key.",
    408: "The body did not arrive in time.",
    409: "It is in use.",
    412: "Changed since.",
    413: "The body is too large.",
    415: "The body has another media type.",
    416: "There is no such range.",
    429: "Too many requests for now; `Retry-After` says when to come back.",
    500: "The server, a worker or a model's guest failed.",
    503: "No capacity now, or the model did not wake; `Retry-After` says when to come back.",
}


@functools.cache
def build_document() -> bytes:
    """The document as JSON. Blocks, for a tenth of a second, once."""
    from scheduler.gateway.answer_types import AnthropicError
    from scheduler.gateway.errors import ErrorBody

    operations = list_operations()
    types = [one for op in operations for one in (op.request, *op.answers.values()) if one is not None]
    types = [*dict.fromkeys(one for one in types if isinstance(one, type)), ErrorBody, AnthropicError]
    _, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    paths: dict[str, dict[str, Any]] = {}
    for op in operations:
        paths.setdefault(op.path, {})[op.method] = _describe(op)
    document = {
        "openapi": VERSION,
        "info": {
            "title": "glowplug",
            "version": metadata.version("glowplug"),
            "description": (
                "Fields that are not listed are ignored. Streams are documented in docs/api.md. What is no HTTP, or "
                "too much of it, is answered with 400, 405, 417 or 431 on any path."
            ),
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{"bearer": []}, {"header": []}],
    }
    return msgspec.json.encode(document)


def _describe(op: Operation) -> dict[str, Any]:
    from scheduler.gateway.anthropic_events import is_anthropic

    error = "AnthropicError" if is_anthropic(op.path) else "ErrorBody"
    statuses = {*ALWAYS, *op.statuses, *(WITH_BODY if op.request is not None else ())}
    responses: dict[str, Any] = {
        str(op.success): {
            "description": DESCRIPTIONS[op.success],
            "content": {
                # OpenAPI 3.1 cannot describe the events of a stream; docs/api.md does.
                kind: {} if kind == EVENTS else _media(one)
                for kind, one in op.answers.items()
            },
        }
    }
    for status in sorted(statuses):
        content = {JSON: {"schema": {"$ref": f"#/components/schemas/{error}"}}}
        responses[str(status)] = {"description": DESCRIPTIONS.get(status, "It failed."), "content": content}
    for status in op.others:
        responses[str(status)] = {"description": DESCRIPTIONS[status]}
    found: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{op.method}{op.path}").strip("_"),
        "summary": op.summary,
        "tags": [op.tag],
        "responses": responses,
    }
    if op.parameters:
        found["parameters"] = list(op.parameters)
    if op.request is not None:
        found["requestBody"] = {"required": True, "content": {op.media: _media(op.request)}}
    if op.is_open:
        found["security"] = []
    return found


def _media(kind: Any) -> dict[str, Any]:
    if kind is None:
        return {"schema": {"type": "string"}}
    if not hasattr(kind, "__struct_fields__"):
        return {"schema": {"type": "object"}}
    return {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}


async def get_document(request: web.Request) -> web.Response:
    """The document."""
    return web.Response(body=await asyncio.to_thread(build_document), content_type=JSON)
