"""Bytes of streams, ids, traces, metrics and settings."""

from __future__ import annotations

import json
from typing import Any
from unittest.mock import Mock

import msgspec
import pytest
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st

from scheduler.contract.chat_template import ChatTemplates
from scheduler.contract.environment import SettingsError
from scheduler.contract.errors import ErrorCode, ErrorInfo
from scheduler.contract.messages import TerminalFrame, TokenEvent, TokenLogprob, TopLogprob, Usage, WorkerReport
from scheduler.contract.states import FinishReason, SlotState, Tier
from scheduler.contract.telemetry import Mark
from scheduler.gateway import sse
from scheduler.gateway.chunks import make_chunk_writer
from scheduler.gateway.errors import HttpError, encode_error, error_response
from scheduler.gateway.event_ids import EventIds
from scheduler.gateway.metrics import GatewayMetrics
from scheduler.gateway.request_ids import create_request_id, is_request_id
from scheduler.gateway.request_schema import Call, read_chat_call, read_completion_call
from scheduler.gateway.responses import build_usage
from scheduler.gateway.routes_admin import check_admin
from scheduler.gateway.settings import GatewaySettings, read_gateway_settings
from scheduler.gateway.traces import build_document, build_trace, format_server_timing
from tests.gateway_fixtures import make_card, make_status
from tests.queue_fixtures import make_request

LOGPROB = TokenLogprob(7, b"\xc3", -0.5, (TopLogprob(7, b"\xc3", -0.5), TopLogprob(8, b"b", -1.5)))


def chat_call(**fields: Any) -> Call:
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True, **fields}
    return read_chat_call(body, make_card(), ChatTemplates())


def decode(payload: bytes) -> list[Any]:
    return [json.loads(block[6:].partition("\n")[0]) for block in payload.decode().split("\n\n") if block]


def test_chat_chunks_have_the_keys_that_clients_look_for() -> None:
    """Role first and once, null finish_reason until the last, no usage key unless asked for."""
    writer = make_chunk_writer(chat_call(), "ID", 5, EventIds("ID", 1))
    first, *rest = decode(
        writer.begin(0) + writer.tokens((TokenEvent(0, 1, "a"), TokenEvent(0, 2, "", FinishReason.LENGTH)), 0)
    )
    assert first == {
        "id": "chatcmpl-ID",
        "created": 5,
        "model": "tiny",
        "system_fingerprint": "fp_5ca1ab1e",
        "object": "chat.completion.chunk",
        "choices": [
            {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        ],
    }
    assert [chunk["choices"][0]["delta"] for chunk in rest] == [{"content": "a"}, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in rest] == [None, "length"]


def test_usage_is_null_in_every_chunk_but_its_own() -> None:
    """With include_usage; the usage chunk has no choices."""
    writer = make_chunk_writer(chat_call(stream_options={"include_usage": True}), "ID", 5, EventIds("ID", 1))
    usage = build_usage([Usage(3, 4, 1), Usage(1, 1, 0)])
    first, last = decode(writer.begin(0) + writer.ending(usage))
    assert first["usage"] is None
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 5,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


def test_held_back_text_writes_nothing_and_its_logprob_still_arrives() -> None:
    """A token in the middle of a character has no text; with logprobs its position must not be lost."""
    writer = make_chunk_writer(chat_call(logprobs=True, top_logprobs=2), "ID", 5, EventIds("ID", 1))
    assert writer.tokens((TokenEvent(0, 7, ""),), 0) == b""
    (chunk,) = decode(writer.tokens((TokenEvent(0, 7, "", None, LOGPROB),), 0))
    (content,) = chunk["choices"][0]["logprobs"]["content"]
    assert content["bytes"] == [0xC3]
    assert content["token"] == "\ufffd"
    assert [top["logprob"] for top in content["top_logprobs"]] == [-0.5, -1.5]


def test_legacy_chunks_echo_each_prompt_and_number_choices_through() -> None:
    """Two prompts with n=2 are choices 0 to 3; offsets count characters."""
    body = {"prompt": ["p", "q"], "n": 2, "stream": True, "echo": True}
    writer = make_chunk_writer(read_completion_call(body, make_card()), "ID", 5, EventIds("ID", 2))
    assert [(c["choices"][0]["index"], c["choices"][0]["text"]) for c in decode(writer.begin(0) + writer.begin(1))] == [
        (0, "p"),
        (1, "p"),
        (2, "q"),
        (3, "q"),
    ]
    plain = make_chunk_writer(
        read_completion_call({"prompt": "p", "logprobs": 2}, make_card()), "ID", 5, EventIds("ID", 1)
    )
    chunks = decode(plain.tokens((TokenEvent(0, 1, "né", None, LOGPROB), TokenEvent(0, 1, "x", None, LOGPROB)), 0))
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks] == [[0], [2]]
    assert chunks[0]["object"] == "text_completion"


