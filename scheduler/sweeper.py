"""The leader's sweeper: finds what fell between the parts, and repairs it or ends it with an error.

======================== ================================================= =========================================
what                     how it comes about                                what is done
======================== ================================================= =========================================
job without a body       it waited longer than a request lives             its log is ended with an error
lease of no worker       a worker died or stands still unseen              the lease is released
request nobody hears     its gateway died, or drained past its grace       cancelled after the grace to come back
log without end or job   a crash between two writes, a server that forgot  ended with an error
key without TTL or owner a bug, or a crash between two writes              gets a TTL where it is ours; else counted
report of nobody         a node or worker that is gone                     taken out of its set
======================== ================================================= =========================================

What looks lost is acted on only when it is seen twice, a sweep apart: a single look may fall between two writes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

import structlog
from redis.asyncio import Redis

from scheduler.contract import codec, keys
from scheduler.contract.errors import ErrorCode, ErrorInfo
from scheduler.contract.job_queue import release_worker
from scheduler.dispatch import CONTROL_OWNER, Dispatcher

SWEEP_EVERY_S: Final = 1.0
#: Keys looked at in each sweep.
SCAN_COUNT: Final = 200

EXPIRED: Final = ErrorInfo(
    ErrorCode.OVERLOADED,
    f"the request waited longer than {keys.REQUEST_TTL_S} s and was not run; try again",
    retry_after_s=30,
)
LOST: Final = ErrorInfo(
    ErrorCode.INTERNAL, "the request was lost between two parts of the server; send it again", retry_after_s=1
)


class _Sightings:
    """What was seen in this round and in the one before."""

    def __init__(self) -> None:
        self._before: set[str] = set()
        self._now: set[str] = set()

    def confirm(self, what: str) -> bool:
        """Note that ``what`` was seen; whether it had been seen in the round before. Then it is forgotten."""
        if what in self._before:
            self._before.discard(what)
            return True
        self._now.add(what)
        return False

    def end_round(self) -> None:
        self._before, self._now = self._now, set()


class Sweeper:
    """Runs in the leader's loop. Deadlines are on this process's monotonic clock; a new leader begins them anew."""

    def __init__(self, redis: Redis, dispatcher: Dispatcher, unheard_grace_s: float) -> None:
        self._redis: Any = redis  # redis-py types each reply as sync-or-async
        self._dispatcher = dispatcher
        self._unheard_grace_s = unheard_grace_s
        self._counts: Counter[str] = Counter()
        self._in_queues, self._in_keys = _Sightings(), _Sightings()
        self._unheard_since_s: dict[str, float] = {}
        self._cursor = 0
        self._log = structlog.get_logger()

    @property
    def counts(self) -> dict[str, int]:
        """How often each kind was found and dealt with, since this leader started."""
        return dict(self._counts)

    async def sweep(self, models: Iterable[str]) -> None:
        """One sweep: the queues of ``models`` and the next part of the key space.

        Raises:
            RedisError: the server could not be reached, or refused a write.
        """
        waiting: set[str] = set()
        for model in models:
            waiting.update(await self._sweep_queue(model))
        for request_id in self._unheard_since_s.keys() - waiting:
            del self._unheard_since_s[request_id]
        self._cursor, found = await self._redis.scan(self._cursor, count=SCAN_COUNT)
        await self._sweep_keys([key.decode() for key in found])
        if self._cursor == 0:
            await self._sweep_sets()
            self._in_keys.end_round()
        self._in_queues.end_round()

    def _count(self, kind: str, **facts: object) -> None:
        self._counts[kind] += 1
        self._log.warning("swept", kind=kind, **facts)

    # --- queues -------------------------------------------------------------------------------------------------

    async def _sweep_queue(self, model: str) -> list[str]:
        request_ids = [raw.decode() for raw in await self._redis.zrange(keys.queue(model), 0, -1)]
        if not request_ids:
            return []
        async with self._redis.pipeline(transaction=False) as pipeline:
            for request_id in request_ids:
                pipeline.exists(keys.job(request_id))
            pipeline.mget([keys.in_progress(request_id) for request_id in request_ids])
            pipeline.mget([keys.listener(request_id) for request_id in request_ids])
            *have_body, leases, listeners = await pipeline.execute()
        for request_id, has_body in zip(request_ids, have_body, strict=True):
            if not has_body and self._in_queues.confirm(f"body:{request_id}"):
                await self._dispatcher.end_abandoned(request_id, model, EXPIRED)
                self._count("expired_requests", request_id=request_id, model=model)
        await self._release_dead({lease.decode() for lease in leases if lease}, model)
        heard = {r: value.decode() for r, value in zip(request_ids, listeners, strict=True) if value}
        await self._cancel_unheard(request_ids, heard, model)
        return request_ids

    async def _release_dead(self, owners: set[str], model: str) -> None:
        workers = [owner for owner in owners if not owner.startswith(CONTROL_OWNER)]
        if not workers:
            return
        reports = await self._redis.mget([keys.worker(worker_id) for worker_id in workers])
        for worker_id, report in zip(workers, reports, strict=True):
            if report is None and self._in_queues.confirm(f"lease:{worker_id}"):
                released = await release_worker(self._redis, model, worker_id)
                self._count("dead_leases", worker_id=worker_id, model=model, requests=released)

    async def _cancel_unheard(self, request_ids: list[str], heard: dict[str, str], model: str) -> None:
        gateways = sorted({listener.partition(keys.LISTENER_MARK)[0] for listener in heard.values()})
        async with self._redis.pipeline(transaction=False) as pipeline:
            for gateway_id in gateways:
                pipeline.sismember(keys.GATEWAYS, gateway_id)
                pipeline.exists(keys.gateway_alive(gateway_id))
            replies = await pipeline.execute()
        # Who never said that it is a gateway (a script that enqueues) is not held to be a dead one.
        dead = {g for g, known, alive in zip(gateways, replies[::2], replies[1::2], strict=True) if known and not alive}
        now_s = time.monotonic()
        for request_id in request_ids:
            listener = heard.get(request_id, "").partition(keys.LISTENER_MARK)[0]
            if not listener or listener in dead:  # none: the one that had resumed it went away
                since_s = self._unheard_since_s.setdefault(request_id, now_s)
                if now_s - since_s >= self._unheard_grace_s:
                    await self._dispatcher.cancel(request_id, model)
                    self._count("unheard_requests", request_id=request_id, model=model)
            else:
                self._unheard_since_s.pop(request_id, None)

    # --- keys ---------------------------------------------------------------------------------------------------

    async def _sweep_keys(self, found: list[str]) -> None:
        ours = [key for key in found if key.startswith(keys.SWEPT_PREFIXES) and not keys.has_owner(key)]
        if not ours:
            return
        async with self._redis.pipeline(transaction=False) as pipeline:
            for key in ours:
                pipeline.pttl(key)
            ttls = await pipeline.execute()
        for key, ttl_ms in zip(ours, ttls, strict=True):
            if ttl_ms == -1 and self._in_keys.confirm(f"ttl:{key}"):
                await self._give_ttl(key)
        prefix = keys.token_log("")
        await self._sweep_logs([key.removeprefix(prefix) for key in ours if key.startswith(prefix)])

    async def _give_ttl(self, key: str) -> None:
        if key.startswith(keys.TTL_PREFIXES):
            await self._redis.expire(key, keys.RECORD_TTL_S)
            self._count("keys_without_ttl", key=key)
        else:
            self._count("keys_without_owner", key=key)

    async def _sweep_logs(self, request_ids: list[str]) -> None:
        if not request_ids:
            return
        async with self._redis.pipeline(transaction=False) as pipeline:
            for request_id in request_ids:
                pipeline.exists(keys.job(request_id))  # before the log, as in the hub
                pipeline.lindex(keys.token_log(request_id), -1)
                pipeline.get(keys.listener(request_id))
            replies = await pipeline.execute()
        for request_id, has_job, last, listener in zip(
            request_ids, replies[::3], replies[1::3], replies[2::3], strict=True
        ):
            if has_job or last is None or codec.is_terminal(last) or not self._in_keys.confirm(f"log:{request_id}"):
                continue
            gateway_id = listener.decode().partition(keys.LISTENER_MARK)[0] if listener else ""
            if gateway_id and await self._redis.exists(keys.gateway_alive(gateway_id)):
                continue  # that one still has the request, and queues it again
            if await self._dispatcher.end_lost_log(request_id, gateway_id, LOST):
                self._count("logs_without_end", request_id=request_id)

    async def _sweep_sets(self) -> None:
        """Take out of their sets what no longer reports."""
        for name, key_of, kind in (
            (keys.NODES, keys.node, "gone_nodes"),
            (keys.WORKERS, keys.worker, "gone_workers"),
            (keys.GATEWAYS, keys.gateway_alive, "gone_gateways"),
        ):
            for raw in await self._redis.smembers(name):
                member = raw.decode()
                if await self._redis.exists(key_of(member)) or not self._in_keys.confirm(f"{kind}:{member}"):
                    continue
                if kind == "gone_gateways" and self._unheard_since_s:
                    continue  # it is still needed, to tell whose requests are unheard
                await self._redis.srem(name, member)
                if kind == "gone_nodes":
                    await self._redis.delete(keys.node_commands(member))
                self._counts[kind] += 1
