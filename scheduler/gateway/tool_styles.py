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


def build_call_grammar(style: ToolStyle, schemas: Mapping[str, dict[str, Any]], *, several: bool) -> str:
    """A Lark grammar (llguidance's) of one call to one of the functions, or of ``several`` where the style has that.

    ``schemas`` holds the JSON schema of each function's arguments. Each is a root of its own, so that ``$ref`` in it
    goes on working.
    """
    rules = []
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
            return "\n".join([f"start: {start}", f"tagged: {one}", f"call: {any_call}", *rules])
        case ToolStyle.MISTRAL:
            more = f" ({_quote(', ')} call)*" if several else ""
            return "\n".join([f"start: {_quote('[')} call{more} {_quote(']')}", f"call: {any_call}", *rules])
        case ToolStyle.LLAMA:
            return "\n".join(["start: call", f"call: {any_call}", *rules])


def _quote(text: str) -> str:
    """A Lark string literal; its escapes are JSON's."""
    return json.dumps(text)
