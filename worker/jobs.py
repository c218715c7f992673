"""Claiming worker: takes a model's requests from the queue, keeps their leases, and gives back what it cannot finish.

A subclass of arq's worker that keeps arq's bookkeeping of a run (tries, timeouts, retries) and replaces what does not
fit a continuous batch: polling (a doorbell instead), claiming (one script that looks past running jobs), the
in-progress mark (a short, renewed lease with an owner) and finishing (refused when another run owns the job).
With :mod:`scheduler.dispatch` on the other side this is the whole of the queue; nothing else imports arq.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, cast

import msgspec
import structlog
from arq.connections import ArqRedis
from arq.worker import Worker, func
from redis.asyncio import Redis
from redis.exceptions import RedisError

from scheduler.contract import codec, job_queue, keys, token_log
from scheduler.contract.connection import CONNECTION_ERRORS
from scheduler.contract.errors import ContractError, ErrorCode, ErrorInfo
from scheduler.contract.job_queue import release_worker
from scheduler.contract.messages import GenerateRequest, TerminalFrame
from scheduler.contract.subscription import Subscription
from worker.publisher import Fenced

__all__ = ["ClaimingWorker", "JobHandler", "release_worker"]

_log = structlog.get_logger()
# arq logs a line with the arguments' text at each start and end of a job.
logging.getLogger("arq.worker").setLevel(logging.WARNING)

#: Runs one request: ``handler(request, attempt)``, attempt from 1. It returns once the terminal frame is logged, and
#: lets :class:`worker.publisher.Fenced` pass. Cancellation means "stop now and re-raise": the client went away, the
#: lease was lost, or the worker closes.
JobHandler = Callable[[GenerateRequest, int], Awaitable[None]]

LEASE_S: Final = 15.0
IDLE_POLL_S: Final = 1.0  # finds jobs for which no bell rings: those whose worker died unnoticed
BELL_BLOCK_MS: Final = 5000
QUEUE_READ_LIMIT: Final = 2000  # must exceed the jobs that can run on one queue: they stay in it while they run
#: Starts of a request, those that ended by a drain or a restart included. Deaths have a limit of their own.
MAX_TRIES: Final = 25
BACK_OFF_S: Final = 0.25
#: Attempt numbers of a request that was queued anew lie above all of those before.
STARTS_PER_GENERATION: Final = 1000


class _Payload(bytes):
    """A request's bytes as arq carries them; arq formats its arguments for a log line that must hold no prompt."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


