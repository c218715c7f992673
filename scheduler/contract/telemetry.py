"""Names of marks, phases and metrics, and the one logging set-up.

A *mark* is a monotonic instant written by the process that saw it; a *phase* is the time between two marks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, NamedTuple, TextIO, cast

import structlog

from scheduler.contract.log_file import LogFile


class Mark(StrEnum):
    """Instants of a request's way, in the order of a cold start."""

    ACCEPTED = "accepted"  # gateway: request read and validated
    ENQUEUED = "enqueued"  # gateway: the queue acknowledged it
    DEMAND_SEEN = "demand_seen"  # scheduler: read the demand that led to this worker
    SPAWN_ORDERED = "spawn_ordered"  # scheduler: order sent to an agent
    ORDER_RECEIVED = "order_received"  # agent: order read
    VERIFIED = "verified"  # agent: snapshot verified and in sealed memory
    FORKED = "forked"  # worker: first line of the child
    DEVICE_READY = "device_ready"  # worker: no-op launch done
    MAPPED = "mapped"  # worker: weights mapped, plan bound
    RESTORED = "restored"  # worker: guest restored; the worker is ready
    CLAIMED = "claimed"  # worker: job claimed from the queue
    TOKENISED = "tokenised"  # worker
    PREFILLED = "prefilled"  # worker: logits of the last prompt token
    SAMPLED = "sampled"  # worker: first token chosen
    PUBLISHED = "published"  # worker: first frame logged and published
    RECEIVED = "received"  # gateway: first frame arrived
    FIRST_BYTE = "first_byte"  # gateway: first content byte written


class Phase(NamedTuple):
    """A named stretch of the way; the time between ``start`` and ``end``."""

    name: str
    start: Mark
    end: Mark


#: Phases of a cold start. They may overlap (the claim runs beside the restore), so they need not add up.
COLD_PHASES: Final = (
    Phase("queue", Mark.ACCEPTED, Mark.ENQUEUED),
    Phase("dispatch", Mark.ENQUEUED, Mark.ORDER_RECEIVED),
    Phase("verify", Mark.ORDER_RECEIVED, Mark.VERIFIED),
    Phase("spawn", Mark.VERIFIED, Mark.FORKED),
    Phase("device", Mark.FORKED, Mark.DEVICE_READY),
    Phase("map", Mark.DEVICE_READY, Mark.MAPPED),
    Phase("restore", Mark.MAPPED, Mark.RESTORED),
    Phase("claim", Mark.RESTORED, Mark.CLAIMED),
    Phase("tokenise", Mark.CLAIMED, Mark.TOKENISED),
    Phase("prefill", Mark.TOKENISED, Mark.PREFILLED),
    Phase("first_token", Mark.PREFILLED, Mark.SAMPLED),
    Phase("publish", Mark.SAMPLED, Mark.PUBLISHED),
    Phase("first_byte", Mark.SAMPLED, Mark.FIRST_BYTE),
)

#: Phases of a request that met a hot worker.
HOT_PHASES: Final = (
    Phase("queue", Mark.ACCEPTED, Mark.ENQUEUED),
    Phase("dispatch", Mark.ENQUEUED, Mark.CLAIMED),
    Phase("tokenise", Mark.CLAIMED, Mark.TOKENISED),
    Phase("prefill", Mark.TOKENISED, Mark.PREFILLED),
    Phase("first_token", Mark.PREFILLED, Mark.SAMPLED),
    Phase("publish", Mark.SAMPLED, Mark.PUBLISHED),
    Phase("first_byte", Mark.SAMPLED, Mark.FIRST_BYTE),
)


def compute_phases_ms(marks: dict[str, int], *, cold: bool) -> dict[str, float]:
    """Phases in milliseconds from ``marks`` (mono ns). A phase with a missing mark is left out; never negative."""
    phases = COLD_PHASES if cold else HOT_PHASES
    return {
        phase.name: max(0, marks[phase.end] - marks[phase.start]) / 1e6
        for phase in phases
        if phase.start in marks and phase.end in marks
    }


#: Stamped once a worker, before any of its requests: only a request that waited for it has them in its trace.
WAKE_MARKS: Final = (
    Mark.DEMAND_SEEN,
    Mark.SPAWN_ORDERED,
    Mark.ORDER_RECEIVED,
    Mark.VERIFIED,
    Mark.FORKED,
    Mark.DEVICE_READY,
    Mark.MAPPED,
    Mark.RESTORED,
)


