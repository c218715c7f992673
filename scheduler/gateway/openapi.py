"""``GET /openapi.json``: every route with every status it can answer, from the types of requests and answers.

Made when it is first asked for: a gateway that nobody asks pays nothing.
"""

from __future__ import annotations

import asyncio
import functools
import re
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Final

import msgspec
from aiohttp import web

VERSION: Final = "3.1.0"
JSON: Final = "application/json"
EVENTS: Final = "text/event-stream"
TEXT: Final = "text/plain"
BYTES: Final = "application/octet-stream"
HTML: Final = "text/html"
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


@dataclass(frozen=True, slots=True)
class Operation:
    """One route as documented. ``answers`` are content types of its 200 with their types (None: any text or bytes)."""

    method: str
    path: str
    summary: str
    answers: dict[str, Any]
    request: Any = None
    media: str = JSON
    statuses: tuple[int, ...] = ()
    parameters: tuple[dict[str, Any], ...] = ()
    tag: str = "inference"
    is_open: bool = False
    others: tuple[int, ...] = field(default=())  # statuses without a body of ours
    success: int = 200


def _path(name: str, text: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "description": text, "schema": {"type": "string"}}


def _query(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema}


def list_operations() -> list[Operation]:
    """All of them. Imports what the handlers have imported already."""
    from scheduler.contract.messages import StatusReport
    from scheduler.gateway import answer_types as answers
    from scheduler.gateway import request_types as requests
    from scheduler.gateway.embeddings import EmbeddingList
    from scheduler.gateway.responses import ChatCompletion, LegacyCompletion
    from scheduler.gateway.routes_batches import BatchBody
    from scheduler.gateway.routes_files import FileBody
    from scheduler.gateway.routes_models import ModelDocument, ModelList
    from scheduler.gateway.traces import TraceDocument

    def wakes(path: str, summary: str, request: Any, answer: Any, *, streams: bool = False) -> Operation:
        content = {JSON: answer, EVENTS: None} if streams else {JSON: answer}
        return Operation("post", path, summary, content, request, statuses=(404, 429))

    def reads(path: str, summary: str, answer: Any, *, tag: str, **options: Any) -> Operation:
        return Operation("get", path, summary, {JSON: answer}, tag=tag, **options)

    file_id, batch_id = _path("file_id", "A file's id."), _path("batch_id", "A batch's id.")
    paging = (_query("after", {"type": "string"}), _query("limit", {"type": "integer", "minimum": 1, "maximum": 100}))
    tokens = [
        wakes(f"{prefix}/{verb}", summary, request, answer)
        for prefix in ("", "/v1")
        for verb, summary, request, answer in (
            ("tokenize", "Token ids of a text or chat", requests.TokenizeRequest, answers.TokenizeAnswer),
            ("detokenize", "Text of token ids", requests.DetokenizeRequest, answers.DetokenizeAnswer),
        )
    ]
    model, act = _path("model", "Its name."), _path("act", "What to do; another word is a 404 that lists them.")
    node = _path("node", "A node's id.")

    def orders(path: str, summary: str, *parameters: dict[str, Any]) -> Operation:
        answer = {JSON: answers.Order}
        statuses = (404, 409)
        return Operation(
            "post", path, summary, answer, statuses=statuses, parameters=parameters, tag="admin", success=202
        )

    return [
        wakes("/v1/chat/completions", "Answer a chat", requests.ChatCompletionRequest, ChatCompletion, streams=True),
        wakes("/v1/completions", "Continue a text", requests.CompletionRequest, LegacyCompletion, streams=True),
        wakes("/v1/responses", "Answer as a response", requests.ResponseRequest, answers.ResponseAnswer, streams=True),
        wakes(
            "/v1/messages",
            "Answer in Anthropic's dialect",
            requests.MessageRequest,
            answers.MessageAnswer,
            streams=True,
        ),
        wakes("/v1/embeddings", "Embed texts", requests.EmbeddingRequest, EmbeddingList),
        *tokens,
        wakes("/v1/responses/input_tokens", "Count a response's prompt", requests.ResponseRequest, answers.InputTokens),
        wakes("/v1/messages/count_tokens", "Count a message's prompt", requests.CountRequest, answers.InputTokens),
        Operation(
            "get",
            "/v1/requests/{request_id}/stream",
            "The rest of a stream that was cut",
            {EVENTS: None},
            statuses=(404,),
            parameters=(_path("request_id", "X-Request-Id of the call."), _query("after", {"type": "string"})),
        ),
        Operation(
            "post",
            "/v1/files",
            "Upload a file",
            {JSON: FileBody},
            requests.FileUpload,
            "multipart/form-data",
            (507,),
            tag="batches",
        ),
        reads("/v1/files", "Files", answers.Page, tag="batches", parameters=paging),
        reads("/v1/files/{file_id}", "A file", FileBody, tag="batches", parameters=(file_id,), statuses=(404,)),
        Operation(
            "get",
            "/v1/files/{file_id}/content",
            "A file's bytes",
            {BYTES: None},
            statuses=(404,),
            others=(206, 304, 412, 416),
            parameters=(file_id,),
            tag="batches",
        ),
        Operation(
            "delete",
            "/v1/files/{file_id}",
            "Delete a file",
            {JSON: answers.Deleted},
            statuses=(404, 409),
            parameters=(file_id,),
            tag="batches",
        ),
        Operation(
            "post",
            "/v1/batches",
            "Begin a batch",
            {JSON: BatchBody},
            requests.BatchRequest,
            statuses=(429,),
            tag="batches",
        ),
        reads("/v1/batches", "Batches", answers.Page, tag="batches", parameters=paging),
        reads("/v1/batches/{batch_id}", "A batch", BatchBody, tag="batches", parameters=(batch_id,), statuses=(404,)),
        Operation(
            "post",
            "/v1/batches/{batch_id}/cancel",
            "Cancel a batch",
            {JSON: BatchBody},
            statuses=(404, 409),
            parameters=(batch_id,),
            tag="batches",
        ),
        reads("/v1/models", "Models, at zero workers too", ModelList, tag="models"),
        reads(
            "/v1/models/{model}",
            "A model",
            ModelDocument,
            tag="models",
            statuses=(404,),
            parameters=(_path("model", "Its name."),),
        ),
        *(reads(path, "Health", answers.Health, tag="health", is_open=True) for path in ("/healthz",)),
        *(
            reads(path, "Readiness", answers.Health, tag="health", is_open=True, others=(503,))
            for path in ("/readyz", "/health")
        ),
        Operation("get", "/metrics", "Prometheus metrics", {TEXT: None}, tag="admin"),
        reads("/admin/status", "The fleet", StatusReport, tag="admin"),
        reads(
            "/admin/traces/{request_id}",
            "Where a request's time went",
            TraceDocument,
            tag="admin",
            statuses=(404,),
            parameters=(_path("request_id", "An id, or last."),),
        ),
        reads(
            "/admin/usage",
            "Tokens used",
            answers.Page,
            tag="admin",
            parameters=(_query("days", {"type": "integer", "minimum": 1, "maximum": 40}),),
        ),
        orders("/admin/models/{model}:{act}", "Wake, prefetch, unload, pin, unpin or park a model", model, act),
        orders("/admin/nodes/{node}:{act}", "Drain a node, or let it work again", node, act),
        orders("/admin/config:reload", "Read the configuration again"),
        Operation("get", "/admin/live", "The dashboard's feed", {EVENTS: None}, tag="admin", statuses=(429,)),
        Operation("get", "/", "The dashboard", {HTML: None}, tag="dashboard", is_open=True),
        Operation(
            "get",
            "/dashboard/{name}",
            "The dashboard's parts",
            {HTML: None},
            tag="dashboard",
            statuses=(404,),
            parameters=(_path("name", "A file's name."),),
            is_open=True,
            others=(304,),
        ),
        Operation("get", "/openapi.json", "This document", {JSON: dict[str, Any]}, tag="health"),
    ]


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
