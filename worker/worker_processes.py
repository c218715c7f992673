"""The worker processes of one host: started, watched, drained and buried by their agent alone.

=========== =========== ==================================================================
from        to          when
=========== =========== ==================================================================
(none)      starting    spawn order; the snapshot is being sealed or the fork is under way
starting    running     the zygote forked it, or it was a spare; its weights may still be filled in
starting    (none)      refused: snapshot corrupt, no room, no fork; reported as failed
starting    (none)      drain order, or the agent stops, before there is a process: reported
running     stopping    drain order, or the agent stops: SIGTERM, and SIGKILL past the grace
running     (none)      it ended by itself: reported with its error
running     (none)      a chunk of its weights is wrong: killed before it served, reported as failed
stopping    (none)      it ended: reported
=========== =========== ==================================================================
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import structlog

from scheduler.contract.errors import ErrorCode, ErrorInfo
from scheduler.contract.messages import SpawnWorker
from scheduler.contract.states import SlotState, Tier
from scheduler.contract.telemetry import Mark
from snapshots.errors import BlobCorrupt, MappingError, SnapshotError
from worker.agent_settings import AgentSettings
from worker.backends.detection import choose_worker_backend
from worker.model_catalogue import CatalogueEntry, describe_refusal
from worker.reports import NO_DESCRIPTORS, Reports, describe_exit, describe_no_worker, keep_trying
from worker.sealed_cache import NoRoom, SealedCache
from worker.spare_workers import SpareWorkers
from worker.spawn_order import (
    EXIT_REPORTED,
    PARK_SIGNAL,
    UNPARK_SIGNAL,
    PrepareModel,
    SpawnedFds,
    SpawnOrder,
    WorkerExited,
)
from worker.zygote_client import SpawnFailed, ZygoteClient

#: A worker that ends by itself at the end of its grace gets this much longer before it is killed.
KILL_MARGIN_S: Final = 0.5

#: Called with a snapshot whose blobs do not match its manifest.
OnCorrupt = Callable[[CatalogueEntry, SnapshotError], Awaitable[None]]
#: Gives a dead worker's jobs back to the queue, and says how many: model, worker id, and whether it died by itself.
ReleaseLeases = Callable[[str, str, bool], Awaitable[int]]
#: Called when a worker that was placed on a GPU has ended, before its end is reported.
OnDeviceFreed = Callable[[], Awaitable[None]]


@dataclass(slots=True)
class _Process:
    worker_id: str
    model: str
    entry: CatalogueEntry
    device: str = ""  # UUID of the GPU that it was placed on
    fork_id: str = ""  # what the zygote calls it: the worker's id, or that of the spare it was
    pid: int = 0  # 0 until forked
    start: asyncio.Task[None] | None = None  # carries out its spawn order
    is_stopping: bool = False
    stood_still: bool = False  # killed because a signal had stopped it
    cause: SnapshotError | None = None  # killed for this: its snapshot turned out corrupt while it started
    kill_timer: asyncio.TimerHandle | None = None


class WorkerProcesses:
    """Owner of this host's workers. Event loop only."""

    def __init__(
        self,
        *,
        zygote: ZygoteClient,
        cache: SealedCache,
        reports: Reports,
        settings: AgentSettings,
        on_corrupt: OnCorrupt,
        release_leases: ReleaseLeases,
        on_device_freed: OnDeviceFreed,
        spares: SpareWorkers,
        find_release_address: Callable[[], str] = str,
    ) -> None:
        """``find_release_address``: of who takes processes off their devices; empty: nobody."""
        self._zygote = zygote
        self._cache = cache
        self._reports = reports
        self._settings = settings
        self._on_corrupt = on_corrupt
        self._release_leases = release_leases
        self._on_device_freed = on_device_freed
        self.spares: Final = spares
        self._find_release_address = find_release_address
        self._log = structlog.get_logger()
        self._processes: dict[str, _Process] = {}
        self._burials: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._processes)

    async def spawn(self, command: SpawnWorker, entry: CatalogueEntry, received_mono_ns: int) -> None:
        """Seal the snapshot if needed and fork a worker. A refusal is reported, never raised."""
        if command.worker_id in self._processes:
            return  # the order was delivered twice
        process = self._processes[command.worker_id] = _Process(command.worker_id, command.model, entry, command.device)
        process.start = asyncio.current_task()
        try:
            await self._spawn_or_refuse(process, command, entry, received_mono_ns)
        except asyncio.CancelledError:  # the agent stops
            if self._processes.get(process.worker_id) is process:
                self._bury(process, None)
            raise

    async def _spawn_or_refuse(
        self, process: _Process, command: SpawnWorker, entry: CatalogueEntry, received_mono_ns: int
    ) -> None:
        try:
            await self._spawn(process, command, entry, received_mono_ns)
        except BlobCorrupt as error:
            if process.cause is None:  # else its burial tells it
                await self._on_corrupt(entry, error)
            await self._refuse(process, describe_refusal(error))
        except (NoRoom, MappingError) as error:
            await self._refuse(process, _describe_no_room(error))
        except SnapshotError as error:  # no sign of tampering, so the card stays: a key that is missing here, the disk
            await self._refuse(process, describe_refusal(error))
        except SpawnFailed as error:
            await self._refuse(process, ErrorInfo(ErrorCode.WAKE_FAILED, f"no worker could be started: {error}"))
        except OSError as error:
            self._log.error("spawn_failed", worker_id=process.worker_id, error=str(error))
            await self._refuse(process, describe_no_worker(error))
        except Exception as error:  # an order must not end in silence: the scheduler would wait for its worker
            self._log.exception("spawn_failed", worker_id=process.worker_id)
            message = f"no worker could be started: {type(error).__name__}; see the agent's log"
            await self._refuse(process, ErrorInfo(ErrorCode.WAKE_FAILED, message))

    async def _spawn(
        self, process: _Process, command: SpawnWorker, entry: CatalogueEntry, received_mono_ns: int
    ) -> None:
        if entry.manifest is None:
            raise AssertionError("spawn of a refused snapshot")  # the agent answers those itself
        card = entry.card
        is_warm = self._cache.holds(card.snapshot_id)
        if not is_warm:
            self._start_task(self._reports.stage(card.name, "verifying"), f"stage of {card.name}")
        fds = await self._cache.acquire(card.snapshot_id, entry.manifest, process.worker_id)
        if self._is_overtaken(process):
            self._bury(process, None)
            return
        order = SpawnOrder(
            worker_id=process.worker_id,
            node_id=self._settings.process.node_id,
            model=card.name,
            snapshot_id=card.snapshot_id,
            redis_url=self._settings.process.redis_url,
            manifest=entry.encoded_manifest,
            backend=choose_worker_backend(self._settings.backend, card.task),
            num_threads=self._settings.num_threads,
            max_running=command.max_running,
            kv_budget_bytes=command.kv_budget_bytes,
            drain_grace_s=self._settings.drain_grace_s,
            cold_tier=Tier.HOST_RAM if is_warm else Tier.DISK,
            draft_tokens=self._settings.draft_tokens,
            park_after_s=command.park_after_s,
            park=command.park,
            release_address=self._find_release_address(),
            device=command.device,
            marks={**command.marks, Mark.ORDER_RECEIVED: received_mono_ns, Mark.VERIFIED: time.monotonic_ns()},
        )
        is_spare = await self._start_process(process, order, fds)
        if self._processes.get(process.worker_id) is not process:
            return  # a spare that died as it was taken; told already
        self._start_task(self._prepare_when_whole(process, order, fds), f"preparation of {card.name}")
        self._log.info(
            "worker_started",
            worker_id=order.worker_id,
            model=card.name,
            pid=process.pid,
            tier=order.cold_tier,
            was_spare=is_spare,
        )
        if process.cause is not None:  # so did the wrong chunk
            await self._zygote.signal(process.fork_id, signal.SIGKILL)
        elif self._is_overtaken(process):
            await self._zygote.signal(process.fork_id, signal.SIGTERM)

    @staticmethod
    def _is_overtaken(process: _Process) -> bool:
        """Whether a drain order came before the one to start was carried out."""
        return process.is_stopping

    async def _start_process(self, process: _Process, order: SpawnOrder, fds: SpawnedFds) -> bool:
        """A spare where there is one for that device, else a fork; whether it was a spare."""
        spare = self.spares.take_nowait(order.device) if order.backend == self._settings.backend else None
        if spare is not None:
            process.fork_id, process.pid = spare.spare_id, spare.pid
            try:
                await self.spares.hand_over(spare, order, fds)
                return True
            except OSError as error:
                self._log.warning("spare_lost", spare_id=spare.spare_id, error=str(error))
                if self._processes.get(process.worker_id) is not process:
                    return True
        process.fork_id, process.pid = order.worker_id, 0
        process.pid = await self._zygote.spawn(order, fds)
        return False

    async def _prepare_when_whole(self, process: _Process, order: SpawnOrder, fds: SpawnedFds) -> None:
        """The zygote restores only what is verified to the last byte: it must not wait for bytes itself."""
        try:
            is_whole = await self._cache.wait_whole(order.snapshot_id)
        except BlobCorrupt:
            return  # the worker is being ended for it
        if is_whole and self._processes.get(process.worker_id) is process:  # else nobody holds the files for it
            message = PrepareModel(order.snapshot_id, order.manifest, order.backend, order.num_threads)
            self._zygote.models.on_forked(message, fds)

    def end_refused(self, worker_ids: list[str], error: SnapshotError) -> None:
        """Kill workers that wait for weights of which a chunk is wrong. They have served nothing: the first token
        needs all weights. Their requests get ``error``."""
        ended = [self._processes[worker_id] for worker_id in worker_ids if worker_id in self._processes]
        for process in ended:
            process.cause = error
            self._log.error("worker_refused", worker_id=process.worker_id, model=process.model, error=str(error))
            self._start_task(self._zygote.signal(process.fork_id, signal.SIGKILL), f"end of {process.worker_id}")

    async def drain(self, worker_id: str, grace_s: float) -> None:
        """Ask a worker to finish what runs and exit; kill it past ``grace_s``. Unknown ids are gone already."""
        process = self._processes.get(worker_id)
        if process is None:
            return
        was_stopping, process.is_stopping = process.is_stopping, True
        self._log.info("worker_drain_ordered", worker_id=worker_id, model=process.model, grace_s=grace_s)
        if process.kill_timer is not None:
            process.kill_timer.cancel()
        process.kill_timer = asyncio.get_running_loop().call_later(grace_s + KILL_MARGIN_S, self._kill, worker_id)
        if process.fork_id and not was_stopping:  # a second one would end its drain at once
            await self._zygote.signal(process.fork_id, signal.SIGTERM)

    async def park(self, worker_id: str, is_parked: bool) -> None:
        """Have a worker leave its device, or come back. Only one that said it was ready may be asked."""
        process = self._processes.get(worker_id)
        if process is not None and not process.is_stopping:
            await self._zygote.signal(process.fork_id, PARK_SIGNAL if is_parked else UNPARK_SIGNAL)

    def pids(self) -> dict[str, int]:
        """Workers that were forked and have not ended, as far as is known."""
        return {worker_id: process.pid for worker_id, process in self._processes.items() if process.pid}

    def end_stopped(self, worker_id: str) -> None:
        """Kill a worker that a signal has stopped: its requests go on elsewhere, and that is not their fault."""
        process = self._processes.get(worker_id)
        if process is not None:
            process.stood_still = True
            self._log.error("worker_stood_still", worker_id=worker_id, model=process.model, pid=process.pid)
            self._start_task(self._zygote.signal(process.fork_id, signal.SIGKILL), f"end of {worker_id}")

    async def drain_all(self, grace_s: float) -> None:
        """Drain every worker and wait until all are gone and reported. One whose snapshot is still being sealed is
        given up: that may take minutes."""
        for process in list(self._processes.values()):
            await self.drain(process.worker_id, grace_s)
            if not process.fork_id and process.start is not None:
                process.start.cancel()
        await self.wait_gone()

    async def wait_gone(self) -> None:
        """Wait until no worker is left and every end is reported."""
        while self._processes or self._burials:
            self._changed.clear()
            await self._changed.wait()

    def _kill(self, worker_id: str) -> None:
        process = self._processes.get(worker_id)
        if process is not None:
            self._log.warning("worker_killed_past_grace", worker_id=worker_id)
            self._start_task(self._zygote.signal(process.fork_id, signal.SIGKILL), f"kill {worker_id}")

    # --- ends -----------------------------------------------------------------------------------------------------

    def on_exit(self, message: WorkerExited) -> None:
        """The zygote reaped a worker."""
        process = self._find_forked(message.worker_id)
        if process is None:
            self.spares.on_exit(message.worker_id)
            return
        is_expected = process.is_stopping or message.exit_code in (0, EXIT_REPORTED)
        error = None if is_expected else describe_exit(process.worker_id, process.model, message.exit_code)
        if process.cause is not None:
            error = _describe_failed_fill(process.cause)
        elif process.stood_still and not process.is_stopping:
            text = f"worker {process.worker_id} of model {process.model!r} was stopped by a signal and has been ended"
            error = ErrorInfo(ErrorCode.WORKER_FAILED, text)
        log = self._log.info if is_expected else self._log.error
        log("worker_exited", worker_id=process.worker_id, model=process.model, exit_code=message.exit_code)
        self._bury(process, error, crashed=not (is_expected or process.cause is not None or process.stood_still))

    def on_lost(self, worker_ids: list[str]) -> None:
        """The zygote died and these workers, by the names that it had for them, with it."""
        for fork_id in worker_ids:
            process = self._find_forked(fork_id)
            if process is not None:
                name = f"worker {process.worker_id} of model {process.model!r}"
                message = f"{name} died with its zygote; a new one is started"
                self._bury(process, ErrorInfo(ErrorCode.WORKER_FAILED, message))
            else:
                self.spares.on_exit(fork_id)

    def _find_forked(self, fork_id: str) -> _Process | None:
        forked = (process for process in self._processes.values() if process.fork_id)
        return next((process for process in forked if process.fork_id == fork_id), None)

    def _bury(self, process: _Process, error: ErrorInfo | None, *, crashed: bool = False) -> None:
        del self._processes[process.worker_id]
        if process.kill_timer is not None:
            process.kill_timer.cancel()
        self._cache.release(process.worker_id)
        self._start_task(self._report_end(process, error, crashed), f"bury {process.worker_id}")

    async def _report_end(self, process: _Process, error: ErrorInfo | None, crashed: bool) -> None:
        """Leases first: when the scheduler hears of the end, the jobs can be claimed again. Before a card is refused
        too: what the scheduler refuses then is the queue."""
        state = SlotState.COLD if error is None else SlotState.FAILED
        num_released = 0
        if process.device:
            await self._on_device_freed()

        async def release() -> None:
            nonlocal num_released
            num_released += await self._release_leases(process.model, process.worker_id, crashed)

        async def report() -> None:
            await release()
            await self._reports.worker_gone(process.worker_id)
            await self._reports.worker_changed(
                process.worker_id, process.model, state, exited=True, error=error, had_requests=num_released > 0
            )

        is_last = not any(other.cause is process.cause for other in self._processes.values())
        if isinstance(process.cause, BlobCorrupt) and is_last:
            await keep_trying(release, "leases of a refused worker")
            await self._on_corrupt(process.entry, process.cause)
        await keep_trying(report, "report of a worker's end")

    async def _refuse(self, process: _Process, error: ErrorInfo) -> None:
        if process.cause is not None:  # whatever came of it
            error = _describe_failed_fill(process.cause)
        self._log.error("worker_refused", worker_id=process.worker_id, model=process.model, error=error.message)
        if process.worker_id in self._processes:  # else the zygote's death has been reported already
            self._bury(process, error)

    def _start_task(self, work: Awaitable[None], name: str) -> None:
        task = asyncio.ensure_future(work)
        task.set_name(name)
        self._burials.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._burials.discard(task)
        self._changed.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error("task_failed", task=task.get_name(), exc_info=error)


def _describe_no_room(error: Exception) -> ErrorInfo:
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno in NO_DESCRIPTORS:
        return describe_no_worker(cause)
    return ErrorInfo(ErrorCode.OUT_OF_MEMORY, str(error))


def _describe_failed_fill(error: SnapshotError) -> ErrorInfo:
    if isinstance(error, MappingError):
        return _describe_no_room(error)
    return describe_refusal(error)
