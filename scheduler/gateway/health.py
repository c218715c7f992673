"""Liveness and readiness. Neither wakes a model nor resets an idle timer."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from scheduler.contract import keys
from scheduler.contract.errors import GlowplugError
from scheduler.gateway.gateway import GATEWAY, Gateway
from scheduler.gateway.model_directory import NO_NODE

RETRY_AFTER_S: Final = 2


async def get_liveness(request: web.Request) -> web.Response:
    """``/healthz``: this process serves HTTP."""
    return web.json_response({"status": "ok"})


async def get_readiness(request: web.Request) -> web.Response:
    """``/readyz`` and ``/health``: a request sent now would be served; else 503 with the reasons."""
    reasons = await find_reasons(request.app[GATEWAY])
    if not reasons:
        return web.json_response({"status": "ready"})
    return web.json_response(
        {"status": "not ready", "reasons": reasons}, status=503, headers={"Retry-After": str(RETRY_AFTER_S)}
    )


async def find_reasons(gateway: Gateway) -> list[str]:
    """Why a request sent now would not be served; empty when it would."""
    if gateway.draining:
        return ["this gateway is shutting down"]
    try:
        await gateway.directory.ensure_fresh()
    except GlowplugError as error:
        return [error.info.message]
    status = gateway.directory.status
    if status is None:  # its TTL tells, on the server's clock: those of two hosts may differ, or step
        return [f"no scheduler has reported in the last {keys.STATUS_TTL_S} s"]
    if not status.nodes:
        return [NO_NODE]
    return []
