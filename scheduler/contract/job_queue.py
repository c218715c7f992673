"""The queue's Lua scripts: what gateway, scheduler, agent and worker must agree on about a job's life.

One queue per model, in arq's data layout: a sorted set of job ids that holds queued *and* running jobs, the body in
:func:`keys.job`, and "running" as the key :func:`keys.in_progress`. Unlike stock arq, that key holds the owner's id
and is a short lease that its owner renews; every later change by a run is refused once another one owns it.

========= ================================================== =========================
script    requires                                           on success
========= ================================================== =========================
ENQUEUE   id unknown, queue shorter than its limit           queued, demand announced
CLAIM     in the queue, no lease                             leased to the caller
RENEW     leased to the caller, or no lease and in the queue lease runs on
FINISH    leased to the caller, or no lease                  gone, or back in the queue
RELEASE   leased to the named worker                         claimable at once
CANCEL    the caller listens, or nobody is asked for         flagged; gone if not running
RECOVER   no job, no end in the log                          queued again, demand announced
========= ================================================== =========================
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from redis.asyncio import Redis

from scheduler.contract import codec, keys
from scheduler.contract.errors import ContractError
from scheduler.contract.messages import GenerateRequest

ACCEPTED: Final = 1
DUPLICATE: Final = 0
FULL: Final = -1

#: Scores are virtual start tags (start-time fair queueing), not times: those of batch jobs begin here, far behind any
#: interactive one (a thousand million requests of one busy period), and before every wall-clock "due before".
BATCH_SCORE: Final = 10**12

#: What RECOVER found.
REQUEUED: Final = 1
STILL_HELD: Final = 0  # the job is there: nothing was lost
ENDED: Final = -1  # the log has its terminal frame
EXPIRED: Final = -2  # in the queue, but its body has run out: it waited too long
GIVEN_UP: Final = -3  # cancelled before it ran

_FAIR: Final = keys.fair("").removeprefix(keys.queue(""))
_RING: Final = "redis.call('XADD', {bell}, 'MAXLEN', '1', '*', 'r', '1')"

_PUT: Final = f"""
redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[2])
if redis.call('ZCARD', KEYS[3]) == 0 then redis.call('DEL', KEYS[6]) end
local ends = ARGV[4] .. ':' .. ARGV[8]
local tags = redis.call('HMGET', KEYS[6], ARGV[4], ends)
local tag = math.max(tonumber(ARGV[4]), tonumber(tags[1] or 0), tonumber(tags[2] or 0))
redis.call('ZADD', KEYS[3], string.format('%.0f', tag), ARGV[5])
redis.call('HSET', KEYS[6], ends, string.format('%.0f', tag + ARGV[9]))
redis.call('PEXPIRE', KEYS[6], ARGV[2])
redis.call('SET', KEYS[7], ARGV[10], 'EX', {keys.RECORD_TTL_S})
if ARGV[11] ~= '' then redis.call('SET', KEYS[8], ARGV[11], 'EX', {keys.RECORD_TTL_S}) end
{_RING.format(bell="KEYS[4]")}
redis.call('XADD', KEYS[5], 'MAXLEN', '~', ARGV[7], '*', '{keys.FIELD}', ARGV[6])
"""

#: KEYS: job, result, queue, bell, inbox, fair, listener, record.
#: ARGV: most jobs allowed in the queue, TTL ms, body, first score of its class, request id, demand, most inbox entries,
#: tenant, cost (whole, already divided by the tenant's weight), gateway id, record or empty.
#: The score is max(virtual time of the class, end of the tenant's last request): a tenant that floods the queue stands
#: behind its own requests, one that comes now and then stands at the head. Source: Goyal, Vin, Cheng, "Start-time Fair
#: Queuing", SIGCOMM 1996; virtual time is the tag claimed last, and an empty queue begins anew.
#: Returns (ACCEPTED | DUPLICATE | FULL, queue length before). The same body again is the same call, retried after a
#: lost reply: accepted, whether it still waits or has already finished.
ENQUEUE: Final = f"""
local depth = redis.call('ZCARD', KEYS[3])
local known = redis.call('GET', KEYS[1])
if known == ARGV[3] then return {{{ACCEPTED}, depth}} end
local finished = redis.call('GET', KEYS[2])
if finished == redis.sha1hex(ARGV[3]) then return {{{ACCEPTED}, depth}} end
if known or finished then return {{{DUPLICATE}, depth}} end
if depth >= tonumber(ARGV[1]) then return {{{FULL}, depth}} end
{_PUT}
return {{{ACCEPTED}, depth}}
"""

#: KEYS as of ENQUEUE, then the log and the flag of a cancelled request. ARGV as of ENQUEUE; an accepted request is
#: never refused for the queue's length. Requires: what the client has seen is back in the log.
RECOVER: Final = f"""
local last = redis.call('LINDEX', KEYS[9], -1)
if last and string.byte(last) == {codec.TERMINAL_KIND[0]} then return {ENDED} end
if redis.call('EXISTS', KEYS[1]) == 1 then return {STILL_HELD} end
if redis.call('ZSCORE', KEYS[3], ARGV[5]) then return {EXPIRED} end
if redis.call('EXISTS', KEYS[10]) == 1 then return {GIVEN_UP} end
{_PUT}
return {REQUEUED}
"""

#: A request under which this many workers have died runs alone among its kind: if it is what kills them, no other
#: suspect dies with it again, and an innocent one gets through. At MAX_CRASHES it is parked with an error.
SUSPECT_CRASHES: Final = 2
MAX_CRASHES: Final = 5

#: KEYS[1] queue. ARGV: due before (ms), room, lease ms, owner, most ids looked at, '1' if the owner runs a suspect.
#: Returns flat (request id, score, crashes). The limit must exceed all jobs that can run on the queue: running ones
#: stay in it.
CLAIM: Final = f"""
local claimed, room, has_suspect = {{}}, tonumber(ARGV[2]), ARGV[6] == '1'
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[1], 'WITHSCORES', 'LIMIT', 0, ARGV[5])
for i = 1, #due, 2 do
  if room <= 0 then break end
  local lease = '{keys.in_progress("")}' .. due[i]
  local crashes = 0
  local is_free = redis.call('SET', lease, ARGV[4], 'NX', 'PX', ARGV[3])
  if is_free then crashes = tonumber(redis.call('GET', '{keys.crashes("")}' .. due[i]) or '0') end
  if is_free and crashes >= {SUSPECT_CRASHES} and has_suspect then
    redis.call('DEL', lease)
  elseif is_free then
    has_suspect = has_suspect or crashes >= {SUSPECT_CRASHES}
    claimed[#claimed + 1] = due[i]
    claimed[#claimed + 1] = due[i + 1]
    claimed[#claimed + 1] = crashes
    room = room - 1
    local class = tonumber(due[i + 1]) < {BATCH_SCORE} and '0' or '{BATCH_SCORE}'
    redis.call('HSET', KEYS[1] .. '{_FAIR}', class, due[i + 1])
    redis.call('PEXPIRE', KEYS[1] .. '{_FAIR}', {keys.REQUEST_TTL_S * 1000})
  end
end
return claimed
"""

#: KEYS[1] queue. ARGV: lease ms, owner, job TTL ms, then request ids.
#: Returns the ids that somebody else runs now. A lease that ran out (Redis was away) is taken again if still free.
RENEW: Final = f"""
local lost = {{}}
for i = 4, #ARGV do
  local lease = '{keys.in_progress("")}' .. ARGV[i]
  local owner = redis.call('GET', lease)
  if owner == ARGV[2] then
    redis.call('PEXPIRE', lease, ARGV[1])
  elseif owner or not redis.call('ZSCORE', KEYS[1], ARGV[i]) then
    lost[#lost + 1] = ARGV[i]
  else
    redis.call('SET', lease, ARGV[2], 'PX', ARGV[1])
  end
  redis.call('PEXPIRE', '{keys.job("")}' .. ARGV[i], ARGV[3])
  redis.call('EXPIRE', '{keys.listener("")}' .. ARGV[i], {keys.RECORD_TTL_S})
  redis.call('EXPIRE', '{keys.record("")}' .. ARGV[i], {keys.RECORD_TTL_S})
end
return lost
"""

#: KEYS: in-progress, result, retry, job, queue, bell. ARGV: owner, request id, '1' finished | '0' again, result TTL s.
#: Returns 1, or 0 when another run owns the job: then nothing is changed. Deletes first: a server that is out of
#: memory refuses a script's first write if it could grow, but not what follows a write.
FINISH: Final = f"""
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
if ARGV[3] == '1' then
  local body = redis.call('GET', KEYS[4])
  redis.call('ZREM', KEYS[5], ARGV[2])
  redis.call('DEL', KEYS[3], KEYS[4], '{keys.listener("")}' .. ARGV[2], '{keys.crashes("")}' .. ARGV[2])
  redis.call('EXPIRE', '{keys.record("")}' .. ARGV[2], {keys.LOG_TTL_S})
  if body then redis.call('SET', KEYS[2], redis.sha1hex(body), 'EX', ARGV[4]) end
else
  {_RING.format(bell="KEYS[6]")}
end
return 1
"""

#: KEYS: queue, bell. ARGV: owner, '1' if it died while it ran them. Returns how many jobs it held.
RELEASE: Final = f"""
local released = 0
for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  local lease = '{keys.in_progress("")}' .. id
  if redis.call('GET', lease) == ARGV[1] then
    redis.call('DEL', lease)
    if ARGV[2] == '1' then
      redis.call('INCR', '{keys.crashes("")}' .. id)
      redis.call('EXPIRE', '{keys.crashes("")}' .. id, {keys.REQUEST_TTL_S})
    end
    released = released + 1
  end
end
if released > 0 then {_RING.format(bell="KEYS[2]")} end
return released
"""

#: KEYS: cancelled, in-progress, queue, job, retry, listener. ARGV: request id, flag TTL s, control channel, and the
#: gateway whose client went away, or empty: its word does not count once another gateway listens.
#: Returns 1 when it had not started and is gone, 0 when a run (if any) was told, -1 when another one listens.
CANCEL: Final = """
if ARGV[4] ~= '' then
  local listener = redis.call('GET', KEYS[6])
  if listener and listener ~= ARGV[4] then return -1 end
end
redis.call('SET', KEYS[1], '1', 'EX', ARGV[2])
if redis.call('EXISTS', KEYS[2]) == 0 and redis.call('ZREM', KEYS[3], ARGV[1]) == 1 then
  redis.call('DEL', KEYS[4], KEYS[5], KEYS[6])
  return 1
end
redis.call('PUBLISH', ARGV[3], ARGV[1])
return 0
"""


def encode_job(request: GenerateRequest, enqueued_at_ms: int) -> bytes:
    """A job body in arq's layout: the request is one opaque MessagePack argument."""
    return codec.encode(
        {"t": None, "f": keys.JOB_FUNCTION, "a": [codec.encode(request)], "k": {}, "et": enqueued_at_ms}
    )


def decode_job(body: bytes) -> GenerateRequest:
    """The request in a job body.

    Raises:
        ContractError: not a body that :func:`encode_job` wrote.
    """
    try:
        job: Any = msgspec.msgpack.decode(body)
        payload = job["a"][0]
    except (msgspec.MsgspecError, UnicodeDecodeError, TypeError, LookupError) as error:
        raise ContractError(f"not a job body: {error}") from error
    return codec.decode(payload, GenerateRequest)


async def release_worker(redis: Redis, model: str, worker_id: str, *, crashed: bool = False) -> int:
    """Make the requests of a worker that has exited claimable at once; returns how many it held.

    ``crashed``: it died by itself, perhaps of one of them. Requires: the process is gone (its parent saw it exit), or
    is taken for dead; what it may still write is fenced off by the next run.

    Raises:
        RedisError: the server could not be reached.
    """
    release = redis.register_script(RELEASE)
    return int(await release(keys=[keys.queue(model), keys.bell(model)], args=[worker_id, int(crashed)]))
