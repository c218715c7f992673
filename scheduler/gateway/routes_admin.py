"""For operators and the command line: fleet status, traces, metrics.

Where API keys are required, all of this needs one with the scope ``admin``. Without keys, ``/admin`` answers loopback
connections only, unless GLOWPLUG_ADMIN=1, and ``/metrics`` answers everybody.
"""

from __future__ import annotations

import ipaddress
import time
from typing import Any

import msgspec
import structlog
from aiohttp import web

from scheduler.contract import keys
from scheduler.contract.errors import ErrorCode, GlowplugError
from scheduler.gateway.batch_sums import BatchSums, sum_batches
from scheduler.gateway.errors import HttpError, redis_within
from scheduler.gateway.gateway import GATEWAY
from scheduler.gateway.identity import ANONYMOUS, IDENTITY
from scheduler.gateway.settings import ADMIN, GatewaySettings
from scheduler.gateway.traces import build_document
from scheduler.gateway.usage import MAX_DAYS

_log = structlog.get_logger()


def check_admin(request: web.Request, settings: GatewaySettings) -> None:
    """Let loopback (and unix-socket) connections through, and who has a key (its scope was checked before).

    Raises:
        HttpError: 403 for others, unless the settings open the admin paths.
    """
    peer = request.transport.get_extra_info("peername") if request.transport is not None else None
    if settings.admin_from_anywhere or request.get(IDENTITY, ANONYMOUS).key is not None or not isinstance(peer, tuple):
        return
    address = ipaddress.ip_address(peer[0].split("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    if not (mapped or address).is_loopback:
        message = f"/admin answers loopback connections only; start the gateway with {ADMIN}=1 to open it"
        raise HttpError(403, message, code="admin_only_on_loopback", openai_type="permission_error")


async def get_status(request: web.Request) -> web.Response:
    """The scheduler's report, as JSON."""
    gateway = request.app[GATEWAY]
    check_admin(request, gateway.settings)
    await gateway.directory.refresh()
    status = gateway.directory.status
    if status is None:
        raise GlowplugError(
            ErrorCode.BACKEND_UNAVAILABLE, "no scheduler has reported in the last seconds; is one running?"
        )
    return web.Response(body=msgspec.json.encode(status), content_type="application/json")


async def get_trace(request: web.Request) -> web.Response:
    """The trace of one request id (``chatcmpl-`` and ``cmpl-`` before it are allowed), or of ``last``."""
    gateway = request.app[GATEWAY]
    check_admin(request, gateway.settings)
    wanted = request.match_info["request_id"].removeprefix("chatcmpl-").removeprefix("cmpl-")
    async with redis_within(gateway.settings.redis_limit_s, "reading a trace"):
        trace = await (gateway.traces.find_last() if wanted == "last" else gateway.traces.find(wanted))
    if trace is None:
        limits = f"the newest {keys.TRACES_MAX_ENTRIES} are kept, for {keys.TRACE_TTL_S // 60} minutes"
        message = f'no trace of "{wanted[:64]}"; {limits}'
        raise HttpError(404, message, code="trace_not_found")
    return web.Response(body=msgspec.json.encode(build_document(trace)), content_type="application/json")


async def get_usage(request: web.Request) -> web.Response:
    """What each tenant, key and model used in the last ``days`` (1 to 40, default 1), newest day first."""
    gateway = request.app[GATEWAY]
    check_admin(request, gateway.settings)
    text = request.query.get("days", "1")
    if not (text.isascii() and text.isdigit() and len(text) <= 3 and 1 <= int(text) <= MAX_DAYS):
        raise HttpError(400, f"days: expected 1 to {MAX_DAYS}, got {text[:20]!r}", code="invalid_request")
    async with redis_within(gateway.settings.redis_limit_s, "reading the usage"):
        rows = await gateway.usage.read(int(text))
    return web.Response(body=msgspec.json.encode({"object": "list", "data": rows}), content_type="application/json")


async def get_metrics(request: web.Request) -> web.Response:
    """Prometheus text. Without Redis the gateway's own numbers are still given."""
    gateway = request.app[GATEWAY]
    security: dict[str, int] = {}
    batches: BatchSums | None = None
    status = None
    redis: Any = gateway.redis  # redis-py types each reply as sync-or-async
    try:
        await gateway.directory.ensure_fresh()
        status = gateway.directory.status
        async with redis_within(gateway.settings.redis_limit_s, "reading security counts"):
            raw = await redis.hgetall(keys.SECURITY_COUNTS)
            under_way = await gateway.batches.find_all(await gateway.batches.list_active())
        batches = sum_batches(under_way, gateway.directory.cards, time.time())
        security = {kind.decode(): int(count) for kind, count in raw.items()}
    except GlowplugError as error:
        _log.warning("metrics_without_fleet", error=error.info.message)
    body, content_type = gateway.metrics.render(status, security, batches)
    return web.Response(body=body, headers={"Content-Type": content_type})
