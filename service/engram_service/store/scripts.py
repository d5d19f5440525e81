"""The scripts that change a session's keys together. Each touches the keys of one session (or copies one to another).

KEYS[1] is the session's hash; record and memory are named from it, in the same cluster slot. Every script may be run
again when its answer was lost: the second run changes nothing more and gives the same answer. It writes all the same what is there
already, for WAIT waits for what a connection has written, and the first run may have been another's.

In a cluster, KEYS[2] is the record under the token that the caller found in the hash (or under none). Redis itself then refuses
the script (TRYAGAIN) while a slot moves and only some of the keys are there yet; without it, the others would seem to be lost.
KEYS[3] is the memory of a session that has one; no script touches the memory of a session that has none.

What is under the keys may be anything (a wrong command, a broken import). A script looks at all that it will use before it writes,
and answers DAMAGED and why: that session alone is refused, and nothing of it is changed. DELETE ends whatever is there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

_HASH = """
local function damaged(why) return redis.error_reply('DAMAGED ' .. why) end
local function kind(key) return redis.call('TYPE', key).ok end
local function fits(key, wanted) local is = kind(key) return is == wanted or is == 'none' end
if not fits(KEYS[1], 'hash') then return damaged('its hash is a ' .. kind(KEYS[1])) end
"""

_SAME_CLAIM = (
    _HASH
    + """
if KEYS[2] and KEYS[2] ~= KEYS[1] .. ':' .. (redis.call('HGET', KEYS[1], 't') or '') then
  return redis.error_reply('TRYAGAIN the session was claimed meanwhile')
end
local g = redis.call('HGET', KEYS[1], 'g')
if KEYS[2] and g and not KEYS[3] then return redis.error_reply('TRYAGAIN the session was given a memory meanwhile') end
local memory = g and KEYS[1] .. ':m'
"""
)

# Of a script that uses what is in the hash: `m`, its fields t m f h e c l, and `old`, the record.
_SOUND = (
    _SAME_CLAIM
    + """
local k = KEYS[1]
local m = redis.call('HMGET', k, 't', 'm', 'f', 'h', 'e', 'c', 'l')
if not m[1] and redis.call('EXISTS', k) == 1 then return damaged('its hash has no token') end
local old = m[1] and k .. ':' .. m[1]
if old then
  if not fits(old, 'string') then return damaged('its record is a ' .. kind(old)) end
  for i = 2, 7 do
    if not m[i] then return damaged('its hash lacks the field ' .. string.sub('tmfhecl', i, i)) end
    if i >= 4 and not string.match(m[i], '^%d+$') then
      return damaged('the field ' .. string.sub('tmfhecl', i, i) .. ' of its hash is not a number')
    end
  end
  if #m[5] > 15 or string.match(m[5], '^0%d') then return damaged('the field e of its hash is not an epoch') end
  if #m[6] > 15 or #m[7] > 15 then return damaged('a time in its hash is too great') end
  if not string.match(m[2], '^[!-~]*/[!-~]*$') then return damaged('the field m of its hash names no model') end
  if not string.match(m[3], '^%x+$') then return damaged('the field f of its hash is not a fingerprint') end
  if memory and not fits(memory, 'list') then return damaged('its memory is a ' .. kind(memory)) end
end
"""
)

# Claims a session for a new token: the record is renamed, so that commits under the old token find nothing.
# ARGV: token, model, version ("" any), version to create, fingerprint, client id, ttl ms, now ms, attach, id, initial record,
#       token of the claim that it may replace ("" none, * any), run of Redis
# attach: 0 an open; 1 an attach, by the session's own client; 2 an open that must not create
CLAIM = (
    _SOUND
    + """
if m[1] ~= ARGV[1] and ARGV[12] ~= '*' and ARGV[12] ~= (m[1] or '') then return {'CHANGED'} end
local record = old and redis.call('GET', old)
if m[1] and not record then
  redis.call('DEL', k)
  if memory then redis.call('DEL', memory) end
end
if not record then
  if ARGV[9] ~= '0' then return {'NOT_FOUND'} end
  redis.call('SET', k .. ':' .. ARGV[1], ARGV[11], 'PX', ARGV[7])
  redis.call('HSET', k, 'i', ARGV[10], 'm', ARGV[2] .. '/' .. ARGV[4], 'f', ARGV[5])
  redis.call('HSET', k, 't', ARGV[1], 'h', ARGV[6], 'e', 1, 'c', ARGV[8], 'l', ARGV[7], 'n', ARGV[13])
  redis.call('PEXPIRE', k, ARGV[7] * 2)
  return {'CREATED', ARGV[2] .. '/' .. ARGV[4], ARGV[5], 1, ARGV[8], ARGV[11]}
