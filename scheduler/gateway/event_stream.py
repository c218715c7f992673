"""One client's event stream: headers by aiohttp, then ready-made chunks straight to the transport.

An awaited write and a task wake-up per token cost twice the CPU and 2 ms of latency under load; a synchronous
``transport.write`` from a callback does not. What aiohttp's writer would have done is done
here: chunk framing, a closed transport, and a bound on what a slow reader may leave in our memory.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from aiohttp import HttpVersion11, web

from scheduler.gateway.paced_writes import PacedWrites
from scheduler.gateway.sse import http_chunk

HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
END_LIMIT_S: Final = 30.0


class EventStream:
    """The response of one streamed call. Event loop only.

    ``is_cut`` turns true when the client is gone or was cut for reading too slowly; pushes are dropped from then on.
    ``on_written`` is called after each write of what was pushed.
    """

    def __init__(
        self,
        request: web.Request,
        writes: PacedWrites,
        max_write_buffer_bytes: int,
        write_limit_s: float = END_LIMIT_S,
        on_written: Callable[[], None] = lambda: None,
    ) -> None:
        self.is_cut = False
        self.cut_for_slowness = False
        self._request = request
        self._writes = writes
        self._max_write_buffer_bytes = max_write_buffer_bytes
        self._write_limit_s = write_limit_s
        self._on_written = on_written
        self._unread_since_mono_s: float | None = None  # when the client last had nothing unread
        self._response = web.StreamResponse(headers=HEADERS)
        self._unsent: list[bytes] = []
        self._is_open = False  # the headers went out
        self._transport: asyncio.Transport | None = None
        self._is_in_line = False
        self._chunked = request.version >= HttpVersion11
        if self._chunked:
            self._response.enable_chunked_encoding()

    async def open(self, first: bytes) -> web.StreamResponse:
        """Send status, headers, ``first`` and what was pushed before, in one write.

        Raises:
            ConnectionResetError: the client is gone.
        """
        await self._response.prepare(self._request)
        self._is_open, self._transport = True, self._request.transport  # from here on, nothing runs before the write
        early, self._unsent = self._unsent, []
        await self._response.write(b"".join((first, *early)))
        if early:
            self._on_written()
        return self._response

    def push(self, payload: bytes) -> None:
        """Write ``payload`` when it is this stream's turn, mostly at once; dropped when the client is gone."""
        if payload and not self.is_cut:
            self._unsent.append(payload)
            if self._is_open and not self._is_in_line:
                self._is_in_line = True
                self._writes.ask(self._on_turn)

    def _on_turn(self) -> None:
        self._is_in_line = False
        self.flush()

    def flush(self) -> None:
        """Write what was pushed, now, without waiting. Nothing before :meth:`open`.

        A client that has left more than the bound unread, or anything for too long, is cut: its connection is aborted,
        which cancels its handler.
        """
        if not self._unsent or not self._is_open:
            return
        payload = b"".join(self._unsent)
        self._unsent.clear()
        transport = self._transport
        if self.is_cut or transport is None or transport.is_closing():
            self.is_cut = True
            return
        try:
            transport.write(http_chunk(payload) if self._chunked else payload)
        except RuntimeError:  # uvloop's answer when the transport closed since the check above
            self.is_cut = True
            return
        unread_bytes = transport.get_write_buffer_size()
        if unread_bytes == 0:
            self._unread_since_mono_s = None
        elif unread_bytes > self._max_write_buffer_bytes or self._is_stalled():
            self.is_cut = self.cut_for_slowness = True
            transport.abort()
        self._on_written()

    def _is_stalled(self) -> bool:
        """Whether the client has had something unread for longer than it may; comments find that out, too."""
        now_mono_s = time.monotonic()
        if self._unread_since_mono_s is None:
            self._unread_since_mono_s = now_mono_s
        return now_mono_s - self._unread_since_mono_s > self._write_limit_s

    async def finish(self) -> None:
        """Write what was pushed, end the body and wait until the client has taken it, for a bounded time.

        Raises:
            ConnectionResetError: the client is gone.
        """
        self.flush()
        if self.is_cut:
            return
        try:
            async with asyncio.timeout(self._write_limit_s):
                await self._response.write_eof()
        except TimeoutError:
            self.is_cut = self.cut_for_slowness = True
            if self._request.transport is not None:
                self._request.transport.abort()
