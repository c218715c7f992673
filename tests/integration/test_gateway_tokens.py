"""The tokeniser's endpoints over real HTTP: fields of vLLM and llama.cpp, counts, what is refused."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from scheduler.contract.messages import GenerateRequest, StepFrame, TokenEvent
from tests.gateway_fixtures import GatewayHarness, Publish, chat_body, end, run_gateway


async def convert(request: GenerateRequest, publish: Publish) -> None:
    """A worker whose tokens are letters."""
    assert request.text_only
    if isinstance(request.prompt, str):
        events = [TokenEvent(0, ord(letter), "") for letter in request.prompt]
    else:
        events = [TokenEvent(0, -1, "".join(map(chr, request.prompt)))]
    publish(StepFrame(tuple(events), time.monotonic_ns()))
    publish(end())


@pytest.fixture
async def gateway(redis_url: str, tmp_path: Path) -> AsyncIterator[GatewayHarness]:
    async with run_gateway(redis_url, tmp_path, convert) as harness:
        yield harness


async def test_a_text_and_its_token_ids(gateway: GatewayHarness) -> None:
    """vLLM's names and llama.cpp's, with and without /v1; the marks around a text as each of them does."""
    status, headers, answer = await gateway.post("/tokenize", {"model": "tiny", "prompt": "abc"})
    assert (status, answer) == (200, {"count": 3, "max_model_len": 2048, "tokens": [97, 98, 99]})
    assert headers["X-Cold-Start"] == "snapshot"
    assert gateway.worker.seen[-1].add_special
    _, _, answer = await gateway.post("/v1/tokenize", {"model": "tiny", "content": "ab", "parse_special": False})
    assert answer["tokens"] == [97, 98]
    assert not gateway.worker.seen[-1].add_special
    assert not gateway.worker.seen[-1].parse_special
    for path in ("/detokenize", "/v1/detokenize"):
        status, _, answer = await gateway.post(path, {"model": "tiny", "tokens": [97, 98]})
        assert (status, answer) == (200, {"prompt": "ab", "content": "ab"})


async def test_counts_of_rendered_prompts(gateway: GatewayHarness) -> None:
    """The same prompt in three dialects has as many tokens; a prompt may be longer than the context."""
    _, _, tokens = await gateway.post("/tokenize", chat_body())
    _, _, message = await gateway.post("/v1/messages/count_tokens", chat_body())
    _, _, response = await gateway.post("/v1/responses/input_tokens", {"model": "tiny", "input": "hi"})
    assert tokens["count"] == message["input_tokens"] == response["input_tokens"]
    assert response["object"] == "response.input_tokens"
    long = {"model": "tiny", "input": "x" * 50_000}
    _, _, response = await gateway.post("/v1/responses/input_tokens", long)
    assert response["input_tokens"] > 50_000


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "content": "b"}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "é" * 200_000}, "prompt"),
        ("/tokenize", {"prompt": "a", "return_token_strs": True}, "return_token_strs"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/detokenize", {"tokens": [1000]}, "tokens"),
        ("/v1/responses/input_tokens", {}, "input"),
    ],
)
async def test_wrong_fields_are_named(gateway: GatewayHarness, path: str, body: dict[str, Any], param: str) -> None:
    """Before anything is woken."""
    status, _, answer = await gateway.post(path, {"model": "tiny", **body})
    assert (status, answer["error"]["param"]) == (400, param)
    assert gateway.worker.seen == []
