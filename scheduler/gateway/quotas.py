"""Quotas of tenants: requests and tokens a minute, calls at once; over all gateways, in Redis.

Windows are the sliding-window counters of the library ``limits``, on our own connection pool. Tokens are reserved when
a call is admitted (its prompt, estimated, and what it may generate, within bounds) and corrected when it has ended.
Calls at once are a sorted set of leases that this gateway renews, so that one which dies gives its calls back.
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from scheduler.contract import keys
from scheduler.gateway.errors import MAX_RETRY_AFTER_S, HttpError, redis_within
from scheduler.tenants import UNLIMITED, TenantPolicy

if TYPE_CHECKING:
    from limits import RateLimitItem
    from limits.aio.storage import RedisStorage
    from limits.aio.strategies import SlidingWindowCounterRateLimiter

WINDOW_S: Final = 60
WINDOW_RESOLUTION_S: Final = 0.001  # of the remaining time that Redis tells
MAX_RESERVED_COMPLETION_TOKENS: Final = 1024
CALL_LEASE_S: Final = 60.0
RENEW_EVERY_S: Final = 20.0
#: A limit that no window reaches: what has been used is counted even if that is more than was allowed.
NO_LIMIT: Final = 2**53

#: KEYS[1] the tenant's calls. ARGV: now, lease end, most calls, call id, TTL s. Returns 1, or 0 when it has enough.
_ENTER: Final = """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ARGV[1])
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[3]) then return 0 end
redis.call('ZADD', KEYS[1], ARGV[2], ARGV[4])
redis.call('EXPIRE', KEYS[1], ARGV[5])
return 1
"""

_log = structlog.get_logger()


@dataclass(slots=True)
class Grant:
    """What one call was allowed. Given back with :meth:`Quotas.settle`."""

    tenant: str
    call_id: str
    policy: TenantPolicy = UNLIMITED
    reserved_tokens: int = 0
    granted_mono_s: float = field(default_factory=time.monotonic)
    headers: dict[str, str] = field(default_factory=dict)
    holds_place: bool = False


class Quotas:
    """The limiter of one gateway process. Event loop only."""

    def __init__(self, redis: Redis, redis_limit_s: float) -> None:
        self._redis: Any = redis  # redis-py types each reply as sync-or-async
        self._redis_limit_s = redis_limit_s
        self._enter = redis.register_script(_ENTER)
        self._windows: _Windows | None = None
        self._places: dict[str, str] = {}  # call id -> tenant
        self._renewing: asyncio.Task[None] | None = None

    async def admit(self, tenant: str, policy: TenantPolicy, call_id: str, tokens: int) -> Grant:
        """Count a call that may use ``tokens``. An unlimited tenant costs no round trip.

        Raises:
            HttpError: 429 with OpenAI's headers: which quota, how much, when again. Nothing is held then.
            GlowplugError: Redis does not answer (503).
        """
        grant = Grant(tenant, call_id, policy)
        if not policy.has_quota:
            return grant
        async with redis_within(self._redis_limit_s, "counting against the quota"):
            if policy.requests_per_minute:
                await self._count(grant, "requests", policy.requests_per_minute, 1)
            if policy.concurrency:
                await self._take_place(grant)
            if policy.tokens_per_minute:
                grant.reserved_tokens = min(tokens, policy.tokens_per_minute)
                try:
                    await self._count(grant, "tokens", policy.tokens_per_minute, grant.reserved_tokens)
                except HttpError:
                    grant.reserved_tokens = 0
                    await self._leave_place(grant)
                    raise
        return grant

    async def settle(self, grant: Grant, used_tokens: int) -> None:
        """Give the place back and correct the tokens, at the end of the call. Never raises; for the background."""
        try:
            await self._leave_place(grant)
            correction = used_tokens - grant.reserved_tokens
            is_recent = time.monotonic() - grant.granted_mono_s < WINDOW_S  # else the reservation has slid away
            if grant.policy.tokens_per_minute and (correction > 0 or (correction < 0 and is_recent)):
                windows = self._ensure_windows()
                await windows.charge(windows.item("tokens", grant.policy.tokens_per_minute), grant.tenant, correction)
        except (RedisError, OSError) as error:  # errs on the side of the tenant's quota; the window slides on
            _log.warning("quota_not_settled", tenant=grant.tenant, error=str(error))

    async def aclose(self) -> None:
        """Stop renewing. Idempotent."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)
            self._renewing = None

    def ensure_ready(self) -> None:
        """Import the limiter (60 ms), so that no request pays for it."""
        self._ensure_windows()

    # --- windows ------------------------------------------------------------------------------------------------

    async def _count(self, grant: Grant, kind: str, limit: int, cost: int) -> None:
        windows = self._ensure_windows()
        item = windows.item(kind, limit)
        allowed = await windows.limiter.hit(item, quote(grant.tenant, safe=""), cost=cost)
        window = await windows.read(item, grant.tenant)
        wait_s = decide_wait_s(window, limit, cost)
        grant.headers[f"x-ratelimit-limit-{kind}"] = str(limit)
        grant.headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, limit - window.count))
        grant.headers[f"x-ratelimit-reset-{kind}"] = format_duration(decide_wait_s(window, limit, limit))
        if not allowed:
            message = (
                f"the quota of {limit} {kind} a minute is used up ({window.count} counted, {cost} more asked for): "
                f"try again in {math.ceil(wait_s)} s"
            )
            raise refuse(message, f"{kind}_quota_exceeded", wait_s, grant.headers)

    def _ensure_windows(self) -> _Windows:
        if self._windows is None:
            self._windows = _Windows(self._redis)
        return self._windows

    # --- calls at once ------------------------------------------------------------------------------------------

    async def _take_place(self, grant: Grant) -> None:
        now_s, limit = time.time(), grant.policy.concurrency
        entered = await self._enter(
            keys=[keys.tenant_running(grant.tenant)],
            args=[now_s, now_s + CALL_LEASE_S, limit, grant.call_id, math.ceil(CALL_LEASE_S)],
        )
        if not entered:
            message = f"{limit} calls of this tenant run or wait already, which is its limit: wait until one has ended"
            raise refuse(message, "concurrency_quota_exceeded", 1.0, grant.headers)
        grant.holds_place = True
        self._places[grant.call_id] = grant.tenant
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._renew_forever(), name="call leases")

    async def _leave_place(self, grant: Grant) -> None:
        if grant.holds_place:
            grant.holds_place = False
            self._places.pop(grant.call_id, None)
            await self._redis.zrem(keys.tenant_running(grant.tenant), grant.call_id)

    async def _renew_forever(self) -> None:
        while True:
            await asyncio.sleep(RENEW_EVERY_S)
            ends_s, lease_s = time.time() + CALL_LEASE_S, math.ceil(CALL_LEASE_S)
            try:
                async with self._redis.pipeline(transaction=False) as pipeline:
                    for call_id, tenant in self._places.items():
                        pipeline.zadd(keys.tenant_running(tenant), {call_id: ends_s}, xx=True)
                        pipeline.expire(keys.tenant_running(tenant), lease_s)
                    await pipeline.execute()
            except (RedisError, OSError) as error:
                _log.warning("call_leases_not_renewed", calls=len(self._places), error=str(error))


