"""Streams over real HTTP: comments while waking, tokens, the end, and every way in which one can end early."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from scheduler.contract import codec, keys
from scheduler.contract.errors import ErrorCode, ErrorInfo
from scheduler.contract.messages import GenerateRequest, StageEvent, StepFrame, TokenEvent
from scheduler.contract.states import FinishReason, Tier
from tests.eventually import eventually
from tests.gateway_fixtures import (
    GatewayHarness,
    chat_body,
    comments_of,
    end,
    events_of,
    make_card,
    make_status,
    run_gateway,
    say,
    stay_silent,
)

CHAT = "/v1/chat/completions"
LEGACY = "/v1/completions"


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[GatewayHarness]:
    async with run_gateway(redis_url, tmp_path) as harness:
        yield harness


async def test_a_stream_from_headers_to_done(gateway: GatewayHarness) -> None:
    """Comment first, then role, deltas, finish, usage, timing, DONE; headers that keep proxies from buffering."""
    headers, blocks = await gateway.stream(CHAT, chat_body(stream_options={"include_usage": True}))
    assert headers["Content-Type"].startswith("text/event-stream")
    assert headers["Cache-Control"] == "no-cache"
    assert headers["X-Accel-Buffering"] == "no"
    assert blocks[0].startswith(": waking model=tiny stage=queued eta_ms=")
    assert blocks[-1] == "data: [DONE]"
    assert blocks[-2].startswith(": Server-Timing: queue;dur=")
    *chunks, usage = events_of(blocks)
    assert {chunk["id"] for chunk in chunks} == {f"chatcmpl-{headers['X-Request-Id']}"}
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Hello"},
        {"content": " world"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 2


async def test_a_hot_model_gets_a_plain_first_comment(gateway: GatewayHarness) -> None:
    """Nothing is waking, so nothing says so."""
    await gateway.publish(make_card(), status=make_status(Tier.HOT, state="ready"))
    _, blocks = await gateway.stream(CHAT, chat_body())
    assert blocks[0] == ": ok"
    assert not any("waking" in comment for comment in comments_of(blocks))


async def test_legacy_streams_and_interleaved_choices(gateway: GatewayHarness) -> None:
    """Chunks of several choices carry their index; each choice finishes once."""
    _, blocks = await gateway.stream(LEGACY, {"model": "tiny", "prompt": ["a", "b"], "n": 2})
    texts: dict[int, str] = {}
    finished = []
    for chunk in events_of(blocks):
        (choice,) = chunk["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        if choice["finish_reason"]:
            finished.append(choice["index"])
    assert texts == dict.fromkeys(range(4), "Hello world")
    assert sorted(finished) == [0, 1, 2, 3]


async def test_comments_go_on_until_the_first_token_and_show_the_newest_stage(redis_url: str, tmp_path: Path) -> None:
    """A silent wait is never longer than the interval; stage events show at once."""
    go_on = asyncio.Event()

    async def script(request: GenerateRequest, publish: Any) -> None:
        await go_on.wait()
        await say("late")(request, publish)

    async with run_gateway(redis_url, tmp_path, script, wake_comment_every_s=0.02) as gateway:
        seen: list[str] = []
        async with gateway.client.post(gateway.url + CHAT, json=chat_body(stream=True)) as response:
            assert response.status == 200
            async for line in response.content:
                text = line.decode().strip()
                seen.append(text)
                if len([s for s in seen if "stage=queued" in s]) == 3:
                    await gateway.redis.publish(keys.EVENTS, codec.encode(StageEvent("tiny", "restoring", 42)))
                if "stage=restoring eta_ms=42" in text:
                    go_on.set()
        assert seen[-2] == "data: [DONE]"
        assert any('"late"' in line for line in seen)


async def test_a_silence_in_the_middle_is_filled_with_comments(redis_url: str, tmp_path: Path) -> None:
    """A worker that died is replaced and goes on; until then the client sees that somebody is there."""
    go_on = asyncio.Event()

    async def script(request: GenerateRequest, publish: Any) -> None:
        publish(StepFrame((TokenEvent(0, 1, "before"),), time.monotonic_ns()))
        await go_on.wait()
        await say(" after")(request, publish)

    async with run_gateway(
        redis_url, tmp_path, script, wake_comment_every_s=0.01, silent_comment_every_s=0.02
    ) as gateway:
        seen = ""
        async with gateway.client.post(gateway.url + CHAT, json=chat_body(stream=True)) as response:
            async for line in response.content:
                seen += line.decode()
                if seen.count(": waiting model=tiny") == 2:
                    go_on.set()
        assert seen.index("before") < seen.index(": waiting") < seen.index(" after") < seen.index("[DONE]")


async def test_a_worker_error_after_the_headers_is_an_event_and_then_the_end(gateway: GatewayHarness) -> None:
    """No DONE after an error: a client must not take the answer for complete."""
    error = ErrorInfo(ErrorCode.WORKER_FAILED, "it broke")
    gateway.worker.script = say("partial", terminal=end(error=error))
    _, blocks = await gateway.stream(CHAT, chat_body())
    assert json.loads(blocks[-1][6:]) == {
        "error": {"message": "it broke", "type": "server_error", "param": None, "code": "worker_failed"}
    }
    assert "data: [DONE]" not in blocks

    async def is_counted() -> bool:
        async with gateway.client.get(gateway.url + "/metrics") as response:
            return 'requests_total{endpoint="chat",model="tiny",status="500"} 1.0' in await response.text()

    await eventually(is_counted, what="one failure")
    _, _, trace = await gateway.get("/admin/traces/last")
    assert trace["error"] == "worker_failed"


async def test_a_wake_that_takes_too_long_ends_with_an_error(redis_url: str, tmp_path: Path) -> None:
    """503 with Retry-After where headers are not out yet, an error event where they are; the request is cancelled."""
    settings = {"cold_start_limit_s": 0.05, "wake_comment_every_s": 0.02}
    async with run_gateway(redis_url, tmp_path, stay_silent, **settings) as gateway:
        _, blocks = await gateway.stream(CHAT, chat_body())
        assert events_of(blocks)[-1]["error"]["code"] == "wake_timeout"
        status, headers, body = await gateway.post(CHAT, chat_body())
        assert (status, body["error"]["code"]) == (503, "wake_timeout")
        assert int(headers["Retry-After"]) <= 120
        assert headers["x-should-retry"] == "true"
        await eventually(lambda: all_cancelled(gateway, 2))


async def test_waiting_behind_others_on_a_hot_worker_has_the_longer_limit(redis_url: str, tmp_path: Path) -> None:
    """A hot model's queue is no cold start; the request limit ends it, with another code."""
    settings = {"cold_start_limit_s": 0.01, "request_limit_s": 0.1, "wake_comment_every_s": 0.02}
    async with run_gateway(redis_url, tmp_path, stay_silent, **settings) as gateway:
        await gateway.publish(make_card(), status=make_status(Tier.HOT, state="ready"))
        _, blocks = await gateway.stream(CHAT, chat_body())
        assert events_of(blocks)[-1]["error"]["code"] == "overloaded"


