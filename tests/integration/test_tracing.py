"""Traces through a real gateway to a real OTLP receiver: one trace for client, gateway and worker; never in the way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import structlog

from scheduler.contract.errors import ErrorCode, ErrorInfo
from scheduler.contract.messages import GenerateRequest, StepFrame
from scheduler.contract.trace_context import parse
from scheduler.gateway.tracing_settings import TracingSettings
from tests.batch_fixtures import batch_line, encode_lines
from tests.eventually import eventually
from tests.gateway_fixtures import (
    MODEL,
    GatewayHarness,
    Publish,
    chat_body,
    comments_of,
    end,
    run_gateway,
    words,
)
from tests.otlp_receiver import OtlpReceiver, ReceivedSpan, run_receiver

CHAT = "/v1/chat/completions"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CLIENT_SPAN = "00f067aa0ba902b7"
SERVER_KIND = 2
HOUR_NS = 3600 * 10**9


def parent(flags: str = "01", trace_id: str = TRACE) -> dict[str, str]:
    """Headers of a client that traces."""
    return {"traceparent": f"00-{trace_id}-{CLIENT_SPAN}-{flags}", "tracestate": "rojo=1"}


@pytest.fixture
async def receiver(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[OtlpReceiver]:
    """A collector that gateways of the test send to, often."""
    async with run_receiver() as running:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", running.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        yield running


@pytest.fixture
async def traced(redis_url: str, tmp_path: Path, receiver: OtlpReceiver) -> AsyncIterator[GatewayHarness]:
    """A gateway that records everything its clients do not forbid."""
    async with run_gateway(redis_url, tmp_path, tracing=TracingSettings()) as harness:
        yield harness


async def test_a_clients_trace_goes_through_gateway_queue_and_worker(
    traced: GatewayHarness, receiver: OtlpReceiver
) -> None:
    """The client's ids at the top, the gateway's span in the queue, the worker's phases below; nothing of the text."""
    status, headers, _ = await traced.post(
        CHAT, chat_body(messages=[{"role": "user", "content": "a secret"}]), headers=parent()
    )
    assert (status, headers["X-Trace-Id"]) == (200, TRACE)
    spans = {span.name: span for span in await receiver.wait_root(TRACE)}
    top, part = spans[f"POST {CHAT}"], spans[f"chat {MODEL}"]
    assert (top.parent_id, top.kind, top.service) == (CLIENT_SPAN, SERVER_KIND, "glowplug")
    assert part.parent_id == top.span_id
    (seen,) = traced.worker.seen
    context = parse(seen.trace_context)
    assert context is not None
    assert (context.trace_id, context.span_id, context.is_sampled) == (TRACE, part.span_id, True)
    assert {span.tracestate for span in spans.values()} == {"rojo=1"} == {context.tracestate}
    assert spans["tokenise"].parent_id == spans["serve"].span_id
    assert {spans[name].service for name in ("serve", "tokenise", "prefill")} == {"glowplug-worker"}
    assert {spans[name].service for name in ("queue", f"chat {MODEL}")} == {"glowplug"}
    assert part.attributes["gen_ai.usage.output_tokens"] == 2
    assert part.attributes["gen_ai.response.id"] == headers["X-Request-Id"]
    assert top.attributes["http.response.status_code"] == 200
    assert abs(time.time_ns() - part.end_ns) < 60e9
    assert top.start_ns <= part.start_ns <= part.end_ns
    assert "secret" not in repr(receiver.spans)
    assert "Hello" not in repr(receiver.spans)


async def test_a_stream_begins_its_own_trace_and_tells_it(traced: GatewayHarness, receiver: OtlpReceiver) -> None:
    """Without a parent the trace begins here; its id is in the stream's headers and in `glowplug trace`'s document."""
    headers, blocks = await traced.stream(CHAT, chat_body())
    trace_id = headers["X-Trace-Id"]
    spans = {span.name: span for span in await receiver.wait_root(trace_id)}
    assert spans[f"POST {CHAT}"].parent_id == ""
    assert "stream" in spans
    assert any(comment.startswith("Server-Timing") for comment in comments_of(blocks))
    _, _, document = await traced.get(f"/admin/traces/{headers['X-Request-Id']}")
    assert document["trace_id"] == trace_id


