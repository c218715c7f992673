"""Input files of batches, and what came back of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tests.gateway_fixtures import MODEL

CHAT = "/v1/chat/completions"


def batch_line(number: int, *, model: str = MODEL, url: str = CHAT, **body: Any) -> dict[str, Any]:
    """Line ``number`` of an input file: a small chat."""
    asked = {"messages": [{"role": "user", "content": f"say {number}"}], "max_tokens": 2} if url == CHAT else {}
    return {"custom_id": f"r{number}", "method": "POST", "url": url, "body": {"model": model, **asked, **body}}


def encode_lines(lines: Iterable[dict[str, Any]]) -> bytes:
    """An input file."""
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def decode_rows(data: bytes) -> list[dict[str, Any]]:
    """The rows of an output or error file."""
    return [json.loads(line) for line in data.splitlines()]
