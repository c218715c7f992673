"""Batches as Redis keeps them: one record each, changed only by the run that holds its lease.

============ ============================================== =====================================================
status       to                                             when
============ ============================================== =====================================================
validating   in_progress                                    every line has the right form
validating   failed                                         a line has not; ``errors`` says which and why
in_progress  finalizing                                     every line has been answered
in_progress  cancelling, then cancelled                     somebody asked; what was answered is kept
in_progress  expired                                        the completion window is over; likewise
finalizing   completed                                      the output files are whole
============ ============================================== =====================================================

A lease names the gateway that runs a batch and a run number that only grows. Whoever lost it can change nothing, and
writes its answers to a file that no later run reads as its own (see batch_results).
"""

from __future__ import annotations

import secrets
from typing import Any, Final

import msgspec
from redis.asyncio import Redis

from scheduler.contract import codec, keys
from scheduler.contract.errors import ContractError

BATCH_PREFIX: Final = "batch_"
ID_BYTES: Final = 16
LEASE_MS: Final = 10_000
RENEW_EVERY_S: Final = 2.5
MAX_LISTED: Final = 10_000  # batches of a tenant that are remembered

VALIDATING: Final = "validating"
IN_PROGRESS: Final = "in_progress"
FINALIZING: Final = "finalizing"
CANCELLING: Final = "cancelling"
COMPLETED, FAILED, EXPIRED, CANCELLED = "completed", "failed", "expired", "cancelled"
ENDED: Final = frozenset({COMPLETED, FAILED, EXPIRED, CANCELLED})


class LineError(msgspec.Struct, frozen=True):
    """What is wrong with a line of an input file. ``line`` counts from 1; None: with the file as a whole."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """A batch. ``reached_at`` holds when it came to each status. ``waits_for`` says why nothing of it runs now."""

    id: str
    tenant: str
    key_id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    output_file_id: str  # chosen at the beginning, told when the file is there
    error_file_id: str
    status: str = VALIDATING
    model: str = ""
    metadata: dict[str, str] | None = None
    reached_at: dict[str, int] = {}
    total: int = 0
    completed: int = 0
    failed: int = 0
    errors: tuple[LineError, ...] = ()
    waits_for: str = ""
    run_window: str = ""  # local times of day, HH:MM-HH:MM, in which lines are begun; empty: as the model's policy says
    in_flight: int = 0  # lines that are queued or running, as last told
    is_promoted: bool = False  # it has waited too long: its lines take the order of interactive requests


class BatchesFull(Exception):
    """As many batches are under way as may be; the message says whose."""


#: KEYS: record, active, the tenant's list. ARGV: id, tenant, record, created at, TTL s, limits: all, tenant, listed.
_CREATE: Final = """
if redis.call('HLEN', KEYS[2]) >= tonumber(ARGV[6]) then return 0 end
local own = 0
for _, tenant in ipairs(redis.call('HVALS', KEYS[2])) do if tenant == ARGV[2] then own = own + 1 end end
if own >= tonumber(ARGV[7]) then return -1 end
redis.call('SET', KEYS[1], ARGV[3], 'EX', ARGV[5])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[3], ARGV[4], ARGV[1])
redis.call('ZREMRANGEBYRANK', KEYS[3], 0, -1 - tonumber(ARGV[8]))
redis.call('EXPIRE', KEYS[3], ARGV[5])
return 1
"""
#: KEYS: lease, run number, record, active. ARGV: owner, lease ms, id. Returns the number of this run, 0: not free.
_ACQUIRE: Final = """
if redis.call('EXISTS', KEYS[3]) == 0 then redis.call('HDEL', KEYS[4], ARGV[3]) return 0 end
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
local run = redis.call('INCR', KEYS[2])
redis.call('SET', KEYS[1], ARGV[1] .. ':' .. run, 'PX', ARGV[2])
return run
"""
#: KEYS: lease. ARGV: owner:run, lease ms.
_RENEW: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return 0
"""
#: KEYS: lease, record, active, cancel flag. ARGV: owner:run, record, TTL s, id, '1' if it has ended.
_UPDATE: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[2], ARGV[2], 'EX', ARGV[3])
if ARGV[5] == '1' then
  redis.call('HDEL', KEYS[3], ARGV[4])
  redis.call('DEL', KEYS[1], KEYS[4])
