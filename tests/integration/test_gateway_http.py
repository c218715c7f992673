"""The gateway over real HTTP and a real Valkey: answers that are not streamed, errors, models, health, admin."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from scheduler.contract import codec, keys
from scheduler.contract.errors import ErrorCode, ErrorInfo
from scheduler.contract.messages import TokenLogprob
from scheduler.contract.states import Priority, Tier
from tests.eventually import eventually
from tests.gateway_fixtures import (
    MODEL,
    GatewayHarness,
    chat_body,
    end,
    make_card,
    make_status,
    run_gateway,
    say,
    stay_silent,
    words,
)

CHAT = "/v1/chat/completions"
LEGACY = "/v1/completions"


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[GatewayHarness]:
    async with run_gateway(redis_url, tmp_path, max_body_bytes=20_000) as harness:
        yield harness


async def test_a_chat_answer_has_openais_shape_and_tells_how_it_was_woken(gateway: GatewayHarness) -> None:
    """Body, usage, fingerprint, ids and the headers about the cold start."""
    status, headers, body = await gateway.post(CHAT, chat_body())
    assert status == 200
    assert body["object"] == "chat.completion"
    assert body["id"] == f"chatcmpl-{headers['X-Request-Id']}"
    assert body["system_fingerprint"] == "fp_5ca1ab1e"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello world", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"]["total_tokens"] == 7
    assert headers["X-Cold-Start"] == "snapshot"
    assert "queue;dur=" in headers["Server-Timing"]
    assert headers["openai-processing-ms"].isdigit()


async def test_what_the_worker_gets(gateway: GatewayHarness) -> None:
    """Rendered prompt, sampling, choices, class, user and the marks known so far; a chat asks for no extra BOS."""
    await gateway.post(CHAT, chat_body(n=2, seed=7, max_tokens=5, priority="batch", user="u", temperature=0))
    (request,) = gateway.worker.seen
    assert request.prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert (request.sampling.seed, request.sampling.max_tokens, request.sampling.temperature) == (7, 5, 0.0)
    assert (request.num_choices, request.priority, request.user) == (2, Priority.BATCH, "u")
    assert set(request.marks) == {"accepted"}
    assert not request.add_special


async def test_several_choices_arrive_by_index(gateway: GatewayHarness) -> None:
    """n choices of one prompt."""
    _, _, body = await gateway.post(CHAT, chat_body(n=3))
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in body["choices"]} == {"Hello world"}


async def test_several_prompts_are_several_choices(gateway: GatewayHarness) -> None:
    """Each prompt is a request of its own; choices are numbered through and the prompts can be echoed."""
    body = {"model": MODEL, "prompt": ["a: ", "b: "], "n": 2, "echo": True}
    status, _, answer = await gateway.post(LEGACY, body)
    assert status == 200
    assert [c["text"] for c in answer["choices"]] == ["a: Hello world"] * 2 + ["b: Hello world"] * 2
    assert answer["usage"]["prompt_tokens"] == 10
    assert len({request.request_id for request in gateway.worker.seen}) == 2
    assert all(request.add_special for request in gateway.worker.seen)


async def test_token_id_prompts_and_legacy_logprobs(gateway: GatewayHarness) -> None:
    """Ids reach the worker as they are; log-probabilities come as parallel arrays."""

    async def script(request: Any, publish: Any) -> None:
        for frame in words("He", "llo", logprob=TokenLogprob(5, b"He", -0.25)):
            publish(frame)
        publish(end())

    gateway.worker.script = script
    _, _, answer = await gateway.post(LEGACY, {"model": MODEL, "prompt": [1, 2, 3], "logprobs": 0})
    assert gateway.worker.seen[0].prompt == (1, 2, 3)
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["He", "He"],
        "token_logprobs": [-0.25, -0.25],
        "top_logprobs": [{}, {}],
        "text_offset": [0, 2],
    }


async def assert_error(answer: tuple[int, Any, Any], status: int, code: str, param: str | None = None) -> None:
    found, headers, body = answer
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert (found, body["error"]["code"], body["error"]["param"]) == (status, code, param)
    assert len(headers["X-Request-Id"]) == 26


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("/chat/completions", "did you mean /v1/chat/completions?"),
        ("/v1/v1/chat/completions", "did you mean /v1/chat/completions?"),
        ("/v1/chat/completions/", "did you mean /v1/chat/completions?"),
        ("/api/chat", "GET /openapi.json lists the paths"),
    ],
)
async def test_a_wrong_base_url_is_told_what_is_right(gateway: GatewayHarness, path: str, remedy: str) -> None:
    """What clients get wrong most: /v1 left out, or there twice."""
    _, _, body = await gateway.post(path, chat_body())
    assert body["error"]["message"] == f"no such path: POST {path}; {remedy}"


async def test_an_empty_body_is_called_empty(gateway: GatewayHarness) -> None:
    """Not "truncated JSON"."""
    async with gateway.client.post(gateway.url + CHAT, headers={"Content-Type": "application/json"}) as response:
        answer = await response.json()
    assert (response.status, answer["error"]["message"]) == (400, "the request body is empty; expected a JSON object")


async def test_errors_have_openais_shape(gateway: GatewayHarness) -> None:
    """Every refusal, from the router's to the body reader's to ours; none of them wakes anything."""
    url = gateway.url
    await assert_error(await gateway.post(CHAT, chat_body(model="nope")), 404, "model_not_found", "model")
    await assert_error(await gateway.post(CHAT, chat_body(temperature="hot")), 400, "invalid_request", "temperature")
    await assert_error(await gateway.post(CHAT, [1]), 400, "invalid_request")
    long_chat = [{"role": "user", "content": "x" * 19_000}]
    await gateway.publish(make_card(context_length=100))
    await assert_error(
        await gateway.post(CHAT, chat_body(messages=long_chat)), 400, "context_length_exceeded", "messages"
    )
    await assert_error(await gateway.post(CHAT, chat_body(user="x" * 20_000)), 413, "request_too_large")
    await assert_error(await gateway.get("/v1/nothing"), 404, "unknown_path")
    await assert_error(await gateway.get(CHAT), 405, "method_not_allowed")
    await assert_error(await gateway.get("/v1/models/nope"), 404, "model_not_found", "model")
    async with gateway.client.post(url + CHAT, data=b"{", headers={"Content-Type": "application/json"}) as response:
        await assert_error((response.status, response.headers, await response.json()), 400, "invalid_request")
    async with gateway.client.post(url + CHAT, data={"a": "b"}) as response:
        await assert_error((response.status, response.headers, await response.json()), 415, "unsupported_media_type")

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield b"x" * 1000

    options = {"data": chunks(), "headers": {"Content-Type": "application/json"}}
    async with gateway.client.post(url + CHAT, **options) as response:
        await assert_error((response.status, response.headers, await response.json()), 413, "request_too_large")
    assert gateway.worker.seen == []


async def test_a_body_that_does_not_arrive_is_a_408(redis_url: str, tmp_path: Path) -> None:
    """A client that announces a body and sends none holds its connection for a bounded time only."""
    async with run_gateway(redis_url, tmp_path, body_limit_s=0.05) as gateway:
        reader, writer = await asyncio.open_connection(gateway.server.host, gateway.server.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        answer = (await reader.readuntil(b"}}")).decode()
        writer.close()
        assert answer.startswith("HTTP/1.1 408 ")
        assert '"code":"request_timeout"' in answer


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    ],
)
async def test_malformed_http_is_refused_and_harms_nobody_else(gateway: GatewayHarness, garbage: bytes) -> None:
    """TLS on a plain port, absurd versions and headers, smuggling: an error in the API's shape, others go on."""
    reader, writer = await asyncio.open_connection(gateway.server.host, gateway.server.port)
    writer.write(garbage)
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    assert answer.split(b" ")[1] in (b"400", b"431")
    assert set(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]) == {"message", "type", "param", "code"}
    assert (await gateway.post(CHAT, chat_body()))[0] == 200
    assert len(gateway.worker.seen) == 1