async def test_what_the_client_does_not_record_is_passed_on_and_not_sent(
    traced: GatewayHarness, receiver: OtlpReceiver
) -> None:
    """The parent's flag decides: its trace goes through the queue unrecorded, the next one's is sent."""
    status, headers, _ = await traced.post(CHAT, chat_body(), headers=parent("00"))
    assert (status, headers["X-Trace-Id"]) == (200, TRACE)
    context = parse(traced.worker.seen[0].trace_context)
    assert context is not None
    assert (context.trace_id, context.is_sampled) == (TRACE, False)
    other = "1" * 32
    await traced.post(CHAT, chat_body(), headers=parent("01", other))
    await receiver.wait_root(other)
    assert {span.trace_id for span in receiver.spans} == {other}


async def test_a_failed_request_is_a_failed_span(redis_url: str, tmp_path: Path, receiver: OtlpReceiver) -> None:
    """Its code is the error's type, on the request and on its part; a refused one has the request's span alone."""

    async def fail(request: GenerateRequest, publish: Publish) -> None:
        publish(end(error=ErrorInfo(ErrorCode.SNAPSHOT_CORRUPT, "broken")))

    async with run_gateway(redis_url, tmp_path, fail, tracing=TracingSettings()) as harness:
        status, headers, _ = await harness.post(CHAT, chat_body())
        assert status == 500
        spans = {span.name: span for span in await receiver.wait_root(headers["X-Trace-Id"])}
        for name in (f"POST {CHAT}", f"chat {MODEL}"):
            assert spans[name].is_error
            assert spans[name].attributes["error.type"] == "snapshot_corrupt"
        status, headers, _ = await harness.post(CHAT, chat_body(temperature=99))
        (refused,) = await receiver.wait_root(headers["X-Trace-Id"])
        assert (status, refused.attributes["http.response.status_code"]) == (400, 400)
        assert not refused.is_error


async def test_without_tracing_a_context_still_goes_to_the_worker(redis_url: str, tmp_path: Path) -> None:
    """The client's own span is the worker's parent, and nothing is said where the client names none."""
    async with run_gateway(redis_url, tmp_path) as harness:
        _, headers, _ = await harness.post(CHAT, chat_body(), headers=parent())
        assert headers["X-Trace-Id"] == TRACE
        context = parse(harness.worker.seen[0].trace_context)
        assert context is not None
        assert (context.trace_id, context.span_id) == (TRACE, CLIENT_SPAN)
        _, headers, _ = await harness.post(CHAT, chat_body(), headers={"traceparent": "00-junk"})
        assert "X-Trace-Id" not in headers
        assert harness.worker.seen[1].trace_context is None


