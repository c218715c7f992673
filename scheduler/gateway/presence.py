"""A gateway's sign of life, by which the sweeper tells requests whose client may be heard from those nobody hears."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from scheduler.contract import keys

BEAT_EVERY_S: Final = 1.0
LAST_BEAT_LIMIT_S: Final = 1.0


class Presence:
    """Beats while started. Event loop only; a Redis that is away is waited for."""

    def __init__(self, redis: Redis, gateway_id: str) -> None:
        self._redis: Any = redis  # redis-py types each reply as sync-or-async
        self._gateway_id = gateway_id
        self._task: asyncio.Task[None] | None = None
        self._log = structlog.get_logger()

    def start(self) -> None:
        """Begin to beat."""
        self._task = asyncio.create_task(self._beat_forever(), name="presence")

    async def aclose(self) -> None:
        """Say that this gateway is gone, so that what it leaves is looked after at once. Idempotent."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None
        try:
            async with asyncio.timeout(LAST_BEAT_LIMIT_S):
                await self._redis.delete(keys.gateway_alive(self._gateway_id))
        except (RedisError, OSError, TimeoutError) as error:
            self._log.warning("gateway_not_unregistered", error=str(error), remedy="its sign of life expires by itself")

    async def _beat_forever(self) -> None:
        while True:
            try:
                async with self._redis.pipeline(transaction=False) as pipeline:
                    pipeline.sadd(keys.GATEWAYS, self._gateway_id)
                    pipeline.set(keys.gateway_alive(self._gateway_id), b"1", ex=keys.GATEWAY_TTL_S)
                    await pipeline.execute()
            except (RedisError, OSError) as error:
                self._log.warning("redis_unreachable", doing="sign of life", error=str(error))
            await asyncio.sleep(BEAT_EVERY_S)
