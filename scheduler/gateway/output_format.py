"""``response_format``: what a completion's text must match.

``text`` asks for nothing, ``json_object`` for any JSON object, ``json_schema`` for JSON of a schema.
Ours beside OpenAI's: ``{"type": "regex", "pattern": ...}`` and ``{"type": "lark", "grammar": ...}``. Here only form and
size are checked; the worker, which compiles the grammar for its tokeniser, refuses what it cannot enforce.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from scheduler.contract.messages import OutputGrammar
from scheduler.contract.states import GrammarKind
from scheduler.gateway.errors import bad_field
from scheduler.gateway.field_reader import FieldReader, json_type

MAX_GRAMMAR_BYTES: Final = 64 * 1024
MAX_SCHEMA_DEPTH: Final = 64
MAX_SCHEMA_NAME_CHARS: Final = 64
_SCHEMA_NAME: Final = re.compile(r"[a-zA-Z0-9_-]+", re.ASCII)
_WHERE: Final = "response_format"


def read_output_grammar(reader: FieldReader) -> OutputGrammar | None:
    """What ``response_format`` asks for; None: any text.

    Raises:
        GlowplugError: unknown type, a part is missing or of the wrong type, or too large or too deep.
    """
    value = reader.mapping(_WHERE)
    if value is None:
        return None
    match value.get("type"):
        case "text":
            return None
        case "json_object":
            return OutputGrammar(GrammarKind.JSON_SCHEMA, '{"type": "object"}')
        case "json_schema":
            return OutputGrammar(GrammarKind.JSON_SCHEMA, _read_schema(value.get("json_schema")))
        case "regex":
            return OutputGrammar(GrammarKind.REGEX, _read_source(value, "pattern"))
        case "lark":
            return OutputGrammar(GrammarKind.LARK, _read_source(value, "grammar"))
        case other:
            seen = f'"{other[:40]}"' if isinstance(other, str) else json_type(other)
            raise bad_field(f"{_WHERE}.type", f"expected text, json_object, json_schema, regex or lark, got {seen}")


def _read_schema(value: Any) -> str:
    """JSON text of the schema. ``strict`` is accepted either way: the schema is always enforced."""
    where = f"{_WHERE}.json_schema"
    if not isinstance(value, dict):
        raise bad_field(where, f"expected an object with name and schema, got {json_type(value)}")
    fields = FieldReader(value)
    name = value.get("name")
    if not isinstance(name, str) or len(name) > MAX_SCHEMA_NAME_CHARS or not _SCHEMA_NAME.fullmatch(name):
        expected = f"expected 1 to {MAX_SCHEMA_NAME_CHARS} letters, digits, underscores and dashes"
        raise bad_field(f"{where}.name", expected if isinstance(name, str) else f"{expected}, got {json_type(name)}")
    fields.boolean("strict", default=False)
    schema = value.get("schema")
    if schema is None:
        return '{"type": "object"}'
    if not isinstance(schema, dict):
        raise bad_field(f"{where}.schema", f"expected a JSON schema, an object, got {json_type(schema)}")
    _check_depth(schema, f"{where}.schema")
    source = json.dumps(schema)  # escapes what is not ASCII, lone surrogates included
    _check_size(source, f"{where}.schema")
    return source


def _read_source(value: dict[str, Any], name: str) -> str:
    source = value.get(name)
    where = f"{_WHERE}.{name}"
    if not isinstance(source, str):
        raise bad_field(where, f"expected a string, got {json_type(source)}")
    if not source:
        raise bad_field(where, "is empty")
    _check_size(source, where)
    return source


def _check_size(source: str, where: str) -> None:
    try:
        num_bytes = len(source.encode())
    except UnicodeEncodeError:
        raise bad_field(where, "holds a lone surrogate, which no text can match") from None
    if num_bytes > MAX_GRAMMAR_BYTES:
        raise bad_field(where, f"has {num_bytes} bytes; at most {MAX_GRAMMAR_BYTES} are accepted")


def _check_depth(schema: dict[str, Any], where: str) -> None:
    level: list[Any] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        inner = (one.values() if isinstance(one, dict) else one for one in level)
        level = [element for elements in inner for element in elements if isinstance(element, dict | list)]
        if not level:
            return
    raise bad_field(where, f"is nested more than {MAX_SCHEMA_DEPTH} levels deep; use $ref, or flatten it")
