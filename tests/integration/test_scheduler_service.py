"""The scheduler's loop against a real server: orders, single flight, idle drain, refusal, leadership."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from scheduler.config import ModelPolicy, SchedulerConfig
from scheduler.contract import codec, keys
from scheduler.contract.connection import connect
from scheduler.contract.errors import ErrorCode, ErrorInfo
from scheduler.contract.messages import (
    AgentCommand,
    DrainWorker,
    GenerateRequest,
    InboxMessage,
    ModelCard,
    ModelsChanged,
    NodeReport,
    SamplingParams,
    SpawnWorker,
    StatusReport,
    TerminalFrame,
    WorkerChanged,
)
from scheduler.contract.states import SlotState
from scheduler.dispatch import Dispatcher
from scheduler.service import Scheduler
from tests.eventually import eventually

MODEL = "m"
NODE = "n1"


class Stage:
    """A scheduler on a real server, with one node and one model, and a test in the agent's place."""

    def __init__(self, redis_url: str) -> None:
        self.redis: Any = connect(redis_url)
        self.dispatcher = Dispatcher(self.redis)
        config = SchedulerConfig(defaults=ModelPolicy(idle_timeout_s=0.3, kv_budget_bytes=2**20))
        self.scheduler = Scheduler(connect(redis_url), config, "s1")
        self.standby = Scheduler(connect(redis_url), config, "s2")

    async def publish_card(self, card: ModelCard) -> None:
        await self.redis.hset(keys.MODELS, card.name, codec.encode(card))
        await self.tell(ModelsChanged(NODE))

    async def publish_node(self) -> None:
        report = NodeReport(NODE, 1, time.time(), 2**40, 2**40, {})
        await self.redis.sadd(keys.NODES, NODE)
        await self.redis.set(keys.node(NODE), codec.encode(report), ex=60)

    async def tell(self, message: InboxMessage) -> None:
        await self.redis.xadd(keys.INBOX, {keys.FIELD: codec.encode(message)})

    async def enqueue(self, request_id: str) -> None:
        sampling = SamplingParams(seed=1, max_tokens=1)
        await self.dispatcher.enqueue(GenerateRequest(request_id, MODEL, "g1", "hi", sampling))

    async def commands(self) -> list[AgentCommand]:
        entries = await self.redis.xrange(keys.node_commands(NODE))
        return [codec.decode(fields[keys.FIELD.encode()], AgentCommand) for _, fields in entries]

    async def first(self, kind: type[Any]) -> Any:
        async def probe() -> Any:
            return next((command for command in await self.commands() if isinstance(command, kind)), None)

        return await eventually(probe, what=f"a {kind.__name__} order")

    async def status(self) -> StatusReport | None:
        data = await self.redis.get(keys.STATUS)
        return codec.decode(data, StatusReport) if data else None


@pytest.fixture
async def stage(redis_url: str) -> AsyncIterator[Stage]:
    """A running scheduler that already knows the node and the model."""
    stage = Stage(redis_url)
    await stage.publish_node()
    await stage.publish_card(ModelCard(MODEL, weights_bytes=1))
    running = asyncio.create_task(stage.scheduler.run())
    await eventually(stage.status, what="a status report")
    yield stage
    stage.scheduler.stop()
    stage.standby.stop()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def test_a_hundred_demands_order_one_worker_and_an_idle_one_is_drained(stage: Stage) -> None:
    """Single flight; then, with the queue empty, the idle timer drains the worker with the leader's token."""
    for number in range(100):
        await stage.enqueue(f"r{number}")
    spawn: SpawnWorker = await stage.first(SpawnWorker)
    await stage.tell(WorkerChanged(NODE, spawn.worker_id, MODEL, SlotState.READY))
    await stage.redis.delete(keys.queue(MODEL))  # as if all were answered
    drain: DrainWorker = await stage.first(DrainWorker)
    assert (drain.worker_id, drain.fencing_token) == (spawn.worker_id, spawn.fencing_token)
    assert sum(isinstance(command, SpawnWorker) for command in await stage.commands()) == 1


async def test_demand_that_came_before_the_scheduler_started_is_served(redis_url: str) -> None:
    """A new leader reads the queues, not only the inbox's news."""
    stage = Stage(redis_url)
    await stage.publish_node()
    await stage.publish_card(ModelCard(MODEL, weights_bytes=1))
    await stage.enqueue("early")
    running = asyncio.create_task(stage.scheduler.run())
    await stage.first(SpawnWorker)
    stage.scheduler.stop()
    await running


