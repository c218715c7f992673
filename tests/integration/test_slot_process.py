"""One worker forked by the real zygote, without an agent: what its process does and does not do."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from scheduler.contract import codec, keys
from scheduler.contract.connection import connect
from scheduler.contract.messages import InboxMessage, WorkerChanged
from scheduler.contract.states import Tier
from scheduler.dispatch import Dispatcher
from snapshots.keyring import KeyRing
from snapshots.manifest import Manifest
from snapshots.mapping import seal_blob
from snapshots.store import SnapshotStore
from tests.eventually import eventually
from tests.worker_fixtures import MODEL, copy_state_dir, make_request
from worker.spawn_order import ModelPrepared, PrepareFailed, PrepareModel, SpawnedFds, SpawnOrder, WorkerExited
from worker.zygote_client import ZygoteClient

INSPECTING = (sys.executable, str(Path(__file__).parents[1] / "inspecting_zygote.py"))


class Slot:
    """A zygote, its exits, and the sealed tiny model."""

    def __init__(self, redis_url: str, state_dir: Path) -> None:
        store = SnapshotStore(state_dir / "store")
        self.manifest = store.read_manifest(MODEL, KeyRing.from_file(state_dir / "keys" / "snapshot.keys"))
        refs = (self.manifest.weights, self.manifest.guest_cwasm)
        self.sealed = [seal_blob(store.blob_path(ref), ref) for ref in refs]
        self.redis = connect(redis_url)
        self.redis_url = redis_url
        self.exits: list[WorkerExited] = []
        self.zygote = ZygoteClient(on_exit=self.exits.append, on_lost=lambda ids: None, command=INSPECTING)

    async def spawn(self, manifest: Manifest | None = None, backend: str = "numkong") -> int:
        order = SpawnOrder(
            worker_id="w1",
            node_id="node",
            model=MODEL,
            snapshot_id="s1",
            redis_url=self.redis_url,
            manifest=codec.encode(manifest or self.manifest),
            backend=backend,
            num_threads=1,
            max_running=4,
            kv_budget_bytes=1 << 24,
            drain_grace_s=5.0,
            cold_tier=Tier.HOST_RAM,
        )
        return await self.zygote.spawn(order, SpawnedFds(self.sealed[0].fd, self.sealed[1].fd))

    async def wait_exit(self) -> int:
        await eventually(lambda: self.exits, what="exit")
        return self.exits[0].exit_code

    async def changes(self) -> list[WorkerChanged]:
        messages = [codec.decode(fields[b"m"], InboxMessage) for _, fields in await self.redis.xrange(keys.INBOX)]
        return [message for message in messages if isinstance(message, WorkerChanged)]


@pytest.fixture
async def slot(redis_url: str, short_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Slot]:
    monkeypatch.setenv("REPORT_TO", str(short_tmp_path / "imports"))
    made = Slot(redis_url, copy_state_dir(short_tmp_path / "state"))
    await made.zygote.start()
    yield made
    await made.zygote.aclose()
    for sealed in made.sealed:
        os.close(sealed.fd)
    await made.redis.aclose()


async def test_worker_imports_nothing_after_its_fork(slot: Slot, short_tmp_path: Path) -> None:
    """From the fork over a request to the drain no module is loaded: imports belong into the zygote."""
    await slot.spawn()
    await Dispatcher(slot.redis).enqueue(make_request("r1"))

    async def is_answered() -> bool:
        last = await slot.redis.lrange(keys.token_log("r1"), -1, -1)  # type: ignore[misc]
        return bool(last) and codec.is_terminal(last[0])

    await eventually(is_answered, what="an answer")
    await slot.zygote.signal("w1", signal.SIGTERM)
    assert await slot.wait_exit() == 0
    assert (short_tmp_path / "imports").read_text().split() == []


async def test_worker_of_a_prepared_model_serves_and_imports_nothing(slot: Slot, short_tmp_path: Path) -> None:
    """The zygote prepares the model without a second thread; its next worker takes it over and answers."""
    answers: list[ModelPrepared | PrepareFailed] = []
    on_answer = slot.zygote.models.on_answer
    slot.zygote.models.on_answer = lambda answer: (answers.append(answer), on_answer(answer))[1]  # type: ignore[method-assign]
    fds = SpawnedFds(*(blob.fd for blob in slot.sealed))
    slot.zygote.models.on_forked(PrepareModel("s1", codec.encode(slot.manifest), "numkong", 1), fds)
    await eventually(lambda: answers, what="an answer of the zygote")
    assert isinstance(answers[0], ModelPrepared), answers
    assert len(os.listdir(f"/proc/{slot.zygote.pid}/task")) == 1
    await slot.spawn()
    await Dispatcher(slot.redis).enqueue(make_request("r1"))

    async def is_answered() -> bool:
        last = await slot.redis.lrange(keys.token_log("r1"), -1, -1)  # type: ignore[misc]
        return bool(last) and codec.is_terminal(last[0])

    await eventually(is_answered, what="an answer")
    await slot.zygote.signal("w1", signal.SIGTERM)
    assert await slot.wait_exit() == 0
    assert (short_tmp_path / "imports").read_text().split() == []


async def test_zygote_has_one_thread_with_everything_imported(slot: Slot) -> None:
    """The process that is forked has exactly one thread, also after a worker came and went."""
    assert len(os.listdir(f"/proc/{slot.zygote.pid}/task")) == 1
    await slot.spawn()
    await slot.zygote.signal("w1", signal.SIGKILL)
    await slot.wait_exit()
    assert len(os.listdir(f"/proc/{slot.zygote.pid}/task")) == 1


async def test_drain_before_the_model_is_ready_hands_back_at_once(slot: Slot) -> None:
    """SIGTERM in the middle of a restore: the claimed request goes back to the queue and the worker exits with 0."""
    dispatcher = Dispatcher(slot.redis)
    for number in range(20):
        await dispatcher.enqueue(make_request(f"r{number}"))
        await slot.spawn()
        await slot.zygote.signal("w1", signal.SIGTERM)
        assert await slot.wait_exit() in (0, -signal.SIGTERM)
        if await dispatcher.queue_depth(MODEL) == 1:
            return
        (last,) = await slot.redis.lrange(keys.token_log(f"r{number}"), -1, -1)  # type: ignore[misc]
        assert codec.is_terminal(last)  # this machine had no time for the signal until the answer was made
        slot.exits.clear()
    raise AssertionError("no worker was met before it was ready")


async def test_model_that_cannot_be_restored_is_reported_with_its_cause(slot: Slot) -> None:
    """A backend that is not there: state failed with the cause, exit code 3, and the request stays queued."""
    await Dispatcher(slot.redis).enqueue(make_request("r1"))
    await slot.spawn(backend="abacus")
    assert await slot.wait_exit() == 3
    (change,) = await slot.changes()
    assert (change.state, change.exited) == ("failed", False)
    assert change.error is not None
    assert change.error.code == "backend_unavailable"
    assert "abacus" in change.error.message
    assert await Dispatcher(slot.redis).queue_depth(MODEL) == 1


async def test_guest_file_of_another_model_is_refused(slot: Slot) -> None:
    """Descriptors that do not fit their manifest are never mapped: the worker fails instead of serving."""
    slot.sealed.reverse()
    await slot.spawn()
    assert await slot.wait_exit() == 3
    (change,) = await slot.changes()
    assert change.error is not None
    assert change.error.code == "snapshot_corrupt"


async def test_worker_that_loses_redis_for_a_moment_goes_on(slot: Slot) -> None:
    """Every connection cut: the worker stays, and answers the next request."""
    await slot.spawn()

    async def is_ready() -> bool:
        return [change.state for change in await slot.changes()] == ["ready"]

    await eventually(is_ready, what="ready")
    await slot.redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    await asyncio.sleep(0)
    await Dispatcher(slot.redis).enqueue(make_request("r1"))

    async def is_answered() -> bool:
        last = await slot.redis.lrange(keys.token_log("r1"), -1, -1)  # type: ignore[misc]
        return bool(last) and codec.is_terminal(last[0])

    await eventually(is_answered, what="an answer")
    assert slot.exits == []
