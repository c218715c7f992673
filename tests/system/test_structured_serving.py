"""``response_format`` through real processes: streamed or not, several choices, drafts on, and what is refused."""

from __future__ import annotations

import http.client
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from jsonschema import Draft202012Validator

from loadtest.processes import Server
from loadtest.streaming_client import chat_body, post_stream
from scheduler.gateway.tool_calls import ToolCall, ToolUse, read_items
from scheduler.gateway.tool_styles import ToolStyle, build_call_grammar

MODEL = "smollm2"
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 24},
        "population": {"type": "integer", "minimum": 0, "maximum": 99_000_000},
        "capital": {"type": "boolean"},
    },
    "required": ["city", "population", "capital"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(smollm2_state_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose workers guess tokens ahead."""
    target = tmp_path_factory.mktemp("s") / "state"
    shutil.copytree(smollm2_state_dir, target, copy_function=_link_blobs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOWPLUG_DRAFT_TOKENS", "6")
        with Server(target) as running:
            running.wait_ready()
            running.wait_listed(MODEL)
            yield running
            assert running.stop() == 0


def _link_blobs(source: str, target: str) -> None:
    if "/blobs/" in source:
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def by_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def post(server: Server, path: str = "/v1/chat/completions", **fields: Any) -> tuple[int, Any]:
    """Status and body of a chat call that is not streamed."""
    parts = urlsplit(server.url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=60)
    body = {**chat_body(MODEL, max_tokens=120), "stream": False, **fields}
    body.pop("stream_options", None)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    status, answer = response.status, json.loads(response.read())
    connection.close()
    return status, answer


def test_choices_of_a_call_match_the_schema(server: Server) -> None:
    """Three choices at temperature 1 with log-probabilities: each validates and ends by itself."""
    status, answer = post(server, response_format=by_schema(SCHEMA), n=3, temperature=1, seed=3, logprobs=True)
    assert status == 200
    for choice in answer["choices"]:
        Draft202012Validator(SCHEMA).validate(json.loads(choice["message"]["content"]))
        assert choice["finish_reason"] == "stop"
        assert choice["logprobs"]["content"]


def test_a_streamed_answer_matches_the_schema(server: Server) -> None:
    """The pieces of a stream are one JSON text."""
    answer = post_stream(server.url, chat_body(MODEL, max_tokens=120, response_format=by_schema(SCHEMA), temperature=0))
    assert not answer.error
    Draft202012Validator(SCHEMA).validate(json.loads(answer.text))


def test_other_formats(server: Server) -> None:
    """Any object; a regular expression; a Lark grammar."""
    status, answer = post(server, response_format={"type": "json_object"}, temperature=0, max_tokens=200)
    assert status == 200
    if answer["choices"][0]["finish_reason"] == "stop":
        assert isinstance(json.loads(answer["choices"][0]["message"]["content"]), dict)
    for wanted in ({"type": "regex", "pattern": "(yes|no)!"}, {"type": "lark", "grammar": 'start: ("yes" | "no") "!"'}):
        status, answer = post(server, response_format=wanted)
        assert status == 200
        assert answer["choices"][0]["message"]["content"] in ("yes!", "no!")


def test_what_cannot_be_enforced_is_the_clients_error(server: Server) -> None:
    """A keyword that is not supported: 400 that names it; as an event where the stream has begun."""
    wanted = by_schema({"type": "array", "uniqueItems": True})
    status, answer = post(server, response_format=wanted)
    assert status == 400
    assert answer["error"]["param"] == "response_format"
    assert "uniqueItems" in answer["error"]["message"]
    assert "uniqueItems" in post_stream(server.url, chat_body(MODEL, max_tokens=9, response_format=wanted)).error


def test_an_enforced_tool_call_is_a_call(server: Server) -> None:
    """The grammar of a required call, at temperature 1: a small model, too, writes a call that is read back."""
    schemas = {"lookup": SCHEMA, "stop": {}}
    for style in ToolStyle:
        grammar = {"type": "lark", "grammar": build_call_grammar(style, schemas, several=False)}
        status, answer = post(server, response_format=grammar, temperature=1, seed=5, max_tokens=200)
        assert status == 200, answer
        text = answer["choices"][0]["message"]["content"]
        (call,) = read_items(text, ToolUse(style, frozenset(schemas)), "s")
        assert isinstance(call, ToolCall), text
        schema = SCHEMA if call.name == "lookup" else {"type": "object", "maxProperties": 0}
        Draft202012Validator(schema).validate(json.loads(call.arguments))


def test_the_models_own_tokenizer_answers(server: Server) -> None:
    """Token ids and back, counts that agree with the usage of a generation."""
    status, tokens = post(server, "/tokenize", prompt="Hello <|im_end|> world", messages=None)
    assert status == 200, tokens
    assert tokens["count"] == len(tokens["tokens"])
    status, text = post(server, "/v1/detokenize", tokens=tokens["tokens"])
    assert (status, text["prompt"]) == (200, "Hello <|im_end|> world")
    status, counted = post(server, "/v1/messages/count_tokens")
    assert status == 200
    _, answer = post(server, max_tokens=1)
    assert counted["input_tokens"] == answer["usage"]["prompt_tokens"]
    status, tokens = post(server, "/tokenize")
    assert tokens["count"] == counted["input_tokens"]
