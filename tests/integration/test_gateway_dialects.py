"""``/v1/responses`` and ``/v1/messages``: bodies, events in their order, tools, and errors in each dialect."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from scheduler.contract.errors import ErrorCode, ErrorInfo
from scheduler.contract.messages import GenerateRequest, StepFrame, TokenEvent
from scheduler.contract.states import FinishReason
from tests.gateway_fixtures import TOOL_TEMPLATE, GatewayHarness, Publish, chat_body, end, make_card, run_gateway, say

RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
CALL = ("I look.\n<tool_call>\n", '{"name": "weather", "arguments": {"city": ', '"Oslo"}}', "\n</tool_call>")
FLAT_TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
CLAUDE_TOOL = {"name": "weather", "input_schema": {"type": "object"}}


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[GatewayHarness]:
    async with run_gateway(redis_url, tmp_path) as harness:
        await harness.publish(make_card(chat_template=TOOL_TEMPLATE))
        yield harness


def ask(**changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "input": "hi", **changes}


def tell(**changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], **changes}


def named_events(blocks: list[str]) -> list[Any]:
    """Decoded events; the name in the stream is the one in the data."""
    found = []
    for block in blocks:
        if block.startswith("event: "):
            name, _, data = block.removeprefix("event: ").partition("\ndata: ")
            found.append(json.loads(data))
            assert found[-1]["type"] == name
    return found


async def test_a_response_object(gateway: GatewayHarness) -> None:
    """One message with its text, usage, and what the request asked for."""
    body = ask(instructions="Be brief.", max_output_tokens=7, temperature=0, metadata={"a": "b"}, store=False)
    status, headers, answer = await gateway.post(RESPONSES, body)
    assert status == 200, answer
    assert answer["id"] == f"resp_{headers['X-Request-Id']}"
    assert (answer["object"], answer["status"], answer["error"]) == ("response", "completed", None)
    (item,) = answer["output"]
    assert item["content"] == [{"type": "output_text", "text": "Hello world", "annotations": [], "logprobs": []}]
    assert answer["usage"]["input_tokens_details"] == {"cached_tokens": 0}
    assert (answer["usage"]["input_tokens"], answer["usage"]["output_tokens"]) == (5, 2)
    assert (answer["instructions"], answer["max_output_tokens"], answer["metadata"]) == ("Be brief.", 7, {"a": "b"})
    (seen,) = gateway.worker.seen
    assert "<|im_start|>system\nBe brief.<|im_end|>" in str(seen.prompt)
    assert (seen.sampling.max_tokens, seen.sampling.temperature) == (7, 0.0)


async def test_the_events_of_a_response_come_in_order(gateway: GatewayHarness) -> None:
    """From created to completed, numbered without gaps; no [DONE]."""
    _, blocks = await gateway.stream(RESPONSES, ask())
    events = named_events(blocks)
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert "".join(event.get("delta", "") for event in events) == "Hello world"
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "Hello world"
    assert events[-1]["response"]["usage"]["total_tokens"] == 7
    assert not any("[DONE]" in block for block in blocks)


async def test_a_response_that_calls_a_function(gateway: GatewayHarness) -> None:
    """A message, then a call; streamed arguments add up to those of the body."""
    gateway.worker.script = say(*CALL)
    _, _, answer = await gateway.post(RESPONSES, ask(tools=[FLAT_TOOL]))
    message, call = answer["output"]
    assert message["content"][0]["text"] == "I look."
    assert (call["type"], call["name"], call["arguments"]) == ("function_call", "weather", '{"city": "Oslo"}')
    _, blocks = await gateway.stream(RESPONSES, ask(tools=[FLAT_TOOL], tool_choice="auto"))
    events = named_events(blocks)
    deltas = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert "".join(deltas) == '{"city": "Oslo"}'
    assert [item["type"] for item in events[-1]["response"]["output"]] == ["message", "function_call"]


async def test_a_conversation_is_sent_back_as_items(gateway: GatewayHarness) -> None:
    """A call and its output are an assistant's turn and a tool's."""
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "weather?"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Oslo"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
    ]
    status, _, answer = await gateway.post(RESPONSES, ask(input=items, tools=[FLAT_TOOL]))
    assert status == 200, answer
    prompt = str(gateway.worker.seen[0].prompt)
    assert 'I look.<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>' in prompt
    assert "<tool_response>weather: rain</tool_response>" in prompt


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": None}, "input"),
        ({"input": [{"type": "item_reference"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
        ({"instructions": 5}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [FLAT_TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name"),
        ({"text": {"format": {"type": "json_schema", "name": "a b"}}}, "text.format.name"),
        ({"temperature": 3}, "temperature"),
    ],
)
async def test_wrong_fields_of_a_response_are_named_as_sent(
    gateway: GatewayHarness, changes: dict[str, Any], param: str
) -> None:
    """Not as the chat fields that they become."""
    status, _, answer = await gateway.post(RESPONSES, ask(**changes))
    assert (status, answer["error"]["param"]) == (400, param)
    assert answer["error"]["message"].startswith(param)


async def test_a_failed_response_ends_its_stream(gateway: GatewayHarness) -> None:
    """An error event, then the failed response."""
    gateway.worker.script = say("a", terminal=end(error=ErrorInfo(ErrorCode.WORKER_FAILED, "it broke")))
    _, blocks = await gateway.stream(RESPONSES, ask())
    *_, error, failed = named_events(blocks)
    assert (error["type"], error["code"]) == ("error", "worker_failed")
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "worker_failed", "message": "it broke"}


async def test_a_message(gateway: GatewayHarness) -> None:
    """Anthropic's body, with the key in its header's place."""
    status, headers, answer = await gateway.post(MESSAGES, tell(system="Be brief.", stop_sequences=["X"]))
    assert status == 200, answer
    assert answer["id"] == f"msg_{headers['X-Request-Id']}"
    assert answer["content"] == [{"type": "text", "text": "Hello world"}]
    assert (answer["type"], answer["role"], answer["stop_reason"]) == ("message", "assistant", "end_turn")
    assert (answer["usage"]["input_tokens"], answer["usage"]["output_tokens"]) == (5, 2)
    (seen,) = gateway.worker.seen
    assert (seen.sampling.stop, seen.sampling.max_tokens) == (("X",), 9)


async def stop_at_x(request: GenerateRequest, publish: Publish) -> None:
    """A worker whose text a stop string ends."""
    publish(StepFrame((TokenEvent(0, 10, "Hello "),), 1))
    publish(StepFrame((TokenEvent(0, 11, "", FinishReason.STOP, None, "X"),), 2))
    publish(end())


async def test_a_message_that_a_stop_sequence_ended_says_so(gateway: GatewayHarness) -> None:
    """In the body and on the stream: the reason and the string; to OpenAI's clients it is a stop like any other."""
    gateway.worker.script = stop_at_x
    _, _, answer = await gateway.post(MESSAGES, tell(stop_sequences=["X", "Y"]))
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "X")
    _, blocks = await gateway.stream(MESSAGES, tell(stop_sequences=["X", "Y"]))
    (delta,) = [event["delta"] for event in named_events(blocks) if event["type"] == "message_delta"]
    assert delta == {"stop_reason": "stop_sequence", "stop_sequence": "X"}
    _, _, answer = await gateway.post("/v1/chat/completions", chat_body(stop=["X", "Y"]))
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_the_events_of_a_message_come_in_order(gateway: GatewayHarness) -> None:
    """Text, then a call, each in a block of its own."""
    gateway.worker.script = say(*CALL)
    _, blocks = await gateway.stream(MESSAGES, tell(tools=[CLAUDE_TOOL], tool_choice={"type": "auto"}))
    events = named_events(blocks)
    assert list(dict.fromkeys(event["type"] for event in events)) == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    starts = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
    assert starts == ["text", "tool_use"]
    arguments = [event["delta"].get("partial_json", "") for event in events if event["type"] == "content_block_delta"]
    assert json.loads("".join(arguments)) == {"city": "Oslo"}
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    assert events[-2]["usage"]["input_tokens"] == 5


