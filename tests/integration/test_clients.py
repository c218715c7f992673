"""The clients that people use, against a gateway: OpenAI's, Anthropic's, LangChain's, LiteLLM and the `llm` command."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from scheduler.contract.errors import ErrorCode, ErrorInfo
from scheduler.contract.messages import GenerateRequest, StepFrame, TokenEvent, VectorFrame
from scheduler.contract.states import Task
from tests.gateway_fixtures import (
    TOOL_TEMPLATE,
    GatewayHarness,
    Publish,
    end,
    function_tool,
    make_card,
    run_gateway,
    say,
)

MESSAGES: Any = [{"role": "user", "content": "hi"}]
CALL = ('<tool_call>{"name": "weather", "arguments": {"city": ', '"Oslo"}}', "</tool_call>")
TOOLS: Any = [function_tool("weather", {"type": "object", "properties": {"city": {"type": "string"}}})]


async def answer(request: GenerateRequest, publish: Publish) -> None:
    """Vectors, tokens, a call where the prompt shows tools, or words."""
    if request.embedding is not None:
        for index in range(len(request.embedding.inputs)):
            publish(VectorFrame(index, 1, 2, 0, bytes(8)))
        publish(end())
    elif request.text_only:
        publish(StepFrame((TokenEvent(0, 7, ""), TokenEvent(0, 8, "")), time.monotonic_ns()))
        publish(end())
    elif '"name": "weather"' in str(request.prompt) and "rain" not in str(request.prompt):
        await say(*CALL)(request, publish)
    else:
        await say("Hello", " world")(request, publish)


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[GatewayHarness]:
    async with run_gateway(redis_url, tmp_path, answer) as harness:
        vectors = make_card("vectors", task=Task.EMBED, vector_size=2)
        await harness.publish(make_card(chat_template=TOOL_TEMPLATE), vectors)
        yield harness


@pytest.fixture
def client(gateway: GatewayHarness) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=1)


async def test_openai_every_endpoint_from_async_code(client: openai.AsyncOpenAI) -> None:
    """Chats, completions, embeddings, responses, models; types are the client's own."""
    chat = await client.chat.completions.create(model="tiny", messages=MESSAGES, seed=1, metadata={"a": "b"})
    assert chat.choices[0].message.content == "Hello world"
    assert chat.usage is not None
    assert chat.usage.prompt_tokens_details is not None
    assert chat.usage.prompt_tokens_details.cached_tokens == 0
    assert chat.system_fingerprint == "fp_5ca1ab1e"
    assert chat._request_id is not None
    text = await client.completions.create(model="tiny", prompt=["a", "b"])
    assert [choice.text for choice in text.choices] == ["Hello world"] * 2
    vectors = await client.embeddings.create(model="vectors", input=["a", "b"])  # asks for base64
    assert [one.embedding for one in vectors.data] == [[0.0, 0.0]] * 2
    response = await client.responses.create(model="tiny", input="hi", store=False)
    assert (response.output_text, response.status) == ("Hello world", "completed")
    counted = await client.responses.input_tokens.count(model="tiny", input="hi")
    assert counted.input_tokens == 2
    assert {model.id async for model in client.models.list()} == {"tiny", "vectors"}
    assert (await client.models.retrieve("tiny")).owned_by == "glowplug"


async def test_openai_streams_from_async_code(client: openai.AsyncOpenAI) -> None:
    """Chunks with usage; the client's own accumulators of chats and responses."""
    stream = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello world"
    assert chunks[-1].usage is not None
    async with client.chat.completions.stream(model="tiny", messages=MESSAGES, tools=TOOLS) as accumulated:
        final = await accumulated.get_final_completion()
    assert final.choices[0].finish_reason == "tool_calls"
    assert final.choices[0].message.tool_calls is not None
    assert json.loads(final.choices[0].message.tool_calls[0].function.arguments) == {"city": "Oslo"}
    async with client.responses.stream(model="tiny", input="hi") as events:
        kinds = [event.type async for event in events]
        response = await events.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert response.output_text == "Hello world"


async def test_openai_from_code_that_blocks(gateway: GatewayHarness) -> None:
    """The synchronous client, streamed and not, and a tool's round trip."""

    def run() -> tuple[str, str, str | None]:
        with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none") as client:
            messages: list[Any] = list(MESSAGES)
            first = client.chat.completions.create(model="tiny", messages=messages, tools=TOOLS).choices[0].message
            assert first.tool_calls is not None
            messages += [first, {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "rain"}]
            last = client.chat.completions.create(model="tiny", messages=messages, tools=TOOLS).choices[0].message
            stream = client.completions.create(model="tiny", prompt="a", stream=True)
            streamed = "".join(chunk.choices[0].text for chunk in stream)
            return first.tool_calls[0].type, streamed, last.content

    assert await asyncio.to_thread(run) == ("function", "Hello world", "Hello world")


