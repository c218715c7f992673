"""From a decoded body of ``POST /v1/responses`` to a chat call. Stateless: whoever calls keeps the conversation.

Source: the openai-openapi specification, schema CreateResponse.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from scheduler.contract.chat_template import ChatTemplates
from scheduler.contract.messages import ModelCard
from scheduler.gateway.chat_messages import MAX_MESSAGES
from scheduler.gateway.errors import bad_field
from scheduler.gateway.field_reader import FieldReader, json_type
from scheduler.gateway.field_renaming import renamed
from scheduler.gateway.ignored_fields import read_metadata
from scheduler.gateway.request_schema import Call, Endpoint, read_chat_call

#: Fields of ours and of OpenAI's that mean the same in both dialects.
SAME: Final[tuple[str, ...]] = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "stop", "frequency_penalty", "presence_penalty"),
    *("repetition_penalty", "logit_bias", "min_tokens", "ignore_eos", "stream", "parallel_tool_calls", "priority"),
    *("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"),
)
CHAT_NAMES: Final = {
    "max_completion_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "tool_choice.function": "tool_choice",
}
TEXT_KINDS: Final = ("input_text", "output_text", "text")


def read_response_call(body: dict[str, Any], card: ModelCard, templates: ChatTemplates) -> Call:
    """A call whose answer is a response object.

    Raises:
        GlowplugError: a field is wrong, asks for stored state, or the prompt cannot fit; names the field.
    """
    reader = FieldReader(body)
    _refuse_state(reader)
    messages, places = _read_input(reader)
    chat = {name: body[name] for name in SAME if name in body}
    chat["messages"] = messages
    chat["max_completion_tokens"] = body.get("max_output_tokens")
    text = reader.mapping("text") or {}
    chat["response_format"] = _convert_format(text.get("format"))
    tools = body.get("tools")
    chat["tools"] = [_convert_tool(tool) for tool in tools] if isinstance(tools, list) else tools
    chat["tool_choice"] = _convert_choice(body.get("tool_choice"))
    names = {**CHAT_NAMES, "messages": "input"}
    for i in range(len(messages)):
        names[f"messages[{i}]"] = places[i]
    for i in range(len(tools) if isinstance(tools, list) else 0):
        names[f"tools[{i}].function"] = f"tools[{i}]"
    with renamed(names):
        call = read_chat_call(chat, card, templates)
    return replace(call, endpoint=Endpoint.RESPONSES, echoed=_collect_echo(body, reader, call))


def _refuse_state(reader: FieldReader) -> None:
    """What would need us to keep conversations, or to run for nobody."""
    for name in ("previous_response_id", "conversation", "prompt"):
        if reader.raw(name) is not None:
            raise bad_field(name, "responses are not stored here: send the whole conversation as input")
    for name in ("store", "background"):
        if reader.boolean(name, default=False):
            raise bad_field(name, "responses are not stored here: send false, and keep the conversation yourself")
    if reader.one_of("truncation", ("disabled", "auto"), default="disabled") != "disabled":
        raise bad_field("truncation", 'input is never dropped here: send "disabled", and a shorter input')
    include = reader.raw("include")
    if include is not None and not isinstance(include, list):
        raise bad_field("include", f"expected an array, got {json_type(include)}")
    if include and "message.output_text.logprobs" in include:
        raise bad_field("include", "log-probabilities are given by POST /v1/chat/completions")
    if reader.integer("top_logprobs", low=0, high=20):
        raise bad_field("top_logprobs", "log-probabilities are given by POST /v1/chat/completions")


def _read_input(reader: FieldReader) -> tuple[list[Any], list[str]]:
    """Chat messages, and of which field each was made."""
    messages: list[Any] = []
    places: list[str] = []
    instructions = reader.raw("instructions")
    if instructions is not None:
        if not isinstance(instructions, str):
            raise bad_field("instructions", f"expected a string, got {json_type(instructions)}")
        messages.append({"role": "system", "content": instructions})
        places.append("instructions")
    value = reader.raw("input")
    if value is None:
        raise bad_field("input", "is required")
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise bad_field("input", f"expected a string or an array of items, got {json_type(value)}")
    if not 0 < len(value) <= MAX_MESSAGES:
        raise bad_field("input", f"{len(value)} items; expected 1 to {MAX_MESSAGES}")
    for i, item in enumerate(value):
        where = f"input[{i}]"
        message = _convert_item(item, where)
        newest = messages[-1] if messages else None
        if "tool_calls" in message and newest is not None and newest.get("role") == "assistant":
            newest.setdefault("tool_calls", []).extend(message["tool_calls"])  # calls belong to one turn
            continue
        messages.append(message)
        places.append(where)
    return messages, places


def _convert_item(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise bad_field(where, f"expected an object, got {json_type(item)}")
    match item.get("type") or "message":
        case "message":
            return {"role": item.get("role"), "content": _convert_content(item.get("content"), f"{where}.content")}
        case "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            return {"role": "assistant", "content": None, "tool_calls": [call]}
        case "function_call_output":
            content = _convert_content(item.get("output"), f"{where}.output")
            return {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
        case other:
            seen = f'"{other[:40]}"' if isinstance(other, str) else json_type(other)
            expected = "expected message, function_call or function_call_output"
            raise bad_field(f"{where}.type", f"{expected}, got {seen}")


def _convert_content(content: Any, where: str) -> Any:
    """Text parts under their chat name; anything else stays, for the reader of messages to refuse."""
    if not isinstance(content, list):
        return content
    parts: list[Any] = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in TEXT_KINDS:
            kind = part.get("type") if isinstance(part, dict) else part
            seen = f'"{kind[:40]}"' if isinstance(kind, str) else json_type(kind)
            raise bad_field(f"{where}[{i}].type", f'only parts of type "input_text" are supported, got {seen}')
        parts.append({**part, "type": "text"})
    return parts


def _convert_tool(tool: Any) -> Any:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        return tool
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def _convert_choice(choice: Any) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _convert_format(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {key: one for key, one in value.items() if key != "type"}}
    return value


def _collect_echo(body: dict[str, Any], reader: FieldReader, call: Call) -> dict[str, Any]:
    """What a response object repeats of its request."""
    text = body.get("text") or {}
    choice = body.get("tool_choice")
    return {
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "metadata": read_metadata(reader),
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "temperature": call.sampling.temperature,
        "top_p": call.sampling.top_p,
        "text": {"format": text.get("format") or {"type": "text"}},
        "tool_choice": "auto" if choice is None else choice,
        "tools": body.get("tools") or [],
        "truncation": "disabled",
        "user": call.user,
    }
