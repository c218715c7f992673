"""The routes as ``/openapi.json`` documents them: a table in parts, one function a tag.

Each imports what its handlers have imported already.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

JSON: Final = "application/json"
EVENTS: Final = "text/event-stream"
TEXT: Final = "text/plain"
BYTES: Final = "application/octet-stream"
HTML: Final = "text/html"


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


def list_operations() -> list[Operation]:
    """All of them."""
    return [*_inference(), *_files(), *_batches(), *_models_and_health(), *_admin(), *_dashboard()]


def _path(name: str, text: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "description": text, "schema": {"type": "string"}}


def _query(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema}


_PAGING: Final = (
    _query("after", {"type": "string"}),
    _query("limit", {"type": "integer", "minimum": 1, "maximum": 100}),
)


def _wakes(path: str, summary: str, request: Any, answer: Any, *, streams: bool = False) -> Operation:
    content = {JSON: answer, EVENTS: None} if streams else {JSON: answer}
    return Operation("post", path, summary, content, request, statuses=(404, 429))


def _reads(path: str, summary: str, answer: Any, *, tag: str, **options: Any) -> Operation:
    return Operation("get", path, summary, {JSON: answer}, tag=tag, **options)


def _orders(path: str, summary: str, *parameters: dict[str, Any]) -> Operation:
    from scheduler.gateway.answer_types import Order

    return Operation(
        "post", path, summary, {JSON: Order}, statuses=(404, 409), parameters=parameters, tag="admin", success=202
    )


def _inference() -> list[Operation]:
    from scheduler.gateway import answer_types as answers
    from scheduler.gateway import request_types as requests
    from scheduler.gateway.embeddings import EmbeddingList
    from scheduler.gateway.responses import ChatCompletion, LegacyCompletion

    tokens = [
        _wakes(f"{prefix}/{verb}", summary, request, answer)
        for prefix in ("", "/v1")
        for verb, summary, request, answer in (
            ("tokenize", "Token ids of a text or chat", requests.TokenizeRequest, answers.TokenizeAnswer),
            ("detokenize", "Text of token ids", requests.DetokenizeRequest, answers.DetokenizeAnswer),
        )
    ]
    return [
        _wakes("/v1/chat/completions", "Answer a chat", requests.ChatCompletionRequest, ChatCompletion, streams=True),
        _wakes("/v1/completions", "Continue a text", requests.CompletionRequest, LegacyCompletion, streams=True),
        _wakes("/v1/responses", "Answer as a response", requests.ResponseRequest, answers.ResponseAnswer, streams=True),
        _wakes(
            "/v1/messages",
            "Answer in Anthropic's dialect",
            requests.MessageRequest,
            answers.MessageAnswer,
            streams=True,
        ),
        _wakes("/v1/embeddings", "Embed texts", requests.EmbeddingRequest, EmbeddingList),
        *tokens,
        _wakes(
            "/v1/responses/input_tokens", "Count a response's prompt", requests.ResponseRequest, answers.InputTokens
        ),
        _wakes("/v1/messages/count_tokens", "Count a message's prompt", requests.CountRequest, answers.InputTokens),
        Operation(
            "get",
            "/v1/requests/{request_id}/stream",
            "The rest of a stream that was cut",
            {EVENTS: None},
            statuses=(404,),
            parameters=(_path("request_id", "X-Request-Id of the call."), _query("after", {"type": "string"})),
        ),
    ]


def _files() -> list[Operation]:
    from scheduler.gateway import answer_types as answers
    from scheduler.gateway import request_types as requests
    from scheduler.gateway.routes_files import FileBody

    file_id = _path("file_id", "A file's id.")
    return [
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
        _reads("/v1/files", "Files", answers.Page, tag="batches", parameters=_PAGING),
        _reads("/v1/files/{file_id}", "A file", FileBody, tag="batches", parameters=(file_id,), statuses=(404,)),
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
    ]


def _batches() -> list[Operation]:
    from scheduler.gateway import answer_types as answers
    from scheduler.gateway import request_types as requests
    from scheduler.gateway.routes_batches import BatchBody

    batch_id = _path("batch_id", "A batch's id.")
    return [
        Operation(
            "post",
            "/v1/batches",
            "Begin a batch",
            {JSON: BatchBody},
            requests.BatchRequest,
            statuses=(429,),
            tag="batches",
        ),
        _reads("/v1/batches", "Batches", answers.Page, tag="batches", parameters=_PAGING),
        _reads("/v1/batches/{batch_id}", "A batch", BatchBody, tag="batches", parameters=(batch_id,), statuses=(404,)),
        Operation(
            "post",
            "/v1/batches/{batch_id}/cancel",
            "Cancel a batch",
            {JSON: BatchBody},
            statuses=(404, 409),
            parameters=(batch_id,),
            tag="batches",
        ),
    ]


def _models_and_health() -> list[Operation]:
    from scheduler.gateway import answer_types as answers
    from scheduler.gateway.routes_models import ModelDocument, ModelList

    return [
        _reads("/v1/models", "Models, at zero workers too", ModelList, tag="models"),
        _reads(
            "/v1/models/{model}",
            "A model",
            ModelDocument,
            tag="models",
            statuses=(404,),
            parameters=(_path("model", "Its name."),),
        ),
        *(_reads(path, "Health", answers.Health, tag="health", is_open=True) for path in ("/healthz",)),
        *(
            _reads(path, "Readiness", answers.Health, tag="health", is_open=True, others=(503,))
            for path in ("/readyz", "/health")
        ),
        Operation("get", "/openapi.json", "This document", {JSON: dict[str, Any]}, tag="health"),
    ]


def _admin() -> list[Operation]:
    from scheduler.contract.messages import StatusReport
    from scheduler.gateway import answer_types as answers
    from scheduler.gateway.traces import TraceDocument

    model, act = _path("model", "Its name."), _path("act", "What to do; another word is a 404 that lists them.")
    node = _path("node", "A node's id.")
    return [
        Operation("get", "/metrics", "Prometheus metrics", {TEXT: None}, tag="admin"),
        _reads("/admin/status", "The fleet", StatusReport, tag="admin"),
        _reads(
            "/admin/traces/{request_id}",
            "Where a request's time went",
            TraceDocument,
            tag="admin",
            statuses=(404,),
            parameters=(_path("request_id", "An id, or last."),),
        ),
        _reads(
            "/admin/usage",
            "Tokens used",
            answers.Page,
            tag="admin",
            parameters=(_query("days", {"type": "integer", "minimum": 1, "maximum": 40}),),
        ),
        _orders("/admin/models/{model}:{act}", "Wake, prefetch, unload, pin, unpin or park a model", model, act),
        _orders("/admin/nodes/{node}:{act}", "Drain a node, or let it work again", node, act),
        _orders("/admin/config:reload", "Read the configuration again"),
        Operation("get", "/admin/live", "The dashboard's feed", {EVENTS: None}, tag="admin", statuses=(429,)),
    ]


def _dashboard() -> list[Operation]:
    return [
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
    ]
