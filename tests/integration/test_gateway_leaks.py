"""A gateway that has answered hundreds of requests, of every kind of end, holds what it held before them."""

from __future__ import annotations

import functools
import gc
import os
from collections import Counter
from pathlib import Path
from typing import Final

import aiohttp
import pytest

from scheduler.contract.errors import ErrorCode, ErrorInfo
from scheduler.contract.messages import GenerateRequest
from scheduler.gateway import traces
from tests.eventually import eventually
from tests.gateway_fixtures import GatewayHarness, Publish, chat_body, end, run_gateway, say, words

CHAT: Final = "/v1/chat/completions"
ROUNDS: Final = 40  # of five requests each
#: Objects that a round may leave: far below one for each request of the rounds that are compared.
SPARE_OBJECTS: Final = ROUNDS // 2


async def answer_as_asked(request: GenerateRequest, publish: Publish) -> None:
    """The request's ``user`` says how it ends: with text, with an error, or with a word and no end."""
    if request.user == "fail":
        publish(end(error=ErrorInfo(ErrorCode.INTERNAL, "as asked")))
    elif request.user == "hang":
        publish(words("Wait")[0])
    else:
        await say("Hello", " world")(request, publish)


async def ask_in_every_way(harness: GatewayHarness) -> None:
    """One round: streamed and resumed, whole, failed, refused, and given up in mid-stream."""
    headers, _ = await harness.stream(CHAT, chat_body())
    async with harness.client.get(f"{harness.url}/v1/requests/{headers['X-Request-Id']}/stream") as response:
        assert (await response.read()).endswith(b"[DONE]\n\n")
    assert (await harness.post(CHAT, chat_body()))[0] == 200
    assert (await harness.post(CHAT, chat_body(user="fail")))[0] == 500
    assert (await harness.post(CHAT, chat_body(max_tokens=-1)))[0] == 400
    async with aiohttp.ClientSession() as leaving:
        response = await leaving.post(harness.url + CHAT, json=chat_body(stream=True, user="hang"))
        assert b"Wait" in await response.content.readuntil(b'"Wait"')
        response.close()


async def count_what_is_held(harness: GatewayHarness) -> Counter[str]:
    """Objects by type, and descriptors, once everything that ran for a request has ended."""
    gateway = harness.server.gateway
    await eventually(lambda: gateway.hub.statistics().open_streams == 0, what="streams closed")
    await eventually(lambda: not gateway._background, what="background work done")
    gc.unfreeze()
    for cache in [one for one in gc.get_objects() if isinstance(one, functools._lru_cache_wrapper)]:
        cache.cache_clear()  # of URLs, for instance: bounded, but not full yet
    gc.collect()
    counts = Counter(f"{type(one).__module__}.{type(one).__qualname__}" for one in gc.get_objects())
    counts["descriptors"] = len(os.listdir("/proc/self/fd"))
    return counts


async def test_requests_of_every_end_leave_nothing_in_the_gateway(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the same rounds: the second time no type has more objects than the first, and no descriptor is left."""
    monkeypatch.setattr(traces, "MAX_KEPT_HERE", 16)  # the newest traces are kept: full after the first rounds
    async with run_gateway(redis_url, tmp_path, answer_as_asked) as harness:
        held = []
        for _ in range(2):
            for _ in range(ROUNDS):
                await ask_in_every_way(harness)
                harness.worker.seen.clear()
            held.append(await count_what_is_held(harness))
    first, second = held
    grown = {name: (first[name], count) for name, count in second.items() if count - first[name] > SPARE_OBJECTS}
    assert grown == {}
