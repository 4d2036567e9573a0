"""Trajectory and GroupClose <-> bytes: checked on the way in, checked on the way out, nothing pickled.

An entry is a fixed prefix and a body::

    prefix  magic 4s | schema u16 | kind u8 | flags u8 | raw size u32 | stored size u32 | crc32 u32   (little-endian)
    body    header size u32 | msgpack header | the segments' arrays, laid out by ``arrays.py``

The body is one zstd frame where that is smaller by a sixteenth (flag bit 0). The checksum covers the prefix before it and the
stored body, so a changed byte anywhere is found before anything is interpreted. Schema 1, which wrote the arrays of all tokens
in full, is still read: what an older version left on a stream is trained.

Both directions apply the same rules, so what cannot be decoded cannot be put on the stream: a token that the policy
sampled (mask True) has a finite logprob <= ``MAX_LOGPROB`` and a version >= 0; every other token has logprob +0 and
version -1; the prompt holds no sampled token; rewards are finite; turns lie inside their segment.
"""

import math
import struct
import threading
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import msgspec
import zstandard

from agentrl.errors import CodecError
from agentrl.stream import arrays
from agentrl.types import GroupClose, Segment, Trajectory, Turn

SCHEMA: Final = 2
"""Number of the layout above. A reader refuses any that is not in ``READABLE``."""
READABLE: Final = (1, SCHEMA)
MAGIC: Final = b"ARLE"
MAX_RAW_BYTES: Final = 256 << 20
"""Largest body before compression, about 20 M tokens: what a hostile frame can make a reader allocate."""

_PREFIX: Final = struct.Struct("<4sHBBIII")
_CHECKED: Final = _PREFIX.size - 4
"""Bytes of the prefix that the checksum covers: all but the checksum itself."""
_U32: Final = struct.Struct("<I")
_KIND_TRAJECTORY: Final = 1
_KIND_CLOSE: Final = 2
_FLAG_ZSTD: Final = 1
_ZSTD_LEVEL: Final = -5
"""Of zstd's fast levels. On arrays as ``arrays.py`` lays them out, level 1 takes four times as long for a sixth fewer bytes."""
_MIN_COMPRESS_BYTES: Final = 256
_WORTH_COMPRESSING: Final = 16
"""Compressed only where that saves more than this part: reading it costs another copy."""
_codecs = threading.local()