async def test_a_refused_snapshot_answers_with_its_refusal(gateway: GatewayHarness) -> None:
    """403 for a bad signature, 500 for a corrupt chunk; trying again is discouraged."""
    for code, status in ((ErrorCode.SNAPSHOT_SIGNATURE_INVALID, 403), (ErrorCode.SNAPSHOT_CORRUPT, 500)):
        await gateway.publish(make_card(refused=ErrorInfo(code, "refused because")))
        answer = await gateway.post(CHAT, chat_body())
        await assert_error(answer, status, code.value, "model")
        assert answer[1]["x-should-retry"] == "false"
    assert (await gateway.get("/v1/models"))[2]["data"][0]["status"] == "refused"


async def test_an_error_of_the_worker_becomes_the_answer(gateway: GatewayHarness) -> None:
    """The exact prompt length is found by the worker; an out-of-memory asks to come back."""
    gateway.worker.script = say("x", terminal=end(error=ErrorInfo(ErrorCode.CONTEXT_LENGTH_EXCEEDED, "3000 > 2048")))
    await assert_error(await gateway.post(CHAT, chat_body()), 400, "context_length_exceeded", "messages")
    gateway.worker.script = say("x", terminal=end(error=ErrorInfo(ErrorCode.OUT_OF_MEMORY, "no room")))
    answer = await gateway.post(CHAT, chat_body())
    await assert_error(answer, 503, "out_of_memory")
    assert answer[1]["Retry-After"] == "5"
    assert answer[1]["x-should-retry"] == "true"


