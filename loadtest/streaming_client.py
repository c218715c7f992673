"""A blocking HTTP client that stamps when the first content byte of a streamed answer arrived."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 120.0

#: The reference prompt: 37 tokens once the model's template has added its default system prompt.
REFERENCE_MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@dataclass(slots=True)
class StreamedAnswer:
    """What came back, with times in ms from just before the request was sent (connection set-up included)."""

    status: int
    first_content_ms: float = 0.0
    total_ms: float = 0.0
    text: str = ""
    content_at_ms: list[float] = field(default_factory=list)
    request_id: str = ""
    error: str = ""
    comments: list[str] = field(default_factory=list)
    completion_tokens: int = 0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first over the time from the first to the last."""
        if len(self.content_at_ms) < 2 or self.completion_tokens < 2:
            return 0.0
        return (self.completion_tokens - 1) / (self.content_at_ms[-1] - self.content_at_ms[0]) * 1e3


def chat_body(model: str, *, max_tokens: int, **fields: Any) -> dict[str, Any]:
    """A streamed greedy chat request with the reference prompt; ``fields`` override."""
    return {
        "model": model,
        "messages": REFERENCE_MESSAGES,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }


def post_stream(
    url: str, body: dict[str, Any], *, started_s: float | None = None, path: str = "/v1/chat/completions"
) -> StreamedAnswer:
    """Send ``body`` and read the stream to its end. ``started_s`` (perf_counter) moves the zero of all times."""
    origin_s = time.perf_counter() if started_s is None else started_s
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "127.0.0.1", address.port, timeout=TIMEOUT_S)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = StreamedAnswer(response.status, request_id=response.getheader("x-request-id") or "")
        if response.status != 200:
            answer.error = response.read().decode("utf-8", "replace")
        else:
            _read_events(response, answer, origin_s)
        answer.total_ms = (time.perf_counter() - origin_s) * 1e3
        return answer
    finally:
        connection.close()


def _read_events(response: http.client.HTTPResponse, answer: StreamedAnswer, origin_s: float) -> None:
    for raw in response:
        at_ms = (time.perf_counter() - origin_s) * 1e3
        line = raw.decode("utf-8").strip()
        if line.startswith(":"):
            answer.comments.append(line)
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line[6:])
        if "error" in event:
            answer.error = event["error"]["message"]
            return
        if usage := event.get("usage"):
            answer.completion_tokens = usage["completion_tokens"]
        for choice in event["choices"]:
            text = choice["delta"].get("content") if "delta" in choice else choice.get("text")
            if text:
                if not answer.content_at_ms:
                    answer.first_content_ms = at_ms
                answer.content_at_ms.append(at_ms)
                answer.text += text


@contextlib.contextmanager
def held_streams(url: str, body: dict[str, Any], count: int) -> Iterator[None]:
    """``count`` streams that have all begun to answer; hung up at the end, which cancels their requests."""
    address = urlsplit(url)
    with contextlib.ExitStack() as stack:
        responses = []
        for _ in range(count):
            connection = http.client.HTTPConnection(address.hostname or "127.0.0.1", address.port, timeout=TIMEOUT_S)
            stack.callback(connection.close)
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            responses.append(stack.enter_context(connection.getresponse()))
        for response in responses:
            while b'"content":"' not in response.readline().replace(b'"content":""', b""):
                pass
        yield


def get_json(url: str, path: str) -> Any:
    """The JSON at ``path``.

    Raises:
        RuntimeError: any status but 200.
    """
    status, text = get_text(url, path)
    if status != 200:
        raise RuntimeError(f"GET {path}: {status} {text[:300]}")
    return json.loads(text)


def get_text(url: str, path: str) -> tuple[int, str]:
    """Status and body of a GET."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "127.0.0.1", address.port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode("utf-8", "replace")
    finally:
        connection.close()