async def test_log_lines_carry_the_trace(traced: GatewayHarness, receiver: OtlpReceiver) -> None:
    """The line of a request has its trace's id, and the connection's next request another."""
    lines: list[Any] = []

    def keep(_logger: Any, _name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        lines.append(dict(event))
        raise structlog.DropEvent

    structlog.configure(processors=[structlog.contextvars.merge_contextvars, keep])
    _, first, _ = await traced.post(CHAT, chat_body(), headers=parent())
    _, second, _ = await traced.post(CHAT, chat_body())

    def logged() -> dict[str, str]:
        return {line["request_id"]: line["trace_id"] for line in lines if line["event"] == "request"}

    expected = {headers["X-Request-Id"]: headers["X-Trace-Id"] for headers in (first, second)}
    await eventually(lambda: logged() == expected, what=f"lines with {expected}")


async def test_a_collector_that_is_down_fails_no_request_and_holds_no_one_up(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing listens at the endpoint: requests are answered, the queue of spans is bounded, and the gateway ends."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "5")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "16")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "8")
    monkeypatch.setattr("scheduler.gateway.span_export.FLUSH_LIMIT_S", 0.3)
    async with run_gateway(redis_url, tmp_path, tracing=TracingSettings()) as harness:
        answers = await asyncio.gather(*(harness.post(CHAT, chat_body()) for _ in range(20)))
        assert [status for status, _, _ in answers] == [200] * 20


async def test_a_collector_that_refuses_or_recovers(traced: GatewayHarness, receiver: OtlpReceiver) -> None:
    """Spans of a time in which it refuses are lost; later ones arrive."""
    receiver.status = 400
    await traced.post(CHAT, chat_body(), headers=parent())
    await eventually(lambda: receiver.num_posts, what="an export that is refused")
    receiver.status = 200
    other = "2" * 32
    await traced.post(CHAT, chat_body(), headers=parent("01", other))
    await receiver.wait_root(other)


async def test_several_prompts_are_parts_of_one_request(traced: GatewayHarness, receiver: OtlpReceiver) -> None:
    """A call with several prompts: one request's span over one span for each prompt, each with its own in the queue."""
    body = {"model": MODEL, "prompt": ["one", "two", "three"], "max_tokens": 4}
    _, headers, _ = await traced.post("/v1/completions", body)
    spans = await receiver.wait_root(headers["X-Trace-Id"])
    (top,) = (span for span in spans if span.kind == SERVER_KIND)
    parts = [span for span in spans if span.name == f"text_completion {MODEL}"]
    assert [part.parent_id for part in parts] == [top.span_id] * 3
    sent = {context.span_id for request in traced.worker.seen if (context := parse(request.trace_context))}
    assert sent == {part.span_id for part in parts}


async def test_a_line_of_a_batch_is_a_trace_of_its_own(traced: GatewayHarness, receiver: OtlpReceiver) -> None:
    """No HTTP request waits for it, so its prompt's span is the root; its batch's uploads are not traced."""
    form = aiohttp.FormData({"purpose": "batch"})
    form.add_field("file", encode_lines([batch_line(1), batch_line(2)]), filename="lines.jsonl")
    async with traced.client.post(traced.url + "/v1/files", data=form) as response:
        file_id = (await response.json())["id"]
    body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    status, _, _ = await traced.post("/v1/batches", body)
    assert status == 200

    def roots() -> list[ReceivedSpan]:
        return [span for span in receiver.spans if span.name == f"chat {MODEL}"]

    await eventually(lambda: len(roots()) == 2, what="two lines' spans")
    assert {span.parent_id for span in roots()} == {""}
    assert len({span.trace_id for span in roots()}) == 2
    assert {span.attributes["glowplug.priority"] for span in roots()} == {"batch"}
    assert not [span for span in receiver.spans if span.kind == SERVER_KIND]


async def test_a_worker_of_another_host_is_moved_onto_this_clock(
    redis_url: str, tmp_path: Path, receiver: OtlpReceiver
) -> None:
    """Marks an hour off: the spans lie within the request, and say how far they may be off."""

    async def from_afar(request: GenerateRequest, publish: Publish) -> None:
        (step,), here = words("Hi"), end(cold_tier=None)
        publish(StepFrame(step.events, step.sampled_mono_ns))
        marks = {name: value + HOUR_NS for name, value in here.marks.items()}
        publish(msgspec.structs.replace(here, marks=marks, clock_id="another-clock"))

    async with run_gateway(redis_url, tmp_path, from_afar, tracing=TracingSettings()) as harness:
        _, headers, _ = await harness.post(CHAT, chat_body())
        spans = {span.name: span for span in await receiver.wait_root(headers["X-Trace-Id"])}
    part, serve = spans[f"chat {MODEL}"], spans["serve"]
    assert part.start_ns <= serve.start_ns <= serve.end_ns <= part.end_ns
    assert 0 <= serve.attributes["glowplug.clock.error_ms"] < 10_000
