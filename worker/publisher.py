"""Token publisher: from engine steps to the fenced log and the gateways' channels, in order and exactly once.

:meth:`TokenPublisher.publish` only notes frames; one background task writes them. While a write is under way, the
steps that arrive wait and go out together with the next one: a slow or absent Redis makes messages bigger, not the
engine slower, until the backlog reaches its bound and :attr:`TokenPublisher.room` asks the engine to pause.

Invariant: for each run, ``frames`` is what the log holds or will hold, and ``frames[:num_logged]`` is in it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from scheduler.contract import codec, keys, token_log
from scheduler.contract.codec import Frame as Frame
from scheduler.contract.connection import CONNECTION_ERRORS
from scheduler.contract.messages import GenerateRequest

_log = structlog.get_logger()

#: Above 16 KiB a Valkey 9 server does not count a message in a slow subscriber's output limit.
MAX_MESSAGE_BYTES: Final = 12 * 1024
MAX_BACKLOG_BYTES: Final = 32 * 1024 * 1024
RETRY_BASE_S: Final = 0.05
RETRY_CAP_S: Final = 1.0
_ITEM_OVERHEAD_BYTES: Final = 16  # MessagePack headers and sequence number


class Fenced(Exception):
    """A newer attempt runs this request, or it was ended from outside: stop generating it, write nothing."""


@dataclass(slots=True)
class Run:
    """One attempt at one request. Read-only for others; written only by the publisher."""

    request_id: str
    gateway_id: str
    attempt: int
    frames: list[bytes]
    num_logged: int
    is_cancelled: bool  # the client went away before this run began
    is_fenced: bool = False
    is_finished: bool = False  # the log has its terminal frame, or will, once all is written
    published_mono_ns: int | None = None  # when this run's first frame was logged and published
    _pending_bytes: int = 0  # its share of the backlog
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def decode_frames(self) -> list[Frame]:
        """All frames so far, those of earlier attempts included.

        Raises:
            ContractError: the log holds something else.
        """
        return [codec.decode_frame(frame) for frame in self.frames]


class PublisherStatistics(NamedTuple):
    """Counts since the start, and the present backlog."""

    num_runs: int
    frames_logged: int
    messages: int
    repairs: int
    fenced: int
    backlog_bytes: int


class TokenPublisher:
    """One per worker process, on its event loop. ``on_fenced(request_id)`` is called there when a run loses its fence.

    ``room`` is set while the backlog is below its bound; the engine thread may wait on it between steps.
    """

    def __init__(
        self,
        redis: Redis,
        on_fenced: Callable[[str], None] | None = None,
        *,
        max_backlog_bytes: int = MAX_BACKLOG_BYTES,
    ) -> None:
        self.room = threading.Event()
        self.room.set()
        self._redis = redis
        self._on_fenced = on_fenced
        self._max_backlog_bytes = max_backlog_bytes
        self._append_step = redis.register_script(token_log.APPEND_STEP)
        self._take_fence = redis.register_script(token_log.TAKE_FENCE)
        self._repair_run = redis.register_script(token_log.REPAIR_RUN)
        self._runs: dict[str, Run] = {}
        self._dirty: dict[str, Run] = {}  # runs with frames not yet logged, oldest first
        self._wake = asyncio.Event()
        self._backlog_bytes = self._frames_logged = self._messages = self._repairs = self._num_fenced = 0
        self._task = asyncio.get_running_loop().create_task(self._write_forever(), name="token publisher")

    def watch(self, on_done: Callable[[asyncio.Task[None]], None]) -> None:
        """Have ``on_done`` called with the writing task when it ends. It should not: without it no frame is logged."""
        self._task.add_done_callback(on_done)

    async def begin(self, request: GenerateRequest, attempt: int) -> Run:
        """Take the request's fence for ``attempt`` (1 or more) and read what earlier attempts logged.

        Raises:
            Fenced: a newer attempt holds the fence.
            RedisError: the server could not be reached.
        """
        reply = await self._take_fence(
            keys=[
                keys.token_log(request.request_id),
                keys.fence(request.request_id),
                keys.cancelled(request.request_id),
            ],
            args=[attempt, keys.LOG_TTL_S, keys.REQUEST_TTL_S],
        )
        if reply is None:
            raise Fenced(f"request {request.request_id}: attempt {attempt} is no longer the newest")
        cancelled, *frames = reply
        run = Run(request.request_id, request.gateway_id, attempt, frames, len(frames), cancelled == b"1")
        run.is_finished = bool(frames) and codec.is_terminal(frames[-1])
        self._runs[request.request_id] = run
        return run

    def publish(self, step: Iterable[tuple[str, Frame]]) -> None:
        """Take the frames of one engine step, (request id, frame) each; returns at once.

        Frames of requests that ended, are fenced or already have their terminal frame are dropped.
        """
        for request_id, frame in step:
            run = self._runs.get(request_id)
            if run is None or run.is_fenced or run.is_finished:
                continue
            data = codec.encode_frame(frame)
            run.frames.append(data)
            run.is_finished = codec.is_terminal(data)
            run._pending_bytes += len(data)
            self._backlog_bytes += len(data)
            self._dirty[request_id] = run
        if self._backlog_bytes > self._max_backlog_bytes:
            self.room.clear()
        if self._dirty:
            self._wake.set()

    async def wait_logged(self, run: Run) -> None:
        """Wait until every frame given for ``run`` is in its log.

        Raises:
            Fenced: the run lost its fence, or was ended meanwhile.
        """
        while self._runs.get(run.request_id) is run and not run.is_fenced and run.num_logged < len(run.frames):
            run._changed.clear()
            await run._changed.wait()
        if run.is_fenced or run.num_logged < len(run.frames):
            raise Fenced(f"request {run.request_id}: attempt {run.attempt} was overtaken")

    def end(self, run: Run) -> None:
        """Forget ``run``; frames not yet logged are dropped. Idempotent."""
        if self._runs.get(run.request_id) is run:
            del self._runs[run.request_id]
        self._drop_backlog(run)

    def statistics(self) -> PublisherStatistics:
        """Counts since the start, and the present backlog."""
        return PublisherStatistics(
            num_runs=len(self._runs),
            frames_logged=self._frames_logged,
            messages=self._messages,
            repairs=self._repairs,
            fenced=self._num_fenced,
            backlog_bytes=self._backlog_bytes,
        )

    async def aclose(self) -> None:
        """Stop writing. Frames not yet logged are lost to this run (the next attempt makes them again). Idempotent."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self.room.set()

    # --- the writing task: the only one that changes num_logged -----------------------------------------------

    async def _write_forever(self) -> None:
        delay_s = RETRY_BASE_S
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                while self._dirty:
                    await self._write_backlog()
                delay_s = RETRY_BASE_S
            except (*CONNECTION_ERRORS, RedisError) as error:
                # Away, loading, or out of memory or disk: keep everything and try again.
                _log.warning("token_log_write_failed", error=str(error), backlog_bytes=self._backlog_bytes)
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, RETRY_CAP_S)
                self._wake.set()

    async def _write_backlog(self) -> None:
        by_gateway: dict[str, list[Run]] = {}
        for run in self._dirty.values():
            by_gateway.setdefault(run.gateway_id, []).append(run)
        for gateway_id, runs in by_gateway.items():
            for batch in _split(runs):
                await self._write(gateway_id, batch)

    async def _write(self, gateway_id: str, batch: Sequence[tuple[Run, int, bytes]]) -> None:
        channel = keys.gateway_channel(gateway_id)
        message = token_log.encode_items([(run.request_id, seq, frame) for run, seq, frame in batch])
        heads = token_log.encode_heads([(run.request_id, run.attempt, seq) for run, seq, _ in batch])
        frames = [frame for _, _, frame in batch]
        reply = await self._append_step(
            keys=[channel], args=[message, heads, keys.LOG_TTL_S, keys.REQUEST_TTL_S, *frames]
        )
        self._messages += 1
        refused = {request_id.decode(): length for request_id, length in zip(reply[::2], reply[1::2], strict=True)}
        now_mono_ns = time.monotonic_ns()
        for run, seq, _frame in batch:
            if run.request_id not in refused:
                self._on_logged(run, seq + 1, now_mono_ns)
        if not refused:
            return
        for run in {run.request_id: run for run, _, _ in batch}.values():
            if run.request_id in refused:
                await self._on_refused(run, refused[run.request_id], now_mono_ns)
        # The script published nothing. Everything that is in a log now, the gateway finds there.
        request_ids = {run.request_id for run, _, _ in batch if not run.is_fenced}
        if request_ids:
            items = [(request_id, token_log.LOOK_AT_LOG, b"") for request_id in request_ids]
            await self._redis.publish(channel, token_log.encode_items(items))

    async def _on_refused(self, run: Run, length: int, now_mono_ns: int) -> None:
        if length == token_log.FENCE_LOST or 0 <= length < run.num_logged:
            length = await self._repair(run)
        if length == token_log.FENCED:
            self._fence(run)
            return
        # As long as ours or longer: a retried call had written it, or a gateway gave back what its client has seen.
        self._on_logged(run, min(length, len(run.frames)), now_mono_ns)

    async def _repair(self, run: Run) -> int:
        """The server lost the end of the log (it crashed): write back what this run knows."""
        self._repairs += 1
        _log.warning("token_log_repaired", request_id=run.request_id, frames=run.num_logged)
        length = await self._repair_run(
            keys=[keys.token_log(run.request_id), keys.fence(run.request_id)],
            args=[run.attempt, keys.LOG_TTL_S, keys.REQUEST_TTL_S, *run.frames],
        )
        return int(length)

    def _on_logged(self, run: Run, num_logged: int, now_mono_ns: int) -> None:
        if num_logged <= run.num_logged:
            return
        self._shrink_backlog(run, sum(map(len, run.frames[run.num_logged : num_logged])))
        self._frames_logged += num_logged - run.num_logged
        run.num_logged = num_logged
        if run.published_mono_ns is None:
            run.published_mono_ns = now_mono_ns
        if num_logged == len(run.frames):
            if self._dirty.get(run.request_id) is run:
                del self._dirty[run.request_id]
            run._changed.set()

    def _fence(self, run: Run) -> None:
        self._num_fenced += 1
        run.is_fenced = True
        self._drop_backlog(run)
        _log.warning("run_fenced", request_id=run.request_id, attempt=run.attempt)
        if self._on_fenced is not None:
            self._on_fenced(run.request_id)

    def _drop_backlog(self, run: Run) -> None:
        if self._dirty.get(run.request_id) is run:
            del self._dirty[run.request_id]
        self._shrink_backlog(run, run._pending_bytes)
        run._changed.set()

    def _shrink_backlog(self, run: Run, num_bytes: int) -> None:
        num_bytes = min(num_bytes, run._pending_bytes)  # nothing is left of a run that was dropped during its write
        run._pending_bytes -= num_bytes
        self._backlog_bytes -= num_bytes
        if self._backlog_bytes <= self._max_backlog_bytes // 2 and not self.room.is_set():  # setting it takes locks
            self.room.set()


def _split(runs: Sequence[Run]) -> list[list[tuple[Run, int, bytes]]]:
    """Everything these runs have to log, in messages below the size limit; a run's frames stay in order."""
    batches: list[list[tuple[Run, int, bytes]]] = [[]]
    size = 0
    for run in runs:
        for seq in range(run.num_logged, len(run.frames)):
            frame = run.frames[seq]
            item_bytes = len(frame) + len(run.request_id) + _ITEM_OVERHEAD_BYTES
            if batches[-1] and size + item_bytes > MAX_MESSAGE_BYTES:
                batches.append([])
                size = 0
            batches[-1].append((run, seq, frame))
            size += item_bytes
    return [batch for batch in batches if batch]