end
return 1
"""
#: KEYS: lease. ARGV: owner:run.
_RELEASE: Final = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""


def create_batch_id() -> str:
    """A new id that nobody can guess."""
    return f"{BATCH_PREFIX}{secrets.token_hex(ID_BYTES)}"


def is_batch_id(text: str) -> bool:
    """Whether ``text`` has the form of a batch id (so that it may go into a key or a path)."""
    digits = text.removeprefix(BATCH_PREFIX)
    return len(digits) == 2 * ID_BYTES == len(text) - len(BATCH_PREFIX) and all(d in "0123456789abcdef" for d in digits)


class BatchRecords:
    """The records of all tenants. Event loop only; every method raises RedisError when the server is away."""

    def __init__(self, redis: Redis, owner: str, *, max_active: int, max_active_of_tenant: int) -> None:
        """At most so many batches that have not ended are accepted, of all tenants and of one."""
        self._redis: Any = redis  # redis-py types each reply as sync-or-async
        self._owner = owner
        self._max_active = max_active
        self._max_active_of_tenant = max_active_of_tenant
        self._create = redis.register_script(_CREATE)
        self._acquire = redis.register_script(_ACQUIRE)
        self._renew = redis.register_script(_RENEW)
        self._update = redis.register_script(_UPDATE)
        self._release = redis.register_script(_RELEASE)

    async def create(self, record: BatchRecord) -> None:
        """Keep a new batch.

        Raises:
            BatchesFull: too many are under way.
        """
        outcome = await self._create(
            keys=[keys.batch(record.id), keys.BATCHES, keys.tenant_batches(record.tenant)],
            args=[
                record.id,
                record.tenant,
                codec.encode(record),
                record.created_at,
                keys.BATCH_TTL_S,
                self._max_active,
                self._max_active_of_tenant,
                MAX_LISTED,
            ],
        )
        if outcome != 1:
            limit = self._max_active if outcome == 0 else self._max_active_of_tenant
            whose = "the server" if outcome == 0 else "this tenant"
            raise BatchesFull(f"{whose} has {limit} batches under way, which is the limit: wait until one has ended")

    async def find(self, batch_id: str) -> BatchRecord | None:
        """The batch as clients see it (one that is being cancelled says so); None when there is none."""
        found = await self.find_all([batch_id])
        return found[0] if found else None

    async def find_all(self, batch_ids: list[str]) -> list[BatchRecord]:
        """Those of ``batch_ids`` that exist, in their order."""
        if not batch_ids:
            return []
        bodies = await self._redis.mget([keys.batch(batch_id) for batch_id in batch_ids])
        flags = await self._redis.mget([keys.batch_cancelled(batch_id) for batch_id in batch_ids])
        found = []
        for body, flag in zip(bodies, flags, strict=True):
            if body is None:
                continue
            try:
                record: BatchRecord = codec.decode(body, BatchRecord)
            except ContractError:  # written by another version: as good as gone
                continue
            if flag is not None and record.status not in ENDED:
                reached_at = {**record.reached_at, CANCELLING: int(flag)}
                record = msgspec.structs.replace(record, status=CANCELLING, reached_at=reached_at)
            found.append(record)
        return found

    async def list_ids(self, tenant: str, after: str | None, limit: int) -> list[str]:
        """At most ``limit`` ids of the tenant's batches after ``after``, newest first."""
        name, begin = keys.tenant_batches(tenant), 0
        if after is not None:
            rank = await self._redis.zrevrank(name, after)
            if rank is None:
                return []
            begin = rank + 1
        return [raw.decode() for raw in await self._redis.zrevrange(name, begin, begin + limit - 1)]

    async def ask_cancel(self, batch_id: str, now_s: int) -> None:
        """Have whoever runs the batch cancel it. Idempotent: the first time counts."""
        await self._redis.set(keys.batch_cancelled(batch_id), str(now_s), ex=keys.BATCH_TTL_S, nx=True)

    async def is_cancelled(self, batch_id: str) -> bool:
        return bool(await self._redis.exists(keys.batch_cancelled(batch_id)))

    async def list_active(self) -> list[str]:
        """Ids of the batches that have not ended."""
        return [raw.decode() for raw in await self._redis.hkeys(keys.BATCHES)]

    # --- the run that holds the lease -----------------------------------------------------------------------------

    async def try_acquire(self, batch_id: str) -> int:
        """Take the lease if nobody has it: the number of this run, or 0."""
        run = await self._acquire(
            keys=[keys.batch_lease(batch_id), keys.BATCH_RUNS, keys.batch(batch_id), keys.BATCHES],
            args=[self._owner, LEASE_MS, batch_id],
        )
        return int(run)

    async def renew(self, batch_id: str, run: int) -> bool:
        """Prolong the lease; False: it is lost."""
        return bool(await self._renew(keys=[keys.batch_lease(batch_id)], args=[f"{self._owner}:{run}", LEASE_MS]))

    async def update(self, record: BatchRecord, run: int) -> bool:
        """Keep ``record``; False, and nothing is changed, when the lease is lost."""
        has_ended = record.status in ENDED
        kept = await self._update(
            keys=[
                keys.batch_lease(record.id),
                keys.batch(record.id),
                keys.BATCHES,
                keys.batch_cancelled(record.id),
            ],
            args=[f"{self._owner}:{run}", codec.encode(record), keys.BATCH_TTL_S, record.id, "1" if has_ended else "0"],
        )
        return bool(kept)

    async def release(self, batch_id: str, run: int) -> None:
        """Let another gateway go on at once."""
        await self._release(keys=[keys.batch_lease(batch_id)], args=[f"{self._owner}:{run}"])
