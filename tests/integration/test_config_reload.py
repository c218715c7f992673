"""``config:reload`` reaches every process, drops no stream, and says who did not follow."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from scheduler.config import load_config
from scheduler.contract import codec, keys
from scheduler.contract.environment import SettingsError
from scheduler.contract.messages import GenerateRequest, NodeReport
from scheduler.contract.reloading import AGENT, ReloadListener
from scheduler.service import Scheduler
from tests.eventually import eventually
from tests.gateway_fixtures import MODEL, GatewayHarness, Publish, chat_body, run_gateway, say

CHAT = "/v1/chat/completions"
RELOAD = "/admin/config:reload"
LIVES_S = 60  # the sign of life of a process that a test makes up


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "glowplug.yaml"
    path.write_text("defaults: {batch_in_flight: 1}\n")
    return path


@pytest.fixture
async def pair(redis_url: str, tmp_path: Path, config: Path) -> AsyncIterator[list[GatewayHarness]]:
    """Two gateways that read the same file."""
    async with run_gateway(redis_url, tmp_path) as first, run_gateway(redis_url, tmp_path) as second:
        for one in (first, second):
            one.server._config_path = config
            await hear(one.server._reloading)
        yield [first, second]


def write(path: Path, text: str) -> None:
    path.write_text(text)


async def hear(listener: ReloadListener) -> None:
    """Wait until ``listener`` is subscribed."""
    await eventually(lambda: listener._subscription._subscribed.is_set(), what="a listener's subscription")


def in_flight(gateway: GatewayHarness) -> int:
    """The policy that the test changes, as a gateway has it."""
    return gateway.server.gateway.admission.model_policy(MODEL).batch_in_flight


def members(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["part"], row["member"]) for row in rows]


def ids(pair: list[GatewayHarness]) -> list[tuple[str, str]]:
    return sorted(("gateway", one.server.gateway.gateway_id) for one in pair)


async def test_every_gateway_reloads_and_streams_go_on(pair: list[GatewayHarness], config: Path) -> None:
    """A stream is open at the second gateway while the first is asked: both have the new policy, the stream its end."""
    gate = asyncio.Event()

    async def held(request: GenerateRequest, publish: Publish) -> None:
        await gate.wait()
        await say("whole")(request, publish)

    for one in pair:
        one.worker.script = held
    stream = asyncio.create_task(pair[1].stream(CHAT, chat_body()))
    await eventually(lambda: pair[1].worker.seen, what="the request at a worker")
    write(config, "defaults: {batch_in_flight: 7}\n")
    status, _, answer = await pair[0].post(RELOAD, {})
    assert (status, members(answer["reloaded"]), answer["failed"], answer["silent"]) == (202, ids(pair), [], [])
    assert [in_flight(one) for one in pair] == [7, 7]
    gate.set()
    _, blocks = await stream
    assert blocks[-1] == "data: [DONE]"
    assert any("whole" in block for block in blocks)


async def test_a_gateway_whose_file_is_wrong_is_named(pair: list[GatewayHarness], config: Path, tmp_path: Path) -> None:
    """On another host the file may differ: that gateway keeps what it had, with the line of the error."""
    other = tmp_path / "other.yaml"
    write(other, "defaults:\n  batch_in_fligt: 9\n")
    pair[1].server._config_path = other
    write(config, "defaults: {batch_in_flight: 8}\n")
    _, _, answer = await pair[0].post(RELOAD, {})
    assert [in_flight(one) for one in pair] == [8, 16]
    assert members(answer["failed"]) == [("gateway", pair[1].server.gateway.gateway_id)]
    assert "other.yaml:2: defaults.batch_in_fligt: unknown field" in answer["failed"][0]["error"]
    status, _, refused = await pair[1].post(RELOAD, {})
    assert (status, refused["error"]["code"]) == (400, "invalid_configuration")


async def test_who_does_not_answer_is_named(pair: list[GatewayHarness]) -> None:
    """A gateway and a node that live but hear nothing: silent, after a bounded wait; dead ones are not waited for."""
    redis: Any = pair[0].redis
    await redis.sadd(keys.GATEWAYS, "stopped", "dead")
    await redis.set(keys.gateway_alive("stopped"), b"1", ex=LIVES_S)
    await redis.sadd(keys.NODES, "cut-off")
    await redis.set(keys.node("cut-off"), b"1", ex=LIVES_S)
    _, _, answer = await pair[0].post(RELOAD, {})
    assert members(answer["reloaded"]) == ids(pair)
    assert members(answer["silent"]) == [("agent", "cut-off"), ("gateway", "stopped")]


async def test_schedulers_and_agents_follow_too(pair: list[GatewayHarness], config: Path) -> None:
    """The leader and its standby take the new policies; an agent says what holds after a restart only."""

    async def check() -> tuple[str, ...]:
        return ("agent.threads",)

    redis: Any = pair[0].redis
    await redis.sadd(keys.NODES, "node-1")
    await redis.set(keys.node("node-1"), codec.encode(NodeReport("node-1", 1, time.time(), 1, 1, {})), ex=LIVES_S)
    agent = ReloadListener(redis, AGENT, "node-1", check)
    schedulers = [Scheduler(redis, load_config(config, env={}), name, config) for name in ("s1", "s2")]
    running = [asyncio.create_task(one.run()) for one in schedulers]
    agent.start()
    for listener in (agent, *(one.reloading for one in schedulers)):
        await hear(listener)
    write(config, "defaults: {batch_in_flight: 9}\n")
    follow = [("agent", "node-1"), *ids(pair), ("scheduler", "s1"), ("scheduler", "s2")]

    async def all_followed() -> bool:
        # A standby shows no sign of life, so that the answer does not wait for it: it may come in the next one.
        _, _, found = await pair[0].post(RELOAD, {})
        return members(found["reloaded"]) == follow

    await eventually(all_followed, what="every process among those that reloaded")
    _, _, answer = await pair[0].post(RELOAD, {})
    assert (answer["failed"], answer["silent"]) == ([], [])
    assert answer["reloaded"][0] == {"part": "agent", "member": "node-1", "needs_restart": ["agent.threads"]}
    assert [one._config.defaults.batch_in_flight for one in schedulers] == [9, 9]
    for one in schedulers:
        one.stop()
    await agent.aclose()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*running)


async def test_a_wrong_file_changes_nothing_in_a_process(redis_url: str, pair: list[GatewayHarness]) -> None:
    """The listener's answer carries the error; nothing is raised into the process."""

    async def refuse() -> tuple[str, ...]:
        raise SettingsError("glowplug.yaml:1: no")

    answer = await ReloadListener(pair[0].redis, AGENT, "n", refuse).reload()
    assert (answer.error, answer.needs_restart) == ("glowplug.yaml:1: no", ())
