"""Quotas, usage records and admission by estimated wait, through HTTP over a real Valkey."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from scheduler.api_keys import Scope, change_keys, create_key, key_file_path
from scheduler.config import SchedulerConfig
from scheduler.contract import keys
from scheduler.contract.messages import GenerateRequest
from scheduler.gateway.admission import Admission
from scheduler.tenants import TenantPolicy
from tests.eventually import eventually
from tests.gateway_fixtures import MODEL, GatewayHarness, chat_body, end, run_gateway, say

CHAT = "/v1/chat/completions"


def add_key(state_dir: Path, tenant: str) -> dict[str, str]:
    """Headers with a new key of ``tenant``."""
    key, token = create_key(tenant, (Scope.INFER, Scope.ADMIN))
    change_keys(key_file_path(state_dir), lambda known: (*known, key))
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[GatewayHarness]:
    add_key(tmp_path, "nobody")
    async with run_gateway(redis_url, tmp_path) as harness:
        yield harness


def configure(gateway: GatewayHarness, **tenants: TenantPolicy) -> None:
    """Give tenants their policies."""
    settings = gateway.server.gateway.settings
    gateway.server.gateway.admission = Admission(settings, SchedulerConfig(tenants=tenants))


async def known_key(gateway: GatewayHarness, state_dir: Path, tenant: str) -> dict[str, str]:
    headers = add_key(state_dir, tenant)

    async def is_known() -> bool:
        async with gateway.client.get(gateway.url + "/v1/models", headers=headers) as response:
            return response.status == 200

    await eventually(is_known)
    return headers


async def test_requests_a_minute_are_counted_over_gateways(
    gateway: GatewayHarness, tmp_path: Path, redis_url: str
) -> None:
    """Headers count down, the next one is a 429 with an honest Retry-After; another tenant and unlimited ones go on."""
    configure(gateway, a=TenantPolicy(requests_per_minute=3))
    a, b = await known_key(gateway, tmp_path, "a"), await known_key(gateway, tmp_path, "b")
    remaining = []
    async with run_gateway(redis_url, tmp_path) as other:
        other.worker.script = gateway.worker.script
        configure(other, a=TenantPolicy(requests_per_minute=3))
        for one in (gateway, gateway, other):
            status, headers, _ = await one.post(CHAT, chat_body(), headers=a)
            assert status == 200
            remaining.append(headers["x-ratelimit-remaining-requests"])
            assert headers["x-ratelimit-limit-requests"] == "3"
            assert re.fullmatch(r"\d+ms|\d+s|\d+m\d+s", headers["x-ratelimit-reset-requests"])
        assert remaining == ["2", "1", "0"]
        for one in (gateway, other):
            status, headers, body = await one.post(CHAT, chat_body(), headers=a)
            assert (status, body["error"]["code"]) == (429, "requests_quota_exceeded")
            assert 1 <= int(headers["Retry-After"]) <= 120
            assert headers["x-ratelimit-remaining-requests"] == "0"
    status, headers, _ = await gateway.post(CHAT, chat_body(), headers=b)
    assert status == 200
    assert "x-ratelimit-limit-requests" not in headers


async def test_tokens_are_reserved_and_then_corrected(gateway: GatewayHarness, tmp_path: Path) -> None:
    """A call reserves what it may use and pays what it used; streamed answers carry the headers too."""
    configure(gateway, a=TenantPolicy(tokens_per_minute=1000))
    headers = await known_key(gateway, tmp_path, "a")
    gateway.worker.script = say("Hello", terminal=end(completion_tokens=95))  # and 5 of the prompt
    _, told, _ = await gateway.post(CHAT, chat_body(max_tokens=500), headers=headers)
    assert int(told["x-ratelimit-remaining-tokens"]) < 500

    async def remaining() -> int:
        async with gateway.client.post(
            gateway.url + CHAT, json=chat_body(max_tokens=1, stream=True), headers=headers
        ) as response:
            assert response.status == 200
            await response.read()
            return int(response.headers["x-ratelimit-remaining-tokens"])

    assert 850 < await remaining() < 990  # 900, and what a minute's share gives back meanwhile; 500 before
    status, told, body = await gateway.post(CHAT, chat_body(max_tokens=1000), headers=headers)
    assert (status, body["error"]["code"]) == (429, "tokens_quota_exceeded")
    assert int(told["Retry-After"]) >= 1


async def test_calls_at_once_are_bounded_and_given_back(gateway: GatewayHarness, tmp_path: Path) -> None:
    """The limit counts what runs; an end, a client's leaving and an error give the place back."""
    configure(gateway, a=TenantPolicy(concurrency=1))
    headers = await known_key(gateway, tmp_path, "a")
    go_on = asyncio.Event()

    async def script(request: GenerateRequest, publish: Any) -> None:
        await go_on.wait()
        await say("x")(request, publish)

    gateway.worker.script = script
    running = asyncio.create_task(gateway.post(CHAT, chat_body(), headers=headers))
    await eventually(lambda: gateway.worker.seen)
    status, told, body = await gateway.post(CHAT, chat_body(), headers=headers)
    assert (status, body["error"]["code"], told["Retry-After"]) == (429, "concurrency_quota_exceeded", "1")
    running.cancel()
    redis: Any = gateway.redis

    async def is_free() -> bool:
        return await redis.zcard(keys.tenant_running("a")) == 0

    await eventually(is_free)
    go_on.set()
    assert (await gateway.post(CHAT, chat_body(), headers=headers))[0] == 200
    await eventually(is_free)


