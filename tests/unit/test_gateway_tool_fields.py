"""Tools in a request: what is refused, what the template gets, and grammars that let nothing but calls through."""

from __future__ import annotations

import json
from typing import Any

import llguidance
import pytest

from scheduler.contract.chat_template import ChatTemplates
from scheduler.contract.errors import GlowplugError
from scheduler.contract.messages import ModelCard
from scheduler.contract.states import GrammarKind
from scheduler.gateway.request_schema import Call, read_chat_call
from scheduler.gateway.tool_calls import ToolCall, ToolUse, read_items
from scheduler.gateway.tool_styles import ToolStyle, begins_unlike_calls, build_call_grammar, find_tool_style
from tests.gateway_fixtures import TOOL_TEMPLATE, function_tool, make_card

WEATHER = function_tool("weather", {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]})
CLOCK = function_tool("clock")


def chat(body: dict[str, Any], card: ModelCard | None = None) -> Call:
    base = {"messages": [{"role": "user", "content": "hi"}], "tools": [WEATHER, CLOCK]}
    return read_chat_call({**base, **body}, card or make_card(chat_template=TOOL_TEMPLATE), ChatTemplates())


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": 5}, "tools"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
        ({"tools": [function_tool("a b")]}, "tools[0].function.name"),
        ({"tools": [function_tool("f", 7)]}, "tools[0].function.parameters"),
        ({"tools": [function_tool(f"f{i}") for i in range(129)]}, "tools"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice.function.name"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"response_format": {"type": "regex", "pattern": "a+"}}, "response_format"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "messages[0].tool_calls[0]"),
    ],
)
def test_wrong_tool_fields_are_named(body: dict[str, Any], param: str) -> None:
    """Each says which element is wrong."""
    with pytest.raises(GlowplugError) as caught:
        chat(body)
    assert caught.value.info.param == param


def test_tools_reach_the_template_unless_the_choice_is_none() -> None:
    """With ``none`` the model never hears of them, and its text is not searched for calls."""
    with_tools, without = chat({}), chat({"tool_choice": "none"})
    assert '"name": "weather"' in str(with_tools.prompts[0])
    assert with_tools.tools == ToolUse(ToolStyle.HERMES, frozenset({"weather", "clock"}))
    assert with_tools.sampling.grammar is None
    assert "weather" not in str(without.prompts[0])
    assert without.tools is None


def test_an_output_format_beside_tools_holds_for_the_answer_that_is_no_call() -> None:
    """With ``auto`` the grammar has both; where a call is required the format has nothing to say."""
    wanted = {"response_format": {"type": "json_object"}}
    either, required = chat(wanted).sampling.grammar, chat({**wanted, "tool_choice": "required"}).sampling.grammar
    assert either is not None
    assert required is not None
    assert either.kind is required.kind is GrammarKind.LARK
    assert "| answer" in either.source
    assert required == chat({"tool_choice": "required"}).sampling.grammar
    without = chat({**wanted, "tool_choice": "none"}).sampling.grammar
    assert without is not None
    assert without.kind is GrammarKind.JSON_SCHEMA


def test_calls_that_begin_like_the_answer_are_refused_beside_a_format() -> None:
    """A grammar could not tell them apart: Llama 3's always, Mistral's from answers that may be an array."""
    assert not begins_unlike_calls(ToolStyle.LLAMA, {"type": "object"})
    assert not begins_unlike_calls(ToolStyle.MISTRAL, {})
    assert begins_unlike_calls(ToolStyle.MISTRAL, {"type": "object"})
    template = TOOL_TEMPLATE.replace("<tool_call>", "[TOOL_CALLS]")
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "array"}}}
    with pytest.raises(GlowplugError) as caught:
        chat({"response_format": schema}, make_card(chat_template=template))
    assert caught.value.info.param == "response_format"


def test_calls_and_results_go_back_through_the_template() -> None:
    """Arguments are decoded for the template; a result knows the name of its function."""
    function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    prompt = str(chat({"messages": messages}).prompts[0])
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>' in prompt
    assert "<tool_response>weather: rain</tool_response>" in prompt


def test_a_template_tells_its_style() -> None:
    """Calls that cannot be read back are not promised."""
    assert find_tool_style(TOOL_TEMPLATE) is ToolStyle.HERMES
    assert find_tool_style("[AVAILABLE_TOOLS] [TOOL_CALLS]") is ToolStyle.MISTRAL
    assert find_tool_style('<|start_header_id|> {"name": f, "parameters": {}}') is ToolStyle.LLAMA
    assert find_tool_style("<tool_call><function=f>") is None
    assert find_tool_style("[TOOL_CALLS]f[ARGS]") is None


BYTES = llguidance.LLTokenizer("byte")


def matches(grammar: str, text: str) -> bool:
    """Whether ``grammar`` lets ``text`` through and it may end there."""
    matcher = llguidance.LLMatcher(BYTES, llguidance.LLMatcher.grammar_from_lark(grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher.consume_tokens(BYTES.tokenize_str(text)) and matcher.is_accepting()


@pytest.mark.parametrize("style", ToolStyle)
def test_an_enforced_call_is_one_that_is_read_back(style: ToolStyle) -> None:
    """For each style: the grammar lets through calls that match their schema, and the parser finds them."""
    schemas = {
        "weather": {
            "$defs": {"C": {"enum": ["Oslo"]}},
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/C"}},
        },
        "clock": {},
    }
    grammar = build_call_grammar(style, schemas, several=False)
    key = style.arguments_key
    good = f'{{"name": "weather", "{key}": {{"city": "Oslo"}}}}'
    wrap = {
        ToolStyle.HERMES: "<tool_call>\n%s\n</tool_call>",
        ToolStyle.LLAMA: "%s",
        ToolStyle.MISTRAL: "[%s]",
    }[style]
    assert matches(grammar, wrap % good)
    assert matches(grammar, wrap % f'{{"name": "clock", "{key}": {{}}}}')
    for bad in (good.replace("Oslo", "Rome"), good.replace("weather", "other"), "no"):
        assert not matches(grammar, wrap % bad)
    (found,) = read_items(wrap % good, ToolUse(style, frozenset(schemas)), "s")
    assert isinstance(found, ToolCall)
    assert json.loads(found.arguments) == {"city": "Oslo"}


def test_required_and_named_choices_ask_for_a_grammar() -> None:
    """``required`` allows any of the functions, a named one only itself."""
    required = chat({"tool_choice": "required"}).sampling.grammar
    named = chat({"tool_choice": {"type": "function", "function": {"name": "clock"}}}).sampling.grammar
    assert required is not None
    assert named is not None
    call = '<tool_call>\n{"name": "%s", "arguments": {%s}}\n</tool_call>'
    assert matches(required.source, call % ("weather", '"city": "Rome"'))
    assert matches(required.source, call % ("clock", "") + "\n" + call % ("clock", ""))
    assert matches(named.source, call % ("clock", ""))
    assert not matches(named.source, call % ("weather", '"city": "Rome"'))
    assert not matches(named.source, call % ("clock", "") + "\n" + call % ("clock", ""))
