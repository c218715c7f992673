"""The spans of a finished request, made from the marks that gateway and worker stamped anyway.

::

    POST /v1/chat/completions         gateway   the HTTP request
    └─ chat MODEL                     gateway   one prompt: accepted to its last frame
       ├─ queue, dispatch             gateway   accepted, queued, claimed (or ordered)
       ├─ wake                        worker    only where the request met a cold model
       │  └─ verify, spawn, device, map, restore
       ├─ claim                       worker    ready to claimed, of a cold start
       ├─ serve                       worker    claimed to first frame published
       │  └─ tokenise, prefill, first_token, publish
       ├─ first_byte                  gateway   first token sampled to first content byte written
       └─ stream                      gateway   the rest of a streamed answer

Workers make no spans: their marks come back in the terminal frame, so a wake pays nothing for tracing. A wake may begin
before the request that reports it, where another one had asked for it. No text of prompt or answer is ever in a span,
and attributes are of fixed number; names of ``gen_ai.*`` are those of OpenTelemetry's conventions for GenAI.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from scheduler.contract.messages import GenerateRequest, Trace, Usage
from scheduler.contract.telemetry import COLD_PHASES, HOT_PHASES, Mark, Phase
from scheduler.gateway.request_span import RequestSpan, create_span_id
from scheduler.gateway.traces import COLD_START_NAMES, compute_ttft_ms

Value = str | int | float | bool

#: Phases by the span over them.
GROUPS: Final[dict[str, frozenset[str]]] = {
    "wake": frozenset({"verify", "spawn", "device", "map", "restore"}),
    "serve": frozenset({"tokenise", "prefill", "first_token", "publish"}),
}
WORKER_PHASES: Final = frozenset.union(*GROUPS.values()) | {"claim"}
MAX_VALUE_CHARS: Final = 256
PROVIDER: Final = "glowplug"


class SpanRecord(NamedTuple):
    """One ended span, times in wall-clock ns. ``error``: why it did not end well."""

    name: str
    span_id: str
    parent_id: str  # empty: the root of its trace
    start_ns: int
    end_ns: int
    attributes: dict[str, Value]
    by_worker: bool = False
    is_server: bool = False
    error: str | None = None


class PartFacts(NamedTuple):
    """What the span of one prompt tells beside its trace."""

    request: GenerateRequest
    trace: Trace
    usage: Usage
    operation: str
    is_streamed: bool
    ended_mono_ns: int


def build_part_spans(span: RequestSpan, span_id: str, facts: PartFacts, wall_offset_ns: int) -> list[SpanRecord]:
    """The span of one prompt, and those of its phases under it. ``wall_offset_ns``: wall clock less monotonic."""
    marks, ended = facts.trace.marks, facts.ended_mono_ns
    begun = marks.get(Mark.ACCEPTED, ended)
    parent_id = span.span_id or ("" if span.parent is None else span.parent.span_id)
    attributes = _describe(facts)
    name = f"{facts.operation} {facts.trace.model}"
    error = None if facts.trace.error is None else facts.trace.error.value
    records = [SpanRecord(name, span_id, parent_id, begun, ended, attributes, error=error)]
    records += _phase_spans(facts, span_id)
    return [one._replace(start_ns=one.start_ns + wall_offset_ns, end_ns=one.end_ns + wall_offset_ns) for one in records]


def _phase_spans(facts: PartFacts, parent_id: str) -> Iterator[SpanRecord]:
    """Phases with both marks, in this order; times still monotonic."""
    trace = facts.trace
    marks = trace.marks
    found = [phase for phase in (HOT_PHASES if trace.cold_tier is None else COLD_PHASES) if _has_passed(phase, marks)]
    group_ids: dict[str, str] = {}
    for group, names in GROUPS.items():
        inside = [phase for phase in found if phase.name in names]
        if inside:
            group_ids[group] = create_span_id()
            begun, ended = min(marks[phase.start] for phase in inside), max(marks[phase.end] for phase in inside)
            yield SpanRecord(group, group_ids[group], parent_id, begun, ended, _worker(trace), by_worker=True)
    for phase in found:
        group = next((group for group, names in GROUPS.items() if phase.name in names), "")
        over, by_worker = group_ids.get(group, parent_id), phase.name in WORKER_PHASES
        begun, ended = marks[phase.start], marks[phase.end]
        yield SpanRecord(phase.name, create_span_id(), over, begun, ended, {}, by_worker)
    if facts.is_streamed and (first := marks.get(Mark.FIRST_BYTE)) is not None:
        yield SpanRecord("stream", create_span_id(), parent_id, first, max(first, facts.ended_mono_ns), {})


def _has_passed(phase: Phase, marks: dict[str, int]) -> bool:
    """Phases may overlap: one that ended before it began (claimed before the queue's answer was read) took no time."""
    return phase.start in marks and phase.end in marks and marks[phase.start] <= marks[phase.end]


def _worker(trace: Trace) -> dict[str, Value]:
    found: dict[str, Value] = {"glowplug.worker.id": _cut(trace.worker_id)}
    if trace.clock_error_ms is not None:
        found["glowplug.clock.error_ms"] = trace.clock_error_ms
    return found


def _describe(facts: PartFacts) -> dict[str, Value]:
    request, trace, usage, sampling = facts.request, facts.trace, facts.usage, facts.request.sampling
    found: dict[str, Value] = {
        "gen_ai.operation.name": facts.operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": _cut(request.model),
        "gen_ai.request.stream": facts.is_streamed,
        "gen_ai.response.model": _cut(trace.model),
        "gen_ai.response.id": request.request_id,
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        "glowplug.cold_start": COLD_START_NAMES[trace.cold_tier],
        "glowplug.priority": request.priority.value,
        **_worker(trace),
    }
    if ttft_ms := compute_ttft_ms(trace):
        found["gen_ai.response.time_to_first_chunk"] = ttft_ms / 1e3
    if request.tenant:
        found["glowplug.tenant"] = _cut(request.tenant)
    if request.embedding is not None:
        if request.embedding.dimensions:
            found["gen_ai.embeddings.dimension.count"] = request.embedding.dimensions
    elif not request.text_only:
        found |= {
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.choice.count": request.num_choices,
        }
    if trace.error is not None:
        found["error.type"] = trace.error.value
    return found


def build_request_span(
    span: RequestSpan, method: str, route: str, status: int, error: str | None, started_ns: int, ended_ns: int
) -> SpanRecord:
    """The span of a whole HTTP request, of which ``route`` is the pattern and not the path; times in wall-clock ns."""
    attributes: dict[str, Value] = {"http.request.method": method, "http.route": route}
    attributes["http.response.status_code"] = status
    if error is not None:
        attributes["error.type"] = error
    parent_id = "" if span.parent is None else span.parent.span_id
    failed = error if status >= 500 or status == 499 else None  # what the client did wrong is no error of the server's
    name = f"{method} {route}"
    return SpanRecord(name, span.span_id, parent_id, started_ns, ended_ns, attributes, is_server=True, error=failed)


def _cut(text: str) -> str:
    return text[:MAX_VALUE_CHARS]
