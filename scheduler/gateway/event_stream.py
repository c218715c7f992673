"""One client's event stream: headers by aiohttp, then ready-made chunks straight to the transport.

An awaited write and a task wake-up per token cost twice the CPU and 2 ms of latency under load; a synchronous
``transport.write`` from the callback that received the token does not. What aiohttp's writer would have done is done
here: chunk framing, a closed transport, and a bound on what a slow reader may leave in our memory.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

from aiohttp import HttpVersion11, web

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
    """

    def __init__(
        self,
        request: web.Request,
        headers: dict[str, str],
        max_write_buffer_bytes: int,
        write_limit_s: float = END_LIMIT_S,
    ) -> None:
        self.is_cut = False
        self.cut_for_slowness = False
        self._request = request
        self._max_write_buffer_bytes = max_write_buffer_bytes
        self._write_limit_s = write_limit_s
        self._unread_since_mono_s: float | None = None  # when the client last had nothing unread
        self._response = web.StreamResponse(headers={**HEADERS, **headers})
        self._pending: bytearray | None = bytearray()  # what was pushed before the headers went out; None: they did
        self._chunked = request.version >= HttpVersion11
        if self._chunked:
            self._response.enable_chunked_encoding()

    async def open(self, first: bytes) -> web.StreamResponse:
        """Send status, headers, ``first`` and what was pushed before, in one write.

        Raises:
            ConnectionResetError: the client is gone.
        """
        await self._response.prepare(self._request)
        early, self._pending = self._pending or b"", None  # from here on, nothing runs before the write
        await self._response.write(first + early)
        return self._response

    def push(self, payload: bytes) -> None:
        """Write ``payload`` now, without waiting; dropped when the client is gone. Empty: nothing is written.

        A client that has left more than the bound unread, or anything for too long, is cut: its connection is aborted,
        which cancels its handler.
        """
        if not payload:
            return
        if self._pending is not None:
            self._pending += payload
            return
        transport = self._request.transport
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

    def _is_stalled(self) -> bool:
        """Whether the client has had something unread for longer than it may; comments find that out, too."""
        now_mono_s = time.monotonic()
        if self._unread_since_mono_s is None:
            self._unread_since_mono_s = now_mono_s
        return now_mono_s - self._unread_since_mono_s > self._write_limit_s

    async def finish(self) -> None:
        """End the body and wait until the client has taken it, for a bounded time.

        Raises:
            ConnectionResetError: the client is gone.
        """
        try:
            async with asyncio.timeout(self._write_limit_s):
                await self._response.write_eof()
        except TimeoutError:
            self.is_cut = self.cut_for_slowness = True
            if self._request.transport is not None:
                self._request.transport.abort()
