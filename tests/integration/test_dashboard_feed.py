"""The dashboard's files and its live feed over real HTTP and a real Valkey."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from scheduler.contract import codec, keys
from scheduler.contract.messages import SecurityEvent
from scheduler.gateway.routes_dashboard import ASSETS, MAX_WATCHERS
from tests.gateway_fixtures import GatewayHarness, chat_body, run_gateway


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[GatewayHarness]:
    async with run_gateway(redis_url, tmp_path) as harness:
        yield harness


async def read_document(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """The next event of a feed."""
    async for line in response.content:
        if line.startswith(b"data: "):
            found: dict[str, Any] = json.loads(line[len(b"data: ") :])
            return found
    raise AssertionError("the feed ended")


async def test_every_file_of_the_page_is_served_once_and_then_not_modified(gateway: GatewayHarness) -> None:
    """Page and assets have types and tags; a browser that has them gets 304, with the page's own policy."""
    async with aiohttp.ClientSession(gateway.url) as session:
        for path in ("/", *(f"/dashboard/{name}" for name in sorted(ASSETS))):
            async with session.get(path) as response:
                assert response.status == 200, path
                assert await response.read()
                tag = response.headers["ETag"]
            async with session.get(path, headers={"If-None-Match": tag}) as response:
                assert response.status == 304
                assert "script-src 'self'" in response.headers["Content-Security-Policy"]


async def test_no_other_file_can_be_read(gateway: GatewayHarness) -> None:
    """Names are looked up, never joined to a path."""
    async with aiohttp.ClientSession(gateway.url) as session:
        for name in ("..%2fapp.py", "%2e%2e/app.py", "nothing.js", "style.css%00"):
            async with session.get(f"/dashboard/{name}") as response:
                assert response.status in (400, 404), name


async def test_the_feed_tells_fleet_requests_and_security_events(gateway: GatewayHarness) -> None:
    """A finished request and an event that an agent reported are in the next document."""
    event = SecurityEvent(at_s=1.0, kind="blob_corrupt", model="m", node_id="n", reason="chunk 3 differs")
    redis: Any = gateway.redis
    await redis.lpush(keys.SECURITY_RECENT, b"of another version", codec.encode(event))
    await redis.hset(keys.SECURITY_COUNTS, "blob_corrupt", 1)
    _, headers, _ = await gateway.post("/v1/chat/completions", chat_body())
    async with aiohttp.ClientSession(gateway.url) as session, session.get("/admin/live") as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        document = await read_document(response)
        while not document["traces"]:  # written behind the answer
            document = await read_document(response)
    assert document["traces"][0]["request_id"] == headers["X-Request-Id"]
    assert document["traces"][0]["cold_tier"] == "T2"
    assert document["security_counts"] == {"blob_corrupt": 1}
    assert [found["reason"] for found in document["security_events"]] == ["chunk 3 differs"]


async def test_the_number_of_watchers_is_bounded(gateway: GatewayHarness) -> None:
    """One too many is refused with a remedy, and a place is free again when a watcher leaves."""
    async with aiohttp.ClientSession(gateway.url, connector=aiohttp.TCPConnector(limit=0)) as session:
        open_feeds = [await session.get("/admin/live") for _ in range(MAX_WATCHERS)]
        async with session.get("/admin/live") as response:
            assert response.status == 503
            assert "close one" in (await response.json())["error"]["message"]
        open_feeds.pop().close()
        while True:
            async with session.get("/admin/live") as response:
                if response.status == 200:
                    break
        for feed in open_feeds:
            feed.close()