async def test_openai_errors_and_retries(gateway: GatewayHarness, client: openai.AsyncOpenAI) -> None:
    """Each status is the client's exception; what may be tried again is, what may not is not."""
    with pytest.raises(openai.BadRequestError) as wrong:
        await client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=9)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("nope")
    with pytest.raises(openai.BadRequestError, match="not stored"):
        await client.responses.create(model="tiny", input="hi", previous_response_id="resp_1")
    num_tries = 0

    async def recover(request: GenerateRequest, publish: Publish) -> None:
        nonlocal num_tries
        num_tries += 1
        if num_tries == 1:
            publish(end(error=ErrorInfo(ErrorCode.OVERLOADED, "busy", retry_after_s=1)))
        else:
            await say("again")(request, publish)

    gateway.worker.script = recover
    chat = await client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert (chat.choices[0].message.content, num_tries) == ("again", 2)
    gateway.worker.script = say("a", terminal=end(error=ErrorInfo(ErrorCode.WORKER_FAILED, "it broke")))
    with pytest.raises(openai.APIError, match="it broke"):
        async for _ in await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True):
            pass


async def test_anthropic(gateway: GatewayHarness) -> None:
    """Messages, streams, tools, counts and errors with the client that is made for them."""
    async with anthropic.AsyncAnthropic(base_url=gateway.url, api_key="none", max_retries=0) as client:
        message = await client.messages.create(model="tiny", max_tokens=9, messages=MESSAGES, system="Be brief.")
        assert [block.text for block in message.content if block.type == "text"] == ["Hello world"]
        tools: Any = [{"name": "weather", "input_schema": TOOLS[0]["function"]["parameters"]}]
        async with client.messages.stream(model="tiny", max_tokens=9, messages=MESSAGES, tools=tools) as stream:
            final = await stream.get_final_message()
        assert final.stop_reason == "tool_use"
        assert [block.input for block in final.content if block.type == "tool_use"] == [{"city": "Oslo"}]
        assert final.usage.input_tokens == 5
        counted = await client.messages.count_tokens(model="tiny", messages=MESSAGES)
        assert counted.input_tokens == 2
        with pytest.raises(anthropic.NotFoundError, match="no model"):
            await client.messages.create(model="nope", max_tokens=9, messages=MESSAGES)
        gateway.worker.script = say("a", terminal=end(error=ErrorInfo(ErrorCode.WORKER_FAILED, "it broke")))
        with pytest.raises(anthropic.APIError, match="it broke"):
            async with client.messages.stream(model="tiny", max_tokens=9, messages=MESSAGES) as stream:
                await stream.get_final_message()


async def test_langchain(gateway: GatewayHarness) -> None:
    """Its chat model: an answer, a stream and bound tools."""
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model="tiny", base_url=f"{gateway.url}/v1", api_key="none")
    assert (await model.ainvoke("hi")).content == "Hello world"
    assert "".join([str(chunk.content) async for chunk in model.astream("hi")]) == "Hello world"
    called = await model.bind_tools(TOOLS).ainvoke("hi")
    assert [(call["name"], call["args"]) for call in called.tool_calls] == [("weather", {"city": "Oslo"})]


async def test_litellm(gateway: GatewayHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an OpenAI-compatible and as an Anthropic-compatible server, streamed too."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else its import asks the network
    import litellm

    to: dict[str, Any] = {"api_base": f"{gateway.url}/v1", "api_key": "none", "messages": MESSAGES}
    answer = await litellm.acompletion(model="openai/tiny", **to)
    assert answer.choices[0].message.content == "Hello world"
    stream = await litellm.acompletion(model="openai/tiny", stream=True, **to)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "Hello world"
    answer = await litellm.acompletion(model="anthropic/tiny", **{**to, "api_base": gateway.url}, max_tokens=9)
    assert answer.choices[0].message.content == "Hello world"


async def test_the_llm_command(gateway: GatewayHarness, tmp_path: Path) -> None:
    """With the file that its manual describes for OpenAI-compatible servers."""
    home = tmp_path / "llm"
    home.mkdir()
    entry = {"model_id": "glow", "model_name": "tiny", "api_base": f"{gateway.url}/v1"}
    (home / "extra-openai-models.yaml").write_text(json.dumps([entry]))  # JSON is YAML
    command = shutil.which("llm", path=str(Path(sys.executable).parent))
    assert command is not None
    for flags in ((), ("--no-stream",)):
        process = await asyncio.create_subprocess_exec(
            *(command, "prompt", "-m", "glow", "--key", "none", "--no-log", *flags, "hi"),
            env={**os.environ, "LLM_USER_PATH": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, err = await process.communicate()
        assert (process.returncode, out.decode().strip()) == (0, "Hello world"), err.decode()
