"""What operators do: ``/admin/models/{id}:ACT``, ``/admin/nodes/{id}:ACT`` and ``/admin/config:reload``.

======== =================================================================== =================================
act      effect                                                              where it is kept
======== =================================================================== =================================
wake     a worker without a request; its idle timer runs once it is ready    the leader, until it is there
prefetch T1 to T2: verified into sealed memory, no process                   the node's sealed cache
unload   present workers drain, then sealed bytes are forgotten              the leader, until done
pin      wakes now and is never scaled to zero                               Redis: survives restarts
unpin    may sleep again                                                     Redis
park     workers return their device memory once idle (T4 to T3); refused    the workers
         on backends without such a state, and where there is no worker
drain    (node) takes no new workers; present ones finish, spares end        Redis
undrain  (node) takes workers again                                          Redis
======== =================================================================== =================================

Orders are accepted (202), not awaited: ``/admin/status`` tells when they have come true. Each is a line of the audit
log.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from aiohttp import web

from scheduler.contract import codec, keys, reloading
from scheduler.contract.environment import SettingsError
from scheduler.contract.errors import ErrorCode, GlowplugError
from scheduler.contract.messages import InboxMessage, ModelCard, ModelOrder, ModelStatus, PolicyChanged
from scheduler.contract.states import ModelAct, Task
from scheduler.gateway.errors import HttpError, redis_within
from scheduler.gateway.gateway import GATEWAY, Gateway
from scheduler.gateway.routes_admin import check_admin

MODEL_ACTS: Final = ("wake", "prefetch", "unload", "pin", "unpin", "park")
#: Backends whose workers can leave their device and come back.
PARKING_BACKENDS: Final = frozenset({"cuda"})
NODE_ACTS: Final = ("drain", "undrain")


async def post_model_act(request: web.Request) -> web.Response:
    """Wake, prefetch, unload, pin, unpin or park one model."""
    gateway = request.app[GATEWAY]
    check_admin(request, gateway.settings)
    model, act = request.match_info["model"], request.match_info["act"]
    _check_act(act, MODEL_ACTS)
    await gateway.directory.refresh()
    card = gateway.directory.cards.get(model)
    if card is None:
        raise GlowplugError(ErrorCode.MODEL_NOT_FOUND, f'no model "{model[:100]}" here: see `glowplug ps`')
    if card.refused is not None and act in ("wake", "prefetch", "pin"):
        raise GlowplugError(card.refused.code, card.refused.message)
    status = gateway.directory.status_of(model)
    if act == "park":
        _check_park(gateway, card)
    if act == "unload" and status is not None and status.pinned:
        raise HttpError(409, f'"{model}" is pinned: unpin it first', code="model_pinned")
    if act == "unpin" and status is not None and status.pinned and not await _is_stored_pin(gateway, model):
        raise HttpError(409, f'"{model}" is pinned in the configuration file: change it there', code="model_pinned")
    async with redis_within(gateway.settings.redis_limit_s, "giving an order"):
        redis: Any = gateway.redis  # redis-py types each reply as sync-or-async
        if act in ("pin", "unpin"):
            await (redis.sadd if act == "pin" else redis.srem)(keys.PINNED, model)
            await _tell(gateway, PolicyChanged())
        else:
            await _tell(gateway, ModelOrder(model, ModelAct(act)))
    return _accepted({"model": model, "act": act, "status": _row(status)})


async def post_node_act(request: web.Request) -> web.Response:
    """Drain a node, or let it work again."""
    gateway = request.app[GATEWAY]
    check_admin(request, gateway.settings)
    node, act = request.match_info["node"], request.match_info["act"]
    _check_act(act, NODE_ACTS)
    await gateway.directory.refresh()
    status = gateway.directory.status
    known = {report.node_id for report in status.nodes} if status is not None else set()
    if node not in known and act == "drain":
        raise HttpError(404, f'no node "{node[:100]}"; there are: {", ".join(sorted(known))}', code="node_not_found")
    async with redis_within(gateway.settings.redis_limit_s, "giving an order"):
        redis: Any = gateway.redis  # as above
        await (redis.sadd if act == "drain" else redis.srem)(keys.DRAINED_NODES, node)
        await _tell(gateway, PolicyChanged())
    return _accepted({"node": node, "act": act})


async def post_reload(request: web.Request) -> web.Response:
    """Read the configuration again, here first (one that is wrong is a 400 and changes nothing), then in every gateway,
    scheduler and agent; the answer says who did."""
    gateway = request.app[GATEWAY]
    check_admin(request, gateway.settings)
    try:
        if gateway.reload is not None:
            await gateway.reload()
    except SettingsError as error:
        raise HttpError(400, str(error), code="invalid_configuration") from error
    async with redis_within(gateway.settings.redis_limit_s, "giving an order"):
        await _tell(gateway, PolicyChanged(reload_config=True))  # also if the leader hears no channel just now
    async with redis_within(gateway.settings.redis_limit_s + reloading.WAIT_S, "waiting for who reloads"):
        outcome = await reloading.order_reload(gateway.redis)
    return _accepted({"act": "reload", **msgspec.to_builtins(outcome)})


def _check_act(act: str, known: tuple[str, ...]) -> None:
    if act not in known:
        raise HttpError(404, f'no act "{act[:40]}": one of {", ".join(known)}', code="unknown_act")


def _check_park(gateway: Gateway, card: ModelCard) -> None:
    """Raise unless the model has a worker that can be parked.

    Raises:
        HttpError: 409, with what is there instead.
    """
    status = gateway.directory.status
    backends = {report.node_id: report.backend for report in status.nodes} if status is not None else {}
    if card.task is Task.EMBED or not PARKING_BACKENDS & set(backends.values()):
        named = (
            "its own (the CPU's)" if card.task is Task.EMBED else ", ".join(sorted({*backends.values()})) or "unknown"
        )
        raise _park_refused(card.name, named)
    own = [worker for worker in status.workers if worker.model == card.name] if status is not None else []
    if not own:
        message = f'"{card.name}" has no worker, so nothing is on a device: there is nothing to park'
        raise HttpError(409, message, code="model_asleep")
    if not any(backends.get(worker.node_id) in PARKING_BACKENDS for worker in own):
        raise _park_refused(card.name, ", ".join(sorted({backends.get(worker.node_id, "unknown") for worker in own})))


def _park_refused(model: str, backend: str) -> HttpError:
    return HttpError(
        409,
        f'"{model}" cannot be parked: backend {backend} has no parked state (T3), a worker is '
        "hot or gone. Its idle timeout ends it and keeps the weights in sealed memory (T2); unload frees those too",
        code="park_unsupported",
    )


async def _is_stored_pin(gateway: Gateway, model: str) -> bool:
    async with redis_within(gateway.settings.redis_limit_s, "reading pins"):
        redis: Any = gateway.redis  # as above
        return bool(await redis.sismember(keys.PINNED, model))


async def _tell(gateway: Gateway, message: InboxMessage) -> None:
    redis: Any = gateway.redis  # as above
    fields = {keys.FIELD: codec.encode(message)}
    await redis.xadd(keys.INBOX, fields, maxlen=keys.INBOX_MAX_ENTRIES, approximate=True)


def _row(status: ModelStatus | None) -> Any:
    return None if status is None else msgspec.to_builtins(status)


def _accepted(body: dict[str, Any]) -> web.Response:
    return web.json_response(
        {"object": "admin.order", **body}, status=202, dumps=lambda v: msgspec.json.encode(v).decode()
    )