async def test_a_full_queue_is_a_429_with_retry_after(redis_url: str, tmp_path: Path) -> None:
    """Streamed or not, before any header is sent."""
    async with (
        run_gateway(redis_url, tmp_path, stay_silent, max_queued=1) as gateway,
        gateway.client.post(gateway.url + CHAT, json=chat_body(stream=True)) as first,
    ):
        assert first.status == 200
        for stream in (False, True):
            answer = await gateway.post(CHAT, chat_body(stream=stream))
            await assert_error(answer, 429, "queue_full")
            assert 1 <= int(answer[1]["Retry-After"]) <= 120


async def test_models_are_listed_at_zero_workers_and_wake_nothing(gateway: GatewayHarness) -> None:
    """Names, status words, one by id; the scheduler's inbox stays empty."""
    await gateway.publish(make_card(), make_card("org/other"), status=make_status(Tier.HOT, state="ready"))
    _, _, listed = await gateway.get("/v1/models")
    assert [(m["id"], m["status"], m["object"]) for m in listed["data"]] == [
        ("org/other", "cold", "model"),
        (MODEL, "warm", "model"),
    ]
    assert (await gateway.get("/v1/models/org/other"))[2]["created"] == 1_700_000_000
    for path in ("/healthz", "/readyz", "/health", "/metrics", "/admin/status"):
        async with gateway.client.get(gateway.url + path) as response:
            assert response.status == 200
    redis: Any = gateway.redis
    assert await redis.xlen(keys.INBOX) == 0


async def test_a_model_built_while_serving_is_found(gateway: GatewayHarness) -> None:
    """An unknown name makes the gateway look again, whatever its cache says."""
    await gateway.get("/v1/models")
    redis: Any = gateway.redis
    await redis.hset(keys.MODELS, "late", codec.encode(make_card("late")))
    assert (await gateway.post(CHAT, chat_body(model="late")))[0] == 200


async def test_a_broken_template_or_card_harms_its_own_model_only(gateway: GatewayHarness) -> None:
    """A template that does not compile is a 500 for its model; a card that does not decode is left out."""
    redis: Any = gateway.redis
    await redis.hset(keys.MODELS, "garbled", b"\xc1\xff")
    await redis.hset(keys.MODELS, "broken", codec.encode(make_card("broken", chat_template="{% if %}")))
    await assert_error(await gateway.post(CHAT, chat_body(model="broken")), 500, "internal_error")
    await assert_error(await gateway.post(CHAT, chat_body(model="garbled")), 404, "model_not_found", "model")
    assert (await gateway.post(CHAT, chat_body()))[0] == 200


