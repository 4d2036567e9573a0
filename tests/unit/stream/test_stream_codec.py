"""What the codec refuses, by name, and what it leaves alone."""

import struct
import zlib
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
import zstandard

from agentrl.errors import CodecError
from agentrl.stream import arrays, codec
from agentrl.stream.codec import decode, encode
from agentrl.testing.stream_doubles import make_close, make_trajectory
from agentrl.types import GroupClose, Segment, Trajectory, Turn, content_digest


def with_arrays(t: Trajectory, **arrays: Any) -> Trajectory:
    segment = t.segments[0]
    fields = {name: getattr(segment, name) for name in ("ids", "mask", "logprobs", "versions", "prompt_length")}
    return replace(t, segments=(Segment(**(fields | arrays)),))


def changed(array: np.ndarray[Any, Any], index: int, value: float) -> np.ndarray[Any, Any]:
    copy = array.copy()
    copy[index] = value
    return copy


def test_round_trip_keeps_every_field() -> None:
    original = replace(
        make_trajectory(3, 2, attempt=1, num_tokens=33),
        turn_rewards=((0, 12, 0.5),),
        stop="max_turns",
        turns=(
            Turn(kind="model", segment=0, start=8, end=20, ms=3.5, server="http://a", finish="stop", text="x"),
            Turn(
                kind="tool", segment=0, start=20, end=33, ms=1.0, name="calc", arguments='{"a":1}', ok=False,
                error_kind="timeout", text="late",
            ),
        ),
    )  # fmt: skip
    back = decode(encode(original))
    assert isinstance(back, Trajectory)
    for name in Trajectory.__slots__:
        if name != "segments":
            assert getattr(back, name) == getattr(original, name), name
    for name in ("ids", "mask", "logprobs", "versions"):
        ours, theirs = getattr(original.segments[0], name), getattr(back.segments[0], name)
        assert theirs.dtype == ours.dtype
        np.testing.assert_array_equal(theirs, ours)
    assert back.segments[0].prompt_length == 8


def test_group_close_round_trip_keeps_every_field() -> None:
    close = GroupClose(group_id="t/7", task_id="t", ordinal=7, size=3, members=("a", "b"), failed={"c": "deadline"})
    assert decode(encode(close)) == close
    assert decode(encode(replace(close, baseline=0.0))) == replace(close, baseline=0.0)


def test_decoded_arrays_are_writable_aligned_and_native() -> None:
    odd = make_trajectory(num_tokens=13)
    back = decode(encode(replace(odd, segments=odd.segments * 3)))
    assert isinstance(back, Trajectory)
    for segment in back.segments:
        for name in ("ids", "mask", "logprobs", "versions"):
            array = getattr(segment, name)
            assert array.flags.writeable
            assert array.flags.aligned
            assert array.dtype.isnative


def test_numpy_scalars_in_plain_fields_are_written_as_numbers() -> None:
    odd = replace(make_trajectory(), reward=np.float32(0.5), reward_terms={"x": np.float64(0.25)}, ordinal=np.int64(4))  # pyright: ignore[reportArgumentType]
    back = decode(encode(odd))
    assert isinstance(back, Trajectory)
    assert (back.reward, dict(back.reward_terms), back.ordinal) == (0.5, {"x": 0.25}, 4)


def test_tool_text_with_lone_surrogates_is_kept_readable() -> None:
    turn = Turn(kind="tool", segment=0, start=8, end=9, ms=0.0, name="sh", text="bad \udcff byte")
    back = decode(encode(replace(make_trajectory(), turns=(turn,))))
    assert isinstance(back, Trajectory)
    assert back.turns[0].text == "bad \\udcff byte"


