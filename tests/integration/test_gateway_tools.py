"""Tool calls over real HTTP: bodies, streams, and a stream that is resumed in the middle of a call."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateway_fixtures import TOOL_TEMPLATE, GatewayHarness, chat_body, events_of, function_tool, run_gateway, say
from tests.gateway_fixtures import make_card as card

CHAT = "/v1/chat/completions"
TEXTS = ("I look.\n<tool", '_call>\n{"name": "weather", "argu', 'ments": {"city": ', '"Oslo"}}\n</tool', "_call>")


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[GatewayHarness]:
    async with run_gateway(redis_url, tmp_path, say(*TEXTS)) as harness:
        await harness.publish(card(chat_template=TOOL_TEMPLATE))
        yield harness


def join(chunks: list[Any]) -> tuple[str, list[dict[str, str]], list[str]]:
    """Content, calls and finish reasons that a client makes of chunks."""
    content, calls, reasons = "", [], []
    for chunk in chunks:
        for choice in chunk["choices"]:
            content += choice["delta"].get("content") or ""
            for call in choice["delta"].get("tool_calls", []):
                if "id" in call:
                    calls.append({"id": call["id"], "name": call["function"]["name"], "arguments": ""})
                calls[call["index"]]["arguments"] += call["function"]["arguments"]
            reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    return content, calls, reasons


async def test_a_call_is_found_in_the_text(gateway: GatewayHarness) -> None:
    """Content, call and finish reason; the same whether streamed or not, but for the id of the call."""
    body = chat_body(tools=[function_tool("weather")])
    _, _, answer = await gateway.post(CHAT, body)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I look."
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    _, blocks = await gateway.stream(CHAT, body)
    content, calls, reasons = join(events_of(blocks))
    assert (content, reasons) == ("I look.", ["tool_calls"])
    assert [(one["name"], one["arguments"]) for one in calls] == [("weather", '{"city": "Oslo"}')]


async def test_without_tools_the_same_text_is_text(gateway: GatewayHarness) -> None:
    """Nobody asked for calls."""
    _, _, answer = await gateway.post(CHAT, chat_body())
    assert answer["choices"][0]["message"]["content"] == "".join(TEXTS)
    assert "tool_calls" not in answer["choices"][0]["message"]


async def test_a_stream_is_resumed_inside_a_call(gateway: GatewayHarness) -> None:
    """From each event on, the rest is the same as it was: ids of calls too."""
    headers, blocks = await gateway.stream(CHAT, chat_body(tools=[function_tool("weather")]))
    ids = [block.partition("\nid: ")[2] for block in blocks if "\nid: " in block]
    whole = events_of(blocks)
    for seen, event_id in enumerate(ids, start=1):
        path = f"/v1/requests/{headers['X-Request-Id']}/stream"
        async with gateway.client.get(gateway.url + path, headers={"Last-Event-ID": event_id}) as response:
            rest = (await response.read()).decode().removesuffix("\n\n").split("\n\n")
        assert events_of(rest) == whole[seen:]


async def test_a_model_without_tools_says_so(gateway: GatewayHarness) -> None:
    """Refused before anything is woken, and told by the model list."""
    await gateway.publish(card())
    status, _, answer = await gateway.post(CHAT, chat_body(tools=[function_tool("weather")]))
    assert (status, answer["error"]["param"]) == (400, "tools")
    assert gateway.worker.seen == []
    _, _, models = await gateway.get("/v1/models/tiny")
    assert models["tools"] is False
