"""Parts that stop, die in pairs, or are restarted in turn under load, with a ledger on the client's side."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from scheduler.contract import keys
from tests.eventually import eventually
from tests.fleet_fixtures import Answer, Fleet, copy_linked, read_stream, started_fleet
from tests.model_fixtures import SMOLLM2

TOKENS = 20


@pytest.fixture
async def fleet(smollm2_state_dir: Path, short_tmp_path: Path) -> AsyncIterator[Fleet]:
    async with started_fleet(
        copy_linked(smollm2_state_dir, short_tmp_path / "s"),
        GLOWPLUG_UNHEARD_GRACE_S="1",
        GLOWPLUG_GATEWAY_DRAIN_GRACE_S="0.1",
    ) as running:
        yield running


def begin(fleet: Fleet, first: str = "gateway-0", tokens: int = TOKENS) -> tuple[Answer, asyncio.Task[Answer]]:
    answer = Answer()
    return answer, asyncio.create_task(fleet.ask(answer, first, model=SMOLLM2, max_tokens=tokens))


async def in_mid_stream(answer: Answer) -> None:
    await eventually(lambda: len(answer.ids) >= 4, what="a stream that has begun")


async def test_parts_that_stand_still_or_die_in_pairs_lose_nothing(fleet: Fleet) -> None:
    """SIGSTOP of worker, leader, agent and gateway; kill -9 of pairs: each stream whole, once, in order."""

    async def finish(answer: Answer, asking: asyncio.Task[Answer], what: str, since_s: float) -> None:
        await asyncio.wait_for(asking, 90)
        print(f"{what}: whole {time.monotonic() - since_s:.2f} s after the fault")
        await fleet.check(answer, TOKENS)

    # The worker is killed: noticed by its parent, replaced, its request goes on.
    answer, asking = begin(fleet)
    await in_mid_stream(answer)
    since_s = time.monotonic()
    os.kill(fleet.find_workers()[0], signal.SIGKILL)
    await finish(answer, asking, "worker killed", since_s)

    # The worker stands still: its report runs out, it is replaced.
    answer, asking = begin(fleet)
    await in_mid_stream(answer)
    since_s = time.monotonic()
    os.kill(fleet.find_workers()[0], signal.SIGSTOP)
    await finish(answer, asking, "worker stopped", since_s)

    # The leader stands still: the other one leads; the sleeper is deposed when it wakes.
    leader = await fleet.leader()
    answer, asking = begin(fleet)
    await in_mid_stream(answer)
    since_s = time.monotonic()
    fleet.send(leader, signal.SIGSTOP)
    standby = next(name for name in fleet.names if name.startswith("scheduler") and name != leader)
    before = len(fleet.log_events(standby, "leading"))
    await eventually(lambda: len(fleet.log_events(standby, "leading")) > before, what="a new leader")
    print(f"leader stopped: standby leads after {time.monotonic() - since_s:.2f} s")
    fleet.send(leader, signal.SIGCONT)
    await finish(answer, asking, "leader stopped", since_s)

    # Leader and worker die together: the standby has the worker replaced.
    answer, asking = begin(fleet)
    await in_mid_stream(answer)
    since_s = time.monotonic()
    fleet.send(await fleet.leader(), signal.SIGKILL)
    os.kill(fleet.find_workers()[0], signal.SIGKILL)
    await finish(answer, asking, "leader and worker killed", since_s)

    # Agent (with all its processes) and gateway die together; both come back.
    answer, asking = begin(fleet)
    await in_mid_stream(answer)
    since_s = time.monotonic()
    fleet.send("gateway-0", signal.SIGKILL)
    fleet.send("agent", signal.SIGKILL)
    fleet.mend()
    await finish(answer, asking, "gateway and agent killed", since_s)

    # The agent stands still: what runs goes on without it.
    answer, asking = begin(fleet)
    await in_mid_stream(answer)
    since_s = time.monotonic()
    fleet.send("agent", signal.SIGSTOP)
    await finish(answer, asking, "agent stopped", since_s)
    fleet.send("agent", signal.SIGCONT)

    # The gateway stands still: its client goes on elsewhere, and the sleeper's late clean-up cancels nothing.
    is_caught = False
    while not is_caught:
        answer, asking = begin(fleet, tokens=3 * TOKENS)
        await in_mid_stream(answer)
        fleet.send("gateway-0", signal.SIGSTOP)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        is_caught = not answer.is_done
        if not is_caught:  # the stream was quicker than this process
            fleet.send("gateway-0", signal.SIGCONT)
    again = asyncio.create_task(fleet.ask(answer, "gateway-1"))
    await eventually(lambda: answer.num_resumes >= 1 and len(answer.ids) > 8, what="the rest")
    fleet.send("gateway-0", signal.SIGCONT)
    await again
    await fleet.check(answer, 3 * TOKENS)


async def test_restarting_every_part_in_turn_under_load_loses_nothing(fleet: Fleet) -> None:
    """SIGTERM and a new process, part by part, while clients ask: the ledger has every answer whole."""
    ledger: list[Answer] = []
    is_over = asyncio.Event()

    async def client(number: int) -> None:
        while not is_over.is_set():
            answer = Answer()
            ledger.append(answer)
            await fleet.ask(answer, f"gateway-{number % 2}", model=SMOLLM2, max_tokens=TOKENS)

    clients = [asyncio.create_task(client(number)) for number in range(3)]
    for name in fleet.names:
        num_answers = len(ledger)
        fleet.send(name, signal.SIGTERM)
        assert await asyncio.to_thread(fleet.parts[name].wait, 30) == 0, fleet.log(name)[-2000:]
        fleet.mend()
        await eventually(lambda n=num_answers: len(ledger) > n + 1, what=f"answers after {name}")
    is_over.set()
    await asyncio.wait_for(asyncio.gather(*clients), 90)
    print(f"rolling restart: {len(ledger)} requests, {sum(a.num_resumes for a in ledger)} resumed elsewhere")
    for answer in ledger:
        await fleet.check(answer, TOKENS)


async def test_requests_that_nobody_hears_are_cancelled_after_the_grace(fleet: Fleet) -> None:
    """A killed gateway's client does not come back: its sequence is freed, and a late comer is told."""
    answer, asking = begin(fleet, tokens=2000)
    await in_mid_stream(answer)
    fleet.send("gateway-0", signal.SIGKILL)
    asking.cancel()  # before it can go on elsewhere

    async def is_gone() -> bool:
        return not await fleet.redis.exists(keys.job(answer.request_id))

    await eventually(is_gone, what="the request cancelled")
    await fleet.ask(answer, "gateway-1")
    assert answer.error is not None
    assert answer.error["code"] == "cancelled"

    async def is_counted() -> bool:
        return (await fleet.status()).swept.get("unheard_requests", 0) >= 1

    await eventually(is_counted, what="the count in the status report")
    async with aiohttp.ClientSession() as client:
        other = answer.request_id[:-1] + ("0" if answer.request_id[-1] != "0" else "1")
        async with client.get(f"{fleet.urls['gateway-1']}/v1/requests/{other}/stream") as response:
            unknown = Answer()
            await read_stream(response, unknown)
    assert unknown.error is not None
    assert unknown.error["status"] == 404
