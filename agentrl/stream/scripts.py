"""The Lua that makes each step of an entry's life atomic. Every script is safe to repeat after a lost reply.

Scripts that only free memory or finish groups carry ``allow-oom``: refusing them at ``maxmemory`` would keep the server
full for ever. PUT does not, and the producer reads that refusal as "full".
"""

from typing import Final

from agentrl.stream import put_ids

DEAD_MAXLEN: Final = 1000
"""Dead letters kept. Only this stream is ever trimmed by length: on the trajectory stream that loses entries."""

DEAD_BLOB_BYTES: Final = 256 << 20
"""Payloads of large dead letters kept in all; the oldest go first, and their letters can then only be dropped."""

_ALLOW_OOM: Final = "#!lua flags=allow-oom\n"

_CLOCK: Final = """
-- The server's clock, never a client's: machines need not agree on the time.
local function wall_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end
-- Lua would write such numbers as 1.7e+12.
local function written(number)
  return string.format('%.0f', number)
end
"""

_AGAIN: Final = """
-- A closed ordinal that the learner gave back is open again for exactly one round of it.
local function is_again(requeued, ordinal, group_id)
  local round = redis.call('ZSCORE', requeued, ordinal)
  return round and tonumber(round) == tonumber(string.match(group_id, '%+again(%d+)$'))
end
"""

_ADMIT: Final = (
    _AGAIN
    + _CLOCK
    + put_ids.LUA
    + """
-- What an id needs no entry for: it has one or had one (DUP), or its group closed without it (LATE).
local function state_of(dedupe, closed, requeued, members, prefix, id, group_id, ordinal)
  if redis.call('SISMEMBER', members, id) == 1 or redis.call('ZSCORE', dedupe, id) then return 'DUP' end
  if redis.call('GETBIT', closed, ordinal) == 0 or is_again(requeued, ordinal, group_id) then return nil end
  return was_put(prefix, id) and 'DUP' or 'LATE'
end
-- 'items' bounds what no learner has taken yet; 'bytes' bounds all that lives, unless the group has already begun.
local function full(traj, stats, open, group_id, bytes, max_items, max_bytes, live)
  local why = nil
  local items = redis.call('XLEN', traj)
  if items >= max_items then
    local pending = redis.pcall('XPENDING', traj, 'learner')
    if not pending['err'] then items = items - tonumber(pending[1]) end
  end
  if items >= max_items then
    why = 'items'
  elseif live > 0 and live + bytes > max_bytes and redis.call('HEXISTS', open, group_id) == 0 then
    why = 'bytes'
  end
  if why and math.abs(wall_ms() - tonumber(redis.call('HGET', stats, 'full_ms') or '0')) > 1000 then
    redis.call('HSET', stats, 'full_ms', written(wall_ms()), 'full_why', why)
  end
  return why
end
"""
)

ROOM: Final = (
    _ALLOW_OOM
    + _ADMIT
    + """
-- KEYS traj dedupe stats closed open requeued members | ARGV prefix id group ordinal max_items max_bytes bytes
local known = state_of(KEYS[2], KEYS[4], KEYS[6], KEYS[7], ARGV[1], ARGV[2], ARGV[3], ARGV[4])
if known then return known end
local live = tonumber(redis.call('HGET', KEYS[3], 'bytes') or '0')
if full(KEYS[1], KEYS[3], KEYS[5], ARGV[3], tonumber(ARGV[7]), tonumber(ARGV[5]), tonumber(ARGV[6]), live)
then return 'FULL' end
return 'ROOM'
"""
)

PUT: Final = (
    _ADMIT
    + """
-- KEYS traj dedupe stats closed open requeued members blob | ARGV prefix id group ordinal max_items max_bytes side payload
local prefix, id, group_id, ordinal, payload = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[8]
local known = state_of(KEYS[2], KEYS[4], KEYS[6], KEYS[7], prefix, id, group_id, ordinal)
if known == 'DUP' then return 'DUP' end
if known == 'LATE' then
  remember(prefix, id)
  redis.call('HINCRBY', KEYS[3], 'submitted', 1)
  redis.call('HINCRBY', KEYS[3], 'outcome:superseded', 1)
  return 'LATE'
end
-- One read and one write of the counters: each call of a script costs the server as much as a command.
local at = redis.call('HMGET', KEYS[3], 'bytes', 'submitted')
local live, submitted = tonumber(at[1] or '0'), tonumber(at[2] or '0')
if full(KEYS[1], KEYS[3], KEYS[5], group_id, #payload, tonumber(ARGV[5]), tonumber(ARGV[6]), live) then return 'FULL' end
if ARGV[7] == '1' then
  redis.call('SET', KEYS[8], payload)
  redis.call('XADD', KEYS[1], '*', 't', id, 'g', group_id, 'k', 't', 'n', #payload, 's', '1')
else
  redis.call('XADD', KEYS[1], '*', 't', id, 'g', group_id, 'k', 't', 'n', #payload, 'b', payload)
end
redis.call('SADD', KEYS[7], id)
if not has_place_in(id, group_id, ordinal) then redis.call('ZADD', KEYS[2], 0, id) end
redis.call('HINCRBY', KEYS[5], group_id, 1)
redis.call('HSET', KEYS[3], 'bytes', written(live + #payload), 'submitted', written(submitted + 1))
return 'OK'
"""
)

