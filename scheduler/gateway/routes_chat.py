"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time

from aiohttp import web

from scheduler.contract.states import Task
from scheduler.gateway.embedding_schema import require_task
from scheduler.gateway.gateway import GATEWAY
from scheduler.gateway.generate import answer_call
from scheduler.gateway.identity import IDENTITY
from scheduler.gateway.request_body import read_json_body
from scheduler.gateway.request_log import FACTS
from scheduler.gateway.request_schema import Endpoint, read_chat_call, read_model_name
from scheduler.gateway.resumption import resume_by_header


async def create_chat_completion(request: web.Request) -> web.StreamResponse:
    """Answer a chat. Everything that can be refused is refused here, before a model is woken."""
    gateway, facts = request.app[GATEWAY], request[FACTS]
    facts.endpoint = Endpoint.CHAT
    resumed = await resume_by_header(request)
    if resumed is not None:
        return resumed
    body = await read_json_body(request, gateway.settings)
    accepted_mono_ns = time.monotonic_ns()
    card = await gateway.directory.get_card(read_model_name(body), request[IDENTITY])
    facts.model = card.name
    require_task(card, Task.GENERATE)
    call = read_chat_call(body, card, gateway.templates)
    return await answer_call(request, facts, call, accepted_mono_ns)