def test_digest_depends_on_exactly_what_is_trained() -> None:
    t = make_trajectory()
    assert content_digest(t) == content_digest(replace(t, reward=0.0, id="other", turns=()))
    segment = t.segments[0]
    for edits in (
        {"ids": changed(segment.ids, 3, 1)},
        {"logprobs": changed(segment.logprobs, 10, -9.0)},
        {"versions": changed(segment.versions, 10, 5)},
    ):
        assert content_digest(with_arrays(t, **edits)) != content_digest(t)
    assert content_digest(replace(t, segments=t.segments * 2)) != content_digest(t)
    assert content_digest(t).startswith("sha256:")
    assert content_digest(t) == content_digest(decode(encode(t)))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"logprobs": (10, np.nan)}, "not finite"),
        ({"logprobs": (10, -np.inf)}, "not finite"),
        ({"logprobs": (10, 0.5)}, "above 0.001"),
        ({"logprobs": (2, -0.1)}, "mask 0 have a logprob"),
        ({"logprobs": (2, np.nan)}, "mask 0 have a logprob"),
        ({"logprobs": (2, -0.0)}, "mask 0 have a logprob"),
        ({"versions": (10, -1)}, "no policy version"),
        ({"versions": (2, 0)}, "version other than -1"),
        ({"ids": (0, -5)}, "token id -5 is negative"),
    ],
)
def test_inconsistent_tokens_are_refused_when_written(arrays: dict[str, tuple[int, float]], message: str) -> None:
    t = make_trajectory()
    edits = {name: changed(getattr(t.segments[0], name), *edit) for name, edit in arrays.items()}
    with pytest.raises(CodecError, match=message):
        encode(with_arrays(t, **edits))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reward": float("nan")}, "reward=nan"),
        ({"reward_terms": {"x": float("inf")}}, "reward_terms"),
        ({"finished": float("nan")}, "finished"),
        ({"id": ""}, "empty id"),
        ({"ordinal": -1}, "ordinal=-1"),
        ({"segments": ()}, "no segment"),
        ({"turn_rewards": ((0, 24, 1.0),)}, "does not exist"),
        ({"turn_rewards": ((1, 0, 1.0),)}, "does not exist"),
        ({"turn_rewards": ((0, 1, float("nan")),)}, "turn_rewards"),
        ({"turns": (Turn(kind="model", segment=0, start=5, end=25, ms=0),)}, "span 5:25"),
        ({"turns": (Turn(kind="model", segment=1, start=0, end=0, ms=0),)}, "segment 1 does not exist"),
    ],
)
def test_inconsistent_fields_are_refused_when_written(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CodecError, match=message):
        encode(replace(make_trajectory(), **fields))


def test_wrong_dtype_names_the_array_and_both_dtypes() -> None:
    t = make_trajectory()
    with pytest.raises(CodecError, match="ids has dtype int64.*must be int32"):
        encode(with_arrays(t, ids=t.segments[0].ids.astype(np.int64)))


def test_sampled_token_in_the_prompt_is_refused() -> None:
    with pytest.raises(CodecError, match="9-token prompt"):
        encode(with_arrays(make_trajectory(prompt_length=8), prompt_length=9))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 1}, "name each sample once"),
        ({"size": 0, "members": ()}, "size=0"),
        ({"members": ("a", "a")}, "twice"),
        ({"failed": {"a": "x"}}, "as member and as failed"),
        ({"group_id": ""}, "empty group_id"),
        ({"baseline": float("nan")}, "baseline=nan"),
    ],
)
def test_inconsistent_closes_are_refused(fields: dict[str, Any], message: str) -> None:
    close = GroupClose(group_id="t/7", task_id="t", ordinal=7, size=3, members=("a", "b"))
    with pytest.raises(CodecError, match=message):
        encode(replace(close, **fields))


def frame(
    raw: bytes,
    *,
    kind: int = 1,
    flags: int = 0,
    raw_size: int | None = None,
    stored: bytes | None = None,
    schema: int = codec.SCHEMA,
) -> bytes:
    """A frame whose checksum is right, so that what lies behind the checksum is reached."""
    stored = raw if stored is None else stored
    size = len(raw) if raw_size is None else raw_size
    head = struct.pack("<4sHBBII", codec.MAGIC, schema, kind, flags, size, len(stored))
    return head + struct.pack("<I", zlib.crc32(stored, zlib.crc32(head))) + stored


