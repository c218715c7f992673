"""The gateway as a process: readiness descriptor, draining on SIGTERM, a Redis that is away, an import budget."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from scheduler.contract import codec, keys
from scheduler.contract.connection import connect
from scheduler.contract.messages import GenerateRequest
from scheduler.embedded_redis import ensure_server, stop_server
from scheduler.gateway.listener import Connection
from tests.eventually import eventually
from tests.gateway_fixtures import MODEL, StubWorker, chat_body, make_card, make_status, run_gateway, say

CHAT = "/v1/chat/completions"


@asynccontextmanager
async def gateway_process(redis_url: str, state_dir: Path, **environment: str) -> AsyncIterator[tuple[Any, str]]:
    """A started gateway process and its URL, as it told the readiness descriptor; killed at the end if still there."""
    read_end, write_end = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "scheduler", "gateway"),
        env={
            **os.environ,
            "GLOWPLUG_STATE_DIR": str(state_dir),
            "REDIS_URL": redis_url,
            "GLOWPLUG_PORT": "0",
            "GLOWPLUG_READY_FD": str(write_end),
            **environment,
        },
        pass_fds=(write_end,),
        stderr=subprocess.DEVNULL,
    )
    os.close(write_end)
    try:
        with os.fdopen(read_end) as pipe:
            address = json.loads(await asyncio.to_thread(pipe.readline))
        yield process, f"http://{address['host']}:{address['port']}"
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def worker_of(redis_url: str, script: Any) -> AsyncIterator[StubWorker]:
    """A stub worker beside the process, with one model published."""
    redis: Any = connect(redis_url)
    await redis.hset(keys.MODELS, MODEL, codec.encode(make_card()))
    await redis.set(keys.STATUS, codec.encode(make_status()))
    worker = StubWorker(redis, script)
    working = asyncio.create_task(worker.run())
    yield worker
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    await redis.aclose()


async def wait_taken(worker: StubWorker, response: aiohttp.ClientResponse) -> None:
    """Until the worker has the request of a stream that has begun."""
    assert response.status == 200, await response.text()
    await eventually(lambda: worker.seen or worker.errors, what="the request at the worker")
    assert worker.errors == []


async def test_sigterm_lets_a_stream_finish_and_refuses_new_connections(redis_url: str, tmp_path: Path) -> None:
    """The listener closes first; what streams goes on; then the process ends with 0."""
    go_on = asyncio.Event()

    async def script(request: GenerateRequest, publish: Any) -> None:
        await go_on.wait()
        await say("to", " the", " end")(request, publish)

    async with (
        worker_of(redis_url, script) as worker,
        gateway_process(redis_url, tmp_path) as (process, url),
        aiohttp.ClientSession() as client,
        client.post(url + CHAT, json=chat_body(stream=True)) as response,
    ):
        await wait_taken(worker, response)
        process.send_signal(signal.SIGTERM)
        await eventually(lambda: refuses(client, url))
        go_on.set()
        text = await response.text()
        assert " end" in text
        assert text.endswith("data: [DONE]\n\n")
        assert await asyncio.wait_for(process.wait(), 30) == 0


async def test_a_connection_of_the_last_moment_is_ended_at_once(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accepted when the idle ones are being closed, before its handler waits for a request: its client need not wait
    for those who are being answered."""
    made = Connection.connection_made

    def close_before_it_waits(connection: Connection, transport: asyncio.BaseTransport) -> None:
        made(connection, transport)
        connection.close()

    async with run_gateway(redis_url, tmp_path, header_limit_s=600.0) as gateway:
        monkeypatch.setattr(Connection, "connection_made", close_before_it_waits)
        reader, writer = await asyncio.open_connection(gateway.server.host, gateway.server.port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 60) == b""
        writer.close()


async def refuses(client: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with aiohttp.ClientSession() as fresh, fresh.get(url + "/healthz"):
            return False
    except aiohttp.ClientConnectorError:
        return True
    except aiohttp.ClientError:
        return False  # accepted in the instant before the listener closed: look again


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_a_call_that_outlasts_the_grace_period_is_cut(redis_url: str, tmp_path: Path, is_streamed: bool) -> None:
    """A streamed one is left for its client to go on with at another gateway; any other is cancelled."""

    async def script(request: GenerateRequest, publish: Any) -> None:
        await asyncio.Event().wait()

    async with (
        worker_of(redis_url, script) as worker,
        gateway_process(redis_url, tmp_path, GLOWPLUG_GATEWAY_DRAIN_GRACE_S="0.5") as (process, url),
        aiohttp.ClientSession() as client,
    ):
        asking = asyncio.create_task(client.post(url + CHAT, json=chat_body(stream=is_streamed)))
        await eventually(lambda: len(worker.seen) == 1)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 30) == 0
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        redis = connect(redis_url)
        request_id = worker.seen[0].request_id
        assert bool(await redis.exists(keys.cancelled(request_id))) is not is_streamed
        assert bool(await redis.exists(keys.record(request_id))) is is_streamed
        await redis.aclose()


async def test_a_second_signal_ends_the_draining_at_once(redis_url: str, tmp_path: Path) -> None:
    """A stream that would hold the process for its grace period does not hold it then."""

    async def script(request: GenerateRequest, publish: Any) -> None:
        await asyncio.Event().wait()

    async with (
        worker_of(redis_url, script) as worker,
        gateway_process(redis_url, tmp_path, GLOWPLUG_GATEWAY_DRAIN_GRACE_S="100") as (process, url),
        aiohttp.ClientSession() as client,
        client.post(url + CHAT, json=chat_body(stream=True)) as response,
    ):
        await wait_taken(worker, response)
        process.send_signal(signal.SIGINT)
        await eventually(lambda: refuses(client, url))
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 30) == 0


async def test_a_redis_that_is_away_is_a_503_and_its_return_is_noticed(short_tmp_path: Path, tmp_path: Path) -> None:
    """Requests and readiness say so with Retry-After; liveness stays; afterwards requests are served again."""
    server = ensure_server(short_tmp_path, maxmemory="64mb")
    try:
        async with run_gateway(server.url, tmp_path, redis_limit_s=0.1) as gateway:
            await eventually(lambda: is_served(gateway), what="an answer within that limit")
            stop_server(short_tmp_path)
            gateway.server.gateway.directory.invalidate()
            for path in (CHAT, "/readyz", "/health"):
                found = await (gateway.post(path, chat_body()) if path == CHAT else gateway.get(path))
                assert found[0] == 503
                assert 1 <= int(found[1]["Retry-After"]) <= 120
            assert (await gateway.get("/healthz"))[0] == 200
            ensure_server(short_tmp_path, maxmemory="64mb")
            await eventually(lambda: gets_ready(gateway))
    finally:
        stop_server(short_tmp_path)


async def is_served(gateway: Any) -> bool:
    return bool((await gateway.post(CHAT, chat_body()))[0] == 200)


async def gets_ready(gateway: Any) -> bool:
    try:
        await gateway.publish(make_card())
    except OSError:
        return False
    return (await gateway.get("/readyz"))[0] == 200


def test_what_the_gateway_does_not_import_before_it_listens() -> None:
    """Import time is part of a cold start from nothing: heavy libraries come later, or never."""
    code = "import scheduler.gateway.app, sys; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["jinja2", "prometheus_client", "yaml", "arq", "numpy", "click", "wasmtime"]
    found = subprocess.run([sys.executable, "-c", code, *heavy], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"
