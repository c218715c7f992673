"""What the dashboard shows, as one document a moment: fleet, newest traces, security events. Reading wakes nothing."""

from __future__ import annotations

import time
from typing import Any, Final

import msgspec

from scheduler.contract import codec, keys
from scheduler.contract.errors import ContractError
from scheduler.contract.messages import SecurityEvent, StatusReport, Trace
from scheduler.contract.states import Tier
from scheduler.gateway.errors import redis_within
from scheduler.gateway.gateway import Gateway
from scheduler.gateway.traces import compute_ttft_ms

#: A new document this often, and at once when a wake changes its stage.
EVERY_S: Final = 0.5
MAX_TRACES: Final = 20
MAX_EVENTS: Final = 10


class TraceSummary(msgspec.Struct, frozen=True):
    """One line of the list of requests; ``/admin/traces/{request_id}`` has the phases."""

    request_id: str
    model: str
    cold_tier: Tier | None
    accepted_at_s: float
    ttft_ms: float
    total_ms: float


class LiveDocument(msgspec.Struct, frozen=True):
    """The state at ``at_s`` (wall clock). ``status`` is None while no scheduler reports."""

    at_s: float
    gateway_id: str
    open_streams: int
    status: StatusReport | None
    traces: list[TraceSummary]
    security_counts: dict[str, int]
    security_events: list[SecurityEvent]


async def read_live(gateway: Gateway) -> LiveDocument:
    """The present state.

    Raises:
        GlowplugError: Redis does not answer (503).
    """
    redis: Any = gateway.redis  # redis-py types each reply as sync-or-async
    await gateway.directory.ensure_fresh()
    async with redis_within(gateway.settings.redis_limit_s, "reading the dashboard's state"):
        traces = await gateway.traces.find_newest(MAX_TRACES)
        async with redis.pipeline(transaction=False) as pipeline:
            pipeline.hgetall(keys.SECURITY_COUNTS)
            pipeline.lrange(keys.SECURITY_RECENT, 0, MAX_EVENTS - 1)
            counts, recent = await pipeline.execute()
    return LiveDocument(
        at_s=time.time(),
        gateway_id=gateway.gateway_id,
        open_streams=gateway.hub.statistics().open_streams,
        status=gateway.directory.status,
        traces=[_summarise(trace) for trace in traces],
        security_counts={kind.decode(): int(count) for kind, count in counts.items()},
        security_events=_decode_events(recent),
    )


def _summarise(trace: Trace) -> TraceSummary:
    return TraceSummary(
        trace.request_id,
        trace.model,
        trace.cold_tier,
        trace.accepted_at_s,
        round(compute_ttft_ms(trace), 3),
        round(trace.total_ms, 3),
    )


def _decode_events(recent: list[bytes]) -> list[SecurityEvent]:
    events: list[SecurityEvent] = []
    for data in recent:
        try:
            events.append(codec.decode(data, SecurityEvent))
        except ContractError:  # of another version; the count and the log still have it
            continue
    return events
