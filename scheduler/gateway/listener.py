"""The gateway's sockets: TLS, and what aiohttp leaves open about connections.

aiohttp parses HTTP; here each of its connections gets a deadline for its first header, a bound on how long an answer
may take to be read, and errors in OpenAI's shape for what cannot be parsed. What a stranger sent is never logged.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from pathlib import Path
from typing import Any, Final

import structlog
from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong
from aiohttp.web_protocol import RequestHandler
from aiohttp.web_request import BaseRequest

from scheduler.contract.environment import SettingsError
from scheduler.contract.errors import ErrorCode
from scheduler.gateway.errors import HttpError, http_error_response
from scheduler.gateway.response_headers import FIXED_HEADERS
from scheduler.gateway.settings import GatewaySettings

MAX_HEADERS: Final = 64
MAX_HEADER_BYTES: Final = 8190  # of one header line
HANDSHAKE_LIMIT_S: Final = 10.0
LINGERING_S: Final = 2.0
#: What the kernel may hold for one client that does not read (it doubles the number). Left to itself it takes up to
#: 4 MiB, which a stream of tokens fills in half an hour: so long a client that never reads would not be noticed.
SEND_BUFFER_BYTES: Final = 64 * 1024

_log = structlog.get_logger()


def make_tls_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """A server context for TLS 1.2 and newer. Reads files: blocks.

    Raises:
        SettingsError: the files cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_certificate(context, certificate, key)
    return context


def load_certificate(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    """Load the certificate (again); connections that come from now on get it.

    Raises:
        SettingsError: the files cannot be used; the context is as it was.
    """
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"TLS: {certificate} with {key} cannot be used: {error}") from error


class Connection(RequestHandler):
    """One client's connection."""

    __slots__ = ("_header_timer", "_settings")

    def __init__(self, manager: web.Server, settings: GatewaySettings, **options: Any) -> None:
        super().__init__(manager, **options)
        self._settings = settings
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        manager = self._manager
        super().connection_made(transport)
        if manager is not None and len(manager.connections) > self._settings.max_connections:
            _log.warning("connection_refused", connections=len(manager.connections))
            transport.abort()  # type: ignore[attr-defined]  # every stream transport has it
            return
        loop = asyncio.get_running_loop()
        self._header_timer = loop.call_later(self._settings.header_limit_s, self._on_header_limit)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
        super().connection_lost(exc)

    def _on_header_limit(self) -> None:
        """No whole header came: nobody, or somebody who sends a byte now and then. Later ones: keep-alive's limit."""
        self._header_timer = None
        if self._request_count == 0 and self.transport is not None:
            self.transport.abort()

    def close(self) -> None:
        """End when what runs has ended; at once where nothing was asked.

        aiohttp ends an idle connection by its handler's wait for a request. One that was accepted a moment ago has no
        such wait yet: it would be held, deaf, for the whole time that is given to those who are being answered.
        """
        super().close()
        if self._waiter is None and self._current_request is None and not self._messages:
            self.force_close()

    async def shutdown(self, timeout: float | None = 15.0) -> None:
        """The same for a connection that was accepted after the idle ones had been closed."""
        self.close()
        await super().shutdown(timeout)

    async def finish_response(
        self, request: BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send the rest of an answer; who does not read it in time is cut."""
        try:
            async with asyncio.timeout(self._settings.write_limit_s):
                return await super().finish_response(request, resp, start_time)
        except TimeoutError:
            if self.transport is not None:
                self.transport.abort()
            return resp, True

    def handle_error(
        self,
        request: BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what aiohttp could not parse or what failed outside our handlers; the connection ends."""
        if request.writer.output_size > 0:
            raise ConnectionError("a part of another answer was sent already")
        if status >= 500:
            _log.error("request_failed_outside_handlers", status=status, kind=type(exc).__name__)
        response = http_error_response(describe_parse_error(status, exc))
        response.headers.update(FIXED_HEADERS)
        response.force_close()
        return response

    def log_exception(self, *args: Any, **options: Any) -> None:
        """Say that something failed, but not aiohttp's text: it quotes what the client sent, keys included."""
        error = options.get("exc_info")
        _log.warning("connection_failed", kind=type(error).__name__)


def describe_parse_error(status: int, exc: BaseException | None) -> HttpError:
    """What aiohttp refused to parse, in our words."""
    if isinstance(exc, LineTooLong):
        message = f"a header line has more than {MAX_HEADER_BYTES} bytes, or there are more than {MAX_HEADERS} headers"
        return HttpError(431, message, code="header_too_large")
    if isinstance(exc, BadHttpMessage) or status == 400:
        return HttpError(400, "this is not a valid HTTP/1.1 request", code="malformed_http")
    return HttpError(status, "the gateway failed; see its log", code=ErrorCode.INTERNAL, openai_type="server_error")


class ListeningSite(web.TCPSite):
    """aiohttp's TCP site, with connections of ours."""

    def __init__(self, runner: web.AppRunner, settings: GatewaySettings, tls: ssl.SSLContext | None) -> None:
        super().__init__(runner, settings.host, settings.port, backlog=settings.backlog, ssl_context=tls)
        self._settings = settings
        self._tls = tls

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: the address cannot be bound.
        """
        await super(web.TCPSite, self).start()  # registers the site; TCPSite's own would make aiohttp's connections
        server, settings = self._runner.server, self._settings
        if server is None:
            raise RuntimeError("the runner must be set up before its site starts")
        loop = asyncio.get_running_loop()

        def connect() -> Connection:
            return Connection(
                server,
                settings,
                loop=loop,
                access_log=None,
                keepalive_timeout=settings.keepalive_s,
                max_headers=MAX_HEADERS,
                max_line_size=MAX_HEADER_BYTES,
                max_field_size=MAX_HEADER_BYTES,
                lingering_time=LINGERING_S,
            )

        options: dict[str, Any] = {} if self._tls is None else {"ssl_handshake_timeout": HANDSHAKE_LIMIT_S}
        listener = await loop.create_server(
            connect, settings.host, settings.port, ssl=self._tls, backlog=settings.backlog, **options
        )
        self._server = listener
        for listening in listener.sockets:
            with socket.socket(fileno=os.dup(listening.fileno())) as same:  # uvloop's own view of it sets no options
                same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # accepted ones inherit it