async def test_tool_results_become_messages_of_their_own(gateway: GatewayHarness) -> None:
    """In the order in which the conversation had them."""
    use = {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Oslo"}}
    result = {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "rain"}]}
    messages = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "ok"}, use]},
        {"role": "user", "content": [result, {"type": "text", "text": "and now?"}]},
    ]
    status, _, answer = await gateway.post(MESSAGES, tell(messages=messages, tools=[CLAUDE_TOOL]))
    assert status == 200, answer
    prompt = str(gateway.worker.seen[0].prompt)
    assert 'ok<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}' in prompt
    assert prompt.index("weather: rain") < prompt.index("and now?")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "messages"),
        ({"stop_sequences": 5}, "stop_sequences"),
        ({"tools": [{"name": "f", "input_schema": 5}]}, "tools[0].input_schema"),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "maybe"}}, "tool_choice.type"),
        ({"system": 5}, "system"),
    ],
)
async def test_errors_of_messages_have_anthropics_shape(
    gateway: GatewayHarness, changes: dict[str, Any], named: str
) -> None:
    """With the field as it was sent at the beginning of the message."""
    status, headers, answer = await gateway.post(MESSAGES, tell(**changes))
    assert (status, answer["type"], answer["error"]["type"]) == (400, "error", "invalid_request_error")
    assert answer["error"]["message"].startswith(named)
    assert answer["request_id"] == headers["request-id"] == headers["X-Request-Id"]


async def test_other_errors_have_that_shape_too(gateway: GatewayHarness) -> None:
    """Unknown models, wrong methods, failures in the middle of a stream."""
    status, _, answer = await gateway.post(MESSAGES, tell(model="nope"))
    assert (status, answer["error"]["type"]) == (404, "not_found_error")
    status, _, answer = await gateway.get(MESSAGES)
    assert (status, answer["type"]) == (405, "error")
    gateway.worker.script = say("a", terminal=end(error=ErrorInfo(ErrorCode.OVERLOADED, "too much")))
    _, blocks = await gateway.stream(MESSAGES, tell())
    assert named_events(blocks)[-1]["error"] == {"type": "overloaded_error", "message": "too much"}
