"""What agents and workers tell the rest: state changes, stages of a wake, heartbeats, security events."""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import resource
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from scheduler.contract import codec, keys
from scheduler.contract.connection import CONNECTION_ERRORS
from scheduler.contract.environment import NODE_ID
from scheduler.contract.errors import ErrorCode, ErrorInfo
from scheduler.contract.messages import (
    GpuReport,
    InboxMessage,
    ModelsChanged,
    NodeReport,
    SecurityEvent,
    StageEvent,
    WorkerChanged,
    WorkerReport,
)
from scheduler.contract.states import SlotState
from scheduler.contract.telemetry import SECURITY_EVENT

#: Stage of an event that concerns no wake: the set of models changed (the model is empty then).
STAGE_MODELS_CHANGED: Final = "models"
RETRY_AFTER_S: Final = 0.5
#: What an absent, loading or overfull server looks like: all of it passes, so whoever loops goes on.
NO_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE)
MAX_MEMINFO_BYTES: Final = 65_536
REDIS_TROUBLE: Final = (*CONNECTION_ERRORS, RedisError)
KEPT_REPORTS: Final = 4  # of our own, to tell them from another agent's
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
_CGROUP_LIMIT: Final = Path("/sys/fs/cgroup/memory.max")


class Reports:
    """Writes to Redis in the name of one node. Event loop only; every method may raise ``REDIS_TROUBLE``."""

    def __init__(self, redis: Redis, node_id: str) -> None:
        self._redis = redis
        self._node_id = node_id
        self._log = structlog.get_logger()
        self._own_reports: deque[bytes] = deque(maxlen=KEPT_REPORTS)

    async def worker_changed(
        self,
        worker_id: str,
        model: str,
        state: SlotState,
        *,
        exited: bool = False,
        error: ErrorInfo | None = None,
        had_requests: bool = False,
    ) -> None:
        """Tell the scheduler of a worker's new state."""
        await self._send(WorkerChanged(self._node_id, worker_id, model, state, exited, error, had_requests))

    async def models_changed(self) -> None:
        """Tell the scheduler and the gateways that the model cards changed."""
        await self._send(ModelsChanged(self._node_id))
        await self.stage("", STAGE_MODELS_CHANGED)

    async def stage(self, model: str, stage: str, eta_ms: int = -1) -> None:
        """Tell waiting clients how far a wake is."""
        await self._redis.publish(keys.EVENTS, codec.encode(StageEvent(model, stage, eta_ms)))

    async def security(self, kind: str, model: str, reason: str) -> None:
        """Something looks like tampering: log it at critical level and count it."""
        self._log.critical(SECURITY_EVENT, kind=kind, model=model, reason=reason)
        event = SecurityEvent(time.time(), kind, model, self._node_id, reason)
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.hincrby(keys.SECURITY_COUNTS, kind, 1)
            pipe.lpush(keys.SECURITY_RECENT, codec.encode(event))
            pipe.ltrim(keys.SECURITY_RECENT, 0, keys.SECURITY_RECENT_MAX_ENTRIES - 1)
            await pipe.execute()

    async def node_alive(self, report: NodeReport) -> bool:
        """Heartbeat of the node; False if it was not registered (any more) and now is.

        A report that we did not write is of an earlier agent, or, between two of ours, of another that runs now.
        """
        is_first, data = not self._own_reports, codec.encode(report)
        self._own_reports.append(data)  # before it is sent: it may arrive, and our reply get lost
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.sadd(keys.NODES, self._node_id)
            pipe.set(keys.node(self._node_id), data, ex=keys.NODE_TTL_S, get=True)
            _, previous = await pipe.execute()
        if previous is not None and not is_first and previous not in self._own_reports:
            remedy = f"give each a name of its own in {NODE_ID}; two of one name start each worker twice"
            self._log.error("two_agents_of_one_name", node_id=self._node_id, remedy=remedy)
        return previous is not None

    async def is_drained(self) -> bool:
        """Whether an operator wants no workers on this node."""
        redis: Any = self._redis  # redis-py types each reply as sync-or-async
        return bool(await redis.sismember(keys.DRAINED_NODES, self._node_id))

    async def node_gone(self) -> None:
        """Unregister the node."""
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.srem(keys.NODES, self._node_id)
            pipe.delete(keys.node(self._node_id), keys.node_commands(self._node_id))
            await pipe.execute()

    async def worker_alive(self, report: WorkerReport) -> None:
        """Heartbeat of a worker."""
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.sadd(keys.WORKERS, report.worker_id)
            pipe.set(keys.worker(report.worker_id), codec.encode(report), ex=keys.WORKER_TTL_S)
            await pipe.execute()

    async def worker_gone(self, worker_id: str) -> None:
        """Unregister a worker."""
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.srem(keys.WORKERS, worker_id)
            pipe.delete(keys.worker(worker_id))
            await pipe.execute()

    async def _send(self, message: InboxMessage) -> None:
        fields: dict[Any, Any] = {keys.FIELD: codec.encode(message)}
        await self._redis.xadd(keys.INBOX, fields, maxlen=keys.INBOX_MAX_ENTRIES, approximate=True)


