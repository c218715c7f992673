"""Tool calls in a model's text: three styles, any cut of the text, and what only looks like a call."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.gateway.tool_calls import ToolCall, ToolCallParser, ToolUse, gather, make_call_id, read_items
from scheduler.gateway.tool_styles import ToolStyle

NAMES = frozenset({"get", "put"})
HERMES, LLAMA, MISTRAL = ToolStyle


def call(index: int, name: str, arguments: str) -> ToolCall:
    return ToolCall(make_call_id("s", index), name, arguments)


CASES = [
    (
        HERMES,
        'Let me see.\n<tool_call>\n{"name": "get", "arguments": {"a": "}\\"{", "b": [1, 2]}}\n</tool_call>\n'
        '<tool_call>{"name":"put","arguments":{}}</tool_call>',
        ["Let me see.", call(0, "get", '{"a": "}\\"{", "b": [1, 2]}'), call(1, "put", "{}")],
    ),
    (HERMES, 'a < b <tool_cal {"name": "get"}\n', ['a < b <tool_cal {"name": "get"}\n']),
    (
        HERMES,
        '<tool_call>{"name":"nope","arguments":{}}</tool_call> after',
        ['<tool_call>{"name":"nope","arguments":{}}</tool_call> after'],
    ),
    (HERMES, '<tool_call>{"arguments":{"x":1},"name":"get"}</tool_call>', [call(0, "get", '{"x":1}')]),
    (HERMES, '<tool_call>{"name":"get","arguments":"{\\"x\\": 2}"}', [call(0, "get", '{"x": 2}')]),
    (HERMES, '<tool_call>{"name":"get","arguments":null}</tool_call>', [call(0, "get", "{}")]),
    (HERMES, '<tool_call>{"name":"get","arguments":{"x":', [call(0, "get", '{"x":')]),
    (HERMES, '<tool_call>{"name":"get"', ['<tool_call>{"name":"get"']),
    (LLAMA, '{"name": "get", "parameters": {"a": 1}}', [call(0, "get", '{"a": 1}')]),
    (
        LLAMA,
        '<|python_tag|>{"name": "get", "parameters": {"a": 1}}; {"name": "put", "parameters": {}}',
        [call(0, "get", '{"a": 1}'), call(1, "put", "{}")],
    ),
    (LLAMA, '{"name": "Bob", "age": 3}', ['{"name": "Bob", "age": 3}']),
    (LLAMA, 'Sure: {"name": "get", "parameters": {}}', ['Sure: {"name": "get", "parameters": {}}']),
    (
        MISTRAL,
        '[TOOL_CALLS][{"name": "get", "arguments": {"a": 1}}, {"name":"put","arguments":{}}]',
        [call(0, "get", '{"a": 1}'), call(1, "put", "{}")],
    ),
    (MISTRAL, ' [{"name": "get", "arguments": {"a": 1}}]', [call(0, "get", '{"a": 1}')]),
    (MISTRAL, "[1, 2, 3]", ["[1, 2, 3]"]),
    (MISTRAL, "[TOOL", ["[TOOL"]),
]


@pytest.mark.parametrize(("style", "text", "expected"), CASES)
@given(data=st.data())
def test_calls_are_found_whatever_the_pieces(
    style: ToolStyle, text: str, expected: list[str | ToolCall], data: st.DataObject
) -> None:
    """The same text and calls come out of the whole text and of any cut of it."""
    use = ToolUse(style, NAMES)
    assert read_items(text, use, "s") == expected
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    parser = ToolCallParser(use, "s")
    deltas = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        deltas += parser.feed(text[start:end])
    assert gather([*deltas, *parser.finish()]) == expected


@given(st.sampled_from(ToolStyle), st.text(alphabet='<tool_ca>/{}[]",:\\ namegturs\n'))
def test_no_text_makes_the_parser_fail_and_text_without_calls_stays(style: ToolStyle, text: str) -> None:
    """Whatever a model writes; without a call, every character of it comes out."""
    items = read_items(text, ToolUse(style, NAMES), "s")
    if not any(isinstance(item, ToolCall) for item in items):
        assert "".join(map(str, items)) == text


def test_arguments_stream_once_the_function_is_known() -> None:
    """They come as they are written, not when the call is complete."""
    parser = ToolCallParser(ToolUse(HERMES, NAMES), "s")
    assert parser.feed('<tool_call>{"name": "get", "argu') == []
    assert len(parser.feed('ments": {"a')) == 2
    assert len(parser.feed('": "bc')) == 1