CLOSE: Final = (
    _ALLOW_OOM
    + _AGAIN
    + put_ids.LUA
    + """
-- KEYS traj dedupe stats closed open requeued members
-- ARGV prefix id group ordinal size payload num_members members.. (reason count)..
local prefix, id, group_id, ordinal, payload = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[6]
if redis.call('GETBIT', KEYS[4], ordinal) == 1 and not is_again(KEYS[6], ordinal, group_id) then
  if redis.call('HEXISTS', KEYS[5], group_id) == 1 then return {'TAKEN'} end
  return {'DUP'}
end
local num_members = tonumber(ARGV[7])
local missing = {'MISSING'}
for i = 8, 7 + num_members do
  if redis.call('SISMEMBER', KEYS[7], ARGV[i]) == 0 and not redis.call('ZSCORE', KEYS[2], ARGV[i]) then missing[#missing + 1] = ARGV[i] end
end
if #missing > 1 then return missing end
local unreported = tonumber(ARGV[5]) - num_members
redis.call('HINCRBY', KEYS[3], 'submitted', unreported)
for i = 8 + num_members, #ARGV, 2 do
  redis.call('HINCRBY', KEYS[3], 'outcome:failed:' .. ARGV[i], ARGV[i + 1])
  unreported = unreported - tonumber(ARGV[i + 1])
end
if unreported > 0 then redis.call('HINCRBY', KEYS[3], 'outcome:failed:unreported', unreported) end
redis.call('XADD', KEYS[1], '*', 't', id, 'g', group_id, 'k', 'c', 'n', #payload, 'b', payload)
redis.call('SETBIT', KEYS[4], ordinal, 1)
redis.call('ZREM', KEYS[6], ordinal)
redis.call('HDEL', KEYS[5], group_id)
redis.call('HINCRBY', KEYS[3], 'bytes', #payload)
redis.call('HINCRBY', KEYS[3], 'closed_groups', 1)
fold(KEYS[7], prefix, group_id, ordinal)
return {'OK'}
"""
)

KNOWN: Final = (
    "#!lua flags=no-writes\n"
    + put_ids.LUA
    + """
-- ARGV prefix ids.. ; 1 for each that was ever put
local known = {}
for i = 2, #ARGV do known[i - 1] = was_put(ARGV[1], ARGV[i]) and 1 or 0 end
return known
"""
)

ACQUIRE: Final = (
    _ALLOW_OOM
    + """
-- KEYS fence traj progress stats | ARGV at_least
local epoch = math.max(tonumber(redis.call('GET', KEYS[1]) or '0'), tonumber(ARGV[1])) + 1
redis.call('SET', KEYS[1], epoch)
local made = redis.pcall('XGROUP', 'CREATE', KEYS[2], 'learner', '0', 'MKSTREAM')
if type(made) == 'table' and made['err'] and not string.find(made['err'], 'BUSYGROUP') then return made end
local committed = redis.call('HGET', KEYS[4], 'committed_groups') or '0'
redis.call('HSET', KEYS[3], 'run_epoch', epoch, 'consumed_groups', committed)
return {epoch, tonumber(committed)}
"""
)

_FENCED: Final = """
local holder = redis.call('GET', KEYS[1])
if holder ~= ARGV[1] then return {'FENCED', holder or '0'} end
"""

