"""What documents say of the API against what the readers of requests do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scheduler.contract.chat_template import ChatTemplates
from scheduler.contract.errors import GlowplugError
from scheduler.gateway.openapi import build_document, list_operations
from scheduler.gateway.request_schema import read_chat_call
from tests.gateway_fixtures import make_card

TABLE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
DOCUMENT = json.loads(build_document())
SCHEMAS = DOCUMENT["components"]["schemas"]


def read(**fields: Any) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    read_chat_call(body, make_card(context_length=0), ChatTemplates())


def test_the_table_names_every_endpoint() -> None:
    """Those that clients call; operators' and the dashboard's are told elsewhere."""
    for op in list_operations():
        if op.tag in ("inference", "batches", "models", "health"):
            first = op.path.removeprefix("/v1").strip("/").split("/")[0]
            assert first in TABLE, op.path


def test_the_table_names_every_field_of_a_chat() -> None:
    """Fields in the document but not in the table would be secrets."""
    words = TABLE.replace("`", " ").replace(",", " ").split()
    missing = {
        name
        for name in SCHEMAS["ChatCompletionRequest"]["properties"]
        if name not in words and not name.endswith("penalty")
    }
    assert missing <= {"model", "messages", "user", "stream_options"}  # the last one is there with its only key


def bounds() -> list[tuple[str, str, float]]:
    """Every numeric bound of a chat's fields: (field, keyword, number)."""
    found = []
    for name, schema in SCHEMAS["ChatCompletionRequest"]["properties"].items():
        for one in schema.get("anyOf", [schema]):
            found += [(name, key, one[key]) for key in ("minimum", "maximum") if key in one]
    return found


@pytest.mark.parametrize(("name", "keyword", "bound"), bounds())
def test_bounds_in_the_document_are_the_readers(name: str, keyword: str, bound: float) -> None:
    """A value at the bound is accepted, one beyond it is a 400 that names the field."""
    companions: dict[str, Any] = {"logprobs": True} if name == "top_logprobs" else {}
    read(**{name: bound}, **companions)
    beyond = bound - 1 if keyword == "minimum" else bound + 1
    with pytest.raises(GlowplugError) as caught:
        read(**{name: beyond}, **companions)
    assert caught.value.info.param == name
