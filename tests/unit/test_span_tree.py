"""Spans out of marks: which there are, under which parent, by whom, and when; and marks of another host's clock."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from scheduler.client_commands import draw_waterfall
from scheduler.contract.errors import ErrorCode
from scheduler.contract.host_clock import CLOCK_ID, read_clock_id
from scheduler.contract.messages import EmbeddingInputs, TerminalFrame, Trace, Usage
from scheduler.contract.states import Tier
from scheduler.contract.telemetry import COLD_PHASES, HOT_PHASES, Mark
from scheduler.gateway.clock_alignment import align_marks
from scheduler.gateway.request_span import RequestSpan
from scheduler.gateway.span_tree import (
    GROUPS,
    WORKER_PHASES,
    PartFacts,
    SpanRecord,
    build_part_spans,
    build_request_span,
)
from scheduler.gateway.traces import build_document, build_trace
from tests.queue_fixtures import make_request

MS = 1_000_000
WALL = 1_700_000_000 * 10**9
SPAN = RequestSpan("ab" * 16, "cd" * 8, 1, is_recorded=True)

#: A cold start in which every mark is 1 ms after the one before.
COLD_MARKS = {mark.value: MS * (i + 1) for i, mark in enumerate(Mark)}
HOT = (Mark.ACCEPTED, Mark.ENQUEUED, Mark.CLAIMED, Mark.TOKENISED, Mark.PREFILLED, Mark.SAMPLED, Mark.PUBLISHED)
HOT_MARKS = {mark.value: MS * (i + 1) for i, mark in enumerate((*HOT, Mark.RECEIVED, Mark.FIRST_BYTE))}


def make_facts(marks: dict[str, int], tier: Tier | None, *, is_streamed: bool = True, **changes: Any) -> PartFacts:
    """One prompt's facts, ended 5 ms after its last mark."""
    request = make_request("R", tenant="acme", **changes)
    trace = Trace("R", request.model, tier, "w1", 1.0, marks, {}, 9.0)
    return PartFacts(request, trace, Usage(7, 3, 2), "chat", is_streamed, max(marks.values()) + 5 * MS)


def by_name(records: list[SpanRecord]) -> dict[str, SpanRecord]:
    """Records by name; each name once."""
    found = {record.name: record for record in records}
    assert len(found) == len(records)
    return found


@pytest.mark.parametrize(("marks", "tier"), [(COLD_MARKS, Tier.HOST_RAM), (HOT_MARKS, None)])
def test_every_phase_is_a_span_within_its_group(marks: dict[str, int], tier: Tier | None) -> None:
    """Times are those of the marks on the wall clock; groups lie around their phases; ids are unique."""
    facts = make_facts(marks, tier)
    records = build_part_spans(SPAN, "ef" * 8, facts, WALL)
    spans = by_name(records)
    assert len({record.span_id for record in records}) == len(records)
    top = spans["chat " + facts.request.model]
    assert (top.span_id, top.parent_id) == ("ef" * 8, SPAN.span_id)
    assert (top.start_ns, top.end_ns) == (WALL + MS, WALL + facts.ended_mono_ns)
    for phase in COLD_PHASES if tier else HOT_PHASES:
        span = spans[phase.name]
        assert (span.start_ns, span.end_ns) == (WALL + marks[phase.start], WALL + marks[phase.end])
        assert span.by_worker is (phase.name in WORKER_PHASES)
        group = next((name for name, inside in GROUPS.items() if phase.name in inside), None)
        over = top if group is None else spans[group]
        assert span.parent_id == over.span_id
        assert over.start_ns <= span.start_ns <= span.end_ns <= over.end_ns
    assert ("wake" in spans) is (tier is not None)
    assert (spans["stream"].start_ns, spans["stream"].end_ns) == (WALL + marks[Mark.FIRST_BYTE], top.end_ns)


def test_phases_of_groups_exist() -> None:
    """A phase that is renamed must be renamed in the tree, too."""
    names = {phase.name for phase in (*COLD_PHASES, *HOT_PHASES)}
    assert names >= WORKER_PHASES