COMMIT: Final = (
    _ALLOW_OOM
    + _FENCED
    + put_ids.LUA
    + f"""
-- KEYS fence traj stats dead closed requeued dead_blobs | ARGV epoch prefix (entry kind id bytes side outcome reason)..
local prefix = ARGV[2]
local function keep_payload(id)
  if redis.call('EXISTS', prefix .. 'blob:' .. id) == 0 then return end
  redis.call('RENAME', prefix .. 'blob:' .. id, prefix .. 'deadblob:' .. id)
  local size = redis.call('STRLEN', prefix .. 'deadblob:' .. id)
  redis.call('RPUSH', KEYS[7], size .. ':' .. id)
  local held = redis.call('HINCRBY', KEYS[3], 'dead_bytes', size)
  while held > {DEAD_BLOB_BYTES} do
    local oldest = redis.call('LPOP', KEYS[7])
    if not oldest then break end
    local bytes, name = string.match(oldest, '^(%d+):(.*)$')
    redis.call('DEL', prefix .. 'deadblob:' .. name)
    held = redis.call('HINCRBY', KEYS[3], 'dead_bytes', -tonumber(bytes))
  end
end
local entries, freed, ends = {{}}, 0, {{}}
for i = 3, #ARGV, 7 do
  local entry, kind, id, outcome, reason = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 5], ARGV[i + 6]
  if reason ~= '' then
    local found = redis.call('XRANGE', KEYS[2], entry, entry)
    if found[1] then
      local copy = {{'entry', entry, 'reason', reason, 'epoch', ARGV[1]}}
      for f = 1, math.min(#found[1][2], 64) do copy[#copy + 1] = found[1][2][f] end
      redis.call('XADD', KEYS[4], 'MAXLEN', '~', {DEAD_MAXLEN}, '*', unpack(copy))
      redis.call('HINCRBY', KEYS[3], 'dead', 1)
      if ARGV[i + 4] == '1' then keep_payload(id) end
      -- What no producer of ours put was never counted as submitted.
      if not (kind == 'c' and was_closed(KEYS[5], id) or was_put(prefix, id)) then outcome, kind = '', 'foreign' end
    end
  end
  if redis.call('XDEL', KEYS[2], entry) == 1 then
    if kind ~= 'foreign' then freed = freed + tonumber(ARGV[i + 3]) end
    if ARGV[i + 4] == '1' then redis.call('DEL', prefix .. 'blob:' .. id) end
    if kind == 'c' then
      redis.call('HINCRBY', KEYS[3], 'committed_groups', 1)
      -- With the entry's end, so that a repeated commit cannot give the group back twice.
      local ordinal, round = string.match(outcome, '^again:(%d+):(%d+)$')
      if ordinal then
        redis.call('ZADD', KEYS[6], round, ordinal)
        redis.call('HINCRBY', KEYS[3], 'requeued_groups', 1)
        outcome = ''
      end
    end
    if outcome ~= '' then ends[outcome] = (ends[outcome] or 0) + 1 end
  end
  entries[#entries + 1] = entry
end
-- Once for all: each call of a script costs the server as much as a command.
redis.call('XACK', KEYS[2], 'learner', unpack(entries))
for outcome, count in pairs(ends) do redis.call('HINCRBY', KEYS[3], 'outcome:' .. outcome, count) end
if freed > 0 then redis.call('HINCRBY', KEYS[3], 'bytes', string.format('%.0f', -freed)) end
return {{'OK', redis.call('HGET', KEYS[3], 'committed_groups') or '0'}}
"""
)

CLAIM: Final = (
    _ALLOW_OOM
    + _FENCED
    + """
-- KEYS fence traj | ARGV epoch consumer cursor
-- min-idle 0 is safe only behind the fence; JUSTID leaves the delivery counts alone.
local claimed = redis.call('XAUTOCLAIM', KEYS[2], 'learner', ARGV[2], 0, ARGV[3], 'COUNT', 1000, 'JUSTID')
return {'OK', claimed[1]}
"""
)

BLAME: Final = (
    _ALLOW_OOM
    + _FENCED
    + """
-- KEYS fence traj | ARGV epoch consumer entries..
for i = 3, #ARGV do
  local pending = redis.call('XPENDING', KEYS[2], 'learner', ARGV[i], ARGV[i], 1)
  if pending[1] then
    redis.call('XCLAIM', KEYS[2], 'learner', ARGV[2], 0, ARGV[i], 'RETRYCOUNT', pending[1][4] + 1, 'JUSTID')
  end
end
return {'OK', '0'}
"""
)

PUBLISH: Final = (
    _ALLOW_OOM
    + _FENCED
    + """
-- KEYS fence progress policy | ARGV epoch consumed_groups version (field value)..
redis.call('HSET', KEYS[2], 'run_epoch', ARGV[1], 'consumed_groups', ARGV[2], 'version', ARGV[3])
redis.call('HSET', KEYS[3], unpack(ARGV, 4))
return {'OK', '0'}
"""
)

REPORT: Final = (
    _ALLOW_OOM
    + _FENCED
    + """
-- KEYS fence progress | ARGV epoch consumed_groups
redis.call('HSET', KEYS[2], 'run_epoch', ARGV[1], 'consumed_groups', ARGV[2])
return {'OK', '0'}
"""
)