def raw_body(data: bytes) -> bytes:
    body = data[20:]
    return zstandard.ZstdDecompressor().decompress(body) if data[7] & 1 else body


def rewrite(t: Trajectory, **header: Any) -> bytes:
    """The entry with header fields replaced, checksummed as if an honest writer had made it."""
    raw = raw_body(encode(t))
    (size,) = struct.unpack_from("<I", raw)
    fields = msgspec.msgpack.decode(raw[4 : 4 + size]) | header
    packed = msgspec.msgpack.encode(fields)
    return frame(struct.pack("<I", len(packed)) + packed + raw[4 + size :])


def test_helper_that_rewrites_headers_makes_valid_entries() -> None:
    assert isinstance(decode(rewrite(make_trajectory())), Trajectory)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"reward": float("nan")}, "reward=nan"),
        ({"surprise": 1}, "unknown field"),
        ({"layout": "ids:<i8"}, "dtypes"),
        ({"segments": [[25, 8, 2, 16, 1]]}, "wrong length"),
        ({"segments": [[24, 8]]}, "sizes that no writer gives"),
        ({"segments": [[24, 8, 2, 15, 1]]}, "wrong length"),
        ({"segments": [[24, 8, 2, 14, 2]]}, "marks 16 tokens but 14 logprobs"),
        ({"segments": [[-1, 0]]}, "prompt_length=0 outside"),
        ({"segments": [[24, 30]]}, "prompt_length=30"),
        ({"segments": [[24, 9, 2, 16, 1]]}, "9-token prompt"),
        ({"reward": "much"}, "malformed"),
    ],
)
def test_bad_header_behind_a_good_checksum_is_refused(header: dict[str, Any], message: str) -> None:
    with pytest.raises(CodecError, match=message):
        decode(rewrite(make_trajectory(), **header))


def test_mask_bits_past_the_end_are_refused() -> None:
    raw = bytearray(raw_body(encode(make_trajectory(num_tokens=13))))
    (size,) = struct.unpack_from("<I", raw)
    raw[4 + size + 2 * 13 + 1] |= 0x80
    with pytest.raises(CodecError, match="past its 13 tokens"):
        decode(frame(bytes(raw)))


def test_versions_that_do_not_cover_the_mask_are_refused() -> None:
    raw = bytearray(raw_body(encode(make_trajectory(num_tokens=13))))
    raw[-8] += 1
    with pytest.raises(CodecError, match="marks 5 tokens but versions of 6 follow"):
        decode(frame(bytes(raw)))


@pytest.mark.parametrize(("largest", "id_bytes"), [(0, 2), (65_535, 2), (65_536, 3), (2**24 - 1, 3), (2**24, 4), (2**31 - 1, 4)])
def test_ids_take_as_many_bytes_as_the_largest_needs(largest: int, id_bytes: int) -> None:
    t = make_trajectory(num_tokens=20)
    t = with_arrays(t, ids=np.array([*range(19), largest], np.int32))
    assert content_digest(decode(encode(t))) == content_digest(t)  # pyright: ignore[reportArgumentType]
    assert arrays.write(t.segments[0])[0].id_bytes == id_bytes


@pytest.mark.parametrize("mask", [[0] * 9, [1] * 9, [0, 1] * 200, [0, 0, 1, 1, 0, 1, 0, 0, 1]])
@pytest.mark.parametrize("versions", [[7], [3, 3, 4, 2**31 - 1]])
def test_any_mask_and_any_versions_survive(mask: list[int], versions: list[int]) -> None:
    sampled = np.array(mask, np.bool_)
    n = len(sampled)
    t = with_arrays(
        make_trajectory(), ids=np.arange(n, dtype=np.int32), mask=sampled, prompt_length=0,
        logprobs=np.where(sampled, -np.arange(n), 0).astype(np.float32),
        versions=np.where(sampled, np.resize(versions, n), -1).astype(np.int32),
    )  # fmt: skip
    back = decode(encode(replace(t, turns=())))
    assert content_digest(back) == content_digest(t)  # pyright: ignore[reportArgumentType]


