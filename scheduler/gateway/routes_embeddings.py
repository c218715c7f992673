"""``POST /v1/embeddings``."""

from __future__ import annotations

import time

from aiohttp import web

from scheduler.gateway.embedding_schema import read_embedding_call
from scheduler.gateway.gateway import GATEWAY
from scheduler.gateway.generate import answer_call
from scheduler.gateway.identity import IDENTITY
from scheduler.gateway.request_body import read_json_body
from scheduler.gateway.request_log import FACTS
from scheduler.gateway.request_schema import Endpoint, read_model_name


async def create_embeddings(request: web.Request) -> web.StreamResponse:
    """Embed the inputs. Everything that can be refused is refused here, before a model is woken."""
    gateway, facts = request.app[GATEWAY], request[FACTS]
    facts.endpoint = Endpoint.EMBEDDINGS
    body = await read_json_body(request, gateway.settings)
    accepted_mono_ns = time.monotonic_ns()
    card = await gateway.directory.get_card(read_model_name(body), request[IDENTITY])
    facts.model = card.name
    call = read_embedding_call(body, card)
    return await answer_call(request, facts, call, accepted_mono_ns)