LEASE: Final = (
    _ALLOW_OOM
    + """
-- KEYS leases lease_owners closed requeued stats | ARGV owner want budget consumed_groups ttl_ms is_first
local owner, want = ARGV[1], tonumber(ARGV[2])
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local taken, count, idle = {}, 0, {}
local function round_of(ordinal)
  return redis.call('ZSCORE', KEYS[4], ordinal) or '0'
end
-- Its group closed, whether or not the learner gave it back meanwhile: then it is open for another round.
local function is_over(ordinal, round)
  return redis.call('GETBIT', KEYS[3], ordinal) == 1 and (round == '0' or round ~= round_of(ordinal))
end
local function take(ordinal)
  redis.call('ZADD', KEYS[1], now + tonumber(ARGV[5]), ordinal)
  redis.call('HSET', KEYS[2], ordinal, round_of(ordinal) .. ':' .. owner)
  taken[#taken + 1] = tostring(ordinal)
  taken[#taken + 1] = round_of(ordinal)
  count = count + 1
end
-- There are at most `budget` leases, so walking over them is cheap.
local leases = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
for i = 1, #leases, 2 do
  local ordinal = tonumber(leases[i])
  local round, holder = string.match(redis.call('HGET', KEYS[2], ordinal) or '0:', '^(%d+):(.*)$')
  if is_over(ordinal, round) then
    redis.call('ZREM', KEYS[1], ordinal)
    redis.call('HDEL', KEYS[2], ordinal)
  elseif ARGV[6] == '1' and holder == owner then
    redis.call('ZADD', KEYS[1], 0, ordinal)
    idle[#idle + 1] = ordinal
  elseif tonumber(leases[i + 1]) < now then
    idle[#idle + 1] = ordinal
  end
end
table.sort(idle)
for _, ordinal in ipairs(idle) do
  if count >= want then break end
  take(ordinal)
end
local closed_groups = tonumber(redis.call('HGET', KEYS[5], 'closed_groups') or '0')
local room = tonumber(ARGV[3]) - (redis.call('ZCARD', KEYS[1]) + closed_groups - tonumber(ARGV[4]))
-- What the learner gave back comes before what is new: the run's cursor stands at it.
local again = {}
for _, ordinal in ipairs(redis.call('ZRANGE', KEYS[4], 0, -1)) do
  if not redis.call('ZSCORE', KEYS[1], ordinal) then again[#again + 1] = tonumber(ordinal) end
end
table.sort(again)
for _, ordinal in ipairs(again) do
  if count >= want or room <= 0 then break end
  take(ordinal)
  room = room - 1
end
local known_next = redis.call('HGET', KEYS[2], 'next')
local next_ordinal = tonumber(known_next or redis.call('BITPOS', KEYS[3], 0))
while count < want and room > 0 do
  if redis.call('GETBIT', KEYS[3], next_ordinal) == 0 and not redis.call('ZSCORE', KEYS[1], next_ordinal) then
    take(next_ordinal)
    room = room - 1
  end
  next_ordinal = next_ordinal + 1
end
-- Asked in vain, several times a second while the learner is behind: nothing is written then, and nothing synced to disk.
if tostring(next_ordinal) ~= known_next then redis.call('HSET', KEYS[2], 'next', next_ordinal) end
return taken
"""
)

RENEW: Final = (
    _ALLOW_OOM
    + """
-- KEYS leases lease_owners closed requeued stats | ARGV owner ttl_ms ordinals..
local time = redis.call('TIME')
local expires = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000) + tonumber(ARGV[2])
local lost = {}
for i = 3, #ARGV do
  local holder = string.match(redis.call('HGET', KEYS[2], ARGV[i]) or '', '^%d+:(.*)$')
  if holder == ARGV[1] then
    redis.call('ZADD', KEYS[1], 'XX', expires, ARGV[i])
  elseif redis.call('GETBIT', KEYS[3], ARGV[i]) == 0 then
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
"""
)

FINGERPRINT: Final = (
    _ALLOW_OOM
    + """
-- KEYS fingerprint | ARGV (field value).. ; the first writer of a field wins, everybody reads the result
local stored = {}
for i = 1, #ARGV, 2 do
  redis.call('HSETNX', KEYS[1], ARGV[i], ARGV[i + 1])
  stored[#stored + 1] = redis.call('HGET', KEYS[1], ARGV[i])
end
return stored
"""
)

