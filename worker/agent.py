"""The node agent: registers its host, publishes its models, and carries out the scheduler's orders.

It owns the host's processes and sealed memory and nothing else. It never forks itself (the zygote does), never touches
a device, and holds the only copy of the verification keys on the host: workers, which run guests, get none.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
from collections.abc import Coroutine
from typing import Any, Final

import structlog
from redis.asyncio import Redis

from scheduler.contract import codec, keys
from scheduler.contract.errors import ContractError, ErrorCode, ErrorInfo
from scheduler.contract.messages import (
    AgentCommand,
    DrainWorker,
    ForgetModel,
    ModelCard,
    NodeReport,
    ParkWorker,
    PrefetchModel,
    SpawnWorker,
    WorkerReport,
)
from scheduler.contract.states import SlotState
from snapshots.errors import BlobCorrupt, SnapshotError
from snapshots.keyring import KeyRing
from snapshots.rollback import NewestSeen
from snapshots.store import SnapshotStore
from worker import agent_sealing
from worker.agent_settings import AgentSettings
from worker.model_catalogue import CatalogueEntry, ModelCatalogue, SecurityEvent
from worker.node_gpus import NodeGpus
from worker.reports import (
    REDIS_TROUBLE,
    RETRY_AFTER_S,
    Reports,
    describe_no_worker,
    keep_trying,
    make_node_report,
    read_memory_total_bytes,
)
from worker.sealed_cache import NoRoom, SealedCache
from worker.stopped_workers import StoppedWorkers
from worker.store_watch import StoreWatch
from worker.worker_processes import WorkerProcesses
from worker.zygote_client import ZygoteClient
from worker.zygote_process import ZygoteProcess

HEARTBEAT_S: Final = 2.0
SCAN_S: Final = 1.0
SETTLE_S: Final = 0.02
COMMAND_BLOCK_MS: Final = 5000
AT_ONCE_S: Final = 1.0


class NodeAgent:
    """One a host. Event loop only."""

    def __init__(
        self, settings: AgentSettings, keyring: KeyRing, redis: Redis, zygote: ZygoteProcess | None = None
    ) -> None:
        from guests.compile import guest_identity  # wasmtime: only now, so that a refused start is quick

        self._settings = settings
        self._node_id = settings.process.node_id
        self._redis = redis
        self._log = structlog.get_logger(node_id=self._node_id)
        self._reports = Reports(redis, self._node_id)
        store = SnapshotStore(settings.store_root, newest=NewestSeen(settings.newest_record))
        self._manifests_folder = store.manifests_folder
        self._catalogue = ModelCatalogue(store, keyring, guest_identity())
        verify_again = agent_sealing.verify_sealed if settings.verification == "always" else None
        seal = functools.partial(agent_sealing.seal_blob, keyring)
        self._zygote = ZygoteClient(  # its callbacks and the cache's: when they come, the workers' owner is there too
            on_exit=lambda message: self._workers.on_exit(message),
            on_lost=lambda worker_ids: self._workers.on_lost(worker_ids),
            started=zygote,
        )
        self._gpus = NodeGpus(self._zygote, settings, lambda: self._start_task(self._on_device_freed(), "spare"))
        self._cache = SealedCache(
            store.blob_path,
            seal,
            settings.sealed_limit_bytes,
            verify_again,
            self._zygote.models.on_dropped,
            functools.partial(agent_sealing.verify_file, keyring),
            functools.partial(agent_sealing.begin_fill, keyring, settings.fill_limit_bytes_per_s),
            lambda worker_ids, error: self._workers.end_refused(worker_ids, error),
        )
        self._workers = WorkerProcesses(
            zygote=self._zygote,
            cache=self._cache,
            reports=self._reports,
            settings=settings,
            on_corrupt=self._on_corrupt,
            release_leases=self._release_leases,
            on_device_freed=self._on_device_freed,
            spares=self._gpus.spares,
            find_release_address=self._gpus.release_address,
        )
        self._fencing_token = 0  # the highest seen; orders with a lower one come from a deposed leader
        self._spawns: set[asyncio.Task[None]] = set()
        self._stopping, self._stopping_at_once = asyncio.Event(), asyncio.Event()

    def stop(self) -> None:
        """Drain and end; called again, end at once."""
        if self._stopping.is_set():
            self._stopping_at_once.set()
        self._stopping.set()

    def accept_gpu_errors(self) -> None:
        """An operator has reloaded the configuration: GPUs are used in spite of the errors so far."""
        self._gpus.accept_errors()

    async def run(self) -> None:
        """Serve until :meth:`stop`.

        Raises:
            Exception: a side task died; the agent cannot go on without it.
        """
        stopped = StoppedWorkers(self._workers.pids, self._workers.end_stopped, self._settings.stopped_limit_s)
        zygote_start = asyncio.create_task(self._zygote.start(), name="zygote-start")
        registration = asyncio.create_task(self._register(), name="registration")
        side_tasks: list[asyncio.Task[Any]] = [zygote_start, registration]
        try:
            await self._until_stopped(side_tasks, registration)  # Redis may be away for as long as it likes
            if not registration.done():
                return
            side_tasks += [
                asyncio.create_task(self._read_commands(registration.result()), name="commands"),
                asyncio.create_task(self._heartbeat(), name="heartbeat"),
                asyncio.create_task(self._watch_store(), name="store-watch"),
                asyncio.create_task(stopped.watch(), name="stopped-workers"),
                asyncio.create_task(self._gpus.run(), name="gpus"),
            ]
            await asyncio.to_thread(agent_sealing.load_sealing)  # now, and not in the first wake from disk
            await self._until_stopped(side_tasks)
        finally:
            for task in side_tasks:
                task.cancel()
            await asyncio.gather(*side_tasks, return_exceptions=True)
            await self._shut_down()

    async def _until_stopped(self, side_tasks: list[asyncio.Task[Any]], first: asyncio.Task[Any] | None = None) -> None:
        """Wait for :meth:`stop`, or for the end of ``first``; a side task that fails ends the agent loudly."""
        stopping = asyncio.create_task(self._stopping.wait(), name="stop")
        waiting: set[asyncio.Task[Any]] = {*side_tasks, stopping}
        try:
            while not stopping.done() and not (first is not None and first.done()):
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            stopping.cancel()

    async def _shut_down(self) -> None:
        """Stop taking orders, drain, end the zygote, unregister."""
        drain = asyncio.create_task(self._workers.drain_all(self._settings.drain_grace_s), name="drain")
        at_once = asyncio.create_task(self._stopping_at_once.wait(), name="stop-at-once")
        try:
            await asyncio.wait({drain, at_once}, return_when=asyncio.FIRST_COMPLETED)
            if not drain.done():
                self._log.warning("stopping_at_once", workers=len(self._workers))
        finally:
            drain.cancel()
            at_once.cancel()
            for spawn in self._spawns:
                spawn.cancel()
            await asyncio.gather(drain, at_once, *self._spawns, return_exceptions=True)
            self._gpus.close()
            await self._zygote.aclose()
            self._cache.close()
        try:
            async with asyncio.timeout(AT_ONCE_S if self._stopping_at_once.is_set() else self._settings.drain_grace_s):
                await self._reports.node_gone()
        except (TimeoutError, *REDIS_TROUBLE):
            self._log.warning("node_not_unregistered", remedy="its report expires by itself")
        self._log.info("agent_stopped")

    # --- registration and models ----------------------------------------------------------------------------------

    async def _register(self) -> bytes:
        """Make this node and its models known; the id after which commands are ours."""
        newest: list[tuple[bytes, object]] = []

        async def read_newest() -> None:
            newest[:] = await self._redis.xrevrange(keys.node_commands(self._node_id), count=1)

        await keep_trying(read_newest, "registration")
        await keep_trying(self._bury_leftovers, "clean-up after an earlier agent")
        await self._rescan()
        await keep_trying(self._publish_all_cards, "registration")
        await keep_trying(self._beat, "registration")
        self._log.info("agent_ready", models=len(self._catalogue.cards), backend=self._settings.backend)
        return newest[0][0] if newest else b"0-0"

    async def _bury_leftovers(self) -> None:
        """Workers of an earlier agent on this node died with it: give their jobs back."""
        for raw_id in await self._members(keys.WORKERS):
            worker_id = raw_id.decode()
            data = await self._redis.get(keys.worker(worker_id))
            report: WorkerReport | None = None
            try:
                report = codec.decode(data, WorkerReport) if data else None
            except ContractError as error:
                self._log.error("worker_report_refused", worker_id=worker_id, error=str(error))
            if report is None:
                await self._reports.worker_gone(worker_id)  # its report ran out: nobody keeps it alive
            elif report.node_id == self._node_id:
                await self._release_leases(report.model, worker_id)
                await self._reports.worker_gone(worker_id)
                await self._reports.worker_changed(worker_id, report.model, SlotState.COLD, exited=True)

    async def _publish_all_cards(self) -> None:
        """Publish every card. Cards that no living node stands for are removed."""
        cards = self._catalogue.cards
        other_nodes = {node.decode() for node in await self._members(keys.NODES)} - {self._node_id}
        alive = [node for node in other_nodes if await self._redis.exists(keys.node(node))]
        removed: list[str] = []
        if not alive:
            known = {card.name for card in cards}
            published = {name.decode() for name in await self._redis.hkeys(keys.MODELS)}  # type: ignore[misc]
            removed = sorted(published - known)
        await self._publish_cards(cards, removed)

    async def _publish_cards(self, cards: list[ModelCard], removed: list[str]) -> None:
        async with self._redis.pipeline(transaction=False) as pipe:
            for card in cards:
                pipe.hset(keys.MODELS, card.name, codec.encode(card))  # type: ignore[arg-type]
            if removed:
                pipe.hdel(keys.MODELS, *removed)
            await pipe.execute()
        await self._reports.models_changed()

    async def _members(self, key: str) -> list[bytes]:
        return sorted(await self._redis.smembers(key))  # type: ignore[misc]

    async def _rescan(self) -> None:
        """Take in what changed on disk; publish it."""
        change = self._catalogue.scan()
        self._cache.retain(self._catalogue.snapshot_ids)
        if not change:
            return
        for card in change.changed:
            refused = card.refused.message if card.refused else None
            self._log.info("model_found", model=card.name, snapshot_id=card.snapshot_id, refused=refused)
        for name in change.removed:
            self._log.info("model_gone", model=name)
        await keep_trying(lambda: self._publish_cards(change.changed, change.removed), "publishing models")
        for event in change.security_events:
            await self._raise_alarm(event)

    async def _on_corrupt(self, entry: CatalogueEntry, error: SnapshotError) -> None:
        """A blob did not match its manifest while it was sealed: refuse the model until its files change."""
        card, event = self._catalogue.refuse(entry, error)
        await keep_trying(lambda: self._publish_cards([card], []), "publishing a refused model")
        if event is not None:
            await self._raise_alarm(event)

    async def _raise_alarm(self, event: SecurityEvent) -> None:
        await keep_trying(lambda: self._reports.security(event.kind, event.model, event.reason), "security count")

    # --- orders ---------------------------------------------------------------------------------------------------

    async def _read_commands(self, last_id: bytes) -> None:
        stream = keys.node_commands(self._node_id)
        while True:
            try:
                batch = await self._redis.xread({stream: last_id}, block=COMMAND_BLOCK_MS)
            except REDIS_TROUBLE as error:
                self._log.warning("redis_unreachable", doing="waiting for orders", error=str(error))
                await asyncio.sleep(RETRY_AFTER_S)
                continue
            received_mono_ns = time.monotonic_ns()
            for _, entries in batch or ():
                for last_id, fields in entries:  # noqa: B007  # the last one read is where the next read starts
                    await self._on_command(fields.get(keys.FIELD.encode(), b""), received_mono_ns)

    async def _on_command(self, data: bytes, received_mono_ns: int) -> None:
        try:
            command: AgentCommand = codec.decode(data, AgentCommand)
        except ContractError as error:
            self._log.error("command_refused", error=str(error))
            return
        if command.fencing_token < self._fencing_token:
            self._log.warning("command_of_deposed_leader", token=command.fencing_token, newest=self._fencing_token)
            return
        self._fencing_token = command.fencing_token
        match command:
            case SpawnWorker():
                self._start_task(self._spawn(command, received_mono_ns), f"spawn {command.worker_id}")
            case DrainWorker():
                await self._workers.drain(command.worker_id, command.grace_s)
            case ForgetModel(model=model):
                forgotten = self._cache.forget(model)
                self._log.info("model_forgotten" if forgotten else "model_in_use", model=model)
                await keep_trying(self._beat, "reporting sealed bytes")
            case ParkWorker(worker_id=worker_id, is_parked=is_parked):
                await self._workers.park(worker_id, is_parked)
            case PrefetchModel(model=model):
                self._start_task(self._prefetch(model), f"prefetch {model}")

    def _start_task(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._spawns.add(task)
        task.add_done_callback(self._on_spawn_done)

    async def _prefetch(self, model: str) -> None:
        """Verify a model into sealed memory as for a worker; it stays until others need the room."""
        await self._rescan()
        entry = self._catalogue.get(model)
        if entry is None or entry.manifest is None or entry.card.refused is not None:
            self._log.error("prefetch_refused", model=model, reason="refused" if entry else "unknown")
            return
        holder = f"prefetch:{secrets.token_hex(4)}"
        try:
            await self._cache.acquire(entry.card.snapshot_id, entry.manifest, holder)
            if await self._cache.wait_whole(entry.card.snapshot_id):
                self._log.info("prefetched", model=model, sealed_bytes=self._cache.sealed_bytes().get(model, 0))
            else:
                self._log.error("prefetch_failed", model=model, error="filling ended early")
        except (SnapshotError, NoRoom) as error:
            self._log.error("prefetch_failed", model=model, error=str(error))
            if isinstance(error, BlobCorrupt):  # others are no sign of tampering: no memory, a key that is missing here
                await self._on_corrupt(entry, error)
        finally:
            self._cache.release(holder)
        await keep_trying(self._beat, "reporting sealed bytes")

    async def _spawn(self, command: SpawnWorker, received_mono_ns: int) -> None:
        error = ErrorInfo(ErrorCode.MODEL_NOT_FOUND, f"node {self._node_id} has no model {command.model!r}")
        try:
            await self._rescan()  # a manifest that was replaced a moment ago is verified before it is used
        except OSError as failure:
            error = describe_no_worker(failure)
        else:
            entry = self._catalogue.get(command.model)
            if entry is not None and entry.card.refused is None:
                await self._workers.spawn(command, entry, received_mono_ns)
                return
            error = error if entry is None or entry.card.refused is None else entry.card.refused
        await keep_trying(
            lambda: self._reports.worker_changed(
                command.worker_id, command.model, SlotState.FAILED, exited=True, error=error
            ),
            "refusing an order",
        )

    def _on_spawn_done(self, task: asyncio.Task[None]) -> None:
        self._spawns.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error("spawn_failed", task=task.get_name(), exc_info=error)

    # --- side tasks and callbacks -----------------------------------------------------------------------------------

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            await keep_trying(self._beat, "heartbeat")

    async def _beat(self, *, now: bool = False) -> None:
        await self._gpus.refresh(is_drained=await self._reports.is_drained(), now=now)
        was_registered = await self._reports.node_alive(self._report())
        if not was_registered:  # first time, or Redis lost it: then it lost the cards too
            await self._publish_all_cards()

    async def _watch_store(self) -> None:
        """Look at the store when it changes, and once a second: blobs that were repaired tell nobody."""
        with StoreWatch(self._manifests_folder) as watch:
            while True:
                await keep_trying(self._rescan, "reading the store")
                await asyncio.sleep(SETTLE_S)  # a writer that never stops costs so many scans and no more
                await watch.wait_changed(SCAN_S)

    def _report(self) -> NodeReport:
        return make_node_report(
            self._node_id,
            sealed_bytes=self._cache.sealed_bytes(),
            zygote_pid=self._zygote.pid,
            backend=self._settings.backend,
            memory_total_bytes=read_memory_total_bytes(),
            gpus=self._gpus.reports(self._workers.pids()),
        )

    async def _on_device_freed(self) -> None:
        """A worker has left its GPU, or a spare is there: say at once how much is free now."""
        await keep_trying(functools.partial(self._beat, now=True), "reporting free device memory")

    async def _release_leases(self, model: str, worker_id: str, crashed: bool = False) -> int:
        from worker.jobs import release_worker  # arq takes 0.1 s to import, and no worker has ended before its first

        return await release_worker(self._redis, model, worker_id, crashed=crashed)
