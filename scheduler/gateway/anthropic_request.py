"""From a decoded body of ``POST /v1/messages`` (Anthropic's dialect) to a chat call.

Source: Anthropic's Messages API reference, as its Python client sends it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Final

from scheduler.contract.chat_template import ChatTemplates
from scheduler.contract.messages import ModelCard
from scheduler.gateway.chat_messages import MAX_MESSAGES, MAX_PARTS_PER_MESSAGE, read_content
from scheduler.gateway.errors import bad_field
from scheduler.gateway.field_reader import FieldReader, json_type
from scheduler.gateway.field_renaming import renamed
from scheduler.gateway.request_schema import Call, Endpoint, read_chat_call

SAME: Final[tuple[str, ...]] = (
    *("temperature", "top_p", "top_k", "max_tokens", "stream"),
    *("seed", "min_p", "priority", "service_tier"),
)
CHAT_NAMES: Final = {"stop": "stop_sequences", "tool_choice.function": "tool_choice"}
CHOICES: Final = {"auto": "auto", "any": "required", "none": "none"}
#: What a model thought before is not for its prompt.
SKIPPED_BLOCKS: Final = ("thinking", "redacted_thinking")


def read_message_call(
    body: dict[str, Any], card: ModelCard, templates: ChatTemplates, *, counts_only: bool = False
) -> Call:
    """A call whose answer is a message. ``counts_only``: nothing is generated, and no ``max_tokens`` needed.

    Raises:
        GlowplugError: a field is wrong, or the prompt cannot fit; names the field.
    """
    reader = FieldReader(body)
    if reader.raw("max_tokens") is None and not counts_only:
        raise bad_field("max_tokens", "is required")
    reader.mapping("metadata")
    messages, places = _read_messages(reader)
    chat = {name: body[name] for name in SAME if name in body}
    chat["messages"] = messages
    chat["stop"] = body.get("stop_sequences")
    tools = body.get("tools")
    chat["tools"] = (
        [_convert_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)] if isinstance(tools, list) else tools
    )
    chat["tool_choice"], chat["parallel_tool_calls"] = _convert_choice(reader.mapping("tool_choice"))
    names = {**CHAT_NAMES, **{f"messages[{i}]": place for i, place in enumerate(places)}}
    for i in range(len(tools) if isinstance(tools, list) else 0):
        names[f"tools[{i}].function"] = f"tools[{i}]"
        names[f"tools[{i}].function.parameters"] = f"tools[{i}].input_schema"
    with renamed(names):
        call = read_chat_call(chat, card, templates)
    return replace(call, endpoint=Endpoint.MESSAGES)


def _read_messages(reader: FieldReader) -> tuple[list[dict[str, Any]], list[str]]:
    """Chat messages, and of which field each was made."""
    value = reader.raw("messages")
    if not isinstance(value, list):
        raise bad_field("messages", "is required" if value is None else f"expected an array, got {json_type(value)}")
    if not 0 < len(value) <= MAX_MESSAGES:
        raise bad_field("messages", f"{len(value)} messages; expected 1 to {MAX_MESSAGES}")
    found: list[tuple[dict[str, Any], str]] = []
    system = reader.raw("system")
    if system is not None:
        text = read_content(system, "system", may_be_absent=False)
        found.append(({"role": "system", "content": text}, "system"))
    for i, message in enumerate(value):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise bad_field(where, f"expected an object, got {json_type(message)}")
        if message.get("role") not in ("user", "assistant"):
            raise bad_field(f"{where}.role", "expected user or assistant; a system prompt goes into system")
        found += [(one, where) for one in _convert_message(message["role"], message.get("content"), where)]
    if value[-1]["role"] != "user":
        raise bad_field("messages", "must end with a message of the user; prefilled answers are not supported")
    return [message for message, _ in found], [place for _, place in found]


def _convert_message(role: str, content: Any, where: str) -> list[dict[str, Any]]:
    """One message, or several where it holds results of tools, which chats give messages of their own."""
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise bad_field(f"{where}.content", f"expected a string or an array of blocks, got {json_type(content)}")
    if len(content) > MAX_PARTS_PER_MESSAGE:
        raise bad_field(f"{where}.content", f"{len(content)} blocks; at most {MAX_PARTS_PER_MESSAGE} are accepted")
    results: list[dict[str, Any]] = []
    texts: list[Any] = []
    calls: list[dict[str, Any]] = []
    for i, block in enumerate(content):
        place = f"{where}.content[{i}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text":
            texts.append(block)
        elif kind == "tool_use" and role == "assistant":
            calls.append(_convert_call(block, place))
        elif kind == "tool_result" and role == "user":
            text = read_content(block.get("content"), f"{place}.content", may_be_absent=True) if block else ""
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
        elif kind not in SKIPPED_BLOCKS:
            seen = f'"{kind[:40]}"' if isinstance(kind, str) else json_type(block if kind is None else kind)
            expected = "text and tool_use" if role == "assistant" else "text and tool_result"
            raise bad_field(f"{place}.type", f"only {expected} blocks are supported here, got {seen}")
    message: dict[str, Any] = {"role": role, "content": read_content(texts, f"{where}.content", may_be_absent=False)}
    if calls:
        message["tool_calls"] = calls
    return results if results and not texts else [*results, message]


def _convert_call(block: dict[str, Any], where: str) -> dict[str, Any]:
    given = block.get("input")
    if not isinstance(given, dict):
        raise bad_field(f"{where}.input", f"expected an object, got {json_type(given)}")
    function = {"name": block.get("name"), "arguments": json.dumps(given)}
    return {"id": block.get("id"), "type": "function", "function": function}


def _convert_tool(tool: Any, where: str) -> Any:
    if not isinstance(tool, dict):
        return tool
    if tool.get("type", "custom") != "custom":
        raise bad_field(f"{where}.type", "only tools of the client's own are supported; leave type out")
    function = {
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": tool.get("input_schema"),
    }
    return {"type": "function", "function": function}


def _convert_choice(choice: dict[str, Any] | None) -> tuple[Any, bool]:
    """The chat's ``tool_choice`` and ``parallel_tool_calls``."""
    if choice is None:
        return None, True
    parallel = not FieldReader(choice).boolean("disable_parallel_tool_use", default=False)
    kind = choice.get("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}, parallel
    if not isinstance(kind, str) or kind not in CHOICES:
        raise bad_field("tool_choice.type", "expected auto, any, tool or none")
    return CHOICES[kind], parallel
