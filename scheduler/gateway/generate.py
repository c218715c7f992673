"""What all endpoints that wake a model share: a validated call becomes an answer, and nothing of it is left running."""

from __future__ import annotations

from aiohttp import web

from scheduler.dispatch import estimate_tokens
from scheduler.gateway.collect import CollectedCall
from scheduler.gateway.embeddings import EmbeddedCall
from scheduler.gateway.exchange import Exchange
from scheduler.gateway.gateway import GATEWAY, Gateway
from scheduler.gateway.identity import IDENTITY
from scheduler.gateway.quotas import MAX_RESERVED_COMPLETION_TOKENS, Grant
from scheduler.gateway.request_log import RequestFacts
from scheduler.gateway.request_schema import Call
from scheduler.gateway.response_headers import RATE_LIMIT_HEADERS
from scheduler.gateway.streaming import StreamedCall
from scheduler.gateway.text_calls import TextCall


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
    identity = request[IDENTITY]
    policy = gateway.admission.tenant_policy(identity.tenant)
    grant = await gateway.quotas.admit(identity.tenant, policy, facts.request_id, estimate_call(call))
    request[RATE_LIMIT_HEADERS] = grant.headers
    exchange = Exchange(gateway, call, facts.request_id, accepted_mono_ns, identity, span=facts.span)
    gateway.metrics.on_in_flight(call.card.name, +1)
    try:
        if call.stream:
            return await StreamedCall(request, gateway, exchange).run()
        if call.embedding is not None:
            return await EmbeddedCall(exchange).run()
        if call.text_only:
            return await TextCall(exchange).run()
        return await CollectedCall(exchange).run()
    finally:
        exchange.close()
        facts.note_exchange(exchange.error)
        gateway.metrics.on_in_flight(call.card.name, -1)
        _settle(gateway, exchange, grant)


def estimate_call(call: Call) -> int:
    """About how many tokens ``call`` will use: what a quota is asked for before anybody knows."""
    if call.embedding is not None:
        return sum(estimate_tokens(one) for one in call.embedding.inputs)
    completion = min(call.sampling.max_tokens, MAX_RESERVED_COMPLETION_TOKENS) * call.total_choices
    return sum(estimate_tokens(prompt) for prompt in call.prompts) + completion


def _settle(gateway: Gateway, exchange: Exchange, grant: Grant) -> None:
    """Record what was used, and give back what was not. In the background: the client need not wait for it."""
    usages = [part.usage for part in exchange.parts]
    if exchange.call.text_only:
        usages = []  # nothing was computed
    gateway.usage.add(exchange.identity, exchange.call.card.name, usages, failed=exchange.error is not None)
    if grant.policy.has_quota:
        used_tokens = sum(usage.prompt_tokens + usage.completion_tokens for usage in usages)
        gateway.run_in_background(gateway.quotas.settle(grant, used_tokens), name=f"settle:{grant.call_id}")
