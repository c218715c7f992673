"""``response_format``: each form that is accepted, and what is refused before anything wakes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from scheduler.contract.errors import ErrorCode, GlowplugError
from scheduler.contract.messages import OutputGrammar
from scheduler.contract.states import GrammarKind
from scheduler.gateway.field_reader import FieldReader
from scheduler.gateway.output_format import MAX_GRAMMAR_BYTES, MAX_SCHEMA_DEPTH, read_output_grammar

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"const": "é\ud800"}}}


def read(value: Any) -> OutputGrammar | None:
    return read_output_grammar(FieldReader({"response_format": value}))


def test_no_format_and_text_ask_for_nothing() -> None:
    """Absent, null and text are the same."""
    assert read_output_grammar(FieldReader({})) is None
    assert read(None) is None
    assert read({"type": "text"}) is None


def test_each_kind_becomes_its_grammar() -> None:
    """JSON of any object, JSON by a schema (key order kept), a regular expression, a Lark grammar."""
    anything = OutputGrammar(GrammarKind.JSON_SCHEMA, '{"type": "object"}')
    assert read({"type": "json_object"}) == anything
    assert read({"type": "json_schema", "json_schema": {"name": "x"}}) == anything
    by_schema = read({"type": "json_schema", "json_schema": {"name": "a-b_1", "strict": True, "schema": SCHEMA}})
    assert by_schema is not None
    assert by_schema.kind is GrammarKind.JSON_SCHEMA
    assert by_schema.source.isascii()
    assert json.loads(by_schema.source) == SCHEMA
    assert list(json.loads(by_schema.source)["properties"]) == ["b", "a"]
    assert read({"type": "regex", "pattern": "[ab]+"}) == OutputGrammar(GrammarKind.REGEX, "[ab]+")
    assert read({"type": "lark", "grammar": 'start: "a"'}) == OutputGrammar(GrammarKind.LARK, 'start: "a"')


def nest(depth: int) -> dict[str, Any]:
    """A schema of arrays in arrays."""
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


def by_schema(schema: Any, name: Any = "x") -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ("json_object", ""),
        ({}, ".type"),
        ({"type": "xml"}, ".type"),
        ({"type": ["text"]}, ".type"),
        ({"type": "json_schema"}, ".json_schema"),
        (by_schema(SCHEMA, None), ".json_schema.name"),
        (by_schema(SCHEMA, "a b"), ".json_schema.name"),
        (by_schema(SCHEMA, "a" * 65), ".json_schema.name"),
        (by_schema([]), ".json_schema.schema"),
        (by_schema(nest(MAX_SCHEMA_DEPTH + 1)), ".json_schema.schema"),
        (by_schema(nest(100_000)), ".json_schema.schema"),
        (by_schema({"const": "x" * MAX_GRAMMAR_BYTES}), ".json_schema.schema"),
        ({"type": "regex"}, ".pattern"),
        ({"type": "regex", "pattern": ""}, ".pattern"),
        ({"type": "lark", "grammar": 7}, ".grammar"),
        ({"type": "lark", "grammar": "é" * (MAX_GRAMMAR_BYTES // 2 + 1)}, ".grammar"),
        ({"type": "regex", "pattern": "\ud800"}, ".pattern"),
    ],
)
def test_what_is_no_format_is_refused_by_name(value: Any, param: str) -> None:
    """A 400 that names the part of response_format; size and depth are bounded."""
    with pytest.raises(GlowplugError) as caught:
        read(value)
    assert caught.value.info.code is ErrorCode.INVALID_REQUEST
    assert caught.value.info.param == f"response_format{param}"


def test_the_deepest_schema_is_accepted() -> None:
    """The limit itself is inside."""
    assert read(by_schema(nest(MAX_SCHEMA_DEPTH))) is not None
