"""A server at its limits (memory, clients, speed) and a gateway at its own (descriptors): clear answers; it passes."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from test_gateway_process import gateway_process, worker_of

from scheduler.contract.connection import connect
from scheduler.contract.messages import GenerateRequest, StepFrame, TokenEvent
from tests.eventually import eventually
from tests.fleet_fixtures import RedisProcess
from tests.gateway_fixtures import GatewayHarness, chat_body, end, events_of, run_gateway, say
from tests.slow_redis import slow_redis

CHAT = "/v1/chat/completions"


@pytest.fixture
async def small(short_tmp_path: Path) -> AsyncIterator[tuple[RedisProcess, Any]]:
    """A server and a client of it that was connected before any trouble."""
    server = RedisProcess(short_tmp_path / "r", "--maxmemory", "8mb", "--maxmemory-policy", "noeviction")
    client: Any = connect(server.url)
    await client.ping()
    yield server, client
    await client.aclose()
    server.kill()


async def post(gateway: GatewayHarness) -> tuple[int, str]:
    status, headers, body = await gateway.post(CHAT, chat_body())
    if status == 503:
        assert int(headers["Retry-After"]) > 0
    return status, body.get("error", {}).get("code", "")


async def test_a_server_out_of_memory_refuses_new_requests_and_delays_running_ones(
    small: tuple[RedisProcess, Any], tmp_path: Path
) -> None:
    """503 with Retry-After; what runs waits and is whole once there is room; then all is as before."""
    server, client = small
    go_on = asyncio.Event()

    async def script(request: GenerateRequest, publish: Any) -> None:
        publish(StepFrame((TokenEvent(0, 1, "before"),), 1))
        await go_on.wait()
        await say(" after")(request, publish)

    async with run_gateway(server.url, tmp_path, script) as gateway:
        async with gateway.client.post(gateway.url + CHAT, json=chat_body(stream=True)) as response:
            async for line in response.content:
                if b"before" in line:
                    break
            await client.config_set("maxmemory", 1)  # less than is used: every write that could grow is refused
            assert await post(gateway) in {(503, "overloaded"), (503, "backend_unavailable")}
            go_on.set()
            gateway.worker.script = say("x")
            await asyncio.sleep(0.2)  # the fault itself: the worker tries to write all that time
            await client.config_set("maxmemory", "64mb")
            rest = await response.text()
        assert " after" in rest
        assert rest.endswith("data: [DONE]\n\n")
        assert (await post(gateway))[0] == 200


async def test_a_server_at_its_client_limit_is_a_503_and_passes(
    small: tuple[RedisProcess, Any], tmp_path: Path
) -> None:
    """No connection is left for the gateway: refused within its limit, served when there is one."""
    server, client = small
    async with run_gateway(server.url, tmp_path, redis_limit_s=0.5) as gateway:
        await eventually(lambda: is_served(gateway), what="an answer within that limit")
        await gateway.server.gateway.redis.connection_pool.disconnect()
        await client.config_set("maxclients", 1)
        gateway.server.gateway.directory.invalidate()
        assert await post(gateway) == (503, "backend_unavailable")
        await client.config_set("maxclients", 1000)
        gateway.worker.script = say("x")
        await eventually(lambda: is_served(gateway), what="served again")


async def is_served(gateway: GatewayHarness) -> bool:
    return (await post(gateway))[0] == 200


async def test_a_slow_server_delays_tokens_and_loses_none(redis_url: str, tmp_path: Path, short_tmp_path: Path) -> None:
    """Each of its answers takes as long as many steps: streams and their ends come late, whole and in order."""
    num_tokens = 60

    async def script(request: GenerateRequest, publish: Any) -> None:
        for number in range(num_tokens):
            publish(StepFrame((TokenEvent(0, 1, f"{number} "),), 1))
            await asyncio.sleep(0.002)  # a step of the engine, which does not wait for the server
        publish(end())

    async with (
        slow_redis(short_tmp_path / "slow.sock", redis_url.removeprefix("unix://"), 0.03) as slow_url,
        run_gateway(slow_url, tmp_path, script) as gateway,
    ):
        streams = await asyncio.gather(*(gateway.stream(CHAT, chat_body()) for _ in range(4)))
        for _, blocks in streams:
            deltas = [event["choices"][0]["delta"] for event in events_of(blocks)]
            text = "".join(delta.get("content") or "" for delta in deltas)
            assert text == "".join(f"{number} " for number in range(num_tokens))
            assert blocks[-1] == "data: [DONE]"
        statistics = gateway.server.gateway.hub.statistics()
        assert (statistics.live + statistics.filled, statistics.open_streams) == (4 * (num_tokens + 1), 0)


async def test_a_gateway_without_descriptors_lives_and_serves_again(redis_url: str, tmp_path: Path) -> None:
    """More connections than it may have files: those wait or are closed, and the next one is answered."""
    async with (
        worker_of(redis_url, say("x")),
        gateway_process(redis_url, tmp_path) as (process, url),
    ):

        async def answers() -> bool:
            async with aiohttp.ClientSession() as client:
                try:
                    async with client.post(url + CHAT, json=chat_body()) as response:
                        return response.status == 200
                except aiohttp.ClientError:
                    return False

        await eventually(answers, what="an answer")
        limit = len(os.listdir(f"/proc/{process.pid}/fd")) + 8
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (limit, limit))
        host, _, port = url.removeprefix("http://").rpartition(":")
        held = [socket.create_connection((host, int(port))) for _ in range(40)]
        await asyncio.sleep(0.2)  # the fault itself: it cannot take any more
        assert process.returncode is None
        for one in held:
            one.close()

        await eventually(answers, what="an answer again")