@dataclass(frozen=True, slots=True)
class Window:
    """A sliding-window counter as it is: the last window's count decays while the present one's grows."""

    previous: int
    previous_ends_in_s: float
    current: int
    current_ends_in_s: float

    @property
    def count(self) -> int:
        """What counts now."""
        return math.floor(self.previous * self.previous_ends_in_s / WINDOW_S) + self.current


def decide_wait_s(window: Window, limit: int, cost: int) -> float:
    """Seconds until ``cost`` fits under ``limit`` if nothing else comes; 0: now. ``cost`` must not exceed ``limit``."""
    room = limit - cost
    if window.count <= room:
        return 0.0
    # The count is rounded down, so it fits as soon as it is *below* one more than the room: a moment later than equal.
    if window.current <= room and window.previous:
        share_s = (room - window.current + 1) * WINDOW_S / window.previous
        return min(window.previous_ends_in_s, max(0.0, window.previous_ends_in_s - share_s) + WINDOW_RESOLUTION_S)
    # The present window must become the last one first, and then decay.
    decay_s = WINDOW_S * (1 - min(1.0, (room + 1) / max(1, window.current)))
    return max(0.0, window.current_ends_in_s) + min(WINDOW_S, decay_s + WINDOW_RESOLUTION_S)


def format_duration(seconds: float) -> str:
    """As OpenAI writes resets: ``1s``, ``6m0s``, ``20ms``."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    whole = math.ceil(seconds)
    return f"{whole // 60}m{whole % 60}s" if whole >= 60 else f"{whole}s"


def refuse(message: str, code: str, wait_s: float, headers: dict[str, str]) -> HttpError:
    """A 429 that says when to come back."""
    retry_after = max(1, min(MAX_RETRY_AFTER_S, math.ceil(wait_s)))
    told = {**headers, "Retry-After": str(retry_after), "x-should-retry": "true"}
    return HttpError(429, message, code=code, openai_type="rate_limit_error", headers=told)


class _Windows:
    """The library's limiter and storage, on our connection pool."""

    def __init__(self, redis: Any) -> None:
        from limits import RateLimitItemPerMinute
        from limits.aio.storage import RedisStorage
        from limits.aio.strategies import SlidingWindowCounterRateLimiter

        # The URI names no server that is ever used: with a pool given, the storage makes no connection of its own.
        self._storage: RedisStorage = RedisStorage(
            "async+redis://", implementation="redispy", key_prefix=keys.LIMITS, connection_pool=redis.connection_pool
        )
        self.limiter: SlidingWindowCounterRateLimiter = SlidingWindowCounterRateLimiter(self._storage)
        self._item_class = RateLimitItemPerMinute

    def item(self, kind: str, limit: int) -> RateLimitItem:
        return self._item_class(limit, namespace=kind)

    async def read(self, item: RateLimitItem, tenant: str) -> Window:
        key = item.key_for(quote(tenant, safe=""))
        previous, previous_s, current, current_s = await self._storage.get_sliding_window(key, item.get_expiry())
        return Window(previous, previous_s, current, current_s)

    async def charge(self, item: RateLimitItem, tenant: str, amount: int) -> None:
        """Count ``amount`` whatever the limit; negative: give back."""
        key = item.key_for(quote(tenant, safe=""))
        await self._storage.acquire_sliding_window_entry(key, NO_LIMIT, item.get_expiry(), amount)
