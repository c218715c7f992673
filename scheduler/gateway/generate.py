"""What all endpoints that wake a model share: a validated call becomes an answer, and nothing of it is left running."""

from __future__ import annotations

from aiohttp import web

from scheduler.gateway.collect import CollectedCall
from scheduler.gateway.embeddings import EmbeddedCall
from scheduler.gateway.exchange import Exchange
from scheduler.gateway.gateway import GATEWAY
from scheduler.gateway.identity import IDENTITY
from scheduler.gateway.request_log import RequestFacts
from scheduler.gateway.request_schema import Call
from scheduler.gateway.streaming import StreamedCall


async def answer_call(
    request: web.Request, facts: RequestFacts, call: Call, accepted_mono_ns: int
) -> web.StreamResponse:
    """Run ``call`` and answer it. A client that goes away cancels this handler, and with it every request of the call.

    ``accepted_mono_ns`` is when its body had been read.

    Raises:
        GlowplugError: refused or failed before the answer began.
        ConnectionResetError: the client is gone.
    """
    gateway = request.app[GATEWAY]
    facts.stream = call.stream
    exchange = Exchange(gateway, call, facts.request_id, accepted_mono_ns, request[IDENTITY])
    gateway.metrics.on_in_flight(call.card.name, +1)
    try:
        if call.stream:
            return await StreamedCall(request, gateway, exchange).run()
        if call.embedding is not None:
            return await EmbeddedCall(exchange).run()
        return await CollectedCall(exchange).run()
    finally:
        exchange.close()
        facts.note_exchange(exchange.error)
        gateway.metrics.on_in_flight(call.card.name, -1)