_FORGET_PAYLOAD: Final = """
local function forget_payload(list, stats, prefix, id)
  local size = redis.call('STRLEN', prefix .. id)
  if redis.call('LREM', list, 1, size .. ':' .. id) == 1 then redis.call('HINCRBY', stats, 'dead_bytes', -size) end
  redis.call('DEL', prefix .. id)
end
"""

DROP: Final = (
    _ALLOW_OOM
    + _FORGET_PAYLOAD
    + """
-- KEYS dead stats dead_blobs | ARGV dead_blob_prefix (dead_id old_id)..
local dropped = 0
for i = 2, #ARGV, 2 do
  dropped = dropped + redis.call('XDEL', KEYS[1], ARGV[i])
  forget_payload(KEYS[3], KEYS[2], ARGV[1], ARGV[i + 1])
end
return dropped
"""
)

REPLAY: Final = (
    _ALLOW_OOM
    + _FORGET_PAYLOAD
    + put_ids.LUA
    + """
-- KEYS traj dedupe stats dead dead_blobs
-- ARGV close_id group close_payload prefix side_above (dead_id old_id new_id payload)..
local prefix = ARGV[4]
for i = 6, #ARGV, 4 do
  if not redis.call('XRANGE', KEYS[4], ARGV[i], ARGV[i])[1] then return {'GONE', ARGV[i]} end
  if not was_put(prefix, ARGV[i + 1]) then return {'FOREIGN', ARGV[i + 1]} end
end
local bytes, count = #ARGV[3], 0
for i = 6, #ARGV, 4 do
  local id, payload = ARGV[i + 2], ARGV[i + 3]
  if #payload > tonumber(ARGV[5]) then
    redis.call('SET', prefix .. 'blob:' .. id, payload)
    redis.call('XADD', KEYS[1], '*', 't', id, 'g', ARGV[2], 'k', 't', 'n', #payload, 's', '1')
  else
    redis.call('XADD', KEYS[1], '*', 't', id, 'g', ARGV[2], 'k', 't', 'n', #payload, 'b', payload)
  end
  forget_payload(KEYS[5], KEYS[3], prefix .. 'deadblob:', ARGV[i + 1])
  redis.call('ZADD', KEYS[2], 0, id)
  redis.call('XDEL', KEYS[4], ARGV[i])
  bytes, count = bytes + #payload, count + 1
end
redis.call('XADD', KEYS[1], '*', 't', ARGV[1], 'g', ARGV[2], 'k', 'c', 'n', #ARGV[3], 'b', ARGV[3])
redis.call('ZADD', KEYS[2], 0, ARGV[1])
-- They were counted as failed once; they wait again, so that column gives them back and the sums stay closed.
redis.call('HINCRBY', KEYS[3], 'outcome:failed:dead_letter', -count)
redis.call('HINCRBY', KEYS[3], 'bytes', bytes)
redis.call('HINCRBY', KEYS[3], 'closed_groups', 1)
redis.call('HINCRBY', KEYS[3], 'replayed', count)
return {'OK', tostring(count)}
"""
)

FULL_AGE: Final = (
    "#!lua flags=no-writes\n"
    + _CLOCK
    + """
-- KEYS stats ; milliseconds since a producer last found no room, -1 for never
local at = redis.call('HGET', KEYS[1], 'full_ms')
if not at then return -1 end
return math.abs(wall_ms() - tonumber(at))
"""
)

SNAPSHOT: Final = """
-- KEYS traj dedupe stats open put | ARGV with_ids prefix ; one instant of the books, without payloads
local on_stream, known, maps = {}, {}, {}
if ARGV[1] == '1' then
  local after = '-'
  while true do
    local page = redis.call('XRANGE', KEYS[1], after, '+', 'COUNT', 128)
    if #page == 0 then break end
    for _, entry in ipairs(page) do
      for f = 1, #entry[2], 2 do
        if entry[2][f] == 't' then on_stream[#on_stream + 1] = entry[2][f + 1] end
      end
      after = '(' .. entry[1]
    end
  end
  known = redis.call('ZRANGE', KEYS[2], 0, -1)
  for _, group_id in ipairs(redis.call('HKEYS', KEYS[4])) do
    for _, id in ipairs(redis.call('SMEMBERS', ARGV[2] .. 'members:' .. group_id)) do known[#known + 1] = id end
  end
  for _, map in ipairs(redis.call('SMEMBERS', KEYS[5])) do
    maps[#maps + 1] = map
    maps[#maps + 1] = redis.call('GET', ARGV[2] .. 'put:' .. map)
  end
end
return {redis.call('HGETALL', KEYS[3]), redis.call('XLEN', KEYS[1]), redis.call('HLEN', KEYS[4]), on_stream, known, maps}
"""