async def keep_trying(action: Callable[[], Awaitable[None]], what: str) -> None:
    """Run ``action`` again until Redis takes it, and while this process has no descriptor left for it."""
    while True:
        try:
            return await action()
        except REDIS_TROUBLE as error:
            is_local = isinstance(error, OSError) and error.errno in NO_DESCRIPTORS
            event = "no_descriptors" if is_local else "redis_unreachable"
            structlog.get_logger().warning(event, doing=what, error=str(error))
            await asyncio.sleep(RETRY_AFTER_S)


def describe_no_worker(error: OSError) -> ErrorInfo:
    """What the kernel refused to an order, with the limit and the remedy where the cause is a limit of ours."""
    cause = error.strerror or type(error).__name__
    if error.errno in NO_DESCRIPTORS:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        cause = (
            f"the node agent has too many open files (limit {limit}): raise it (`ulimit -n`, LimitNOFILE in systemd)"
        )
    return ErrorInfo(ErrorCode.WAKE_FAILED, f"no worker could be started: {cause}")


def describe_exit(worker_id: str, model: str, exit_code: int) -> ErrorInfo:
    """The error of a worker that ended without being asked to. ``exit_code`` below 0: minus a signal's number."""
    if exit_code >= 0:
        how = f"ended with exit code {exit_code}"
    elif exit_code == -signal.SIGKILL:
        how = "was killed (SIGKILL; out of memory, or by hand)"
    else:
        name = next((known.name for known in signal.Signals if known == -exit_code), f"number {-exit_code}")
        how = f"was ended by signal {name}"
    return ErrorInfo(ErrorCode.WORKER_FAILED, f"worker {worker_id} of model {model!r} {how}; see its log lines")


def read_memory_total_bytes() -> int:
    """Memory that this machine, or this container, may use."""
    total = _read_meminfo()["MemTotal"]
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdecimal() else total


def read_memory_available_bytes() -> int:
    """Memory that can be had without swapping."""
    return _read_meminfo()["MemAvailable"]


def read_private_bytes() -> int:
    """Anonymous memory of this process, pages still shared with the zygote included. Costs 10 us."""
    with open("/proc/self/statm") as statm:
        _, resident, shared, *_ = statm.read().split()
    return (int(resident) - int(shared)) * _PAGE_BYTES


def read_proportional_bytes(pid: int | None = None) -> int:
    """PSS of a process (None: this one): its pages, each divided by the number of processes that map it.

    The kernel walks the page tables: 5 ms for 270 MB of mapped weights, without the interpreter lock.

    Raises:
        OSError: the process is gone, or no descriptor is to be had.
    """
    with open(f"/proc/{pid or 'self'}/smaps_rollup") as rollup:
        for line in rollup:
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def make_node_report(
    node_id: str,
    *,
    sealed_bytes: dict[str, int],
    zygote_pid: int,
    backend: str,
    memory_total_bytes: int,
    gpus: tuple[GpuReport, ...] = (),
) -> NodeReport:
    """The node's heartbeat at this instant."""
    return NodeReport(
        node_id=node_id,
        pid=os.getpid(),
        reported_at_s=time.time(),
        memory_total_bytes=memory_total_bytes,
        memory_available_bytes=read_memory_available_bytes(),
        sealed_bytes=sealed_bytes,
        zygote_pid=zygote_pid,
        backend=backend,
        gpus=gpus,
    )


def _read_meminfo() -> dict[str, int]:
    fields = (line.split() for line in os.pread(_open_meminfo(), MAX_MEMINFO_BYTES, 0).decode().splitlines())
    return {name.rstrip(":"): int(kib) * 1024 for name, kib, *_ in fields}


@functools.cache
def _open_meminfo() -> int:
    """Held open: a node that has no descriptor left must still say that it lives."""
    return os.open("/proc/meminfo", os.O_RDONLY)
