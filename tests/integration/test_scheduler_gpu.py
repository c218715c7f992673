"""The scheduler's loop on a real server with a node that has a GPU, and the test in the agent's place."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from scheduler import gpu_placement
from scheduler.config import ModelPolicy, SchedulerConfig
from scheduler.contract import codec, keys
from scheduler.contract.connection import connect
from scheduler.contract.messages import (
    AgentCommand,
    DrainWorker,
    GenerateRequest,
    GpuReport,
    InboxMessage,
    ModelCard,
    ModelOrder,
    NodeReport,
    ParkWorker,
    SamplingParams,
    SpawnWorker,
    WorkerChanged,
)
from scheduler.contract.states import ModelAct, SlotState
from scheduler.dispatch import Dispatcher
from scheduler.service import Scheduler
from tests.eventually import eventually

NODE = "g1"
GIB = 1 << 30


class Stage:
    """One GPU of 24 GiB, two models of 14 with their KV budget."""

    def __init__(self, redis_url: str) -> None:
        self.redis: Any = connect(redis_url)
        self.dispatcher = Dispatcher(self.redis)
        config = SchedulerConfig(defaults=ModelPolicy(idle_timeout_s=600.0, kv_budget_bytes=GIB))
        self.scheduler = Scheduler(connect(redis_url), config, "s1")

    async def report(self, free_gib: int) -> None:
        """A heartbeat of the node."""
        gpu = GpuReport(0, "GPU-a", "Stand-in", 24 * GIB, free_gib * GIB)
        node = NodeReport(NODE, 1, time.time(), 64 * GIB, 64 * GIB, {}, backend="cuda", gpus=(gpu,))
        await self.redis.sadd(keys.NODES, NODE)
        await self.redis.set(keys.node(NODE), codec.encode(node), ex=60)

    async def tell(self, message: InboxMessage) -> None:
        await self.redis.xadd(keys.INBOX, {keys.FIELD: codec.encode(message)})

    async def ask(self, model: str) -> None:
        sampling = SamplingParams(seed=1, max_tokens=1)
        await self.dispatcher.enqueue(GenerateRequest(f"r-{model}", model, "g1", "hi", sampling))

    async def nth(self, kind: type[Any], number: int = 0) -> Any:
        """The order of that kind, once there are so many."""

        async def probe() -> Any:
            entries = await self.redis.xrange(keys.node_commands(NODE))
            orders = [codec.decode(fields[keys.FIELD.encode()], AgentCommand) for _, fields in entries]
            found = [order for order in orders if isinstance(order, kind)]
            return found[number] if len(found) > number else None

        return await eventually(probe, what=f"{kind.__name__} order {number}")


@pytest.fixture
async def stage(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    """A running scheduler; models may leave as soon as they are idle."""
    monkeypatch.setattr(gpu_placement, "MIN_RESIDENCE_S", 0.0)
    stage = Stage(redis_url)
    await stage.report(24)
    for name in ("one", "two"):
        await stage.redis.hset(keys.MODELS, name, codec.encode(ModelCard(name, weights_bytes=13 * GIB)))
    running = asyncio.create_task(stage.scheduler.run())
    await eventually(lambda: stage.redis.exists(keys.STATUS), what="a status report")
    yield stage
    stage.scheduler.stop()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def test_two_models_take_turns_on_one_gpu(stage: Stage) -> None:
    """The idle one is drained for the other, which is started only when the driver shows its memory free."""
    await stage.ask("one")
    first: SpawnWorker = await stage.nth(SpawnWorker)
    assert (first.model, first.device) == ("one", "GPU-a")
    await stage.tell(WorkerChanged(NODE, first.worker_id, "one", SlotState.READY))
    await stage.report(9)
    await stage.redis.delete(keys.queue("one"))  # as if answered
    await stage.ask("two")
    drain: DrainWorker = await stage.nth(DrainWorker)
    assert drain.worker_id == first.worker_id
    await stage.report(24)
    await stage.tell(WorkerChanged(NODE, first.worker_id, "one", SlotState.COLD, exited=True))
    second: SpawnWorker = await stage.nth(SpawnWorker, 1)
    assert (second.model, second.device) == ("two", "GPU-a")
    assert await stage.redis.xlen(keys.node_commands(NODE)) == 3


async def test_operators_park_and_wake_what_is_there(stage: Stage) -> None:
    """park goes to workers that are ready, wake to those that are parked; neither starts a process."""
    await stage.ask("one")
    spawn: SpawnWorker = await stage.nth(SpawnWorker)
    await stage.tell(WorkerChanged(NODE, spawn.worker_id, "one", SlotState.READY))
    await stage.tell(ModelOrder("one", ModelAct.PARK))
    park: ParkWorker = await stage.nth(ParkWorker)
    assert (park.worker_id, park.is_parked, park.fencing_token) == (spawn.worker_id, True, spawn.fencing_token)
    await stage.tell(WorkerChanged(NODE, spawn.worker_id, "one", SlotState.PARKED))
    await stage.tell(ModelOrder("one", ModelAct.WAKE))
    back: ParkWorker = await stage.nth(ParkWorker, 1)
    assert (back.worker_id, back.is_parked) == (spawn.worker_id, False)
    assert await stage.redis.xlen(keys.node_commands(NODE)) == 3
