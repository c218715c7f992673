"""The dashboard: one page without build step or foreign resources, and the live feed that it reads.

The page itself holds no data and is open to everybody; what it shows comes from ``/admin``, with the rights of whoever
looks.
"""

from __future__ import annotations

import asyncio
import hashlib
from functools import cache
from importlib import resources
from typing import Final, NamedTuple

import msgspec
from aiohttp import web

from scheduler.contract.errors import ErrorCode, GlowplugError
from scheduler.gateway import sse
from scheduler.gateway.errors import HttpError
from scheduler.gateway.event_stream import EventStream
from scheduler.gateway.gateway import GATEWAY, Gateway
from scheduler.gateway.live_feed import EVERY_S, read_live
from scheduler.gateway.response_headers import PAGE_POLICY
from scheduler.gateway.routes_admin import check_admin

PAGE: Final = "index.html"
CONTENT_TYPES: Final = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}
ASSETS: Final = frozenset(
    {
        PAGE,
        "app.js",
        "chat.js",
        "feed.js",
        "format.js",
        "ladder.js",
        "panels.js",
        "waterfall.js",
        "style.css",
        "icon.svg",
    }
)
MAX_WATCHERS: Final = 32
_WATCHERS: Final = web.AppKey("dashboard_watchers", set[object])


class Asset(NamedTuple):
    """A file of the page."""

    body: bytes
    content_type: str
    etag: str


@cache
def load_asset(name: str) -> Asset:
    """A file of the page, read once a process. ``name`` is one of :data:`ASSETS`."""
    body = (resources.files("scheduler.gateway") / "dashboard" / name).read_bytes()
    suffix = name.rsplit(".", 1)[-1]
    return Asset(body, CONTENT_TYPES[suffix], hashlib.blake2b(body, digest_size=12).hexdigest())


async def get_page(request: web.Request) -> web.Response:
    """The page."""
    return _answer(request, PAGE)


async def get_asset(request: web.Request) -> web.Response:
    """A file that the page names."""
    name = request.match_info["name"]
    if name not in ASSETS:
        raise HttpError(404, f'the dashboard has no file "{name[:64]}"', code="not_found")
    return _answer(request, name)


def _answer(request: web.Request, name: str) -> web.Response:
    asset = load_asset(name)
    etag = f'"{asset.etag}"'
    # Asked for again each time and answered 304: an upgrade shows at once. A 304's headers replace the stored ones.
    headers = {"ETag": etag, "Cache-Control": "no-cache", "Content-Security-Policy": PAGE_POLICY}
    if request.headers.get("If-None-Match") == etag:
        return web.Response(status=304, headers=headers)
    return web.Response(body=asset.body, headers={**headers, "Content-Type": asset.content_type})


async def watch_live(request: web.Request) -> web.StreamResponse:
    """Server-sent events: the state now, then twice a second and whenever a wake changes its stage."""
    gateway = request.app[GATEWAY]
    check_admin(request, gateway.settings)
    watchers = request.app[_WATCHERS]
    if len(watchers) >= MAX_WATCHERS:
        message = f"{MAX_WATCHERS} dashboards watch this gateway already; close one, or ask another gateway"
        raise GlowplugError(ErrorCode.OVERLOADED, message, retry_after_s=5)
    me = object()
    watchers.add(me)
    try:
        return await _stream(request, gateway)
    finally:
        watchers.discard(me)


async def _stream(request: web.Request, gateway: Gateway) -> web.StreamResponse:
    stream = EventStream(request, gateway.writes, gateway.settings.max_write_buffer_bytes)
    changed = asyncio.Event()
    unwatch = gateway.hub.watch_all_stages(lambda event: changed.set())
    try:
        response = await stream.open(await _next_event(gateway))
        while not (stream.is_cut or gateway.draining):
            try:
                async with asyncio.timeout(EVERY_S):
                    await changed.wait()
            except TimeoutError:
                pass
            changed.clear()
            stream.push(await _next_event(gateway))
        if not stream.is_cut:
            await stream.finish()
    finally:
        unwatch()
    return response


async def _next_event(gateway: Gateway) -> bytes:
    try:
        return sse.event(msgspec.json.encode(await read_live(gateway)))
    except GlowplugError as error:
        return sse.event(msgspec.json.encode({"error": {"code": error.info.code, "message": error.info.message}}))


def prepare_watchers(app: web.Application) -> None:
    """Make the set of watchers of ``app``; before its first request."""
    app[_WATCHERS] = set()