@given(st.text(max_size=40))
def test_any_text_survives_as_one_event(text: str) -> None:
    """Line breaks and controls in a token never split an event."""
    writer = make_chunk_writer(chat_call(), "ID", 5, EventIds("ID", 1))
    payload = writer.tokens((TokenEvent(0, 1, text or "x"),), 0)
    assert payload.count(b"\n") == 3
    (chunk,) = decode(payload)
    assert chunk["choices"][0]["delta"]["content"] == (text or "x")


@given(st.text(max_size=40))
def test_a_comment_cannot_forge_an_event(text: str) -> None:
    """A model's name may hold anything; the comment stays one line."""
    payload = sse.comment(text)
    assert payload.startswith(b": ")
    assert b"\n" not in payload[:-2]
    assert b"\r" not in payload


def test_http_chunks_are_framed_and_never_empty() -> None:
    """An empty chunk would end the body."""
    assert sse.http_chunk(b"x" * 26) == b"1a\r\n" + b"x" * 26 + b"\r\n"
    with pytest.raises(ValueError, match="empty"):
        sse.http_chunk(b"")


def test_request_ids_sort_by_time_and_are_recognised() -> None:
    """Ids go into Redis keys, so their form is checked."""
    ids = [create_request_id(now_s=1000.0 + i) for i in range(5)]
    assert ids == sorted(ids)
    assert len(set(ids)) == 5
    assert all(map(is_request_id, ids))
    assert not is_request_id("../../" + "A" * 20)
    assert not is_request_id(ids[0].lower())


def test_error_bodies_have_all_four_keys_and_a_string_code() -> None:
    """OpenAI's shape, also where param is null."""
    assert json.loads(encode_error(ErrorInfo(ErrorCode.QUEUE_FULL, "full"))) == {
        "error": {"message": "full", "type": "rate_limit_error", "param": None, "code": "queue_full"}
    }


def test_retry_after_is_bounded_and_hopeless_errors_say_so() -> None:
    """Clients ignore a Retry-After above 120 s; a corrupt snapshot does not heal by trying again."""
    slow = error_response(ErrorInfo(ErrorCode.WAKE_TIMEOUT, "slow", retry_after_s=900))
    assert (slow.headers["Retry-After"], slow.headers["x-should-retry"]) == ("120", "true")
    broken = error_response(ErrorInfo(ErrorCode.SNAPSHOT_CORRUPT, "broken"))
    assert (broken.status, broken.headers["x-should-retry"]) == (500, "false")
    assert "Retry-After" not in broken.headers


def test_a_trace_takes_marks_from_both_sides() -> None:
    """The gateway's own marks win, phases with a missing end are left out, times are ms."""
    worker = {Mark.CLAIMED: 5_000_000, Mark.TOKENISED: 6_000_000, Mark.ENQUEUED: 1}
    own = {Mark.ACCEPTED: 1_000_000, Mark.ENQUEUED: 2_000_000, Mark.FIRST_BYTE: 9_000_000}
    terminal = TerminalFrame(marks={str(k): v for k, v in worker.items()}, worker_id="w")
    trace = build_trace(make_request("ID"), terminal, {str(k): v for k, v in own.items()}, 11_000_000)
    assert trace.phases_ms == {"queue": 1.0, "dispatch": 3.0, "tokenise": 1.0}
    assert trace.total_ms == 10.0
    document = build_document(trace)
    assert document.ttft_ms == 8.0
    assert [(row.name, row.start, row.end) for row in document.phases][1] == ("dispatch", "enqueued", "claimed")
    assert format_server_timing(trace.phases_ms) == "queue;dur=1.00, dispatch;dur=3.00, tokenise;dur=1.00"


