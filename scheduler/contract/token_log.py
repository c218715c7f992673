"""The fenced token log: three Lua scripts that workers write with and gateways repair with.

``log:<rid>`` is a list whose element *i* is frame *i*. A run first takes the fence with its attempt number;
a script call appends frames only while the fence is its own and the sequence number is the next one, then
publishes the whole step once. Published is therefore always a subset of logged, and a stale run can write nothing.
"""

from __future__ import annotations

from typing import Final

from scheduler.contract import keys

#: Attempt number of a terminal frame written by the control side (no worker will ever run this request).
CONTROL_ATTEMPT: Final = 2**31

#: KEYS[1] gateway channel. ARGV[1] message, ARGV[2] TTL in s, then per item: request id, attempt, seq, frame.
#: Returns flat (request id, n): n = -1 fenced, else the log's present length. Empty: all appended and published.
APPEND_STEP: Final = f"""
local refused = {{}}
for i = 3, #ARGV, 4 do
  local rid = ARGV[i]
  local log = '{keys.token_log("")}' .. rid
  if redis.call('GET', '{keys.fence("")}' .. rid) ~= ARGV[i + 1] then
    refused[#refused + 1] = rid
    refused[#refused + 1] = -1
  else
    local n = redis.call('LLEN', log)
    if n == tonumber(ARGV[i + 2]) then
      redis.call('RPUSH', log, ARGV[i + 3])
      if n % 256 == 0 or string.byte(ARGV[i + 3]) == 102 then redis.call('EXPIRE', log, ARGV[2]) end
    else
      refused[#refused + 1] = rid
      refused[#refused + 1] = n
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
REPAIR_TAIL: Final = """
local n, start = redis.call('LLEN', KEYS[1]), tonumber(ARGV[1])
if n < start then return n end
for i = 3 + n - start, #ARGV do redis.call('RPUSH', KEYS[1], ARGV[i]) end
redis.call('EXPIRE', KEYS[1], ARGV[2])
return redis.call('LLEN', KEYS[1])
"""
