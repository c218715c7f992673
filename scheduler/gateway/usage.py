"""Usage records: what each tenant, key and model used, by UTC day, as counters in Redis.

Counted in memory and written once a second, so that a request pays nothing for it; a gateway that is killed loses at
most that second. Rows are as many as tenants, keys and models that were used, and a day's rows end with their TTL.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

import msgspec
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from scheduler.contract import keys
from scheduler.contract.messages import Usage
from scheduler.gateway.identity import Identity

FLUSH_EVERY_S: Final = 1.0
MAX_DAYS: Final = 40
DAY_S: Final = 86_400
KINDS: Final = ("requests", "errors", "prompt_tokens", "completion_tokens")

_log = structlog.get_logger()


class UsageRow(msgspec.Struct):
    """One line of the table."""

    day: str
    tenant: str
    key_id: str
    model: str
    requests: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class UsageRecorder:
    """Counts of one gateway process on their way to Redis. Event loop only."""

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # redis-py types each reply as sync-or-async
        self._counts: Counter[tuple[str, bytes]] = Counter()  # (day, field) -> what is not written yet
        self._used_at_s: dict[str, int] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._flushing: asyncio.Task[None] | None = None

    def add(self, identity: Identity, model: str, usages: Iterable[Usage], *, failed: bool) -> None:
        """Count a call that has ended. Returns at once."""
        now_s = time.time()
        day = format_day(now_s)
        found = list(usages)
        counted = {
            "requests": 1,
            "errors": int(failed),
            "prompt_tokens": sum(usage.prompt_tokens for usage in found),
            "completion_tokens": sum(usage.completion_tokens for usage in found),
        }
        for kind, count in counted.items():
            if count:
                self._counts[day, encode_field(identity.tenant, identity.key_id, model, kind)] += count
        if identity.key_id:
            self._used_at_s[identity.key_id] = int(now_s)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_EVERY_S, self._on_timer)

    async def flush(self) -> None:
        """Write what has been counted; what cannot be written is kept for the next time."""
        counts, used_at_s = self._counts, self._used_at_s
        self._counts, self._used_at_s = Counter(), {}
        if not counts and not used_at_s:
            return
        try:
            async with self._redis.pipeline(transaction=True) as pipeline:  # all or nothing: nothing is counted twice
                for (day, field), count in counts.items():
                    pipeline.hincrby(keys.usage(day), field, count)
                for day in {day for day, _ in counts}:
                    pipeline.expire(keys.usage(day), keys.USAGE_TTL_S)
                if used_at_s:
                    pipeline.hset(keys.KEYS_USED, mapping=used_at_s)
                await pipeline.execute()
        except (RedisError, OSError) as error:
            _log.warning("usage_not_written", rows=len(counts), error=str(error))
            self._counts.update(counts)
            self._used_at_s = {**used_at_s, **self._used_at_s}

    async def read(self, num_days: int) -> list[UsageRow]:
        """The rows of the last ``num_days`` days, today included, newest day first.

        Raises:
            RedisError: the server could not be reached.
        """
        now_s = time.time()
        days = [format_day(now_s - i * DAY_S) for i in range(min(num_days, MAX_DAYS))]
        async with self._redis.pipeline(transaction=False) as pipeline:
            for day in days:
                pipeline.hgetall(keys.usage(day))
            found = await pipeline.execute()
        rows: dict[tuple[str, str, str, str], UsageRow] = {}
        for day, fields in zip(days, found, strict=True):
            for field, count in fields.items():
                tenant, key_id, model, kind = msgspec.json.decode(field, type=tuple[str, str, str, str])
                row = rows.setdefault((day, tenant, key_id, model), UsageRow(day, tenant, key_id, model))
                if kind in KINDS:
                    setattr(row, kind, int(count))
        return [rows[name] for name in sorted(rows, key=lambda name: (days.index(name[0]), *name[1:]))]

    async def aclose(self) -> None:
        """Write the rest. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._flushing is not None:
            await asyncio.gather(self._flushing, return_exceptions=True)
        await self.flush()

    def _on_timer(self) -> None:
        self._timer = None
        self._flushing = asyncio.create_task(self.flush(), name="usage")


def encode_field(tenant: str, key_id: str, model: str, kind: str) -> bytes:
    """Name of one counter inside a day's hash: JSON, so that no name can run into the next."""
    return msgspec.json.encode((tenant, key_id, model, kind))


def format_day(at_s: float) -> str:
    """UTC day."""
    return time.strftime("%Y-%m-%d", time.gmtime(at_s))
