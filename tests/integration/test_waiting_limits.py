"""Requests that wait past their limit, over HTTP and a real queue: each ends, once, and its client is told why."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from scheduler.config import SchedulerConfig
from scheduler.contract import codec, keys
from scheduler.contract.connection import connect
from scheduler.contract.messages import GenerateRequest, TerminalFrame
from scheduler.dispatch import Dispatcher
from scheduler.service import Scheduler
from tests.eventually import eventually
from tests.gateway_fixtures import MODEL, GatewayHarness, chat_body, events_of, make_card, make_status, run_gateway
from tests.queue_fixtures import serving_worker

CHAT = "/v1/chat/completions"


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[GatewayHarness]:
    async with run_gateway(redis_url, tmp_path, cold_start_limit_s=20.0) as running:
        running.worker.is_away = True
        yield running


@contextlib.asynccontextmanager
async def leading_scheduler(redis_url: str) -> AsyncIterator[None]:
    """A scheduler with its sweeper. There is no node, so nothing is woken."""
    redis = connect(redis_url)
    scheduler = Scheduler(redis, SchedulerConfig(), "s1")
    running = asyncio.create_task(scheduler.run())
    try:
        yield
    finally:
        scheduler.stop()
        await running
        await redis.aclose()


async def queued(gateway: GatewayHarness) -> str:
    """The id of the one request that waits."""
    redis: Any = gateway.redis
    (found,) = await eventually(lambda: redis.zrange(keys.queue(MODEL), 0, -1), what="a request in the queue")
    return str(found.decode())


async def has_expired(gateway: GatewayHarness, request_id: str) -> bool:
    return await gateway.redis.exists(keys.job(request_id)) == 0


async def assert_ended_once(gateway: GatewayHarness, request_id: str) -> None:
    """One terminal frame is all of its log; nothing of it is left in the queue."""

    async def is_empty() -> bool:
        return await Dispatcher(gateway.redis).queue_depth(MODEL) == 0

    await eventually(is_empty, what="an empty queue")
    redis: Any = gateway.redis
    log = await eventually(lambda: redis.lrange(keys.token_log(request_id), 0, -1), what="an end in the log")
    frames = [codec.decode_frame(raw) for raw in log]
    assert [type(frame) for frame in frames] == [TerminalFrame]


def check_expired(error: dict[str, Any]) -> None:
    """It says what, the limit and the remedy."""
    assert (error["code"], error["type"]) == ("overloaded", "server_error")
    for words in ("the request waited longer than", f"{keys.REQUEST_TTL_S} s", "try again"):
        assert words in error["message"]


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("ended_by", ["worker", "sweeper", "both"])
async def test_a_request_that_waits_past_its_life_in_the_queue(
    gateway: GatewayHarness, redis_url: str, ended_by: str, is_streamed: bool
) -> None:
    """Its body runs out (its TTL is cut short here): whoever finds it first, gateway, sweeper or a worker that claims
    what is left, its client gets one error with the limit and when to come back, and no worker runs it."""
    body = chat_body()
    waiting: asyncio.Task[Any] = asyncio.create_task(
        gateway.stream(CHAT, body) if is_streamed else gateway.post(CHAT, body)
    )
    request_id = await queued(gateway)
    redis: Any = gateway.redis
    await redis.pexpire(keys.job(request_id), 1)
    await eventually(lambda: has_expired(gateway, request_id), what="the end of its life")
    ran: list[str] = []

    async def run(request: GenerateRequest, attempt: int) -> None:
        ran.append(request.request_id)

    async with contextlib.AsyncExitStack() as stack:
        if ended_by != "worker":
            await stack.enter_async_context(leading_scheduler(redis_url))
        if ended_by != "sweeper":
            await stack.enter_async_context(serving_worker(gateway.redis, run))
        if is_streamed:
            _, blocks = await asyncio.wait_for(waiting, 60)
            check_expired(events_of(blocks)[-1]["error"])
            assert not any("[DONE]" in block for block in blocks)
        else:
            status, headers, answer = await asyncio.wait_for(waiting, 60)
            assert (status, headers["Retry-After"], headers["x-should-retry"]) == (503, "30", "true")
            check_expired(answer["error"])
        await assert_ended_once(gateway, request_id)
    assert ran == []


@pytest.mark.parametrize(
    ("report", "cause"),
    [
        ({}, "of being woken; try again"),
        ({"nodes": ()}, "start one with `glowplug agent`"),
        ({"drained_nodes": ("node-0",)}, "every node is drained; let one work again with `glowplug undrain NODE`"),
    ],
)
async def test_a_request_whose_model_does_not_wake_in_time(
    redis_url: str, tmp_path: Path, report: dict[str, Any], cause: str
) -> None:
    """The gateway's own limit: a 503 with the limit, the cause where it is known, and when to come back; the request
    leaves the queue with an end."""
    async with run_gateway(redis_url, tmp_path, cold_start_limit_s=0.5) as gateway:
        await gateway.publish(make_card(), status=msgspec.structs.replace(make_status(), **report))
        gateway.worker.is_away = True
        waiting = asyncio.create_task(gateway.post(CHAT, chat_body()))
        request_id = await queued(gateway)
        status, headers, answer = await waiting
        assert (status, answer["error"]["code"], headers["Retry-After"]) == (503, "wake_timeout", "30")
        for words in (f'"{MODEL}"', "0.5 s", "try again", cause):
            assert words in answer["error"]["message"]
        await assert_ended_once(gateway, request_id)
