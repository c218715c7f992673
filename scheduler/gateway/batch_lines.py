"""One line of a batch, run like a call that is not streamed, but for which nobody waits at the other end."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from typing import Any, Final

import structlog
from aiohttp import web

from scheduler.contract.errors import ErrorCode, ErrorInfo, GlowplugError
from scheduler.contract.messages import ModelCard
from scheduler.contract.states import Priority, Task
from scheduler.gateway.batch_input import BatchLine
from scheduler.gateway.batch_policy import decide_retry_s
from scheduler.gateway.batch_results import ResultRow, build_failure, build_success
from scheduler.gateway.collect import CollectedCall
from scheduler.gateway.embedding_schema import read_embedding_call, require_task
from scheduler.gateway.embeddings import EmbeddedCall
from scheduler.gateway.exchange import Exchange
from scheduler.gateway.gateway import Gateway
from scheduler.gateway.identity import Identity
from scheduler.gateway.request_ids import create_request_id
from scheduler.gateway.request_schema import Call, read_chat_call, read_completion_call
from scheduler.gateway.responses_request import read_response_call

Body = dict[str, Any]

_log = structlog.get_logger()


def _read_chat(body: Body, card: ModelCard, gateway: Gateway) -> Call:
    require_task(card, Task.GENERATE)
    return read_chat_call(body, card, gateway.templates)


def _read_completion(body: Body, card: ModelCard, _gateway: Gateway) -> Call:
    require_task(card, Task.GENERATE)
    return read_completion_call(body, card)


def _read_embedding(body: Body, card: ModelCard, _gateway: Gateway) -> Call:
    return read_embedding_call(body, card)


def _read_response(body: Body, card: ModelCard, gateway: Gateway) -> Call:
    require_task(card, Task.GENERATE)
    return read_response_call(body, card, gateway.templates)


#: Endpoints that a batch may be for, and how a line's body becomes a call.
ENDPOINTS: Final[dict[str, Callable[[Body, ModelCard, Gateway], Call]]] = {
    "/v1/chat/completions": _read_chat,
    "/v1/completions": _read_completion,
    "/v1/embeddings": _read_embedding,
    "/v1/responses": _read_response,
}


async def answer_line(
    gateway: Gateway, identity: Identity, line: BatchLine, number: int, choose_priority: Callable[[], Priority]
) -> tuple[bool, ResultRow]:
    """Run line ``number`` until it has an answer; whether it succeeded, and its row. Cancel it to withdraw it."""
    num_tries = 0
    while True:
        num_tries += 1
        request_id = create_request_id()
        try:
            body = await _run_once(gateway, identity, line, request_id, choose_priority())
            return True, build_success(line.custom_id, request_id, body)
        except GlowplugError as error:
            retry_s = decide_retry_s(error.info.code, num_tries)
            if retry_s is None:
                return False, build_failure(line.custom_id, request_id, error.info, number)
        except Exception as error:  # a bug of ours must not end the batch
            _log.error("batch_line_crashed", request_id=request_id, exc_info=error)
            info = ErrorInfo(ErrorCode.INTERNAL, f"the gateway failed; its log has the details under {request_id}")
            return False, build_failure(line.custom_id, request_id, info, number)
        await asyncio.sleep(retry_s)


async def _run_once(
    gateway: Gateway, identity: Identity, line: BatchLine, request_id: str, priority: Priority
) -> bytes:
    """The body of the answer.

    Raises:
        GlowplugError: refused or failed.
    """
    card = await gateway.directory.get_card(line.body["model"], identity)
    call = ENDPOINTS[line.url](line.body, card, gateway)
    call = dataclasses.replace(call, stream=False, priority=priority)
    span = gateway.tracing.begin_line()
    exchange = Exchange(gateway, call, request_id, time.monotonic_ns(), identity, is_unhurried=True, span=span)
    gateway.metrics.on_in_flight(card.name, +1)
    try:
        collected = EmbeddedCall(exchange) if call.embedding is not None else CollectedCall(exchange)
        response: web.Response = await collected.run()
    finally:
        exchange.close()
        gateway.metrics.on_in_flight(card.name, -1)
        usages = [part.usage for part in exchange.parts]
        gateway.usage.add(identity, card.name, usages, failed=exchange.error is not None)
    body = response.body
    if not isinstance(body, bytes):
        raise GlowplugError(ErrorCode.INTERNAL, "the answer has no body")
    return body