def as_schema_1(t: Trajectory, **edits: Any) -> bytes:
    """The entry as versions before schema 2 wrote it."""
    raw = raw_body(encode(t))
    (size,) = struct.unpack_from("<I", raw)
    fields = msgspec.msgpack.decode(raw[4 : 4 + size]) | {"layout": arrays.LAYOUT_1}
    fields["segments"] = [[len(s.ids), s.prompt_length] for s in t.segments]
    packed = msgspec.msgpack.encode(fields)
    body = struct.pack("<I", len(packed)) + packed
    for s in t.segments:
        body += s.ids.tobytes() + np.packbits(s.mask, bitorder="little").tobytes()
        body += edits.get("logprobs", s.logprobs).tobytes() + s.versions.tobytes()
    return frame(body, flags=1, raw_size=len(body), stored=zstandard.ZstdCompressor().compress(body), schema=1)


def test_entries_that_an_older_version_left_on_the_stream_are_read_and_checked() -> None:
    t = make_trajectory(4, 2, num_tokens=300, version=3)
    t = replace(t, segments=t.segments * 2)
    back = decode(as_schema_1(t))
    assert isinstance(back, Trajectory)
    assert content_digest(back) == content_digest(t)
    assert (back.id, back.turns, encode(back)) == (t.id, t.turns, encode(t))
    with pytest.raises(CodecError, match="mask 0 have a logprob"):
        decode(as_schema_1(t, logprobs=changed(t.segments[0].logprobs, 2, -0.1)))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: b"", "fewer than its 20-byte prefix"),
        (lambda d: b"XXXX" + d[4:], "magic"),
        (lambda d: d[:4] + b"\x09\x00" + d[6:], "schema is 9"),
        (lambda d: d[:-1], "wrong length"),
        (lambda d: d + b"\0", "wrong length"),
        (lambda d: d[:-1] + bytes([d[-1] ^ 1]), "CRC32"),
        (lambda d: frame(b"\0\0\0\0", kind=7), "kind 7"),
        (lambda d: frame(b"\0\0\0\0", flags=4), "flags"),
        (lambda d: frame(b"\0\0"), "too few"),
        (lambda d: frame(b"\xff\0\0\0"), "claims 255 bytes"),
        (lambda d: frame(raw_body(d), kind=2), "malformed"),
        (lambda d: frame(b"junk", flags=1), "zstd"),
        (lambda d: frame(b"junk", raw_size=5), "wrong length"),
    ],
)
def test_each_kind_of_damage_is_named(edit: Any, message: str) -> None:
    with pytest.raises(CodecError, match=message):
        decode(edit(encode(make_trajectory())))


def test_decompression_bombs_are_refused_unread() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    assert len(bomb) < 10_000
    with pytest.raises(CodecError, match="refused unread"):
        decode(frame(b"", flags=1, raw_size=1000, stored=bomb))
    with pytest.raises(CodecError, match="refused unread"):
        decode(frame(b"", flags=1, raw_size=codec.MAX_RAW_BYTES + 1, stored=bomb))


def test_two_zstd_frames_in_one_entry_are_refused() -> None:
    raw = raw_body(encode(make_trajectory()))
    packed = zstandard.ZstdCompressor().compress(raw)
    with pytest.raises(CodecError):
        decode(frame(raw, flags=1, stored=packed + packed))


def test_long_trajectory_is_compressed_below_its_arrays() -> None:
    t = make_trajectory(num_tokens=8192, prompt_length=512)
    assert len(encode(t)) < 13 * 8192 * 0.8


def test_close_of_made_up_members_is_valid() -> None:
    members = [make_trajectory(0, i) for i in range(2)]
    assert make_close(members, failed={"x": "deadline"}).size == 3
