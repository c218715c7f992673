"""``POST /v1/responses`` and ``POST /v1/messages``: chats in other dialects than chat completions."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from aiohttp import web

from scheduler.contract.chat_template import ChatTemplates
from scheduler.contract.messages import ModelCard
from scheduler.contract.states import Task
from scheduler.gateway.anthropic_request import read_message_call
from scheduler.gateway.embedding_schema import require_task
from scheduler.gateway.gateway import GATEWAY
from scheduler.gateway.generate import answer_call
from scheduler.gateway.identity import IDENTITY
from scheduler.gateway.request_body import read_json_body
from scheduler.gateway.request_log import FACTS
from scheduler.gateway.request_schema import Call, Endpoint, read_model_name
from scheduler.gateway.responses_request import read_response_call

ReadCall = Callable[[dict[str, Any], ModelCard, ChatTemplates], Call]


async def create_response(request: web.Request) -> web.StreamResponse:
    """Answer with a response object, or its events."""
    return await answer_dialect(request, Endpoint.RESPONSES, read_response_call)


async def create_message(request: web.Request) -> web.StreamResponse:
    """Answer with a message in Anthropic's dialect, or its events."""
    return await answer_dialect(request, Endpoint.MESSAGES, read_message_call)


async def answer_dialect(
    request: web.Request, endpoint: Endpoint, read_call: ReadCall, *, task: Task | None = Task.GENERATE
) -> web.StreamResponse:
    """Everything that can be refused is refused here, before a model is woken. ``task``: what the model must do."""
    gateway, facts = request.app[GATEWAY], request[FACTS]
    facts.endpoint = endpoint
    body = await read_json_body(request, gateway.settings)
    accepted_mono_ns = time.monotonic_ns()
    card = await gateway.directory.get_card(read_model_name(body), request[IDENTITY])
    facts.model = card.name
    if task is not None:
        require_task(card, task)
    return await answer_call(request, facts, read_call(body, card, gateway.templates), accepted_mono_ns)