class ClaimingWorker(Worker):
    """Claims up to ``room`` requests of ``model`` at once and runs ``handler`` for each, on the running loop.

    ``redis`` stays the caller's. :meth:`serve` runs until :meth:`aclose`. It handles no signals, survives a Redis
    that restarts or is out of memory, and idles without work: a blocking read and one script call a second.
    """

    def __init__(
        self,
        redis: Redis,
        *,
        model: str,
        worker_id: str,
        handler: JobHandler,
        room: int,
        lease_s: float = LEASE_S,
        idle_poll_s: float = IDLE_POLL_S,
        settled: asyncio.Event | None = None,
    ) -> None:
        """Connections that the first claims can do without are made once ``settled`` is set (None: at once)."""
        super().__init__(
            [func(cast(Any, self._run_payload), name=keys.JOB_FUNCTION)],
            queue_name=keys.queue(model),
            redis_pool=cast(ArqRedis, redis),  # only run_job uses it, for a plain pipeline
            handle_signals=False,
            max_jobs=room,
            job_timeout=cast(float, None),  # arq reads None as "no limit"; the engine bounds a run by its tokens
            keep_result=0,  # FINISH keeps a digest instead of arq's copy of request and result
            queue_read_limit=QUEUE_READ_LIMIT,
            max_tries=MAX_TRIES,
            job_serializer=_serialize_nothing,
            job_deserializer=_deserialize_job,
            log_results=False,
        )
        self._redis = redis
        self._model = model
        self._worker_id = worker_id
        self._handler = handler
        self._lease_s = lease_s
        self._idle_poll_s = idle_poll_s
        self._settled = settled
        self._claim = redis.register_script(job_queue.CLAIM)
        self._renew = redis.register_script(job_queue.RENEW)
        self._finish = redis.register_script(job_queue.FINISH)
        self._bell = asyncio.Event()  # something may have changed: look at the queue
        self._claiming = asyncio.Lock()
        self._closing = False
        self._control = Subscription(
            redis, [keys.control_channel(model)], self._on_control, self._on_control_subscribed
        )
        self._side_tasks: set[asyncio.Task[Any]] = set()
        self._crashes: dict[str, int] = {}  # of the claimed requests under which workers have died: how many

    # --- for the slot loop ------------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        """Claimed requests that have not ended."""
        return self.job_counter

    def pause_claims(self) -> None:
        """Claim nothing more; what runs goes on."""
        self.allow_pick_jobs = False

    async def drain(self, grace_s: float) -> bool:
        """Claim nothing more and wait up to ``grace_s`` for what runs; whether all of it has ended."""
        self.pause_claims()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                async with self._claiming:  # a claim under way may still bring runs
                    pass
                while self.tasks:
                    await asyncio.wait(self.tasks.values())
        return self.job_counter == 0

    async def serve(self) -> None:
        """Claim and run until :meth:`aclose`. Call once.

        Raises:
            Exception: whatever ended a side task; the component does not run on without it.
        """
        await self.main()

    async def aclose(self) -> None:
        """Stop: cancel what runs (it goes back to the queue, to be run elsewhere at once) and wait. Idempotent."""
        self._closing = True
        self.pause_claims()
        self._bell.set()
        for task in tuple(self.job_tasks.values()):
            task.cancel()
        if self.tasks:
            await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        await self._control.aclose()
        for task in self._side_tasks:
            task.cancel()
        await asyncio.gather(*self._side_tasks, return_exceptions=True)

    # --- claiming: what replaces arq's polling ----------------------------------------------------------------

    async def main(self) -> None:
        """arq's main loop, by doorbell."""
        listener = self._start_side_task(self._listen_for_bell(), "doorbell")
        renewer = self._start_side_task(self._renew_leases(), "lease renewal")
        self._start_side_task(self._listen_for_control(), "control subscription")
        while not self._closing:
            self._bell.clear()  # a ring from here on makes the wait below return at once
            await self._poll_iteration()
            for task in (listener, renewer):
                if task.done() and not self._closing:
                    task.result()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._idle_poll_s):
                    await self._bell.wait()

    async def _poll_iteration(self) -> None:
        room = self.max_jobs - self.job_counter
        if not self.allow_pick_jobs or room <= 0:
            return
        lease_ms = int(self._lease_s * 1000)
        async with self._claiming:
            try:
                claimed = await self._claim(
                    keys=[self.queue_name],
                    args=["+inf", room, lease_ms, self._worker_id, self.queue_read_limit, int(self._runs_suspect())],
                )
            except (*CONNECTION_ERRORS, RedisError) as error:  # away, loading, out of memory or disk
                _log.warning("claim_failed", model=self._model, error=str(error))
                claimed = None
            rows = claimed or ()
            for raw_id, score, crashes in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
                if crashes:
                    self._crashes[raw_id.decode()] = crashes
                self._start_run(raw_id.decode(), int(float(score)))
        if claimed is None:
            await asyncio.sleep(BACK_OFF_S)
            self._bell.set()

    def _runs_suspect(self) -> bool:
        return any(crashes >= job_queue.SUSPECT_CRASHES for crashes in self._crashes.values())

    def _start_run(self, request_id: str, score: int) -> None:
        if request_id in self.tasks:
            return  # its lease had run out and nobody else took it: the claim renewed it
        self.job_counter += 1
        task = self.loop.create_task(self.run_job(request_id, score), name=f"request {request_id}")
        self.tasks[request_id] = task
        task.add_done_callback(lambda done: self._on_run_done(request_id, done))

    def _on_run_done(self, request_id: str, task: asyncio.Task[Any]) -> None:
        self.job_counter -= 1
        if self.tasks.get(request_id) is task:
            del self.tasks[request_id]
        self.aborting_tasks.discard(request_id)
        self._crashes.pop(request_id, None)
        self._bell.set()  # there is room now
        if not task.cancelled() and (error := task.exception()) is not None:
            # Redis was away for longer than its retries: the lease ends by itself and the request runs again.
            _log.error("run_bookkeeping_failed", request_id=request_id, error=f"{type(error).__name__}: {error}")

    async def _listen_for_bell(self) -> None:
        key, last_id = keys.bell(self._model), "0-0"  # a ring before the first read is seen too
        await self._wait_settled()
        while True:
            try:
                reply = await self._redis.xread({key: last_id}, block=BELL_BLOCK_MS)
            except (*CONNECTION_ERRORS, RedisError):
                await asyncio.sleep(BACK_OFF_S)
                reply = []
                self._bell.set()
            if reply:
                last_id = reply[0][1][-1][0]
                self._bell.set()

    async def _listen_for_control(self) -> None:
        await self._wait_settled()
        await self._control.start()  # reads what it missed when it is subscribed

    async def _wait_settled(self) -> None:
        if self._settled is not None:
            await self._settled.wait()

    # --- one run ----------------------------------------------------------------------------------------------

    async def _run_payload(self, context: dict[Any, Any], payload: bytes) -> None:
        """The arq function: decode, run, and make sure that the request ends whatever the handler does."""
        request_id = context["job_id"]
        try:
            request: GenerateRequest = codec.decode(payload, GenerateRequest)
        except ContractError as error:
            await self._refuse_unread(request_id, error)
            return
        if self._closing:
            raise asyncio.CancelledError
        if (crashes := self._crashes.get(request_id, 0)) >= job_queue.MAX_CRASHES:
            _log.error("request_parked", request_id=request_id, crashes=crashes)
            limit = job_queue.MAX_CRASHES
            message = f"{crashes} workers died while they ran this request, the limit is {limit}: do not send it again"
            await self._end_with_error(request, ErrorCode.WORKER_FAILED, message)
            return
        try:
            await self._handler(request, request.generation * STARTS_PER_GENERATION + context["job_try"])
        except Fenced as error:
            # Another run has the request, so this one must not end it. arq queues a cancelled run again, which
            # changes nothing while the other one holds the lease, and saves the request if that one has died.
            _log.warning("run_overtaken", request_id=request_id, error=str(error))
            raise asyncio.CancelledError from error
        except (*CONNECTION_ERRORS, RedisError) as error:
            # The server was away for longer than our patience, or full: no fault of the request. It runs again.
            _log.warning("run_without_server", request_id=request_id, error=f"{type(error).__name__}: {error}")
            raise asyncio.CancelledError from error
        except Exception as error:  # the handler's fault must reach the client, not leave it waiting
            _log.exception("request_failed", request_id=request_id)
            await self._end_with_error(request, ErrorCode.INTERNAL, f"the worker failed: {type(error).__name__}")

    async def finish_job(
        self,
        job_id: str,
        finish: bool,
        result_data: bytes | None,
        result_timeout_s: float | None,
        keep_result_forever: bool,
        incr_score: int | None,
        keep_in_progress: float | None,
    ) -> None:
        """arq's end of a run, refused by the script if another worker has taken the request over."""
        owned = await self._finish(
            keys=[
                keys.in_progress(job_id),
                keys.result(job_id),
                keys.retry(job_id),
                keys.job(job_id),
                self.queue_name,
                keys.bell(self._model),
            ],
            args=[self._worker_id, job_id, "1" if finish else "0", keys.RESULT_TTL_S],
        )
        if not owned:
            _log.warning("finish_refused", request_id=job_id, worker_id=self._worker_id)

    async def finish_failed_job(self, job_id: str, result_data: bytes | None) -> None:
        """arq's end of a request it will not run: out of tries, expired, or unreadable. Its client is told."""
        body = await self._redis.get(keys.job(job_id))
        if body is None:
            _log.error("request_expired", request_id=job_id, limit_s=keys.REQUEST_TTL_S)
            message = f"the request waited longer than {keys.REQUEST_TTL_S} s and was not run; try again"
            await self._end_unread(job_id, ErrorInfo(ErrorCode.OVERLOADED, message, retry_after_s=30))
        else:
            try:
                request: GenerateRequest = job_queue.decode_job(body)
            except ContractError as error:
                await self._refuse_unread(job_id, error)
            else:
                message = f"the request was started {MAX_TRIES} times and did not end: its worker was lost each time"
                await self._end_with_error(request, ErrorCode.WORKER_FAILED, message)
        await self.finish_job(job_id, True, None, None, False, None, None)

    async def _refuse_unread(self, request_id: str, error: ContractError) -> None:
        _log.error("request_refused", request_id=request_id, error=str(error))
        text = "the worker cannot read the request: gateway and worker are of different versions"
        await self._end_unread(request_id, ErrorInfo(ErrorCode.INTERNAL, text))

    async def _end_unread(self, request_id: str, error: ErrorInfo) -> None:
        """End a request of which nothing but the id is known; its gateway finds the end in the log."""
        await token_log.end_log(self._redis, request_id, "", TerminalFrame(error=error, worker_id=self._worker_id))

    async def _end_with_error(self, request: GenerateRequest, code: ErrorCode, message: str) -> None:
        frame = TerminalFrame(error=ErrorInfo(code, message), worker_id=self._worker_id)
        await token_log.end_log(self._redis, request.request_id, request.gateway_id, frame)

    # --- leases and cancellation ------------------------------------------------------------------------------

    async def _renew_leases(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 4)
            request_ids = list(self.tasks)
            if not request_ids:
                continue
            try:
                lost = await self._renew(
                    keys=[self.queue_name],
                    args=[int(self._lease_s * 1000), self._worker_id, keys.REQUEST_TTL_S * 1000, *request_ids],
                )
            except (*CONNECTION_ERRORS, RedisError) as error:
                _log.warning("lease_renewal_failed", error=str(error), leases=len(request_ids))
                continue
            for raw_id in lost:
                request_id = raw_id.decode()
                if request_id in self.tasks:
                    _log.warning("lease_lost", request_id=request_id, worker_id=self._worker_id)
                    self._cancel_run(request_id)

    def _cancel_run(self, request_id: str) -> None:
        task = self.job_tasks.get(request_id) or self.tasks.get(request_id)
        if task is not None:
            task.cancel()

    def _on_control(self, channel: str, data: bytes) -> None:
        """A client went away. A run that has not begun yet sees the flag in Redis instead."""
        request_id = data.decode(errors="replace")
        if request_id in self.job_tasks:
            self.aborting_tasks.add(request_id)  # arq then ends the request instead of queueing it again
            self._cancel_run(request_id)

    def _on_control_subscribed(self) -> None:
        if self.job_tasks:
            self._start_side_task(self._read_cancelled(list(self.job_tasks)), "missed cancellations")

    async def _read_cancelled(self, request_ids: list[str]) -> None:
        try:
            flags = await self._redis.mget([keys.cancelled(request_id) for request_id in request_ids])
        except (*CONNECTION_ERRORS, RedisError) as error:
            _log.warning("missed_cancellations_unread", error=str(error))
            return
        for request_id, flag in zip(request_ids, flags, strict=True):
            if flag is not None:
                self._on_control("", request_id.encode())

    def _start_side_task(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        task = self.loop.create_task(work, name=f"{name} of {self._worker_id}")
        self._side_tasks.add(task)
        task.add_done_callback(self._side_tasks.discard)
        return task


def _serialize_nothing(_: object) -> bytes:
    """arq would store request and result with a finished job; FINISH keeps a digest of the request instead."""
    return b""


def _deserialize_job(body: bytes) -> dict[str, Any]:
    job = msgspec.msgpack.decode(body, type=dict[str, Any])
    job["a"] = [_Payload(argument) for argument in job["a"]]
    return job
