"""The queue's server dies, forgets, stands still or fills up: nothing accepted is lost, and nothing hangs."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from scheduler.contract import codec, keys
from tests.eventually import eventually
from tests.fleet_fixtures import CHAT, DURABLE, FORGETFUL, Answer, Fleet, copy_linked, started_fleet, stopped
from tests.model_fixtures import SMOLLM2

MANY = 4
TOKENS = 20
PATIENT = {"GLOWPLUG_STOPPED_LIMIT_S": "60"}  # workers are stopped for a moment


@pytest.fixture(params=[FORGETFUL, DURABLE], ids=["forgetful", "durable"])
async def fleet(request: pytest.FixtureRequest, smollm2_state_dir: Path, short_tmp_path: Path) -> AsyncIterator[Fleet]:
    async with started_fleet(
        copy_linked(smollm2_state_dir, short_tmp_path / "s"), *request.param, **PATIENT
    ) as running:
        yield running


async def ask_many(fleet: Fleet) -> tuple[list[Answer], list[asyncio.Task[Answer]]]:
    """Streams at both gateways, all of them in the middle."""
    answers = [Answer() for _ in range(MANY)]
    asking = [
        asyncio.create_task(fleet.ask(answer, f"gateway-{i % 2}", model=SMOLLM2, max_tokens=TOKENS))
        for i, answer in enumerate(answers)
    ]

    def are_in_the_middle() -> bool:
        for task in asking:
            if task.done():
                task.result()  # raises what ended it: a refusal, for example
        assert [answer.error for answer in answers if answer.error] == []
        return all(len(answer.ids) >= 3 for answer in answers)

    await eventually(are_in_the_middle, what="every stream in its middle")
    return answers, asking


async def ask_many_and_kill_server(fleet: Fleet) -> tuple[list[Answer], list[asyncio.Task[Answer]]]:
    """As above; then the server is killed while no request has ended: the log of one that has would be lost with it."""
    for _ in range(10):
        answers, asking = await ask_many(fleet)
        with stopped(*fleet.find_workers()):
            logs = [await fleet.redis.lrange(keys.token_log(answer.request_id), -1, -1) for answer in answers]  # type: ignore[misc]
            if not any(codec.is_terminal(log[0]) for log in logs):
                fleet.redis_process.kill()
                return answers, asking
        await check_all(fleet, answers, asking)
    raise AssertionError("the requests were always quicker")


async def check_all(fleet: Fleet, answers: list[Answer], asking: list[asyncio.Task[Answer]]) -> None:
    await asyncio.wait_for(asyncio.gather(*asking), 90)
    for answer in answers:
        await fleet.check(answer, TOKENS)


async def refused_with_503(fleet: Fleet) -> bool:
    """Whether a new request is refused, with a time to come back."""
    body = {"model": SMOLLM2, "messages": [{"role": "user", "content": "x"}]}
    async with aiohttp.ClientSession() as client, client.post(fleet.urls["gateway-0"] + CHAT, json=body) as response:
        return response.status == 503 and int(response.headers["Retry-After"]) > 0


async def test_a_server_that_is_killed_and_restarted_loses_no_request(fleet: Fleet) -> None:
    """Alone and together with the worker; with and without its data: each stream ends once, whole, as logged."""
    for kills_worker in (False, True):
        answers, asking = await ask_many_and_kill_server(fleet)
        if kills_worker:
            os.kill(fleet.find_workers()[0], signal.SIGKILL)
        fleet.redis_process.start()
        await check_all(fleet, answers, asking)
        await fleet.wait_ready()  # until they know that it is back, new requests are refused
    recovered = [fleet.log_events(name, "request_recovered") for name in ("gateway-0", "gateway-1")]
    assert fleet.redis_process.options == DURABLE or any(recovered)


async def test_running_generations_go_on_without_the_server_and_catch_up(
    smollm2_state_dir: Path, short_tmp_path: Path
) -> None:
    """Down for a while: new requests are 503 with Retry-After; what ran is complete once it is back. Then slow."""
    async with started_fleet(copy_linked(smollm2_state_dir, short_tmp_path / "s"), *FORGETFUL, **PATIENT) as fleet:
        answers, asking = await ask_many_and_kill_server(fleet)
        assert await refused_with_503(fleet)
        fleet.redis_process.start()
        await check_all(fleet, answers, asking)
        await fleet.wait_ready()  # until they know that it is back, new requests are refused
        answers, asking = await ask_many(fleet)
        with stopped(fleet.redis_process.process.pid):
            await asyncio.sleep(1.5)  # the fault itself: a server that does not answer for so long
        await check_all(fleet, answers, asking)