end
local name, version = string.match(m[2], '^(.*)/([^/]*)$')
if name ~= ARGV[2] or (ARGV[3] ~= '' and version ~= ARGV[3]) then return {'OTHER_MODEL', m[2], m[3]} end
if ARGV[9] == '1' and m[4] ~= ARGV[6] then return {'TAKEN_OVER'} end
local new = k .. ':' .. ARGV[1]
if old == new then
  redis.call('HSET', k, 't', ARGV[1], 'n', ARGV[13])
  return {m[5] == '1' and record == ARGV[11] and 'CREATED' or 'CARRIED', m[2], m[3], tonumber(m[5]), m[6], record}
end
redis.call('RENAME', old, new)
redis.call('PEXPIRE', new, ARGV[7])
redis.call('PEXPIRE', k, ARGV[7] * 2)
if memory then redis.call('PEXPIRE', memory, ARGV[7] * 2) end
redis.call('HSET', k, 't', ARGV[1], 'h', ARGV[6], 'l', ARGV[7], 'n', ARGV[13])
return {'CARRIED', m[2], m[3], redis.call('HINCRBY', k, 'e', 1), m[6], record}
"""
)

# Writes a record that Redis has lost, if nobody has claimed the session meanwhile. A claim that is there and is not ours is one of
# the copy that Redis came back with, if it is older than ours (or of an older session of this id) and was made in none of the runs
# since.
# ARGV: token, record, ttl ms, id, model reference, fingerprint, client id, epoch, created ms, runs since that ("" unknown)
RESTORE = (
    _SAME_CLAIM
    + """
local k = KEYS[1]
local m = redis.call('HMGET', k, 't', 'e', 'n', 'c')
if m[1] and m[1] ~= ARGV[1] then
  local epoch, created, own = tonumber(m[2]) or 0, tonumber(m[4]) or 0, tonumber(ARGV[9])
  if created > own or (created == own and epoch >= tonumber(ARGV[8])) then return 0 end
  if ARGV[10] == '' or (m[3] and m[3] ~= '' and string.find(ARGV[10], m[3], 1, true)) then return 0 end
  redis.call('DEL', k .. ':' .. m[1])
  if created ~= own and memory then
    redis.call('DEL', memory)
    redis.call('HDEL', k, 'g')
    memory = false
  end
end
redis.call('SET', k .. ':' .. ARGV[1], ARGV[2], 'PX', ARGV[3])
if m[1] ~= ARGV[1] then
  redis.call('HSET', k, 'i', ARGV[4], 'm', ARGV[5], 'f', ARGV[6], 't', ARGV[1], 'h', ARGV[7], 'e', ARGV[8], 'c', ARGV[9])
  redis.call('HSET', k, 'l', ARGV[3], 'n', '')
end
redis.call('PEXPIRE', k, ARGV[3] * 2)
if memory then redis.call('PEXPIRE', memory, ARGV[3] * 2) end
return 1
"""
)

# ARGV: token of the claim that is ended ("" any): a delete that comes late must not end the session that has the id by then.
DELETE = """
local k = KEYS[1]
if redis.call('TYPE', k).ok ~= 'hash' then
  redis.call('DEL', k)
  return 1
end
local m = redis.call('HMGET', k, 't', 'g')
if KEYS[2] and KEYS[2] ~= k .. ':' .. (m[1] or '') then return redis.error_reply('TRYAGAIN the session was claimed meanwhile') end
if KEYS[2] and m[2] and not KEYS[3] then return redis.error_reply('TRYAGAIN the session was given a memory meanwhile') end
if m[1] and ARGV[1] ~= '' and m[1] ~= ARGV[1] then return 0 end
redis.call('DEL', k)
if m[1] then redis.call('DEL', k .. ':' .. m[1]) end
if m[2] then redis.call('DEL', k .. ':m') end
return 1
"""

# Creates a session from a record, with a memory or none.
# ARGV: token, record, ttl ms, id, model reference, fingerprint, now ms, memory's revision ("" none), run of Redis, chunks
CREATE = (
    _SOUND
    + """
if old and redis.call('EXISTS', old) == 1 then
  redis.call('HSET', k, 't', m[1])
  return m[1] == ARGV[1] and 1 or 0
end
redis.call('SET', k .. ':' .. ARGV[1], ARGV[2], 'PX', ARGV[3])
redis.call('DEL', k)
if memory then redis.call('DEL', memory) end
redis.call('HSET', k, 'i', ARGV[4], 'm', ARGV[5], 'f', ARGV[6], 't', ARGV[1], 'h', 0, 'e', 1, 'c', ARGV[7], 'l', ARGV[3])
redis.call('HSET', k, 'n', ARGV[9])
if ARGV[8] ~= '' then
  for i = 10, #ARGV do redis.call('RPUSH', k .. ':m', ARGV[i]) end
  redis.call('PEXPIRE', k .. ':m', ARGV[3] * 2)
  redis.call('HSET', k, 'g', ARGV[8])
