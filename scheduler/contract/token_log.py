"""The fenced token log: how frames are written, published, read back and repaired.

``log:<rid>`` is a list whose element *i* is frame *i*. A run first takes the fence with its attempt number;
a script call appends frames only while the fence is its own and the sequence number is the next one, then
publishes the whole step once. Published is therefore always a subset of logged, and a stale run can write nothing.

A message on a gateway's channel is a MessagePack list of :data:`TokenItem`. An item whose sequence number is
:data:`LOOK_AT_LOG` carries no frame: it tells the gateway that the log holds more than was published.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
from redis.asyncio import Redis

from scheduler.contract import codec, keys
from scheduler.contract.errors import ContractError
from scheduler.contract.messages import TerminalFrame

#: Attempt number of a terminal frame written by the control side (no worker will ever run this request).
CONTROL_ATTEMPT: Final = 2**31

#: Sequence number no log reaches: a gateway sees a jump and reads the log.
LOOK_AT_LOG: Final = 2**31

#: Reasons why a frame was not appended, in place of the log's length.
FENCED: Final = -1  # another attempt holds the fence
FENCE_LOST: Final = -2  # nobody holds it: the server came back without it

#: Request id, sequence number, frame.
TokenItem = tuple[str, int, bytes]

_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(list[TokenItem])

#: KEYS[1] gateway channel. ARGV: message, heads of its items (:func:`encode_heads`), log TTL s, fence TTL s, frames.
#: Returns flat (request id, n): n = FENCED, FENCE_LOST, or the log's present length. Empty: all appended and published.
#: Runs for every token: one call asks for all fences, and a frame is pushed before it is known to be the next one.
APPEND_STEP: Final = f"""
local heads = cmsgpack.unpack(ARGV[2])
local fences, refused = {{}}, {{}}
local function refuse(rid, n)
  refused[#refused + 1] = rid
  refused[#refused + 1] = n
end
for i, head in ipairs(heads) do fences[i] = '{keys.fence("")}' .. head[1] end
local held = redis.call('MGET', unpack(fences))
for i, head in ipairs(heads) do
  local rid, attempt, seq, frame = head[1], head[2], head[3], ARGV[i + 4]
  if not held[i] then
    refuse(rid, {FENCE_LOST})
  elseif tonumber(held[i]) ~= attempt then
    refuse(rid, {FENCED})
  else
    local log = '{keys.token_log("")}' .. rid
    local n = redis.call('RPUSH', log, frame) - 1
    if n ~= seq then
      redis.call('RPOP', log)
      refuse(rid, n)
    else
      local is_end = string.byte(frame) == {codec.TERMINAL_KIND[0]}
      if seq % 64 == 0 or is_end then
        redis.call('EXPIRE', log, ARGV[3])
        redis.call('EXPIRE', fences[i], ARGV[is_end and 3 or 4])
      end
    end
  end
end
if #refused == 0 then redis.call('PUBLISH', KEYS[1], ARGV[1]) end
return refused
"""

#: KEYS: log, fence, cancelled. ARGV: attempt, log TTL s, fence TTL s.
#: Returns false when a newer attempt holds the fence, else (cancelled flag, frames...).
TAKE_FENCE: Final = """
local held = tonumber(redis.call('GET', KEYS[2]) or '0')
if held > tonumber(ARGV[1]) then return false end
redis.call('SET', KEYS[2], ARGV[1], 'EX', ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[2])
local out = redis.call('LRANGE', KEYS[1], 0, -1)
table.insert(out, 1, tostring(redis.call('EXISTS', KEYS[3])))
return out
"""

#: KEYS[1] log. ARGV: index of the first frame given, TTL s, frames. Appends only what is missing; returns the length.
#: For gateways, which give back what a client has already seen; a run repairs with REPAIR_RUN.
REPAIR_TAIL: Final = """
local n, start = redis.call('LLEN', KEYS[1]), tonumber(ARGV[1])
if n < start then return n end
for i = 3 + n - start, #ARGV do redis.call('RPUSH', KEYS[1], ARGV[i]) end
redis.call('EXPIRE', KEYS[1], ARGV[2])
return redis.call('LLEN', KEYS[1])
"""

#: KEYS: log, fence. ARGV: attempt, log TTL s, fence TTL s, all frames of the run from index 0.
#: Takes the fence if nobody holds it, appends what is missing; returns the length, or FENCED.
REPAIR_RUN: Final = f"""
local held = redis.call('GET', KEYS[2])
if held and held ~= ARGV[1] then return {FENCED} end
redis.call('SET', KEYS[2], ARGV[1], 'EX', ARGV[3])
for i = 4 + redis.call('LLEN', KEYS[1]), #ARGV do redis.call('RPUSH', KEYS[1], ARGV[i]) end
redis.call('EXPIRE', KEYS[1], ARGV[2])
return redis.call('LLEN', KEYS[1])
"""

#: KEYS: log, fence, gateway channel. ARGV: attempt, frame, message, log TTL s, fence TTL s.
#: Ends a request that no run will end: fences every run off, appends the frame unless the log has ended already.
END_LOG: Final = f"""
redis.call('SET', KEYS[2], ARGV[1], 'EX', ARGV[5])
local last = redis.call('LINDEX', KEYS[1], -1)
if last and string.byte(last) == {codec.TERMINAL_KIND[0]} then return 0 end
redis.call('RPUSH', KEYS[1], ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[4])
redis.call('PUBLISH', KEYS[3], ARGV[3])
return 1
"""


def encode_items(items: Sequence[TokenItem]) -> bytes:
    """A message for a gateway's channel."""
    return _encoder.encode(items)


def encode_heads(heads: Sequence[tuple[str, int, int]]) -> bytes:
    """What :data:`APPEND_STEP` checks of each item before it takes its frame: request id, attempt, sequence number."""
    return _encoder.encode(heads)


def decode_items(data: bytes) -> list[TokenItem]:
    """The items of a message.

    Raises:
        ContractError: larger than :data:`codec.MAX_MESSAGE_BYTES`, or malformed.
    """
    if len(data) > codec.MAX_MESSAGE_BYTES:
        raise ContractError(f"message of {len(data)} bytes: at most {codec.MAX_MESSAGE_BYTES} are accepted")
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ContractError(f"not a token message: {error}") from error


async def end_log(redis: Redis, request_id: str, gateway_id: str, frame: TerminalFrame) -> bool:
    """End a request from the control side; no run can write to it any more. False: it had ended already.

    Raises:
        RedisError: the server could not be reached or refused the write.
    """
    ended = await redis.register_script(END_LOG)(
        keys=[keys.token_log(request_id), keys.fence(request_id), keys.gateway_channel(gateway_id)],
        args=[
            CONTROL_ATTEMPT,
            codec.encode_frame(frame),
            encode_items([(request_id, LOOK_AT_LOG, b"")]),
            keys.LOG_TTL_S,
            keys.REQUEST_TTL_S,
        ],
    )
    return bool(ended)