def test_phases_that_did_not_pass_are_left_out() -> None:
    """A missing mark, or one before its phase's begin, leaves no span; a wake may begin before the request."""
    marks = {**COLD_MARKS, Mark.ORDER_RECEIVED.value: -50 * MS, Mark.VERIFIED.value: -40 * MS}
    del marks[Mark.MAPPED]
    spans = by_name(build_part_spans(SPAN, "ef" * 8, make_facts(marks, Tier.DISK, is_streamed=False), WALL))
    assert not {"dispatch", "map", "restore", "stream"} & set(spans)
    assert spans["wake"].start_ns == WALL - 50 * MS < spans["queue"].start_ns


def test_attributes_are_those_of_the_conventions_and_hold_no_text() -> None:
    """Model, usage and sampling under gen_ai's names; neither prompt nor stop sequences nor long values."""
    facts = make_facts(COLD_MARKS, Tier.HOST_RAM, prompt="a secret prompt")
    attributes = by_name(build_part_spans(SPAN, "ef" * 8, facts, 0))["chat " + facts.request.model].attributes
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "glowplug",
        "gen_ai.request.model": facts.request.model,
        "gen_ai.request.max_tokens": facts.request.sampling.max_tokens,
        "gen_ai.request.stream": True,
        "gen_ai.response.id": "R",
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "glowplug.cold_start": "snapshot",
        "glowplug.tenant": "acme",
        "glowplug.worker.id": "w1",
    }
    assert expected.items() <= attributes.items()
    assert attributes["gen_ai.response.time_to_first_chunk"] == pytest.approx(0.016)
    assert "secret" not in repr(build_part_spans(SPAN, "ef" * 8, facts, 0))
    assert all(len(str(value)) <= 256 for value in attributes.values())
    vectors = make_facts(HOT_MARKS, None, embedding=EmbeddingInputs(("a secret text",), 64))
    embedded = build_part_spans(SPAN, "ef" * 8, vectors, 0)
    assert embedded[0].attributes["gen_ai.embeddings.dimension.count"] == 64
    assert "gen_ai.request.max_tokens" not in embedded[0].attributes
    assert "secret" not in repr(embedded)


def test_errors_are_marked_where_they_are_ours() -> None:
    """A failed request is an error with its code; a client's own mistake fails no server span."""
    facts = make_facts(HOT_MARKS, None)
    failed = facts._replace(trace=Trace("R", "m", None, "w1", 1.0, HOT_MARKS, {}, 9.0, ErrorCode.WAKE_TIMEOUT))
    top = build_part_spans(SPAN, "ef" * 8, failed, 0)[0]
    assert (top.error, top.attributes["error.type"]) == ("wake_timeout", "wake_timeout")
    asked = build_request_span(SPAN, "POST", "/v1/chat/completions", 400, "invalid_request", 1, 2)
    assert (asked.name, asked.error) == ("POST /v1/chat/completions", None)
    assert asked.attributes["error.type"] == "invalid_request"
    assert build_request_span(SPAN, "POST", "/x", 503, "overloaded", 1, 2).error == "overloaded"


def terminal_of(marks: dict[Mark, int], clock_id: str) -> TerminalFrame:
    """The last frame of a worker with these marks."""
    named = {mark.value: value for mark, value in marks.items()}
    return TerminalFrame(marks=named, worker_id="w1", cold_tier=Tier.HOST_RAM, clock_id=clock_id)


GATEWAY_MARKS = {Mark.ACCEPTED.value: 100 * MS, Mark.ENQUEUED.value: 101 * MS, Mark.RECEIVED.value: 160 * MS}
WORKER_MARKS = {
    Mark.ORDER_RECEIVED: 103 * MS,
    Mark.RESTORED: 110 * MS,
    Mark.CLAIMED: 111 * MS,
    Mark.TOKENISED: 112 * MS,
    Mark.SAMPLED: 158 * MS,
    Mark.PUBLISHED: 161 * MS,  # stamped after the frame has already arrived
}


@pytest.mark.parametrize("clock_id", ["", "here"])
def test_marks_of_the_same_clock_are_not_touched(clock_id: str) -> None:
    """Nor those of a worker that names no clock."""
    terminal = terminal_of(WORKER_MARKS, clock_id)
    aligned = align_marks(terminal, GATEWAY_MARKS, "here", 300 * MS)
    assert (aligned.marks, aligned.error_ms) == (terminal.marks, None)


