"""The codec over generated entries: round trip, and no damaged entry passes for another."""

import os
import struct
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrl.errors import CodecError
from agentrl.stream.codec import MAGIC, SCHEMA, decode, encode
from agentrl.testing.stream_doubles import make_trajectory
from agentrl.types import GroupClose, Segment, Trajectory, Turn, content_digest

FUZZ = int(os.environ.get("AGENTRL_FUZZ", "0"))
finite = st.floats(allow_nan=False, allow_infinity=False)
names = st.text(min_size=1, max_size=12)


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    n = draw(st.integers(0, 40))
    prompt = draw(st.integers(0, n))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    mask = rng.random(n) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    mask[:prompt] = False
    logprobs = np.where(mask, -rng.exponential(3.0, n) * (rng.random(n) < 0.7), 0.0).astype(np.float32)
    versions = np.where(mask, rng.integers(0, 2**31 - 1, n), -1).astype(np.int32)
    ids = rng.integers(0, 2**31 - 1, n).astype(np.int32)
    return Segment(ids=ids, mask=mask, logprobs=logprobs, versions=versions, prompt_length=prompt)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    parts = tuple(draw(st.lists(segments(), min_size=1, max_size=3)))
    turns: list[Turn] = []
    for index, part in enumerate(parts):
        start = draw(st.integers(0, len(part.ids)))
        end = draw(st.integers(start, len(part.ids)))
        turns.append(
            Turn(kind=draw(st.sampled_from(["model", "tool", "env"])), segment=index, start=start, end=end,
                 ms=draw(finite), name=draw(st.text(max_size=5)), text=draw(st.text(max_size=20)), ok=draw(st.booleans()))
        )  # fmt: skip
    rewards = tuple((i, len(p.ids) - 1, draw(finite)) for i, p in enumerate(parts) if len(p.ids))
    return Trajectory(
        id=draw(names), task_id=draw(names), group_id=draw(names), ordinal=draw(st.integers(0, 2**40)),
        sample_index=draw(st.integers(0, 99)), attempt=draw(st.integers(0, 9)), env=draw(st.text()), agent=draw(st.text()),
        data_source=draw(st.text()), split=draw(st.text()), segments=parts, reward=draw(finite),
        reward_terms=draw(st.dictionaries(names, finite, max_size=3)), turn_rewards=rewards, turns=tuple(turns),
        stop=draw(names), created=draw(finite), finished=draw(finite),
    )  # fmt: skip


def plain(t: Any) -> Any:
    if isinstance(t, GroupClose):
        return t
    arrays = [(s.ids.tolist(), s.mask.tolist(), s.logprobs.tolist(), s.versions.tolist(), s.prompt_length) for s in t.segments]
    return [getattr(t, name) for name in Trajectory.__slots__ if name != "segments"], arrays


@settings(max_examples=max(80, FUZZ), deadline=None)
@given(trajectories())
def test_every_trajectory_survives_the_round_trip(t: Trajectory) -> None:
    data = encode(t)
    back = decode(data)
    assert isinstance(back, Trajectory)
    assert plain(back) == plain(t)
    assert content_digest(back) == content_digest(t)
    assert encode(back) == data


@settings(max_examples=60, deadline=None)
@given(st.lists(names, unique=True, max_size=6), st.integers(0, 6), st.integers(0, 2**31), st.integers(0, 3))
def test_every_close_survives_the_round_trip(ids: list[str], cut: int, ordinal: int, spare: int) -> None:
    members, failed = tuple(ids[:cut]), dict.fromkeys(ids[cut:], "deadline")
    close = GroupClose(group_id="g", task_id="t", ordinal=ordinal, size=max(1, len(ids)) + spare, members=members, failed=failed)
    assert decode(encode(close)) == close


def test_no_changed_byte_of_an_entry_is_accepted() -> None:
    for t in (make_trajectory(num_tokens=9, prompt_length=2), replace(make_trajectory(num_tokens=300), stop="deadline")):
        data = encode(t)
        for position in range(len(data)):
            for flip in (0x01, 0x80, 0xFF):
                damaged = bytearray(data)
                damaged[position] ^= flip
                _refused(bytes(damaged))


def test_no_truncation_or_extension_of_an_entry_is_accepted() -> None:
    data = encode(make_trajectory())
    for length in range(len(data)):
        _refused(data[:length])
    _refused(data + b"\0")


@settings(max_examples=max(300, FUZZ), deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_never_raise_anything_but_codec_error(data: bytes) -> None:
    _refused(data)


def _refused(data: bytes) -> None:
    with pytest.raises(CodecError, match="."):
        decode(data)


@settings(max_examples=max(300, FUZZ), deadline=None)
@given(st.data())
def test_damage_behind_an_honest_checksum_raises_codec_error_or_yields_a_valid_entry(data: st.DataObject) -> None:
    raw = bytearray(_raw(make_trajectory(num_tokens=9, prompt_length=2)))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    head = struct.pack("<4sHBBII", MAGIC, SCHEMA, 1, 0, len(raw), len(raw))
    try:
        entry = decode(head + struct.pack("<I", zlib.crc32(raw, zlib.crc32(head))) + bytes(raw))
    except CodecError:
        return
    encode(entry)


def _raw(t: Trajectory) -> bytes:
    data = encode(t)
    return zstandard.ZstdDecompressor().decompress(data[20:]) if data[7] & 1 else data[20:]