async def test_a_refused_snapshot_ends_the_queue_with_its_error(stage: Stage) -> None:
    """Each queued request gets one terminal frame with the card's error."""
    error = ErrorInfo(ErrorCode.SNAPSHOT_CORRUPT, "chunk 3 of weights")
    await stage.publish_card(ModelCard(MODEL, refused=error))
    await stage.enqueue("r1")

    async def ended() -> Any:
        return await stage.redis.lrange(keys.token_log("r1"), 0, -1)

    (frame,) = await eventually(ended, what="a terminal frame")
    decoded = codec.decode_frame(frame)
    assert isinstance(decoded, TerminalFrame)
    assert decoded.error == error


async def test_a_failed_wake_is_tried_again(stage: Stage) -> None:
    """A worker that fails before it is ready is replaced after the back-off."""
    await stage.enqueue("r1")
    spawn: SpawnWorker = await stage.first(SpawnWorker)
    error = ErrorInfo(ErrorCode.WORKER_FAILED, "exit status 1")
    await stage.tell(WorkerChanged(NODE, spawn.worker_id, MODEL, SlotState.FAILED, exited=True, error=error))

    async def spawned_again() -> bool:
        return sum(isinstance(command, SpawnWorker) for command in await stage.commands()) == 2

    await eventually(spawned_again, what="a second spawn")


async def test_a_model_whose_workers_die_is_held_back_and_tried_again(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the limit its queue is refused with why and when; after the wait one more worker is ordered."""
    monkeypatch.setattr("scheduler.autoscaler.REFUSED_FROM", 3)
    monkeypatch.setattr("scheduler.crash_streak.FIRST_DELAY_S", 2.0)  # so long that the refusal comes within it
    error = ErrorInfo(ErrorCode.WORKER_FAILED, "killed by signal SIGSEGV")

    async def orders() -> list[SpawnWorker]:
        return [command for command in await stage.commands() if isinstance(command, SpawnWorker)]

    async def ordered(number: int) -> bool:
        return len(await orders()) == number

    await stage.enqueue("r1")
    for number in (1, 2, 3):
        await eventually(lambda number=number: ordered(number), what=f"worker {number}")  # type: ignore[misc]
        worker_id = (await orders())[-1].worker_id
        await stage.tell(WorkerChanged(NODE, worker_id, MODEL, SlotState.READY))
        await stage.tell(WorkerChanged(NODE, worker_id, MODEL, SlotState.FAILED, True, error, True))

    async def ended() -> Any:
        return await stage.redis.lrange(keys.token_log("r1"), 0, -1)

    decoded = codec.decode_frame((await eventually(ended, what="a terminal frame"))[0])
    assert isinstance(decoded, TerminalFrame)
    assert decoded.error is not None
    assert decoded.error.code is ErrorCode.WAKE_FAILED
    assert decoded.error.retry_after_s in (1, 2, 3)
    assert "SIGSEGV" in decoded.error.message
    asked = 1

    async def tried_again() -> bool:
        nonlocal asked
        asked += 1
        await stage.enqueue(f"r{asked}")
        return len(await orders()) > 3

    await eventually(tried_again, what="another try")


async def test_a_standby_takes_over_with_a_newer_token(stage: Stage) -> None:
    """When the leader stops, the other one leads, and its token is higher."""
    before = int(await stage.redis.get(keys.LEADER_TOKEN) or 0)
    running = asyncio.create_task(stage.standby.run())
    stage.scheduler.stop()

    async def leader() -> bool:
        status = await stage.status()
        return status is not None and status.leader == "s2"

    await eventually(leader, what="the standby to lead")
    await stage.enqueue("r1")
    spawn: SpawnWorker = await stage.first(SpawnWorker)
    assert 0 < before < spawn.fencing_token
    stage.standby.stop()
    await running


async def test_malformed_inbox_messages_are_skipped(stage: Stage) -> None:
    """Garbage in the inbox stops nothing."""
    await stage.redis.xadd(keys.INBOX, {"x": b"y"})
    await stage.redis.xadd(keys.INBOX, {keys.FIELD: b"\xff\x00garbage"})
    await stage.enqueue("r1")
    await stage.first(SpawnWorker)
