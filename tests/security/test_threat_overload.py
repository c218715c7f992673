"""Threats of wearing out: slow, large, deep, many; from one client, one tenant or one that never reads."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import re
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from scheduler.api_keys import Scope, change_keys, create_key, key_file_path
from scheduler.config import SchedulerConfig
from scheduler.contract import keys
from scheduler.contract.messages import GenerateRequest, StepFrame, TokenEvent
from scheduler.gateway.admission import Admission
from scheduler.gateway.listener import SEND_BUFFER_BYTES
from scheduler.tenants import TenantPolicy
from tests.eventually import eventually
from tests.gateway_fixtures import GatewayHarness, chat_body, run_gateway, stay_silent

CHAT = "/v1/chat/completions"


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[GatewayHarness]:
    async with run_gateway(redis_url, tmp_path, max_body_bytes=100_000) as harness:
        yield harness


async def send(gateway: GatewayHarness, data: bytes) -> bytes:
    """Everything that the gateway says to ``data`` until it ends the connection."""
    reader, writer = await asyncio.open_connection(gateway.server.host, gateway.server.port)
    writer.write(data)
    try:
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


def raw_chat(**changes: Any) -> bytes:
    body = json.dumps(chat_body(**changes)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def assert_serves(gateway: GatewayHarness) -> None:
    status, _, _ = await gateway.post(CHAT, chat_body())
    assert status == 200


async def serves(gateway: GatewayHarness) -> bool:
    """The same, with limits so small that a loaded machine may not meet them at the first try."""
    try:
        return (await gateway.post(CHAT, chat_body()))[0] == 200
    except aiohttp.ClientError:
        return False


async def is_answered(gateway: GatewayHarness, rest: bytes) -> bool:
    """Whether a whole header got its answer; on a loaded machine it may come later than such a small limit."""
    answer = await send(gateway, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" + rest)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 200")
    return bool(answer)


async def test_threat_slow_headers(redis_url: str, tmp_path: Path) -> None:
    """A connection that sends no whole header, or nothing, is ended; so is one that idles after an answer."""
    async with run_gateway(redis_url, tmp_path, header_limit_s=0.1, keepalive_s=0.1) as gateway:
        assert await send(gateway, b"") == b""
        assert await send(gateway, b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: ") == b""
        for rest in (b"", b"GET /"):
            await eventually(lambda rest=rest: is_answered(gateway, rest), what="an answer in time, then an end")
        await eventually(lambda: serves(gateway), what="others served")


async def test_threat_slow_body(redis_url: str, tmp_path: Path) -> None:
    """A body that comes byte by byte is a 408 after a bounded time."""
    async with run_gateway(redis_url, tmp_path, body_limit_s=0.1) as gateway:
        reader, writer = await asyncio.open_connection(gateway.server.host, gateway.server.port)
        writer.write(raw_chat()[:-10])
        assert (await reader.readline()).startswith(b"HTTP/1.1 408")
        writer.close()
        assert gateway.server.gateway.bodies_bytes == 0


async def test_threat_large_body(gateway: GatewayHarness) -> None:
    """Announced, chunked or compressed: more than the limit is a 413, and is not kept."""
    large = json.dumps(chat_body(user="x" * 200_000)).encode()
    bomb = gzip.compress(b'{"user":"' + b"x" * 50_000_000 + b'"}')
    assert len(bomb) < 100_000
    json_type = {"Content-Type": "application/json"}

    async def chunks() -> AsyncIterator[bytes]:
        yield large

    for options in (
        {"data": large, "headers": json_type},
        {"data": chunks(), "headers": json_type},
        {"data": bomb, "headers": {**json_type, "Content-Encoding": "gzip"}},
    ):
        async with gateway.client.post(gateway.url + CHAT, **options) as response:  # type: ignore[arg-type]
            assert response.status == 413
    assert gateway.worker.seen == []
    await assert_serves(gateway)


async def test_threat_many_large_bodies(redis_url: str, tmp_path: Path) -> None:
    """Bodies being read are bounded over all clients: the next one is a 503 until others are done."""
    async with run_gateway(redis_url, tmp_path, max_bodies_bytes=1500) as gateway:
        reader, writer = await asyncio.open_connection(gateway.server.host, gateway.server.port)
        writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1450\r\n\r\n".encode())
        await eventually(lambda: gateway.server.gateway.bodies_bytes == 1450)
        status, headers, _ = await gateway.post(CHAT, chat_body())
        assert (status, headers["Retry-After"]) == (503, "1")
        writer.close()
        await eventually(lambda: gateway.server.gateway.bodies_bytes == 0)
        await assert_serves(gateway)
        del reader


async def test_threat_deep_json(gateway: GatewayHarness) -> None:
    """Nesting is bounded before anything looks at the body, and costs no stack."""
    for depth, opening, closing in ((100, "[", "]"), (1000, '{"a":', "}"), (40_000, "[", "]"), (19_000, '{"a":', "}")):
        body = '{"model":"tiny","metadata":' + opening * depth + "1" + closing * depth + "}"
        options = {"data": body.encode(), "headers": {"Content-Type": "application/json"}}
        async with gateway.client.post(gateway.url + CHAT, **options) as response:  # type: ignore[arg-type]
            assert response.status == (400 if len(body) <= 100_000 else 413)
            if response.status == 400:
                assert "too deeply" in (await response.json())["error"]["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": [{"role": "user", "content": ""}] * 2049}, "messages"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"n": 17}, "n"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"user": "x" * 513}, "user"),
        ({"model": "m" * 257}, "model"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ],
)
async def test_threat_oversized_fields(gateway: GatewayHarness, change: dict[str, Any], param: str) -> None:
    """Each list, text and number of a request has a limit; the error names the field."""
    status, _, body = await gateway.post(CHAT, chat_body(**change))
    assert status == 400
    assert body["error"]["param"].startswith(param)
    assert gateway.worker.seen == []


async def test_threat_large_headers(gateway: GatewayHarness) -> None:
    """A long header line, a long path or very many headers are refused before any handler."""
    for lines in (b"X: " + b"a" * 9000, b"\r\n".join(b"X%d: a" % i for i in range(200))):
        answer = await send(gateway, b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + lines + b"\r\n\r\n")
        assert answer.split(b" ")[1] in (b"400", b"431")
    assert (await send(gateway, b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n")).split(b" ")[1] == b"431"
    await assert_serves(gateway)


async def test_threat_many_connections(redis_url: str, tmp_path: Path) -> None:
    """Connections beyond the limit are ended at once; when others leave there is room again."""
    async with run_gateway(redis_url, tmp_path, max_connections=10) as gateway:
        held = [await asyncio.open_connection(gateway.server.host, gateway.server.port) for _ in range(10)]
        manager = gateway.server._runner.server
        assert manager is not None
        await eventually(lambda: len(manager.connections) == 10)
        assert await send(gateway, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n") == b""
        for _, writer in held:
            writer.close()
        await eventually(lambda: not manager.connections)
        await assert_serves(gateway)


async def pour(request: GenerateRequest, publish: Any) -> None:
    """Fill every buffer, then trickle."""
    for i in range(100_000):
        publish(StepFrame((TokenEvent(0, 1, "x" * 20_000 if i < 400 else "x"),), time.monotonic_ns()))
        await asyncio.sleep(0 if i < 400 else 0.02)


async def is_cancelled(gateway: GatewayHarness) -> bool:
    redis: Any = gateway.redis
    seen = gateway.worker.seen
    return bool(seen) and bool(await redis.exists(keys.cancelled(seen[0].request_id)))


@pytest.mark.parametrize("bound", [{"max_write_buffer_bytes": 100_000}, {"write_limit_s": 0.2}], ids=["bytes", "time"])
async def test_threat_client_that_never_reads(redis_url: str, tmp_path: Path, bound: dict[str, Any]) -> None:
    """It is cut at a bound of bytes and at a bound of time; its request is cancelled, so it holds no place."""
    settings = {"max_write_buffer_bytes": 1 << 30, **bound}
    async with run_gateway(redis_url, tmp_path, pour, **settings) as gateway:
        reader, writer = await asyncio.open_connection(gateway.server.host, gateway.server.port, limit=1024)
        writer.write(raw_chat(stream=True))
        await eventually(lambda: is_cancelled(gateway))
        await eventually(lambda: gateway.server.gateway.hub.statistics().open_streams == 0)
        writer.close()
        del reader


async def test_threat_client_that_never_reads_in_the_kernel(gateway: GatewayHarness) -> None:
    """What the kernel holds for a client is bounded too, so that one that never reads is noticed soon."""
    _, writer = await asyncio.open_connection(gateway.server.host, gateway.server.port)
    manager = gateway.server._runner.server
    assert manager is not None
    await eventually(lambda: manager.connections)
    transport = manager.connections[0].transport
    assert transport is not None
    with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as same:
        assert same.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 2 * SEND_BUFFER_BYTES
    writer.close()


async def test_threat_unread_answer(redis_url: str, tmp_path: Path) -> None:
    """An answer that is not streamed and not read is dropped after a bounded time, with its connection."""

    async def script(request: GenerateRequest, publish: Any) -> None:
        from tests.gateway_fixtures import say

        await say(*["x" * 500_000] * 30)(request, publish)

    async with run_gateway(redis_url, tmp_path, script, write_limit_s=0.2) as gateway:
        reader, writer = await asyncio.open_connection(gateway.server.host, gateway.server.port, limit=1024)
        writer.write(raw_chat())
        manager = gateway.server._runner.server
        assert manager is not None
        await eventually(lambda: gateway.worker.seen)
        await eventually(lambda: not manager.connections)
        writer.close()
        del reader


async def test_threat_client_gone(redis_url: str, tmp_path: Path) -> None:
    """Who leaves frees the request: workers are told at once, on the channel that a step reads."""
    async with run_gateway(redis_url, tmp_path, stay_silent) as gateway:
        for stream in (True, False):
            gateway.worker.seen.clear()
            _, writer = await asyncio.open_connection(gateway.server.host, gateway.server.port)
            writer.write(raw_chat(stream=stream))
            await eventually(lambda: gateway.worker.seen)
            writer.close()
            await eventually(lambda: is_cancelled(gateway))
        await eventually(lambda: gateway.server.gateway.hub.statistics().open_streams == 0)


async def test_threat_quota_by_many_keys(redis_url: str, tmp_path: Path) -> None:
    """A quota is the tenant's: more keys give no more of it."""
    tokens = []
    for _ in range(3):
        key, token = create_key("a", (Scope.INFER,))
        change_keys(key_file_path(tmp_path), lambda known, key=key: (*known, key))
        tokens.append(token)
    async with run_gateway(redis_url, tmp_path) as gateway:
        config = SchedulerConfig(tenants={"a": TenantPolicy(requests_per_minute=2)})
        gateway.server.gateway.admission = Admission(gateway.server.gateway.settings, config)
        statuses = [(await gateway.post(CHAT, chat_body(), headers={"x-api-key": token}))[0] for token in tokens]
    assert statuses == [200, 200, 429]


async def test_threat_request_smuggling(gateway: GatewayHarness) -> None:
    """Two lengths, two forms of length or a folded one are refused, and what follows is no second request."""
    inner = b"GET /admin/status HTTP/1.1\r\nHost: x\r\n\r\n"
    for header in (
        b"Content-Length: 3\r\nTransfer-Encoding: chunked",
        b"Content-Length: 3\r\nContent-Length: 4",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        b"Transfer-Encoding : chunked",
        b"Content-Length: +3",
    ):
        answer = await send(gateway, f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n".encode() + header + b"\r\n\r\n" + inner)
        assert re.findall(rb"HTTP/1\.[01] (\d{3}) ", answer) == [b"400"], header
