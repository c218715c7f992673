"""Bodies of both endpoints: prompts, messages, what is refused, and the cheap bound on a prompt's length."""

from __future__ import annotations

from typing import Any

import pytest

from scheduler.contract.chat_template import ChatTemplates
from scheduler.contract.errors import ErrorCode, GlowplugError
from scheduler.contract.messages import ModelCard
from scheduler.contract.states import Priority
from scheduler.gateway.chat_messages import read_messages
from scheduler.gateway.request_body import parse_json_object
from scheduler.gateway.request_schema import (
    Call,
    read_chat_call,
    read_completion_call,
    read_model_name,
)
from tests.gateway_fixtures import make_card


def chat(body: dict[str, Any], card: ModelCard | None = None) -> Call:
    return read_chat_call(
        {"messages": [{"role": "user", "content": "hi"}], **body}, card or make_card(), ChatTemplates()
    )


def complete(body: dict[str, Any], card: ModelCard | None = None) -> Call:
    return read_completion_call(body, card or make_card())


def refusal(call: Any, *arguments: Any) -> Any:
    with pytest.raises(GlowplugError) as caught:
        call(*arguments)
    return caught.value.info


def test_a_chat_call_renders_its_messages_and_may_fill_the_context() -> None:
    """The prompt is the template's text; without a limit the answer may be as long as the context allows."""
    call = chat({})
    assert call.prompts == ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",)
    assert call.sampling.max_tokens == 2048
    assert (call.stream, call.num_choices, call.priority) == (False, 1, Priority.INTERACTIVE)


def test_text_parts_are_joined_and_developer_is_system() -> None:
    """Content may come in parts; templates know no developer role."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read_messages([{"role": "developer", "content": parts}, {"role": "assistant", "content": None}]) == [
        {"role": "system", "content": "a\nb"},
        {"role": "assistant", "content": ""},
    ]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ("hi", "messages"),
        ([], "messages"),
        ([{}] * 2049, "messages"),
        (["hi"], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": 5, "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [7]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": "x", "name": 5}], "messages[0].name"),
    ],
)
def test_a_bad_message_is_named_by_its_place(messages: Any, param: str) -> None:
    """The error points at the element, so that a client with a long list finds it."""
    assert refusal(read_messages, messages).param == param


def test_prompts_as_text_texts_and_token_ids() -> None:
    """All four forms of OpenAI's ``prompt``; legacy completions default to 16 tokens."""
    assert complete({"prompt": "a"}).prompts == ("a",)
    assert complete({"prompt": ["a", "b"]}).prompts == ("a", "b")
    assert complete({"prompt": [1, 2]}).prompts == ((1, 2),)
    assert complete({"prompt": [[1], [2, 3]]}).prompts == ((1,), (2, 3))
    assert complete({"prompt": "a"}).sampling.max_tokens == 16


@pytest.mark.parametrize("prompt", [None, "", [], [""], 5, [1, "a"], [[]], [True], [1000], [[-1]], ["a"] * 17, {}])
def test_a_bad_prompt_names_the_field(prompt: Any) -> None:
    """Nothing but the four forms passes, and no token id outside the vocabulary."""
    assert refusal(complete, {"prompt": prompt}).param == "prompt"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": 5}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"priority": "urgent"}, "priority"),
        ({"priority": ["batch"]}, "priority"),
        ({"user": 5}, "user"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),  # the template takes none
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"store": "yes"}, "store"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
    ],
)
def test_bad_call_fields_are_named(body: dict[str, Any], param: str) -> None:
    """Also fields that would change the answer and are not supported are refused, not ignored."""
    assert refusal(chat, body).param == param


def test_fields_of_no_meaning_here_are_ignored() -> None:
    """Clients add fields each month; those that cannot change the text do no harm."""
    extra = {
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "tools": [],
        "response_format": {"type": "text"},
    }
    assert chat({**extra, "brand_new_field": 1}).prompts


def test_legacy_only_fields_that_cannot_be_honoured_are_refused() -> None:
    """Suffix, ranking, and log-probabilities of an echoed prompt."""
    assert refusal(complete, {"prompt": "a", "suffix": "b"}).param == "suffix"
    assert refusal(complete, {"prompt": "a", "best_of": 2}).param == "best_of"
    assert complete({"prompt": "a", "best_of": 2, "n": 2}).num_choices == 2
    assert refusal(complete, {"prompt": "a", "echo": True, "logprobs": 1}).param == "echo"
    assert refusal(complete, {"prompt": [1], "echo": True}).param == "echo"
    assert refusal(complete, {"prompt": ["a"] * 9, "n": 2}).param == "n"


def test_an_overlong_prompt_is_refused_with_both_numbers() -> None:
    """Text is bounded from below by its bytes, token ids are counted."""
    card = make_card(context_length=100, max_token_bytes=10)
    error = refusal(complete, {"prompt": "x" * 1000}, card)
    assert error.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED
    assert "at least 100 tokens" in error.message
    assert "holds 100" in error.message
    assert refusal(complete, {"prompt": [1] * 100}, card).code is ErrorCode.CONTEXT_LENGTH_EXCEEDED
    assert complete({"prompt": "x" * 990}, card).prompts
    long_chat = {"messages": [{"role": "user", "content": "é" * 500}]}
    assert refusal(chat, long_chat, card).param == "messages"


def test_an_unknown_length_is_left_to_the_worker() -> None:
    """A card without numbers bounds nothing."""
    assert complete({"prompt": "x" * 9000}, make_card(context_length=0, max_token_bytes=0)).prompts


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"x"', b"nul", b'{"a":"\\ud800"}', b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_a_400(body: bytes) -> None:
    """Cut, nested, badly encoded or of another type."""
    assert refusal(parse_json_object, body).code is ErrorCode.INVALID_REQUEST


def test_a_missing_model_is_named() -> None:
    """The one field that every call needs."""
    for body in ({}, {"model": ""}, {"model": 5}, {"model": "x" * 257}):
        assert refusal(read_model_name, body).param == "model"
