"""Thousands of clients of one gateway in one process: raw HTTP/1.1 over asyncio protocols, as cheap as they can be.

A library's client costs more for each event than the gateway does; here one in eight streams is read token by token
(latency, order), of the others only the bytes and the events are counted.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from dataclasses import dataclass, field
from typing import Final, cast

PROBE_EVERY: Final = 8
SLOW_BUFFER_BYTES: Final = 4096
#: The text of a token: its number in the stream and the monotonic nanosecond at which it was sampled.
TOKEN: Final = re.compile(rb'"content":"(\d+):(\d+);"')
EVENT: Final = b'"content":"'


@dataclass(slots=True)
class StreamCounts:
    """What all clients saw. Latencies are of the probed streams, in ms, with the instant (monotonic s) of arrival."""

    opened: int = 0
    refused: int = 0
    ended: int = 0  # with [DONE]
    failed: int = 0  # with an error event
    cut: int = 0  # closed by the gateway without an end
    left: int = 0
    tokens: int = 0
    num_bytes: int = 0
    out_of_order: int = 0
    latencies_ms: list[tuple[float, float]] = field(default_factory=list)
    status_lines: dict[str, int] = field(default_factory=dict)


class StreamClient(asyncio.Protocol):
    """One streamed request. ``is_slow``: reads nothing after the headers. ``opened`` is set when the answer begins."""

    def __init__(self, counts: StreamCounts, head: bytes, *, is_probe: bool, is_slow: bool) -> None:
        self.opened = asyncio.get_running_loop().create_future()
        self.closed = asyncio.get_running_loop().create_future()
        self.is_slow = is_slow
        self._counts = counts
        self._head = head
        self._is_probe = is_probe
        self._tail = b""
        self._next = 0
        self._is_over = False
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        self._transport.write(self._head)

    def data_received(self, data: bytes) -> None:
        counts = self._counts
        counts.num_bytes += len(data)
        if not self.opened.done():
            self._on_head(data)
        if self._is_probe:
            self._probe(data)
        else:
            counts.tokens += data.count(EVENT)
        if b"data: [DONE]" in data:
            self._is_over = True
            counts.ended += 1
        elif b'"error":' in data:
            self._is_over = True
            counts.failed += 1

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.opened.done():
            self.opened.set_result(False)
            self._counts.refused += 1
        elif not self._is_over:
            self._counts.cut += 1
        if not self.closed.done():
            self.closed.set_result(None)

    def leave(self) -> None:
        """Hang up, as a person who closes the page."""
        if self._transport is not None and not self._is_over:
            self._is_over = True
            self._counts.left += 1
            self._transport.abort()

    def read_on(self) -> None:
        """A slow client looks again: what is left of its connection comes to an end."""
        if self._transport is not None and self.is_slow:
            self._transport.resume_reading()

    def close(self) -> None:
        """Hang up at the end of the measurement."""
        self._is_over = True
        if self._transport is not None:
            self._transport.abort()

    def _on_head(self, data: bytes) -> None:
        status = data.split(b"\r\n", 1)[0].decode("latin-1")
        self._counts.status_lines[status] = self._counts.status_lines.get(status, 0) + 1
        is_good = b" 200 " in data[:16]
        self._counts.opened += is_good
        self._counts.refused += not is_good
        self._is_over = not is_good
        self.opened.set_result(is_good)
        if self.is_slow and self._transport is not None:
            self._transport.pause_reading()

    def _probe(self, data: bytes) -> None:
        now_ns = time.monotonic_ns()
        text = self._tail + data
        end = 0
        for match in TOKEN.finditer(text):
            end = match.end()
            number, sampled_ns = int(match[1]), int(match[2])
            self._counts.tokens += 1
            self._counts.out_of_order += number != self._next
            self._next = number + 1
            self._counts.latencies_ms.append((now_ns / 1e9, (now_ns - sampled_ns) / 1e6))
        self._tail = text[max(end, len(text) - 64) :]


def request_bytes(host: str, port: int, model: str) -> bytes:
    """A streamed chat request, head and body."""
    body = json.dumps({"model": model, "stream": True, "messages": [{"role": "user", "content": "go on"}]}).encode()
    lines = (
        "POST /v1/chat/completions HTTP/1.1",
        f"Host: {host}:{port}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "",
        "",
    )
    return "\r\n".join(lines).encode() + body


async def open_stream(
    counts: StreamCounts, host: str, port: int, model: str, index: int, *, is_slow: bool
) -> StreamClient:
    """A stream whose answer has begun, or which was refused."""
    loop = asyncio.get_running_loop()
    is_probe = index % PROBE_EVERY == 0 and not is_slow
    connecting = socket.socket()
    connecting.setblocking(False)
    if is_slow:
        connecting.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_BUFFER_BYTES)
    await loop.sock_connect(connecting, (host, port))
    head = request_bytes(host, port, model)
    _, client = await loop.create_connection(
        lambda: StreamClient(counts, head, is_probe=is_probe, is_slow=is_slow), sock=connecting
    )
    await client.opened
    return client
