"""Where the time of finished requests went: kept in Redis for an hour, the newest also here."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Final

import msgspec
from redis.asyncio import Redis

from scheduler.contract import codec, keys
from scheduler.contract.errors import ErrorCode
from scheduler.contract.host_clock import CLOCK_ID
from scheduler.contract.messages import GenerateRequest, TerminalFrame, Trace
from scheduler.contract.states import Tier
from scheduler.contract.telemetry import COLD_PHASES, HOT_PHASES, WAKE_MARKS, Mark, arrived_before, compute_phases_ms
from scheduler.gateway.clock_alignment import AlignedMarks, align_marks
from scheduler.gateway.request_ids import is_request_id

MAX_KEPT_HERE: Final = 256

#: ``X-Cold-Start`` by the tier that the request met; also a metrics label.
COLD_START_NAMES: Final[dict[Tier | None, str]] = {
    None: "hot",
    Tier.HOT: "hot",
    Tier.PARKED: "parked",
    Tier.RELEASED: "released",
    Tier.HOST_RAM: "snapshot",
    Tier.DISK: "disk",
    Tier.REMOTE: "remote",
}


#: What needs no start of a worker: its phases are those of a request to a hot one.
WITHOUT_A_START: Final = frozenset({None, Tier.PARKED, Tier.RELEASED})


class PhaseRow(msgspec.Struct):
    """One bar of a waterfall; ``start`` and ``end`` name marks."""

    name: str
    start: str
    end: str
    ms: float


class TraceDocument(msgspec.Struct):
    """A trace as ``/admin/traces`` gives it. ``ttft_ms``: accepted to first content byte; ``marks`` in mono ns."""

    request_id: str
    model: str
    cold_tier: Tier | None
    worker_id: str
    accepted_at_s: float
    ttft_ms: float
    total_ms: float
    marks: dict[str, int]
    phases_ms: dict[str, float]
    phases: list[PhaseRow]
    error: str | None = None  # why it did not end well
    trace_id: str = ""  # in the tracing system, where it was sent to one
    clock_error_ms: float | None = None  # the worker's host has another clock; its marks were moved to within this


def build_trace(
    request: GenerateRequest,
    terminal: TerminalFrame,
    gateway_marks: dict[str, int],
    now_mono_ns: int,
    error: ErrorCode | None = None,
) -> Trace:
    """The trace of a request that just ended; where both sides set a mark, the gateway's own wins."""
    aligned = align_marks(terminal, gateway_marks, CLOCK_ID, now_mono_ns)
    cold_tier, worker_marks = _find_cold_tier(terminal, gateway_marks, aligned)
    marks = {**worker_marks, **gateway_marks}
    accepted_mono_ns = marks.get(Mark.ACCEPTED, now_mono_ns)
    return Trace(
        request_id=request.request_id,
        model=request.model,
        cold_tier=cold_tier,
        worker_id=terminal.worker_id,
        accepted_at_s=request.accepted_at_s,
        marks=marks,
        phases_ms=compute_phases_ms(marks, cold=cold_tier not in WITHOUT_A_START),
        total_ms=(now_mono_ns - accepted_mono_ns) / 1e6,
        error=error,
        clock_error_ms=aligned.error_ms,
    )


def _find_cold_tier(
    terminal: TerminalFrame, gateway_marks: dict[str, int], aligned: AlignedMarks
) -> tuple[Tier | None, dict[str, int]]:
    """The tier that the request met, and its worker's marks on our clock, less those of a wake it did not wait for."""
    if terminal.wake_tier is None:
        return terminal.cold_tier, aligned.marks
    if arrived_before(gateway_marks, aligned.marks):
        return terminal.wake_tier, aligned.marks
    return terminal.cold_tier, {name: mono_ns for name, mono_ns in aligned.marks.items() if name not in WAKE_MARKS}


def compute_ttft_ms(trace: Trace) -> float:
    """Accepted to first content byte, ms; 0 when there was none."""
    first = trace.marks.get(Mark.FIRST_BYTE)
    return 0.0 if first is None else max(0, first - trace.marks.get(Mark.ACCEPTED, first)) / 1e6


def format_server_timing(phases_ms: dict[str, float]) -> str:
    """The value of a ``Server-Timing`` header. Source: W3C Server Timing, section 2."""
    return ", ".join(f"{name};dur={ms:.2f}" for name, ms in phases_ms.items())


def build_document(trace: Trace) -> TraceDocument:
    """``trace`` with its phases as rows, for drawing."""
    phases = HOT_PHASES if trace.cold_tier in WITHOUT_A_START else COLD_PHASES
    rows = [PhaseRow(p.name, p.start, p.end, trace.phases_ms[p.name]) for p in phases if p.name in trace.phases_ms]
    return TraceDocument(
        request_id=trace.request_id,
        model=trace.model,
        cold_tier=trace.cold_tier,
        worker_id=trace.worker_id,
        accepted_at_s=trace.accepted_at_s,
        ttft_ms=compute_ttft_ms(trace),
        total_ms=trace.total_ms,
        marks=trace.marks,
        phases_ms=trace.phases_ms,
        phases=rows,
        error=trace.error,
        trace_id=trace.trace_id,
        clock_error_ms=trace.clock_error_ms,
    )


#: KEYS: trace, list of ids. ARGV: trace, TTL s, id, most traces kept, prefix of traces. The oldest above that go: by
#: their TTL alone, a busy gateway would keep an hour of them.
SAVE: Final = """
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
for _ = redis.call('LPUSH', KEYS[2], ARGV[3]), ARGV[4] + 1, -1 do
  redis.call('DEL', ARGV[5] .. redis.call('RPOP', KEYS[2]))
end
"""


class TraceStore:
    """Writes and finds traces. Event loop only."""

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # redis-py types each reply as sync-or-async
        self._save = redis.register_script(SAVE)
        self._newest: OrderedDict[str, Trace] = OrderedDict()

    def remember(self, trace: Trace) -> None:
        """Keep ``trace`` in this process (bounded); never waits."""
        self._newest[trace.request_id] = trace
        if len(self._newest) > MAX_KEPT_HERE:
            self._newest.popitem(last=False)

    async def save(self, trace: Trace) -> None:
        """Write ``trace`` for all processes, one round trip.

        Raises:
            RedisError: Redis does not answer.
        """
        await self._save(
            keys=[keys.trace(trace.request_id), keys.TRACES],
            args=[codec.encode(trace), keys.TRACE_TTL_S, trace.request_id, keys.TRACES_MAX_ENTRIES, keys.trace("")],
        )

    async def find(self, request_id: str) -> Trace | None:
        """The trace of a request, or None when unknown or expired.

        Raises:
            RedisError: Redis does not answer.
        """
        if not is_request_id(request_id):
            return None
        here = self._newest.get(request_id)
        if here is not None:
            return here
        data = await self._redis.get(keys.trace(request_id))
        return None if data is None else codec.decode(data, Trace)

    async def find_newest(self, limit: int) -> list[Trace]:
        """The newest traces of all gateways, newest first; two round trips.

        Raises:
            RedisError: Redis does not answer.
        """
        request_ids = await self._redis.lrange(keys.TRACES, 0, limit - 1)
        if not request_ids:
            return []
        found = await self._redis.mget([keys.trace(request_id.decode()) for request_id in request_ids])
        return [codec.decode(data, Trace) for data in found if data is not None]

    async def find_last(self) -> Trace | None:
        """The newest trace of any gateway.

        Raises:
            RedisError: Redis does not answer.
        """
        request_id = await self._redis.lindex(keys.TRACES, 0)
        return None if request_id is None else await self.find(request_id.decode())
