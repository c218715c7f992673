"""How models write tool calls, read off their chat templates.

============ ============================================================ ==============================
style        what the model writes                                        models
============ ============================================================ ==============================
hermes       ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``  Hermes, Qwen 2.5, Qwen 3
llama        ``{"name": ..., "parameters": {...}}`` and nothing else       Llama 3.1 to 3.3
mistral      ``[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]``      Mistral, up to tokenizer v3
============ ============================================================ ==============================
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final

HERMES_OPEN: Final = "<tool_call>"
HERMES_CLOSE: Final = "</tool_call>"
LLAMA_OPEN: Final = "<|python_tag|>"
MISTRAL_OPEN: Final = "[TOOL_CALLS]"
#: Between tokens of arguments that a grammar enforces: what people write, but no endless run of blanks.
JSON_OPTIONS: Final = {"whitespace_pattern": r"[ ]?|\n[ ]{0,32}", "lenient": False}
NO_PARAMETERS: Final = {"type": "object", "properties": {}, "additionalProperties": False}


class ToolStyle(StrEnum):
    """A way of writing tool calls; see the module."""

    HERMES = "hermes"
    LLAMA = "llama"
    MISTRAL = "mistral"

    @property
    def arguments_key(self) -> str:
        """The key beside ``name`` under which the arguments stand."""
        return "parameters" if self is ToolStyle.LLAMA else "arguments"


def find_tool_style(template: str) -> ToolStyle | None:
    """The style that ``template`` (which takes tools) teaches its model; None: none that we can read back."""
    if HERMES_OPEN in template and "<function=" not in template:
        return ToolStyle.HERMES
    if MISTRAL_OPEN in template and "[ARGS]" not in template:
        return ToolStyle.MISTRAL
    if '"parameters": ' in template and "<|start_header_id|>" in template:
        return ToolStyle.LLAMA
    return None


def begins_unlike_calls(style: ToolStyle, answer: dict[str, Any]) -> bool:
    """Whether the first bytes tell an ``answer`` of this JSON schema from calls, as a grammar of both needs it.

    llguidance's lexer takes the longest match and never goes back: of ``{"name": ...`` and ``{`` it follows the first.
    """
    return style is ToolStyle.HERMES or (style is ToolStyle.MISTRAL and answer.get("type") == "object")


def build_call_grammar(
    style: ToolStyle, schemas: Mapping[str, dict[str, Any]], *, several: bool, answer: dict[str, Any] | None = None
) -> str:
    """A Lark grammar (llguidance's) of one call to one of the functions, or of ``several`` where the style has that.

    ``schemas`` holds the JSON schema of each function's arguments. Each is a root of its own, so that ``$ref`` in it
    goes on working. With the schema of an ``answer`` (which :func:`begins_unlike_calls`), the text is calls or such an
    answer, as the model likes.
    """
    rules = []
    otherwise = ""
    if answer is not None:
        rules.append(f"answer: %json {json.dumps({'x-guidance': JSON_OPTIONS, **answer})}")
        otherwise = " | answer"
    for i, (name, schema) in enumerate(schemas.items()):
        begin = f'{{"name": {json.dumps(name)}, "{style.arguments_key}": '
        arguments = {**(schema or NO_PARAMETERS), "x-guidance": JSON_OPTIONS}
        rules.append(f"call_{i}: {_quote(begin)} arguments_{i} {_quote('}')}")
        rules.append(f"arguments_{i}: %json {json.dumps(arguments)}")
    any_call = " | ".join(f"call_{i}" for i in range(len(schemas)))
    match style:
        case ToolStyle.HERMES:
            one = " ".join([_quote(f"{HERMES_OPEN}\n"), "call", _quote(f"\n{HERMES_CLOSE}")])
            start = 'tagged ("\\n" tagged)*' if several else "tagged"
            return "\n".join([f"start: {start}{otherwise}", f"tagged: {one}", f"call: {any_call}", *rules])
        case ToolStyle.MISTRAL:
            more = f" ({_quote(', ')} call)*" if several else ""
            start = f"{_quote('[')} call{more} {_quote(']')}"
            return "\n".join([f"start: {start}{otherwise}", f"call: {any_call}", *rules])
        case ToolStyle.LLAMA:
            return "\n".join([f"start: call{otherwise}", f"call: {any_call}", *rules])


def _quote(text: str) -> str:
    """A Lark string literal; its escapes are JSON's."""
    return json.dumps(text)
