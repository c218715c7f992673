"""Leadership among schedulers: a lease in Redis and a fencing token that only grows."""

from __future__ import annotations

from typing import Any, Final

import structlog
from redis.asyncio import Redis

from scheduler.contract import keys

LEASE_S: Final = 2.0
RENEW_EVERY_S: Final = 0.5

#: The token grows by one, but is at least the server's clock in milliseconds: a server that lost its data must not
#: begin again at one, which agents that saw more would take for a deposed leader.
_ACQUIRE: Final = """
if not redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return 0 end
local now = redis.call('TIME')
local now_ms = now[1] * 1000 + math.floor(now[2] / 1000)
local token = math.max(tonumber(redis.call('GET', KEYS[2]) or '0') + 1, now_ms)
redis.call('SET', KEYS[2], string.format('%.0f', token))
return token
"""
_RENEW: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return 0
"""
_RELEASE: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""


class Leadership:
    """One scheduler's claim to lead. ``fencing_token`` is 0 while it does not lead.

    Agents refuse orders with a token older than the newest they saw, so a leader that slept through the end of its
    lease can order nothing. Runs on the event loop; every method is one round trip.
    """

    def __init__(self, redis: Redis, scheduler_id: str) -> None:
        self._scheduler_id = scheduler_id
        self._acquire: Any = redis.register_script(_ACQUIRE)
        self._renew: Any = redis.register_script(_RENEW)
        self._release: Any = redis.register_script(_RELEASE)
        self._log = structlog.get_logger(scheduler=scheduler_id)
        self.fencing_token = 0

    @property
    def is_leader(self) -> bool:
        return self.fencing_token > 0

    async def try_acquire(self) -> bool:
        """Take the lease if nobody holds it."""
        token = await self._acquire(
            keys=[keys.LEADER, keys.LEADER_TOKEN], args=[self._scheduler_id, int(LEASE_S * 1000)]
        )
        self.fencing_token = int(token)
        if self.is_leader:
            self._log.info("leading", fencing_token=self.fencing_token)
        return self.is_leader

    async def renew(self) -> bool:
        """Prolong the lease; False (and no longer leader) if another took it or it ran out."""
        kept = await self._renew(keys=[keys.LEADER], args=[self._scheduler_id, int(LEASE_S * 1000)])
        if not kept:
            self._log.warning("leadership_lost", fencing_token=self.fencing_token)
            self.fencing_token = 0
        return self.is_leader

    async def release(self) -> None:
        """Give the lease up at once, so that a standby need not wait. Idempotent."""
        if self.is_leader:
            self.fencing_token = 0
            await self._release(keys=[keys.LEADER], args=[self._scheduler_id])