def test_metrics_show_cold_starts_phases_and_the_fleet() -> None:
    """Tier names are words, models come from the report, impossible delivery times are dropped."""
    metrics = GatewayMetrics()
    marks = {str(Mark.ACCEPTED): 0, str(Mark.ENQUEUED): 2_000_000, str(Mark.FIRST_BYTE): 50_000_000}
    trace = build_trace(
        make_request("ID", model="tiny"), TerminalFrame(cold_tier=Tier.HOST_RAM, marks=marks), {}, 60_000_000
    )
    metrics.on_trace(trace, prompt_tokens=3, completion_tokens=4)
    metrics.on_request(None, "chat", 404)
    metrics.on_delivery([0], 1_000_000)
    metrics.on_delivery([5], 0)
    text = metrics.render(make_status(Tier.HOST_RAM), {"corrupt": 2})[0].decode()
    for line in (
        'glowplug_cold_starts_total{model="tiny",tier="snapshot"} 1.0',
        'glowplug_cold_start_phase_seconds_count{phase="queue"} 1.0',
        'glowplug_time_to_first_token_seconds_sum{model="tiny",tier="snapshot"} 0.05',
        'glowplug_tokens_total{kind="completion",model="tiny"} 4.0',
        'glowplug_requests_total{endpoint="chat",model="unknown",status="404"} 1.0',
        "glowplug_token_delivery_seconds_count 1.0",
        'glowplug_sealed_bytes{model="tiny"} 1.048576e+06',
        'glowplug_security_events_total{kind="corrupt"} 2.0',
    ):
        assert line in text
    assert 'sealed_bytes{model="tiny"}' not in metrics.render(None, {})[0].decode()


def test_metrics_add_up_the_kv_memory_of_a_models_workers() -> None:
    """What is used, kept and allowed, and prompt tokens that were not computed again: summed over workers."""
    worker = WorkerReport(
        "w1", "n1", "tiny", 1, SlotState.READY, 0, 0, 1.0, kv_used_bytes=100, kv_budget_bytes=1000,
        kv_cached_bytes=300, prompt_tokens=50, cached_tokens=20,
    )  # fmt: skip
    status = msgspec.structs.replace(make_status(), workers=(worker, worker))
    text = GatewayMetrics().render(status, {})[0].decode()
    for kind, value in (("used", 200), ("cached", 600), ("budget", 2000)):
        assert f'glowplug_kv_bytes{{kind="{kind}",model="tiny"}} {value}.0' in text
    for kind, value in (("prompt", 100), ("cached", 40)):
        assert f'glowplug_prefix_tokens{{kind="{kind}",model="tiny"}} {value}.0' in text


@pytest.mark.parametrize(
    ("peer", "allowed"),
    [
        (("127.0.0.1", 5), True),
        (("127.9.9.9", 5), True),
        (("::1", 5, 0, 0), True),
        (("::ffff:127.0.0.1", 5, 0, 0), True),
        ("", True),
        (("10.0.0.1", 5), False),
        (("::ffff:10.0.0.1", 5, 0, 0), False),
        (("fe80::1%eth0", 5, 0, 2), False),
    ],
)
def test_admin_paths_answer_loopback_only(peer: Any, allowed: bool) -> None:
    """By the connection's own address, never by a header; a unix socket counts as loopback; one setting opens them."""
    transport = Mock()
    transport.get_extra_info.return_value = peer
    request = make_mocked_request("GET", "/admin/status", headers={"X-Forwarded-For": "127.0.0.1"}, transport=transport)
    check_admin(request, GatewaySettings(admin_from_anywhere=True))
    outcome = None
    try:
        check_admin(request, GatewaySettings())
    except HttpError as error:
        outcome = (error.status, error.openai_type)
    assert outcome == (None if allowed else (403, "permission_error"))


def test_settings_come_from_the_environment_and_errors_name_the_variable() -> None:
    """Port 0 is allowed; a bad number says what was expected."""
    assert read_gateway_settings({}) == GatewaySettings()
    found = read_gateway_settings({"GLOWPLUG_PORT": "0", "GLOWPLUG_HOST": "::1", "GLOWPLUG_READY_FD": "7"})
    assert (found.host, found.port, found.ready_fd) == ("::1", 0, 7)
    for name, value in (("GLOWPLUG_PORT", "http"), ("GLOWPLUG_PORT", "70000"), ("GLOWPLUG_REQUEST_LIMIT_S", "-1")):
        with pytest.raises(SettingsError, match=name):
            read_gateway_settings({name: value})
