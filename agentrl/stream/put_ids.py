"""Which trajectory ids were ever put: exact for ever, in memory that does not grow with what has passed.

While a group is open its ids lie one by one in a set of their own (``members:<group>``). Its close folds them into bits: one for
each sample of a group, round and attempt, so an id that is repeated after the close, the commit or a year is still known, for a
byte per group of eight. ``dedupe`` keeps one by one what has no such place: ids that are not ``<group>/<sample>/<attempt>`` under
the group's ordinal (replayed dead letters), and everything that versions before this layout put.

A bit's place leaves the task out: ordinals are unique in a run, and a second group on a closed ordinal is refused or superseded.
"""

import re
from collections.abc import Iterable
from typing import Final

GROUPS_PER_MAP: Final = 1024
"""Ordinals that share one bitmap, which then has at most as many bytes: what a stray ordinal can make the server allocate."""
SAMPLES_PER_MAP: Final = 8
"""Samples of a group in one bitmap: a byte per group. Further samples, attempts and rounds have bitmaps of their own."""

_NUMBER: Final = "(0|[1-9][0-9]{0,14})"
_PLACED: Final = re.compile(f"(?:^|/)({_NUMBER}(?:\\+again([1-9][0-9]{{0,14}}))?/{_NUMBER}/{_NUMBER})$", re.ASCII)

LUA: Final = f"""
-- Group, map and bit of an id; nothing for ids that have no place.
local function canonical(number)
  return number == '0' or (#number < 16 and string.match(number, '^[1-9]%d*$'))
end
local function place_of(id)
  local group, sample, attempt = string.match(id, '^(.*)/(%d+)/(%d+)$')
  if not group then return nil end
  local stem, round = string.match(group, '^(.*)%+again([1-9]%d*)$')
  local ordinal = string.match('/' .. (stem or group), '/(%d+)$')
  if not (ordinal and canonical(ordinal) and canonical(round or '0') and canonical(sample) and canonical(attempt)) then return nil end
  local map = string.format('%.0f:%s:%s:%.0f', math.floor(ordinal / {GROUPS_PER_MAP}), round or '0', attempt, math.floor(sample / {SAMPLES_PER_MAP}))
  return group, map, (ordinal % {GROUPS_PER_MAP}) * {SAMPLES_PER_MAP} + sample % {SAMPLES_PER_MAP}, ordinal
end
-- 'prefix' is of the run: all its keys lie in one slot, and cluster mode is refused.
local function set_bit(prefix, map, bit)
  redis.call('SADD', prefix .. 'put', map)
  redis.call('SETBIT', prefix .. 'put:' .. map, bit, 1)
end
local function was_put(prefix, id)
  local group, map, bit = place_of(id)
  if group then
    if redis.call('SISMEMBER', prefix .. 'members:' .. group, id) == 1 then return true end
    if redis.call('GETBIT', prefix .. 'put:' .. map, bit) == 1 then return true end
  end
  return redis.call('ZSCORE', prefix .. 'dedupe', id)
end
-- For an id whose group is closed.
local function remember(prefix, id)
  local group, map, bit = place_of(id)
  if group then set_bit(prefix, map, bit) else redis.call('ZADD', prefix .. 'dedupe', 0, id) end
end
local function has_place_in(id, group_id, ordinal)
  local group, _, _, its_ordinal = place_of(id)
  return group == group_id and its_ordinal == ordinal
end
-- Turns the ids of a group that closes into bits.
local function fold(members, prefix, group_id, ordinal)
  for _, id in ipairs(redis.call('SMEMBERS', members)) do
    if has_place_in(id, group_id, ordinal) then remember(prefix, id) end
  end
  redis.call('DEL', members)
end
local function was_closed(closed, close_id)
  local group = string.match(close_id, '^(.*)/close$') or ''
  local ordinal = string.match('/' .. (string.match(group, '^(.*)%+again[1-9]%d*$') or group), '/(%d+)$')
  return ordinal and canonical(ordinal) and redis.call('GETBIT', closed, ordinal) == 1
end
"""


def put_name(trajectory_id: str) -> str:
    """How the memory names an id: by its place (``<ordinal>[+again<round>]/<sample>/<attempt>``), or itself where it has none."""
    placed = _PLACED.search(trajectory_id)
    return placed[1] if placed else trajectory_id


def names_in_maps(maps: Iterable[tuple[str, bytes]]) -> set[str]:
    """The names behind the bits of bitmaps, given by the end of their keys."""
    names: set[str] = set()
    for key, data in maps:
        chunk, round_, attempt, block = (int(part) for part in key.split(":"))
        mark = f"+again{round_}" if round_ else ""
        for offset, byte in enumerate(data):
            ordinal = chunk * GROUPS_PER_MAP + offset
            for bit in range(SAMPLES_PER_MAP if byte else 0):
                if byte & (0x80 >> bit):
                    names.add(f"{ordinal}{mark}/{block * SAMPLES_PER_MAP + bit}/{attempt}")
    return names
