"""The agent's table of workers, with the test in the place of zygote, sealed memory and Redis."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from scheduler.contract.errors import ErrorCode, ErrorInfo
from scheduler.contract.messages import ModelCard, SpawnWorker
from scheduler.contract.states import SlotState
from snapshots.errors import BlobCorrupt, SnapshotError
from snapshots.store import ManifestStamp
from worker.agent_settings import read_agent_settings
from worker.model_catalogue import CatalogueEntry
from worker.sealed_cache import SealedCache
from worker.spawn_order import SpawnedFds, SpawnOrder, WorkerExited
from worker.worker_processes import WorkerProcesses
from worker.zygote_client import ZygoteClient

ENTRY = CatalogueEntry(ModelCard("m", snapshot_id="s"), ManifestStamp(1, 1, 1), cast(Any, "a manifest"))
ORDER = SpawnWorker(worker_id="w1", model="m", fencing_token=1, max_running=1, kv_budget_bytes=1)
WRONG = BlobCorrupt("weights", "its bytes are not the signed ones")


class FakeCache:
    """Seals when the test says so, or fails with ``error``."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.is_asked = asyncio.Event()
        self.error: SnapshotError | None = None
        self.released: list[str] = []

    def holds(self, snapshot_id: str) -> bool:
        return False

    async def acquire(self, snapshot_id: str, manifest: object, worker_id: str) -> SpawnedFds:
        self.is_asked.set()
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return SpawnedFds(0, 1)

    async def wait_whole(self, snapshot_id: str) -> bool:
        return False

    def release(self, worker_id: str) -> None:
        self.released.append(worker_id)


class FakeZygote:
    """Forks nothing, and notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def spawn(self, order: SpawnOrder, fds: SpawnedFds) -> int:
        self.asked.append(f"fork {order.worker_id}")
        return 77

    async def signal(self, worker_id: str, number: int) -> None:
        self.asked.append(f"signal {worker_id} {number}")


class FakeReports:
    """Notes the last word on each worker."""

    def __init__(self) -> None:
        self.ends: dict[str, tuple[SlotState, ErrorInfo | None]] = {}

    async def stage(self, model: str, stage: str) -> None: ...

    async def worker_gone(self, worker_id: str) -> None: ...

    async def worker_changed(
        self, worker_id: str, model: str, state: SlotState, *, exited: bool, error: ErrorInfo | None, had_requests: bool
    ) -> None:
        assert exited
        assert worker_id not in self.ends
        self.ends[worker_id] = (state, error)


class Host:
    def __init__(self) -> None:
        self.cache, self.zygote, self.reports = FakeCache(), FakeZygote(), FakeReports()
        self.corrupt: list[SnapshotError] = []

        async def on_corrupt(entry: CatalogueEntry, error: SnapshotError) -> None:
            self.corrupt.append(error)

        async def release_leases(model: str, worker_id: str, crashed: bool) -> int:
            return 0

        async def on_device_freed() -> None: ...

        self.workers = WorkerProcesses(
            zygote=cast(ZygoteClient, self.zygote),
            cache=cast(SealedCache, self.cache),
            reports=cast(Any, self.reports),
            settings=read_agent_settings(1 << 30, {"GLOWPLUG_BACKEND": "numkong"}),
            on_corrupt=on_corrupt,
            release_leases=release_leases,
            on_device_freed=on_device_freed,
            spares=cast(Any, SimpleNamespace(take_nowait=lambda device: None)),
        )

    async def begin(self) -> asyncio.Task[None]:
        """A spawn whose snapshot is being sealed."""
        spawning = asyncio.create_task(self.workers.spawn(ORDER, ENTRY, 0))
        await self.cache.is_asked.wait()
        return spawning


async def test_a_worker_that_is_drained_while_its_snapshot_is_sealed_is_never_forked() -> None:
    """Its end is told as that of one that was drained, and what was sealed for it is free."""
    host = Host()
    spawning = await host.begin()
    await host.workers.drain("w1", 5.0)
    host.cache.gate.set()
    await spawning
    async with asyncio.timeout(10):
        await host.workers.wait_gone()
    assert host.zygote.asked == []
    assert host.reports.ends == {"w1": (SlotState.COLD, None)}
    assert host.cache.released == ["w1"]


async def test_an_agent_that_stops_waits_for_no_sealing() -> None:
    """A disk that takes minutes, or another model's turn, does not hold up the end of the agent."""
    host = Host()
    spawning = await host.begin()
    async with asyncio.timeout(10):
        await host.workers.drain_all(5.0)
        await asyncio.gather(spawning, return_exceptions=True)
    assert len(host.workers) == 0
    assert host.zygote.asked == []
    assert host.reports.ends == {"w1": (SlotState.COLD, None)}


@pytest.mark.parametrize(("number", "name"), [(11, "SIGSEGV"), (37, "number 37")])
async def test_a_worker_is_buried_whatever_signal_ended_it(number: int, name: str) -> None:
    """Real-time signals have no names of their own; whoever sends one must not leave a worker in the books for ever."""
    host = Host()
    host.cache.gate.set()
    await (await host.begin())
    host.workers.on_exit(WorkerExited("w1", 77, number))
    async with asyncio.timeout(10):
        await host.workers.wait_gone()
    state, error = host.reports.ends["w1"]
    assert state is SlotState.FAILED
    assert error is not None
    assert f"was ended by signal {name}" in error.message


async def test_weights_that_turn_out_wrong_while_a_worker_waits_are_told_as_such_once() -> None:
    """Requests are told that the snapshot is corrupt, not that there was no memory; one alarm is raised."""
    host = Host()
    spawning = await host.begin()
    host.workers.end_refused(["w1"], WRONG)
    host.cache.error = WRONG
    host.cache.gate.set()
    await spawning
    async with asyncio.timeout(10):
        await host.workers.wait_gone()
    assert host.corrupt == [WRONG]
    state, error = host.reports.ends["w1"]
    assert state is SlotState.FAILED
    assert error is not None
    assert error.code is ErrorCode.SNAPSHOT_CORRUPT