async def all_cancelled(gateway: GatewayHarness, count: int) -> bool:
    """Whether ``count`` requests were seen and all of them are flagged as cancelled."""
    redis: Any = gateway.redis
    seen = gateway.worker.seen
    flags = [await redis.exists(keys.cancelled(request.request_id)) for request in seen]
    return len(seen) == count and all(flags)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_frees_its_request(redis_url: str, tmp_path: Path, stream: bool) -> None:
    """Streamed or not: the connection's end cancels the request and closes its stream in the hub."""
    async with run_gateway(redis_url, tmp_path, stay_silent) as gateway:
        posting = asyncio.create_task(
            gateway.client.post(gateway.url + CHAT, json=chat_body(stream=stream, n=2)), name="client"
        )
        await eventually(lambda: len(gateway.worker.seen) == 1)
        if stream:
            (await posting).close()
        else:
            posting.cancel()
        await eventually(lambda: all_cancelled(gateway, 1))
        await eventually(lambda: gateway.server.gateway.hub.statistics().open_streams == 0)


async def flood(request: GenerateRequest, publish: Any) -> None:
    """More text than any socket buffer holds, as fast as the log takes it."""
    for _ in range(400):
        publish(StepFrame((TokenEvent(0, 1, "x" * 20_000),), time.monotonic_ns()))
        await asyncio.sleep(0)
    publish(StepFrame((TokenEvent(0, 1, "", FinishReason.LENGTH),), time.monotonic_ns()))
    publish(end())


async def test_a_client_that_reads_too_slowly_is_cut(redis_url: str, tmp_path: Path) -> None:
    """Its connection is aborted, its request cancelled, and others are not held up."""
    async with run_gateway(redis_url, tmp_path, flood, max_write_buffer_bytes=100_000) as gateway:
        reader, writer = await asyncio.open_connection(gateway.server.host, gateway.server.port, limit=1024)
        body = json.dumps(chat_body(stream=True)).encode()
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await eventually(lambda: len(gateway.worker.seen) == 1)
        await eventually(lambda: all_cancelled(gateway, 1))
        gateway.worker.script = say("still", " here")
        assert (await gateway.post(CHAT, chat_body()))[0] == 200
        writer.close()
        del reader


async def test_http_1_0_clients_get_an_unchunked_stream(gateway: GatewayHarness) -> None:
    """Old proxies speak it: the body ends with the connection."""
    reader, writer = await asyncio.open_connection(gateway.server.host, gateway.server.port)
    body = json.dumps(chat_body(stream=True)).encode()
    head = f"POST {CHAT} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    raw = await reader.read()
    writer.close()
    headers, _, text = raw.decode().partition("\r\n\r\n")
    assert "chunked" not in headers.lower()
    assert text.startswith(": waking")
    assert text.endswith("data: [DONE]\n\n")


async def test_many_streams_at_once_are_all_exact(gateway: GatewayHarness) -> None:
    """100 clients, each gets its own text whole."""

    async def script(request: GenerateRequest, publish: Any) -> None:
        await say(*(f"{request.user}." for _ in range(20)))(request, publish)

    gateway.worker.script = script
    answers = await asyncio.gather(*(gateway.stream(CHAT, chat_body(user=f"u{i}")) for i in range(100)))
    for i, (_, blocks) in enumerate(answers):
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in events_of(blocks))
        assert text == f"u{i}." * 20
