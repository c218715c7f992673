"""A worker's slot: one model in one forked process, from the spawn order to the exit.

The main thread runs the event loop: Redis, claims, heartbeats, the drain signal. The engine thread restores the model
beside it, so that connecting to Redis and claiming the first request cost no time of a cold start. The slot's state
machine is :class:`scheduler.contract.states.SlotState`; written only by :class:`WorkerSlot`, on the loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401  # asyncio loads it with the first thread that it starts
import contextlib
import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import numpy.random  # noqa: F401  # NumPy loads it on first use, which would be the first sampled token
import structlog
import uvloop
from redis.asyncio import Redis

from guests.runtime import GuestEngine
from scheduler.contract.connection import connect
from scheduler.contract.errors import ErrorInfo
from scheduler.contract.messages import WorkerReport
from scheduler.contract.states import CLAIMING_STATES, SlotState, Tier
from scheduler.contract.telemetry import Mark
from worker.backends.protocol import Backend, BackendFull
from worker.engine.engine_statistics import EngineStatistics
from worker.engine.step_loop import StepLoop
from worker.engine.types import RequestStep
from worker.engine_thread import EngineThread, describe_failure
from worker.jobs import ClaimingWorker
from worker.prepared_models import PreparedModels
from worker.publisher import TokenPublisher
from worker.reports import REDIS_TROUBLE, Reports, keep_trying, read_private_bytes, read_proportional_bytes
from worker.request_runner import RequestRunner, WakeRecord
from worker.restore import prepare_restore
from worker.spawn_order import (
    EXIT_REPORTED,
    PARK_SIGNAL,
    UNPARK_SIGNAL,
    SpawnedFds,
    SpawnOrder,
    choose_device,
)

HEARTBEAT_S: Final = 1.0
#: How often a worker's share of memory is measured: the kernel walks its page tables for it.
SHARE_EVERY_BEATS: Final = 10
#: Requests claimed beyond what runs at once, so that the engine has the next one when one ends.
CLAIM_AHEAD: Final = 8
#: The engine thread's Python must not keep a token waiting: the default of 5 ms would show in every latency.
SWITCH_INTERVAL_S: Final = 0.0005
#: A restore that is over this soon is announced as ready only: telling more would only slow it down.
SETTLE_S: Final = 0.05
#: A resume of a prepared model is waited for; it takes 3 ms unless something is wrong.
MAX_RESUME_S: Final = 0.05
#: Talk that serves no request waits for the first token, but not longer.
MAX_SILENCE_S: Final = 0.15
#: And so long after the step that chose it, so that it is logged and published before connections are made.
SETTLE_AFTER_TOKEN_S: Final = 0.02
LAST_WORDS_S: Final = 2.0  # for the last reports of a worker that ends
#: What a worker is called by where its model is.
STATE_OF_TIER: Final = {
    Tier.HOT: SlotState.READY,
    Tier.PARKED: SlotState.PARKED,
    Tier.RELEASED: SlotState.RELEASED,
}
EXIT_OK: Final = 0
EXIT_CRASHED: Final = 70  # EX_SOFTWARE, as of a worker that raises

# Made once in the zygote, inherited by every worker.
_guest_engine: GuestEngine | None = None
_prepared: PreparedModels | None = None


class WorkerSlot:
    """One worker's life. ``run`` is called once; ``thread`` restores already."""

    def __init__(self, order: SpawnOrder, thread: EngineThread) -> None:
        self._order = order
        self._loop = asyncio.get_running_loop()
        self._log = structlog.get_logger()
        self._state = SlotState.RESTORING
        self._marks = thread.marks
        self._engine: StepLoop | None = None
        self._proportional_bytes = 0  # 0: not measured yet
        self._thread = thread
        self._redis: Redis = connect(order.redis_url)
        self._reports = Reports(self._redis, order.node_id)
        self._publisher = TokenPublisher(self._redis, on_fenced=self._on_fenced)
        self._publisher.watch(self._on_task_done)
        wake = WakeRecord(order.worker_id, order.snapshot_id, order.cold_tier, self._marks)
        self._runner = RequestRunner(self._publisher, wake, self._was_cancelled)
        self._has_stepped = False
        self._is_settled = asyncio.Event()  # a first token is out, or none so soon: other talk may begin
        self._claiming = ClaimingWorker(
            self._redis,
            model=order.model,
            worker_id=order.worker_id,
            handler=self._runner.run,
            room=order.max_running + CLAIM_AHEAD,
            settled=self._is_settled,
        )
        self._loop.call_later(SETTLE_S, self._be_restoring)
        self._loop.call_later(MAX_SILENCE_S, self._is_settled.set)
        self._news: asyncio.Queue[tuple[SlotState, ErrorInfo | None]] = asyncio.Queue()
        self._end: asyncio.Future[None] = self._loop.create_future()  # drain asked for; or what went wrong
        self._hurry = asyncio.Event()
        self._side_tasks: list[asyncio.Task[None]] = []

    async def run(self) -> int:
        """Serve until drained; the process's exit code.

        Where a side task or the running engine dies (a sticky error of the device), the process ends there and then,
        like one that was killed: its agent gives the requests back, and counts against them that it died.
        """
        self._loop.add_signal_handler(signal.SIGTERM, self._on_sigterm)
        self._loop.add_signal_handler(PARK_SIGNAL, self._thread.park, True)
        self._loop.add_signal_handler(UNPARK_SIGNAL, self._thread.park, False)
        self._start("claims", self._claiming.serve())
        self._start("announcements", self._announce())
        self._start("heartbeat", self._heartbeat())
        self._thread.attach(self)
        try:
            await self._end
            self._is_settled.set()
            await self._drain()
        except RestoreFailed as failure:
            self._log.error("restore_failed", exc_info=failure.cause)
            self._tell(SlotState.FAILED, describe_failure(self._order.model, failure.cause))
            return EXIT_REPORTED
        except Exception as error:  # any: what is left of this process is not to be trusted with requests
            self._log.error("worker_crashed", exc_info=error)
            sys.stderr.flush()
            os._exit(EXIT_CRASHED)
        finally:
            await self._close()
        return EXIT_OK

    # --- the engine thread calls these ------------------------------------------------------------------------------

    def on_ready(self, engine: StepLoop) -> None:
        self._tell_loop(self._become_ready, engine)

    def on_ended(self, error: Exception | None) -> None:
        self._tell_loop(self._on_engine_ended, error)

    def _tell_loop(self, callback: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            return  # the loop is closed: the process exits this moment

    def on_steps(self, steps: list[RequestStep]) -> None:
        self._runner.on_steps(steps)
        if not self._has_stepped:
            self._has_stepped = True  # written only by the engine's thread
            self._tell_loop(self._settle_soon)

    def on_moved(self, tier: Tier) -> None:
        self._tell_loop(self._change_tier, tier)

    def _settle_soon(self) -> None:
        self._loop.call_later(SETTLE_AFTER_TOKEN_S, self._is_settled.set)

    # --- changes of state -------------------------------------------------------------------------------------------

    def _become_ready(self, engine: StepLoop) -> None:
        self._engine = engine
        self._runner.attach(engine)
        if self._state is SlotState.RESTORING:
            self._tell(SlotState.READY)
        gc.freeze()
        gc.enable()

    def _change_tier(self, tier: Tier) -> None:
        if self._state in CLAIMING_STATES:
            self._tell(STATE_OF_TIER[tier])
            self._runner.away_tier = None if tier is Tier.HOT else tier

    def _be_restoring(self) -> None:
        """The restore takes longer than a blink: say so."""
        if self._state is SlotState.RESTORING and self._engine is None:
            self._tell(SlotState.RESTORING)
            self._is_settled.set()

    def _on_engine_ended(self, error: Exception | None) -> None:
        if error is None or self._end.done():
            return
        is_start = self._engine is None or isinstance(error, BackendFull)  # a parked model's way back is one too
        self._end.set_exception(RestoreFailed(error) if is_start else error)

    def _on_sigterm(self) -> None:
        if not self._end.done():
            self._end.set_result(None)
        else:
            self._hurry.set()  # a second signal: hand back at once

    async def _drain(self) -> None:
        """Finish what runs. What waits for an engine that is not there yet goes back to the queue at once."""
        self._tell(SlotState.DRAINING)
        if self._engine is not None:
            drained = asyncio.create_task(self._claiming.drain(self._order.drain_grace_s), name="drain")
            hurry = asyncio.create_task(self._hurry.wait(), name="hurry")
            await asyncio.wait({drained, hurry}, return_when=asyncio.FIRST_COMPLETED)
            if drained.done():
                drained.result()
            hurry.cancel()
            drained.cancel()
            await asyncio.gather(drained, hurry, return_exceptions=True)
        self._log.info("worker_drained", handed_back=len(self._runner))

    async def _close(self) -> None:
        """Hand back what still runs, say the last words, stop."""
        await self._claiming.aclose()
        self._thread.stop()
        try:
            async with asyncio.timeout(LAST_WORDS_S):
                await self._runner.aclose()
                await self._news.join()
        except TimeoutError:
            self._log.warning("last_words_unsaid", news=self._news.qsize())
        for task in self._side_tasks:
            task.cancel()
        await asyncio.gather(*self._side_tasks, return_exceptions=True)
        await self._publisher.aclose()
        await self._redis.aclose()

    # --- side tasks -------------------------------------------------------------------------------------------------

    def _start(self, name: str, work: Any) -> None:
        task = self._loop.create_task(work, name=name)
        task.add_done_callback(self._on_task_done)
        self._side_tasks.append(task)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None and not self._end.done():
            self._end.set_exception(error)

    def _tell(self, state: SlotState, error: ErrorInfo | None = None) -> None:
        self._state = state
        self._news.put_nowait((state, error))

    async def _announce(self) -> None:
        """Tell the scheduler of every state, in order."""
        worker_id, model = self._order.worker_id, self._order.model
        await self._is_settled.wait()
        has_been_ready = False
        while True:
            state, error = await self._news.get()

            async def tell(state: SlotState = state, error: ErrorInfo | None = error) -> None:
                await self._reports.worker_changed(worker_id, model, state, error=error)
                await self._reports.stage(model, state.value)

            await keep_trying(tell, f"announcing {state}")
            self._news.task_done()
            if state is SlotState.READY and not has_been_ready:
                has_been_ready = True
                ready_ms = (self._marks[Mark.RESTORED] - self._marks[Mark.FORKED]) / 1e6
                self._log.info("worker_ready", since_fork_ms=round(ready_ms, 2), tier=self._order.cold_tier.value)

    async def _heartbeat(self) -> None:
        await self._is_settled.wait()
        num_beats = 0
        while True:
            try:
                await self._reports.worker_alive(self._report())
            except REDIS_TROUBLE as error:
                self._log.warning("redis_unreachable", doing="heartbeat", error=str(error))
            await asyncio.sleep(HEARTBEAT_S)
            if num_beats % SHARE_EVERY_BEATS == 0:
                with contextlib.suppress(OSError):  # no descriptor left on this host: the figure stays what it was
                    self._proportional_bytes = await asyncio.to_thread(read_proportional_bytes)
            num_beats += 1

    def _report(self) -> WorkerReport:
        statistics = self._engine.statistics() if self._engine is not None else EngineStatistics()
        return WorkerReport(
            worker_id=self._order.worker_id,
            node_id=self._order.node_id,
            model=self._order.model,
            pid=os.getpid(),
            state=self._state,
            num_running=statistics.num_running,
            num_waiting=statistics.num_waiting,
            reported_at_s=time.time(),
            kv_used_bytes=statistics.kv_used_bytes,
            kv_budget_bytes=self._order.kv_budget_bytes,
            private_bytes=read_private_bytes(),
            proportional_bytes=self._proportional_bytes,
            tokens_generated=statistics.tokens_generated,
            kv_cached_bytes=statistics.kv_cached_bytes,
            prompt_tokens=statistics.num_prompt_tokens,
            cached_tokens=statistics.num_cached_tokens,
            device=self._order.device,
            park=self._order.park,
        )

    def _on_fenced(self, request_id: str) -> None:
        self._runner.on_fenced(request_id)

    def _was_cancelled(self, request_id: str) -> bool:
        return request_id in self._claiming.aborting_tasks


class RestoreFailed(Exception):
    """The engine thread could not restore the model."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


def prepare_to_fork() -> PreparedModels:
    """Do in the zygote, once, what every worker would otherwise do after its fork. Starts no thread.

    What it returns prepares single models, and chooses what each child inherits of them.
    """
    global _guest_engine, _prepared
    _guest_engine = GuestEngine()
    _prepared = PreparedModels(_guest_engine)
    prepare_restore()
    return _prepared


def run_worker(order: SpawnOrder, fds: SpawnedFds, forked_mono_ns: int, warm: Backend | None = None) -> int:
    """Main function of a forked worker; its exit code. ``warm``: the backend of a spare that becomes it.

    Requires: :func:`prepare_to_fork` ran before the fork.
    """
    if _guest_engine is None or _prepared is None:
        raise RuntimeError("prepare_to_fork() was not called before the fork")
    gc.disable()  # until the slot is ready: a collection in the middle of a restore helps nobody
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    choose_device(order.device)
    marks = {**order.marks, Mark.FORKED: forked_mono_ns}
    thread = EngineThread(order, fds, _guest_engine, marks, _prepared.selected, warm)
    thread.start()
    # Both threads are Python and share one interpreter lock: side by side, a resume of 3 ms takes 12. So the engine
    # thread goes first where the zygote has prepared the model; a longer restore has the rest happen beside it.
    if _prepared.selected is not None:
        thread.wait_restored(MAX_RESUME_S)
    structlog.contextvars.bind_contextvars(worker_id=order.worker_id, model=order.model)

    async def live() -> int:
        return await WorkerSlot(order, thread).run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(live())