async def test_readiness_needs_a_fresh_report_and_a_node(gateway: GatewayHarness) -> None:
    """Each missing part is named; liveness does not care."""
    assert (await gateway.get("/readyz"))[0] == 200
    for status, word in ((None, "scheduler"), (make_status(nodes=0), "node")):
        await gateway.publish(make_card(), status=status)
        if status is None:
            await gateway.redis.delete(keys.STATUS)
            gateway.server.gateway.directory.invalidate()
        found, headers, body = await gateway.get("/readyz")
        assert found == 503
        assert word in body["reasons"][0]
        assert headers["Retry-After"]
    assert (await gateway.get("/healthz"))[0] == 200


async def test_status_and_traces_for_operators(gateway: GatewayHarness) -> None:
    """``ps`` and ``trace`` read these; the newest trace is there as soon as the answer is."""
    _, headers, _ = await gateway.post(CHAT, chat_body())
    request_id = headers["X-Request-Id"]
    for name in (request_id, f"chatcmpl-{request_id}", "last"):
        _, _, trace = await gateway.get(f"/admin/traces/{name}")
        assert trace["request_id"] == request_id
        assert trace["cold_tier"] == "T2"
        assert {"accepted", "enqueued", "received", "first_byte", "claimed"} <= set(trace["marks"])
        assert {row["name"] for row in trace["phases"]} >= {"queue", "tokenise", "first_byte"}
        assert trace["ttft_ms"] > 0
    await assert_error(await gateway.get("/admin/traces/../../x"), 404, "unknown_path")
    await assert_error(await gateway.get("/admin/traces/" + "0" * 26), 404, "trace_not_found")
    _, _, status = await gateway.get("/admin/status")
    assert status["models"][0]["name"] == MODEL
    assert status["models"][0]["tier"] == "T2"


async def test_metrics_count_what_happened(gateway: GatewayHarness) -> None:
    """Requests, cold starts, tokens and the security counts that agents keep."""
    redis: Any = gateway.redis
    await redis.hset(keys.SECURITY_COUNTS, "snapshot_corrupt", 3)
    await gateway.post(CHAT, chat_body())
    await gateway.post(CHAT, chat_body(model=secrets.token_hex(4)))
    expected = {
        'glowplug_requests_total{endpoint="chat",model="tiny",status="200"} 1.0',
        'glowplug_requests_total{endpoint="chat",model="unknown",status="404"} 1.0',
        'glowplug_cold_starts_total{model="tiny",tier="snapshot"} 1.0',
        'glowplug_security_events_total{kind="snapshot_corrupt"} 3.0',
        'glowplug_requests_in_flight{model="tiny"} 0.0',
    }
    missing = set(expected)

    async def are_counted() -> bool:
        async with gateway.client.get(gateway.url + "/metrics") as response:
            assert response.headers["Content-Type"].startswith("text/plain")
            missing.difference_update((await response.text()).splitlines())
        return not missing

    await eventually(are_counted, what=f"all of {expected}")


async def test_no_prompt_reaches_the_log(gateway: GatewayHarness, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither of a served request nor of a refused one."""
    secret = "swordfish"
    await gateway.post(CHAT, chat_body(messages=[{"role": "user", "content": secret}]))
    await gateway.post(CHAT, chat_body(messages=[{"role": "user", "content": secret}], top_k="x"))
    captured = capfd.readouterr()
    assert secret not in captured.out + captured.err
    assert json.dumps(secret) not in captured.out


async def test_only_the_newest_traces_are_kept(gateway: GatewayHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy gateway does not fill Redis with an hour of traces: the oldest above the limit are deleted."""
    monkeypatch.setattr("scheduler.contract.keys.TRACES_MAX_ENTRIES", 2)
    for _ in range(4):
        assert (await gateway.post("/v1/chat/completions", chat_body()))[0] == 200
    redis: Any = gateway.redis

    async def kept() -> bool:
        ids = await redis.lrange(keys.TRACES, 0, -1)
        there = {key async for key in redis.scan_iter(match=keys.trace("*"))}
        return len(ids) == 2 and there == {keys.trace(request_id.decode()).encode() for request_id in ids}

    await eventually(kept, what="two traces")