async def test_usage_is_recorded_by_tenant_key_and_model(gateway: GatewayHarness, tmp_path: Path) -> None:
    """Requests and tokens add up; the day's counters have a TTL; keys know when they were last used."""
    headers = await known_key(gateway, tmp_path, "acme")
    for _ in range(3):
        await gateway.post(CHAT, chat_body(), headers=headers)
    await gateway.post(CHAT, chat_body(model="nope"), headers=headers)
    await gateway.server.gateway.usage.flush()

    async def rows() -> Any:
        async with gateway.client.get(gateway.url + "/admin/usage?days=2", headers=headers) as response:
            found = [row for row in (await response.json())["data"] if row["tenant"] == "acme"]
            return found if found and found[0]["requests"] >= 3 else None

    (row,) = await eventually(rows, what="three requests of the tenant")
    assert (row["model"], row["requests"], row["prompt_tokens"], row["completion_tokens"]) == (MODEL, 3, 15, 6)
    assert row["key_id"] == headers["Authorization"].split("_")[1]
    redis: Any = gateway.redis
    assert 0 < await redis.ttl(keys.usage(row["day"])) <= keys.USAGE_TTL_S
    assert await redis.hexists(keys.KEYS_USED, row["key_id"])
    for days in ("0", "41", "x", "-1", "1e1"):
        async with gateway.client.get(f"{gateway.url}/admin/usage?days={days}", headers=headers) as response:
            assert response.status == 400


async def test_the_usage_verb_prints_a_table(gateway: GatewayHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """`glowplug usage` asks the server and shows what it says."""
    from click.testing import CliRunner

    from scheduler.usage_command import usage

    row = {"day": "2026-11-22", "tenant": "acme", "key_id": "abcdefgh", "model": MODEL}
    counts = {"requests": 3, "errors": 0, "prompt_tokens": 15, "completion_tokens": 6}
    monkeypatch.setattr("scheduler.usage_command.get_json", lambda url, path: {"data": [{**row, **counts}]})
    shown = CliRunner().invoke(usage, ["--url", gateway.url])
    assert shown.exit_code == 0
    assert "acme" in shown.output
    assert json.loads(CliRunner().invoke(usage, ["--url", gateway.url, "--json"]).output)[0]["requests"] == 3


async def test_a_tenants_weight_reaches_the_queue(gateway: GatewayHarness, tmp_path: Path) -> None:
    """The policy's weight divides the cost of the tenant's requests."""
    configure(gateway, heavy=TenantPolicy(weight=4.0))
    redis: Any = gateway.redis
    ends = {}
    blocker = {"blocker": 0}
    await redis.zadd(keys.queue(MODEL), blocker)
    for tenant in ("heavy", "light"):
        headers = await known_key(gateway, tmp_path, tenant)
        await gateway.post(CHAT, chat_body(max_tokens=100), headers=headers)
        ends[tenant] = int(await redis.hget(keys.fair(MODEL), f"0:{tenant}"))
    assert 3.5 < ends["light"] / ends["heavy"] < 4.5
    assert gateway.worker.seen[0].tenant == "heavy"