end
redis.call('PEXPIRE', k, ARGV[3] * 2)
return 1
"""
)

# Places in a tenant's tally, which is KEYS[1]: the indexes of those that are above the limit, which get none.
# ARGV: now ms, until when ms, limit (0 none), tags
PLACE = """
if redis.call('TYPE', KEYS[1]).ok ~= 'zset' then redis.call('DEL', KEYS[1]) end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ARGV[1])
local limit, count, above = tonumber(ARGV[3]), redis.call('ZCARD', KEYS[1]), {}
for i = 4, #ARGV do
  local known = redis.call('ZSCORE', KEYS[1], ARGV[i])
  if not known and limit > 0 and count >= limit then
    above[#above + 1] = i - 4
  else
    if not known then count = count + 1 end
    redis.call('ZADD', KEYS[1], ARGV[2], ARGV[i])
  end
end
local left = ARGV[2] - ARGV[1]
if redis.call('PTTL', KEYS[1]) < left then redis.call('PEXPIRE', KEYS[1], left) end
return above
"""

# Puts another record and model reference in place, under a new token.
# ARGV: old token, new token, record, reference, fingerprint, run of Redis
REWRITE = (
    _SOUND
    + """
if m[1] == ARGV[2] then
  redis.call('HSET', k, 't', m[1], 'n', ARGV[6])
  return 1
end
if m[1] ~= ARGV[1] then return 0 end
local ttl = redis.call('PTTL', k .. ':' .. ARGV[1])
if ttl == -2 then return 0 end
redis.call('SET', k .. ':' .. ARGV[2], ARGV[3])
redis.call('DEL', k .. ':' .. ARGV[1])
if ttl > 0 then redis.call('PEXPIRE', k .. ':' .. ARGV[2], ttl) end
redis.call('HSET', k, 't', ARGV[2], 'm', ARGV[4], 'f', ARGV[5], 'h', 0, 'n', ARGV[6])
redis.call('HINCRBY', k, 'e', 1)
return 1
"""
)

# What a session's memory is at: {model reference, fingerprint, revision ("" none), chunks in its log, created ms}; nil: there
# is no such session. The session's time is renewed, when a quarter of it has passed, so that reading stays reading.
LOOK = (
    _SOUND
    + """
if not old or redis.call('EXISTS', old) == 0 then return false end
if redis.call('PTTL', old) < m[7] * 0.75 then
  redis.call('PEXPIRE', old, m[7])
  redis.call('PEXPIRE', k, m[7] * 2)
  if memory then redis.call('PEXPIRE', memory, m[7] * 2) end
end
return {m[2], m[3], g or '', memory and redis.call('LLEN', memory) or 0, m[6]}
"""
)

# Writes to a memory's log, if it still is what the caller knows: 1 written, 0 it is not, -1 there is no such session.
# ARGV: fingerprint, revision and length that are expected, new revision, replace (0/1), chunks
WRITE = (
    _SOUND
    + """
if not old or redis.call('EXISTS', old) == 0 then return -1 end
local log = k .. ':m'
if g ~= ARGV[4] or redis.call('LLEN', log) == 0 then
  if m[3] ~= ARGV[1] or (g or '') ~= ARGV[2] then return 0 end
  if ARGV[5] == '1' then
    if memory then redis.call('DEL', log) end
  elseif (memory and redis.call('LLEN', log) or 0) ~= tonumber(ARGV[3]) then
    return 0
  end
  for i = 6, #ARGV do redis.call('RPUSH', log, ARGV[i]) end
  redis.call('HSET', k, 'g', ARGV[4])
end
redis.call('PEXPIRE', old, m[7])
redis.call('PEXPIRE', k, m[7] * 2)
redis.call('PEXPIRE', log, m[7] * 2)
return 1
"""
)

ALL = (CLAIM, RESTORE, DELETE, CREATE, PLACE, REWRITE, LOOK, WRITE)


class Script:
    """One of these. A pipeline asks for it by its digest and does not look first whether Redis knows it: nodes.py loads them all
    where it does not."""

    def __init__(self, text: str) -> None:
        assert text in ALL
        self._sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    def __call__(self, keys: Sequence[bytes], args: Sequence[Any], pipe: Any) -> None:
        pipe.execute_command("EVALSHA", self._sha, len(keys), *keys, *args)
