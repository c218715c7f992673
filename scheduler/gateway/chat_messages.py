"""``messages`` of a chat, as chat templates expect them: text content, tool calls with decoded arguments."""

from __future__ import annotations

import json
from typing import Any, Final

from scheduler.gateway.errors import bad_field
from scheduler.gateway.field_reader import json_type
from scheduler.gateway.request_body import is_deeper
from scheduler.gateway.tool_fields import MAX_TOOLS, check_tool_name

MAX_MESSAGES: Final = 2048
MAX_PARTS_PER_MESSAGE: Final = 256
MAX_ROLE_CHARS: Final = 64
MAX_CALL_ID_CHARS: Final = 256
MAX_ARGUMENTS_DEPTH: Final = 64


def read_messages(value: Any) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: ``role`` and ``content`` as text. ``developer`` becomes ``system``.

    Raises:
        GlowplugError: not a list of messages, too many, or a content part that is not text; names the element.
    """
    if value is None:
        raise bad_field("messages", "is required")
    if not isinstance(value, list):
        raise bad_field("messages", f"expected an array, got {json_type(value)}")
    if not 0 < len(value) <= MAX_MESSAGES:
        raise bad_field("messages", f"{len(value)} messages; expected 1 to {MAX_MESSAGES}")
    names: dict[str, str] = {}  # of functions, by the id of their call: some templates want it beside the result
    return [_read_message(message, f"messages[{i}]", names) for i, message in enumerate(value)]


def _read_message(message: Any, where: str, names: dict[str, str]) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise bad_field(where, f"expected an object, got {json_type(message)}")
    role = message.get("role")
    if not isinstance(role, str) or not 0 < len(role) <= MAX_ROLE_CHARS:
        seen = "an empty or overlong string" if isinstance(role, str) else json_type(role)
        raise bad_field(f"{where}.role", f"expected system, user, assistant or tool, got {seen}")
    found: dict[str, Any] = {
        "role": "system" if role == "developer" else role,
        "content": read_content(message.get("content"), f"{where}.content", may_be_absent=role == "assistant"),
    }
    name = message.get("name")
    if name is not None:
        if not isinstance(name, str):
            raise bad_field(f"{where}.name", f"expected a string, got {json_type(name)}")
        found["name"] = name
    if role == "assistant" and message.get("tool_calls"):
        found["tool_calls"] = _read_calls(message["tool_calls"], f"{where}.tool_calls", names)
    if role == "tool":
        call_id = _read_call_id(message.get("tool_call_id"), f"{where}.tool_call_id")
        found["tool_call_id"] = call_id
        if call_id in names:
            found.setdefault("name", names[call_id])
    return found


def _read_calls(value: Any, where: str, names: dict[str, str]) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise bad_field(where, f"expected an array, got {json_type(value)}")
    if len(value) > MAX_TOOLS:
        raise bad_field(where, f"{len(value)} calls; at most {MAX_TOOLS} are accepted")
    calls = []
    for i, call in enumerate(value):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise bad_field(f"{where}[{i}]", "expected an object with id, type and function")
        call_id = _read_call_id(call.get("id"), f"{where}[{i}].id")
        name = check_tool_name(function.get("name"), f"{where}[{i}].function.name")
        arguments = decode_arguments(function.get("arguments"), f"{where}[{i}].function.arguments")
        names[call_id] = name
        calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})
    return calls


def decode_arguments(value: Any, where: str) -> Any:
    """What JSON text of arguments says, as templates expect it; text that is no JSON stays, a model wrote it.

    Raises:
        GlowplugError: not a string, or nested too deep.
    """
    if not isinstance(value, str):
        raise bad_field(where, f"expected JSON in a string, got {json_type(value)}")
    try:
        decoded = json.loads(value or "{}")
    except (ValueError, RecursionError):
        return value
    if is_deeper(decoded, MAX_ARGUMENTS_DEPTH):
        raise bad_field(where, f"is nested more than {MAX_ARGUMENTS_DEPTH} levels deep")
    return decoded if isinstance(decoded, dict) else value


def _read_call_id(value: Any, where: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_CALL_ID_CHARS:
        seen = json_type(value) if not isinstance(value, str) else f"{len(value)} characters"
        raise bad_field(where, f"expected the id of a call, 1 to {MAX_CALL_ID_CHARS} characters, got {seen}")
    return value


def read_content(content: Any, where: str, *, may_be_absent: bool, kinds: tuple[str, ...] = ("text",)) -> str:
    """Content as one text: a string, or parts of these ``kinds`` that have a ``text``.

    Raises:
        GlowplugError: something else; names the element.
    """
    if isinstance(content, str):
        return content
    if content is None and may_be_absent:
        return ""
    if not isinstance(content, list):
        raise bad_field(where, f"expected a string or an array of text parts, got {json_type(content)}")
    if len(content) > MAX_PARTS_PER_MESSAGE:
        raise bad_field(where, f"{len(content)} parts; at most {MAX_PARTS_PER_MESSAGE} are accepted")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in kinds:
            seen = f'"{kind[:40]}"' if isinstance(kind, str) else json_type(part if kind is None else kind)
            raise bad_field(f"{where}[{i}].type", f'only parts of type "{kinds[0]}" are supported, got {seen}')
        if not isinstance(part.get("text"), str):
            raise bad_field(f"{where}[{i}].text", f"expected a string, got {json_type(part.get('text'))}")
        texts.append(part["text"])
    return "\n".join(texts)