class _TrajectoryHeader(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    task_id: str
    group_id: str
    ordinal: int
    sample_index: int
    attempt: int
    env: str
    agent: str
    data_source: str
    split: str
    layout: str
    segments: list[arrays.SegmentHeader]
    reward: float
    reward_terms: dict[str, float]
    turn_rewards: list[tuple[int, int, float]]
    turns: list[Turn]
    stop: str
    created: float
    finished: float


class _CloseHeader(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    group_id: str
    task_id: str
    ordinal: int
    size: int
    members: list[str]
    failed: dict[str, str]
    baseline: float | None = None


_encoder = msgspec.msgpack.Encoder()
_trajectory_decoder = msgspec.msgpack.Decoder(_TrajectoryHeader)
_close_decoder = msgspec.msgpack.Decoder(_CloseHeader)


def encode(entry: Trajectory | GroupClose) -> bytes:
    """The bytes of one entry.

    Raises:
        CodecError: the entry breaks a rule of this module; the message names the field. Nothing was written.
    """
    if isinstance(entry, GroupClose):
        _check_close(entry)
        return _pack(_KIND_CLOSE, _encode_header(_close_header(entry)), [])
    _check_trajectory(entry)
    segments, buffers = _write_segments(entry)
    try:
        header = _encode_header(_trajectory_header(entry, segments))
    except UnicodeEncodeError:
        header = _encode_header(_trajectory_header(replace(entry, turns=tuple(_printable(t) for t in entry.turns)), segments))
    return _pack(_KIND_TRAJECTORY, header, buffers)


def decode(data: bytes) -> Trajectory | GroupClose:
    """The entry in ``data``. Arrays are fresh, writable, aligned and in native byte order.

    Raises:
        CodecError: the bytes are not an entry of schema ``SCHEMA``; the message says what is wrong.
    """
    schema, kind, body = _unpack(data)
    if len(body) < _U32.size:
        raise CodecError(f"body holds {len(body)} bytes, too few for its header size: the entry is truncated")
    (header_size,) = _U32.unpack_from(body)
    start = _U32.size + header_size
    if start > len(body):
        raise CodecError(f"header claims {header_size} bytes but the body holds {len(body) - _U32.size}: wrong length")
    header, buffers = body[_U32.size : start], body[start:]
    if kind == _KIND_CLOSE:
        return _decode_close(header, buffers)
    return _decode_trajectory(schema, header, buffers)


# -- frame ------------------------------------------------------------------------------------------------------------


def _pack(kind: int, header: bytes, buffers: Sequence[memoryview]) -> bytes:
    raw = b"".join([_U32.pack(len(header)), header, *buffers])
    if len(raw) > MAX_RAW_BYTES:
        raise CodecError(f"entry of {len(raw)} bytes exceeds {MAX_RAW_BYTES}: lower the token limits of a rollout")
    stored, flags = raw, 0
    if len(raw) >= _MIN_COMPRESS_BYTES:
        compressed = _compressor().compress(raw)
        if len(compressed) < len(raw) - len(raw) // _WORTH_COMPRESSING:
            stored, flags = compressed, _FLAG_ZSTD
    checked = _PREFIX.pack(MAGIC, SCHEMA, kind, flags, len(raw), len(stored), 0)[:_CHECKED]
    return b"".join([checked, _U32.pack(zlib.crc32(stored, zlib.crc32(checked))), stored])


def _unpack(data: bytes) -> tuple[int, int, memoryview]:
    """The schema, the kind and the decompressed body of a frame whose every byte was checked."""
    if len(data) < _PREFIX.size:
        raise CodecError(f"entry holds {len(data)} bytes, fewer than its {_PREFIX.size}-byte prefix: truncated")
    magic, schema, kind, flags, raw_size, stored_size, crc = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise CodecError(f"magic is {magic!r}, not {MAGIC!r}: these bytes are not an agentrl entry")
    if schema not in READABLE:
        raise CodecError(f"schema is {schema} but this build reads {READABLE}: run serve and learn from one version")
    stored = memoryview(data)[_PREFIX.size :]
    if len(stored) != stored_size:
        raise CodecError(f"body holds {len(stored)} bytes but the prefix claims {stored_size}: wrong length")
    actual = zlib.crc32(stored, zlib.crc32(data[:_CHECKED]))
    if actual != crc:
        raise CodecError(f"CRC32 is {actual:08x} but the prefix claims {crc:08x}: the entry was corrupted")
    if kind not in (_KIND_TRAJECTORY, _KIND_CLOSE):
        raise CodecError(f"kind {kind} is neither a trajectory (1) nor a group close (2)")
    if flags & ~_FLAG_ZSTD:
        raise CodecError(f"flags {flags:#04x} are unknown to schema {schema}")
    if raw_size > MAX_RAW_BYTES:
        raise CodecError(f"body claims {raw_size} bytes uncompressed; the bound is {MAX_RAW_BYTES}: refused unread")
    raw = memoryview(_decompress(stored, raw_size)) if flags & _FLAG_ZSTD else stored
    if len(raw) != raw_size:
        raise CodecError(f"body holds {len(raw)} bytes uncompressed but the prefix claims {raw_size}: wrong length")
    return schema, kind, raw


def _decompress(stored: memoryview, raw_size: int) -> bytes:
    # zstandard trusts the size inside the frame over max_output_size, so that one is compared before allocating.
    try:
        claimed = zstandard.get_frame_parameters(stored).content_size
        if claimed != raw_size:
            raise CodecError(f"zstd frame claims {claimed} bytes but the prefix {raw_size}: refused unread")
        return _decompressor().decompress(stored, max_output_size=raw_size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CodecError(f"body is not a zstd frame: {error}") from error


def _compressor() -> zstandard.ZstdCompressor:
    """One per thread: the objects are not thread-safe and cost more to make than a small entry to compress."""
    if not hasattr(_codecs, "compressor"):
        _codecs.compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
    return _codecs.compressor


def _decompressor() -> zstandard.ZstdDecompressor:
    if not hasattr(_codecs, "decompressor"):
        _codecs.decompressor = zstandard.ZstdDecompressor()
    return _codecs.decompressor


# -- headers ----------------------------------------------------------------------------------------------------------


def _encode_header(header: _TrajectoryHeader | _CloseHeader) -> bytes:
    try:
        return _encoder.encode(header)
    except (TypeError, OverflowError) as error:
        raise CodecError(f"a field has a type that cannot be written: {error}") from error


def _trajectory_header(t: Trajectory, segments: list[arrays.SegmentHeader]) -> _TrajectoryHeader:
    return _TrajectoryHeader(
        id=t.id,
        task_id=t.task_id,
        group_id=t.group_id,
        ordinal=int(t.ordinal),
        sample_index=int(t.sample_index),
        attempt=int(t.attempt),
        env=t.env,
        agent=t.agent,
        data_source=t.data_source,
        split=t.split,
        layout=arrays.LAYOUT,
        segments=segments,
        reward=float(t.reward),
        reward_terms={name: float(value) for name, value in t.reward_terms.items()},
        turn_rewards=[(int(segment), int(token), float(value)) for segment, token, value in t.turn_rewards],
        turns=list(t.turns),
        stop=t.stop,
        created=float(t.created),
        finished=float(t.finished),
    )


def _close_header(close: GroupClose) -> _CloseHeader:
    return _CloseHeader(
        group_id=close.group_id,
        task_id=close.task_id,
        ordinal=int(close.ordinal),
        size=int(close.size),
        members=list(close.members),
        failed=dict(close.failed),
        baseline=None if close.baseline is None else float(close.baseline),
    )


def _printable(turn: Turn) -> Turn:
    """The turn without lone surrogates, which tools that decode with ``surrogateescape`` let through."""

    def clean(text: str) -> str:
        return text.encode("utf-8", "backslashreplace").decode()

    return replace(turn, text=clean(turn.text), arguments=clean(turn.arguments), name=clean(turn.name))


def _decode_close(header: memoryview, buffers: memoryview) -> GroupClose:
    try:
        parsed = _close_decoder.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CodecError(f"group close header is malformed: {error}") from error
    if buffers:
        raise CodecError(f"group close carries {len(buffers)} bytes after its header: wrong length")
    close = GroupClose(
        group_id=parsed.group_id,
        task_id=parsed.task_id,
        ordinal=parsed.ordinal,
        size=parsed.size,
        members=tuple(parsed.members),
        failed=parsed.failed,
        baseline=parsed.baseline,
    )
    _check_close(close)
    return close


def _decode_trajectory(schema: int, header: memoryview, buffers: memoryview) -> Trajectory:
    try:
        parsed = _trajectory_decoder.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CodecError(f"trajectory header is malformed: {error}") from error
    layout = arrays.LAYOUT_1 if schema == 1 else arrays.LAYOUT
    if parsed.layout != layout:
        raise CodecError(f"arrays have dtypes {parsed.layout!r}; schema {schema} has {layout!r}")
    trajectory = Trajectory(
        id=parsed.id,
        task_id=parsed.task_id,
        group_id=parsed.group_id,
        ordinal=parsed.ordinal,
        sample_index=parsed.sample_index,
        attempt=parsed.attempt,
        env=parsed.env,
        agent=parsed.agent,
        data_source=parsed.data_source,
        split=parsed.split,
        segments=_read_segments(schema, parsed.segments, buffers),
        reward=parsed.reward,
        reward_terms=parsed.reward_terms,
        turn_rewards=tuple(parsed.turn_rewards),
        turns=tuple(parsed.turns),
        stop=parsed.stop,
        created=parsed.created,
        finished=parsed.finished,
    )
    _check_trajectory(trajectory)
    return trajectory


# -- segments ---------------------------------------------------------------------------------------------------------


def _write_segments(t: Trajectory) -> tuple[list[arrays.SegmentHeader], list[memoryview]]:
    headers: list[arrays.SegmentHeader] = []
    buffers: list[memoryview] = []
    for index, segment in enumerate(t.segments):
        try:
            header, parts = arrays.write(segment)
        except CodecError as error:
            raise CodecError(f"trajectory {t.id!r}, segment {index}: {error}") from error
        headers.append(header)
        buffers += parts
    return headers, buffers


def _read_segments(schema: int, headers: Sequence[arrays.SegmentHeader], buffers: memoryview) -> tuple[Segment, ...]:
    for index, header in enumerate(headers):
        if not 0 <= header.prompt_length <= header.num_tokens:
            raise CodecError(f"segment {index} has prompt_length={header.prompt_length} outside its {header.num_tokens} tokens")
        if schema != 1 and not (header.id_bytes in (2, 3, 4) and min(header.num_sampled, header.num_versions) >= 0):
            raise CodecError(f"segment {index} has sizes that no writer gives it: {header}")
    sizes = [arrays.num_bytes_1(h) if schema == 1 else h.num_bytes for h in headers]
    if sum(sizes) != len(buffers):
        raise CodecError(f"segments need {sum(sizes)} bytes of arrays but the body holds {len(buffers)}: wrong length")
    segments, offset = list[Segment](), 0
    for index, (header, size) in enumerate(zip(headers, sizes, strict=True)):
        try:
            segments.append((arrays.read_1 if schema == 1 else arrays.read)(header, buffers, offset))
        except CodecError as error:
            raise CodecError(f"segment {index}: {error}") from error
        offset += size
    return tuple(segments)


# -- rules ------------------------------------------------------------------------------------------------------------


def _check_trajectory(t: Trajectory) -> None:
    for name in ("id", "task_id", "group_id"):
        if not getattr(t, name):
            raise CodecError(f"trajectory {t.id!r} has an empty {name}")
    for name in ("ordinal", "sample_index", "attempt"):
        if getattr(t, name) < 0:
            raise CodecError(f"trajectory {t.id!r} has {name}={getattr(t, name)}; it must be >= 0")
    for name in ("reward", "created", "finished"):
        _check_finite(t.id, name, getattr(t, name))
    for name, value in t.reward_terms.items():
        _check_finite(t.id, f"reward_terms[{name!r}]", value)
    if not t.segments:
        raise CodecError(f"trajectory {t.id!r} has no segment: list it as failed in its group's close instead")
    _check_spans(t)


def _check_spans(t: Trajectory) -> None:
    for segment, token, value in t.turn_rewards:
        if not (0 <= segment < len(t.segments) and 0 <= token < len(t.segments[segment].ids)):
            raise CodecError(f"trajectory {t.id!r} rewards segment {segment}, token {token}, which does not exist")
        _check_finite(t.id, "turn_rewards", value)
    for index, turn in enumerate(t.turns):
        if not 0 <= turn.segment < len(t.segments):
            raise CodecError(f"trajectory {t.id!r}, turn {index}: segment {turn.segment} does not exist")
        num_tokens = len(t.segments[turn.segment].ids)
        if not 0 <= turn.start <= turn.end <= num_tokens:
            raise CodecError(
                f"trajectory {t.id!r}, turn {index}: span {turn.start}:{turn.end} is outside its {num_tokens} tokens"
            )


def _check_finite(trajectory_id: str, name: str, value: Any) -> None:
    if not math.isfinite(value):
        raise CodecError(f"trajectory {trajectory_id!r} has {name}={value}; it must be finite")


def _check_close(close: GroupClose) -> None:
    where = f"close of group {close.group_id!r}"
    if not close.group_id or not close.task_id:
        raise CodecError(f"{where} has an empty group_id or task_id")
    if close.ordinal < 0 or close.size < 1:
        raise CodecError(f"{where} has ordinal={close.ordinal} and size={close.size}; they must be >= 0 and >= 1")
    if close.baseline is not None and not math.isfinite(close.baseline):
        raise CodecError(f"{where} has baseline={close.baseline}; it must be finite, or None where no greedy rollout finished")
    if len(set(close.members)) != len(close.members):
        raise CodecError(f"{where} lists a member twice")
    both = set(close.members) & set(close.failed)
    if both:
        raise CodecError(f"{where} lists {min(both)!r} as member and as failed")
    if len(close.members) + len(close.failed) > close.size:
        raise CodecError(
            f"{where} of size {close.size} lists {len(close.members)} members and {len(close.failed)} failures: "
            "name each sample once, by its last attempt"
        )
