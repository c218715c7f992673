"""``/tokenize``, ``/detokenize`` and the two endpoints that count a prompt's tokens."""

from __future__ import annotations

from aiohttp import web

from scheduler.gateway.request_schema import Endpoint
from scheduler.gateway.routes_dialects import ReadCall, answer_dialect
from scheduler.gateway.text_calls import (
    read_detokenize_call,
    read_message_count_call,
    read_response_count_call,
    read_tokenize_call,
)


async def tokenize(request: web.Request) -> web.StreamResponse:
    """Token ids of a text or of a rendered chat."""
    return await _answer(request, Endpoint.TOKENIZE, read_tokenize_call)


async def detokenize(request: web.Request) -> web.StreamResponse:
    """The text of token ids, special ones shown."""
    return await _answer(request, Endpoint.DETOKENIZE, read_detokenize_call)


async def count_message_tokens(request: web.Request) -> web.StreamResponse:
    """How many tokens the prompt of such a message has."""
    return await _answer(request, Endpoint.COUNT, read_message_count_call)


async def count_response_tokens(request: web.Request) -> web.StreamResponse:
    """How many tokens the prompt of such a response has."""
    return await _answer(request, Endpoint.COUNT, read_response_count_call)


async def _answer(request: web.Request, endpoint: Endpoint, read_call: ReadCall) -> web.StreamResponse:
    return await answer_dialect(request, endpoint, read_call, task=None)
