"""The request fields about tools: ``tools``, ``tool_choice`` and ``parallel_tool_calls``, in OpenAI's chat form.

``auto`` leaves the choice to the model. ``required`` and a named function make a grammar of the call, so that the
output is one and its arguments match their schema. ``none`` renders no tools: the model never hears of them.
Beside a ``response_format`` of JSON, ``auto`` makes a grammar of both: calls, or an answer that matches the format.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final

from scheduler.contract.chat_template import ChatTemplates
from scheduler.contract.messages import ModelCard, OutputGrammar
from scheduler.contract.states import GrammarKind
from scheduler.gateway.errors import bad_field
from scheduler.gateway.field_reader import FieldReader, json_type
from scheduler.gateway.output_format import MAX_GRAMMAR_BYTES, MAX_SCHEMA_DEPTH
from scheduler.gateway.request_body import is_deeper
from scheduler.gateway.tool_calls import ToolUse
from scheduler.gateway.tool_styles import begins_unlike_calls, build_call_grammar, find_tool_style

MAX_TOOLS: Final = 128
MAX_TOOL_NAME_CHARS: Final = 64
MAX_TOOLS_BYTES: Final = 256 * 1024  # of all definitions as JSON
_TOOL_NAME: Final = re.compile(r"[a-zA-Z0-9_-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class ToolRequest:
    """What a request says about tools: their definitions for the template, how to read calls, what is enforced."""

    definitions: list[dict[str, Any]]
    use: ToolUse
    is_required: bool
    schemas: dict[str, dict[str, Any]]  # of the arguments of the functions to choose from
    several: bool

    def build_grammar(self, wanted: OutputGrammar | None) -> OutputGrammar | None:
        """What the output must match, where ``wanted`` is what ``response_format`` asks for; None: anything.

        A call that is required takes the place of the answer, and of its format.

        Raises:
            GlowplugError: the grammar is too large, or the format is no JSON, beside which a call cannot be told.
        """
        answer = None
        if not self.is_required:
            if wanted is None:
                return None
            if wanted.kind is not GrammarKind.JSON_SCHEMA:
                message = 'beside tools only json_object and json_schema can be enforced; send tool_choice "none"'
                raise bad_field("response_format", message)
            answer = json.loads(wanted.source)
            if not begins_unlike_calls(self.use.style, answer):
                message = "this model's calls are JSON that begins like such an answer"
                raise bad_field("response_format", f'{message}; send tool_choice "none" or "required"')
        source = build_call_grammar(self.use.style, self.schemas, several=self.several, answer=answer)
        if len(source) > MAX_GRAMMAR_BYTES:
            message = f"as a grammar they have {len(source)} bytes; at most {MAX_GRAMMAR_BYTES} can be enforced"
            raise bad_field("tools", f"{message}: send fewer, or tool_choice auto without a response_format")
        return OutputGrammar(GrammarKind.LARK, source)


def read_tools(reader: FieldReader, card: ModelCard, templates: ChatTemplates) -> ToolRequest | None:
    """The tools that this answer may use; None without any.

    Raises:
        GlowplugError: a field is wrong, or the model's chat template has no tools that we can read back.
    """
    _refuse_functions(reader)
    functions = _read_functions(reader.raw("tools"))
    several = reader.boolean("parallel_tool_calls", default=True)
    mode, chosen = _read_choice(reader.raw("tool_choice"), functions)
    if not functions or mode == "none":
        return None
    style = find_tool_style(card.chat_template or "") if templates.takes_tools(card) else None
    if style is None:
        raise bad_field(
            "tools",
            f'the chat template of "{card.name}" takes no tools, or has its model write calls in a way that is not '
            "read here; leave tools out, or choose a model of which GET /v1/models says tools: true",
        )
    return ToolRequest(
        definitions=[{"type": "function", "function": function} for function in functions.values()],
        use=ToolUse(style, frozenset(functions)),
        is_required=mode == "required",
        schemas={name: functions[name].get("parameters", {}) for name in chosen},
        several=several and len(chosen) == len(functions),
    )


def _refuse_functions(reader: FieldReader) -> None:
    for name in ("functions", "function_call"):
        if reader.raw(name):
            raise bad_field(name, "is the form before tools; send tools and tool_choice")


def _read_functions(value: Any) -> dict[str, dict[str, Any]]:
    """Function definitions by name, in order."""
    if value is None:
        return {}
    if not isinstance(value, list):
        raise bad_field("tools", f"expected an array, got {json_type(value)}")
    if len(value) > MAX_TOOLS:
        raise bad_field("tools", f"{len(value)} tools; at most {MAX_TOOLS} are accepted")
    found: dict[str, dict[str, Any]] = {}
    for i, tool in enumerate(value):
        function = _read_function(tool, f"tools[{i}]")
        if function["name"] in found:
            raise bad_field(f"tools[{i}].function.name", f'"{function["name"]}" is there already')
        found[function["name"]] = function
    num_bytes = len(json.dumps(found))
    if num_bytes > MAX_TOOLS_BYTES:
        raise bad_field("tools", f"{num_bytes} bytes as JSON; at most {MAX_TOOLS_BYTES} are accepted")
    return found


def _read_function(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise bad_field(where, f"expected an object, got {json_type(tool)}")
    if tool.get("type") != "function":
        kind = tool.get("type")
        seen = f'"{kind[:40]}"' if isinstance(kind, str) else json_type(kind)
        raise bad_field(f"{where}.type", f'only "function" tools are supported, got {seen}')
    where = f"{where}.function"
    function = tool.get("function")
    if not isinstance(function, dict):
        raise bad_field(where, f"expected an object, got {json_type(function)}")
    found: dict[str, Any] = {"name": check_tool_name(function.get("name"), f"{where}.name")}
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise bad_field(f"{where}.description", f"expected a string, got {json_type(description)}")
    found["description"] = description or ""
    parameters = function.get("parameters")
    if parameters is not None:
        if not isinstance(parameters, dict):
            raise bad_field(f"{where}.parameters", f"expected a JSON schema, an object, got {json_type(parameters)}")
        if is_deeper(parameters, MAX_SCHEMA_DEPTH):
            raise bad_field(f"{where}.parameters", f"is nested more than {MAX_SCHEMA_DEPTH} levels deep")
        found["parameters"] = parameters
    return found


def check_tool_name(name: Any, where: str) -> str:
    """``name`` if it can be a function's.

    Raises:
        GlowplugError: it cannot.
    """
    if not isinstance(name, str) or len(name) > MAX_TOOL_NAME_CHARS or not _TOOL_NAME.fullmatch(name):
        expected = f"expected 1 to {MAX_TOOL_NAME_CHARS} letters, digits, underscores and dashes"
        raise bad_field(where, expected if isinstance(name, str) else f"{expected}, got {json_type(name)}")
    return name


def _read_choice(value: Any, functions: dict[str, dict[str, Any]]) -> tuple[str, list[str]]:
    """``none``, ``auto`` or ``required``, and the functions to choose from."""
    everything = list(functions)
    if value is None:
        return "auto", everything
    if value in ("none", "auto", "required"):
        if value == "required" and not functions:
            raise bad_field("tool_choice", '"required" needs tools')
        return value, everything
    if not isinstance(value, dict):
        seen = f'"{value[:40]}"' if isinstance(value, str) else json_type(value)
        raise bad_field("tool_choice", f"expected none, auto, required or a function, got {seen}")
    function = value.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if value.get("type") != "function" or not isinstance(name, str):
        raise bad_field("tool_choice", 'expected {"type": "function", "function": {"name": ...}}')
    if name not in functions:
        raise bad_field("tool_choice.function.name", f'"{name[:MAX_TOOL_NAME_CHARS]}" is none of tools')
    return "required", [name]