@pytest.mark.parametrize("offset_ns", [-7200 * 10**9, -3 * MS, 40 * MS, 10**15])
def test_marks_of_another_host_are_moved_by_one_distance_within_the_bounds(offset_ns: int) -> None:
    """However far apart they are: the error is at most what is told, and phases within the host keep their time."""
    foreign = terminal_of({mark: value + offset_ns for mark, value in WORKER_MARKS.items()}, "there")
    aligned = align_marks(foreign, GATEWAY_MARKS, "here", 300 * MS)
    assert aligned.error_ms == pytest.approx(13.0)  # 11 from accepted to claimed and 2 from sampled to received
    for mark, value in WORKER_MARKS.items():
        assert 0 <= aligned.marks[mark] - value <= aligned.error_ms * MS, mark
    assert aligned.marks[Mark.SAMPLED] == GATEWAY_MARKS[Mark.RECEIVED]
    trace = build_trace(make_request("R"), foreign, GATEWAY_MARKS, 300 * MS)
    assert trace.clock_error_ms == pytest.approx(13.0)
    assert trace.phases_ms["claim"] == pytest.approx(1.0)
    assert 0 < trace.phases_ms["dispatch"] < 20


def test_the_waterfall_tells_trace_and_clock() -> None:
    """`glowplug trace` names the trace to look up, and says where its times are not exact."""
    trace = build_trace(make_request("R"), terminal_of(WORKER_MARKS, "there"), GATEWAY_MARKS, 300 * MS)
    named = msgspec.structs.replace(trace, trace_id="ab" * 16)
    text = draw_waterfall(msgspec.to_builtins(build_document(named)))
    assert "trace id " + "ab" * 16 in text
    assert "another clock: its phases may lie 13.0 ms earlier" in text
    here = build_trace(make_request("R"), terminal_of(WORKER_MARKS, ""), GATEWAY_MARKS, 300 * MS)
    assert "clock" not in draw_waterfall(msgspec.to_builtins(build_document(here)))


def test_a_second_run_on_another_host_lies_before_the_end() -> None:
    """Its first frame was the first run's, so only the end of the request bounds it."""
    marks = {Mark.CLAIMED: 10**12, Mark.SAMPLED: 10**12 + 90 * MS}
    aligned = align_marks(terminal_of(marks, "there"), GATEWAY_MARKS, "here", 300 * MS)
    assert GATEWAY_MARKS[Mark.ACCEPTED] <= aligned.marks[Mark.CLAIMED]
    assert aligned.marks[Mark.SAMPLED] <= 300 * MS


@pytest.mark.parametrize("offset_ns", [0, -7200 * 10**9, 10**15])
@pytest.mark.parametrize(("accepted_ms", "tier"), [(100, Tier.HOST_RAM), (109, Tier.HOST_RAM), (113, None)])
def test_cold_or_hot_is_told_on_the_gateways_clock(offset_ns: int, accepted_ms: int, tier: Tier | None) -> None:
    """The worker was ready at 110 by our clock: whoever came before met a cold model, whatever its own clock shows."""
    worker_marks = WORKER_MARKS | {Mark.CLAIMED: 114 * MS, Mark.TOKENISED: 115 * MS}
    foreign = TerminalFrame(
        marks={mark.value: value + offset_ns for mark, value in worker_marks.items()},
        worker_id="w1",
        clock_id="there",
        wake_tier=Tier.HOST_RAM,
    )
    gateway_marks = GATEWAY_MARKS | {Mark.ACCEPTED: accepted_ms * MS, Mark.ENQUEUED: accepted_ms * MS}
    trace = build_trace(make_request("R"), foreign, gateway_marks, 300 * MS)
    assert trace.cold_tier == tier
    assert (Mark.RESTORED in trace.marks) == (tier is not None)
    assert set(trace.phases_ms) <= {phase.name for phase in (HOT_PHASES if tier is None else COLD_PHASES)}
    assert "claim" in trace.phases_ms or "dispatch" in trace.phases_ms


def test_this_host_has_a_clock_id() -> None:
    """The same for every process of a host, and short."""
    assert read_clock_id() == CLOCK_ID
    assert 0 < len(CLOCK_ID) <= 40