def arrived_before(request_marks: Mapping[str, int], wake_marks: Mapping[str, int]) -> bool:
    """Whether a request was accepted before the worker that serves it was ready: it met a cold model.

    Requires: both sets of marks are of one clock.
    """
    ready_mono_ns = wake_marks.get(Mark.RESTORED)
    accepted_mono_ns = request_marks.get(Mark.ACCEPTED, request_marks.get(Mark.ENQUEUED))
    return ready_mono_ns is not None and accepted_mono_ns is not None and accepted_mono_ns < ready_mono_ns


class Metric(StrEnum):
    """Prometheus names; the gateway exposes them all."""

    REQUESTS_TOTAL = "glowplug_requests_total"  # labels: model, endpoint, status
    COLD_STARTS_TOTAL = "glowplug_cold_starts_total"  # labels: model, tier
    PHASE_SECONDS = "glowplug_cold_start_phase_seconds"  # labels: phase
    TTFT_SECONDS = "glowplug_time_to_first_token_seconds"  # labels: model, tier
    TOKEN_DELIVERY_SECONDS = "glowplug_token_delivery_seconds"
    TOKENS_TOTAL = "glowplug_tokens_total"  # labels: model, kind (prompt|completion)
    RECOVERIES_TOTAL = "glowplug_recoveries_total"
    REFUSED_KEYS_TOTAL = "glowplug_refused_keys_total"  # labels: reason (missing|unknown|expired|revoked)
    SWEPT_TOTAL = "glowplug_swept_total"  # labels: kind
    IN_FLIGHT = "glowplug_requests_in_flight"  # labels: model
    QUEUE_DEPTH = "glowplug_queue_depth"  # labels: model
    DEATHS = "glowplug_worker_deaths_in_a_row"  # labels: model
    WORKERS = "glowplug_workers"  # labels: model, state
    SEALED_BYTES = "glowplug_sealed_bytes"  # labels: model
    KV_BYTES = "glowplug_kv_bytes"  # labels: model, kind (used|cached|budget)
    PREFIX_TOKENS = "glowplug_prefix_tokens"  # labels: model, kind (prompt|cached)
    GPU_BYTES = "glowplug_gpu_bytes"  # labels: node, gpu, kind (total|free|spares)
    GPU_ERRORS = "glowplug_gpu_errors"  # labels: node, gpu, kind (fault|uncorrected_ecc|xid)
    BATCH_ANSWERS_TOTAL = "glowplug_batch_answers_total"  # labels: model, outcome (completed|failed)
    BATCHES = "glowplug_batches"  # labels: status
    BATCH_LINES = "glowplug_batch_lines"  # labels: model, state (waiting|in_flight|completed|failed)
    BATCH_OLDEST_AGE = "glowplug_batch_oldest_age_seconds"  # labels: status
    SECURITY_EVENTS_TOTAL = "glowplug_security_events_total"  # labels: kind


#: Log event name of anything that looks like tampering; always at critical level.
SECURITY_EVENT: Final = "security"


class _LossyStream:
    """What lines are written to. A line that cannot be written (full disk, closed pipe) is lost; it ends nothing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream was closed
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def configure_logging(
    *, component: str, level: str = "info", log_format: str = "auto", log_dir: Path | None = None
) -> None:
    """Route structlog and the standard library's logging to stderr, one line an event.

    ``log_format`` ``json`` or ``console``; ``auto``: console on a terminal. In ``log_dir`` the same lines are appended
    to a file, always as JSON. Call once a process, before the first log line. Prompts and completions are never logged.
    """
    as_console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer()
    if as_console:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty() and not os.environ.get("NO_COLOR"))
    to_file = [] if log_dir is None else [_append_to(LogFile(log_dir))]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            *to_file,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(file=cast(TextIO, _LossyStream(sys.stderr))),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(component=component)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")


def _append_to(file: LogFile) -> structlog.typing.Processor:
    render = structlog.processors.JSONRenderer()

    def append(logger: Any, name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        file.write_line(str(render(logger, name, dict(event))))
        return event

    return append
