"""A segment's arrays <-> bytes: only what was sampled is written for what only sampled tokens have.

    ids        <u2 where all are below 2**16; low <u2, then high u1, below 2**24; otherwise <i4
    mask       bits, little-endian
    logprobs   <f4 of the sampled tokens
    versions   of the sampled tokens, as runs: lengths <u4, then versions <i4

Schema 1 (``read_schema_1``) had ids <i4, mask bits, logprobs <f4 and versions <i4 of all tokens.

The rules that both directions apply are in ``codec.py``. What its layout cannot express (a logprob of a token that was not sampled)
needs no check on the way in.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

from agentrl.errors import CodecError
from agentrl.types import Segment

if TYPE_CHECKING:
    from numpy.typing import NDArray

LAYOUT: Final = "ids:<u2|<u2u1|<i4 mask:bits logprobs:<f4/sampled versions:runs/sampled"
LAYOUT_1: Final = "ids:<i4 mask:bits logprobs:<f4 versions:<i4"
MAX_LOGPROB: Final = 1e-3
"""A logprob is <= 0 up to rounding: engines that normalise in bfloat16 overshoot by less than this."""

_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "ids": np.dtype(np.int32),
    "mask": np.dtype(np.bool_),
    "logprobs": np.dtype(np.float32),
    "versions": np.dtype(np.int32),
}
_FEW_SPANS: Final = 64
"""Spans of sampled tokens up to which copying them one by one is faster than a boolean index."""


class SegmentHeader(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """Sizes of a segment's arrays. Schema 1 wrote the first two."""

    num_tokens: int
    prompt_length: int
    id_bytes: int = 4
    num_sampled: int = -1
    num_versions: int = -1
    """Runs of one version among the sampled tokens."""

    @property
    def num_bytes(self) -> int:
        return (
            self.id_bytes * self.num_tokens + _mask_bytes(self.num_tokens) + 4 * max(self.num_sampled, 0) + 8 * max(self.num_versions, 0)
        )  # fmt: skip


def write(segment: Segment) -> tuple[SegmentHeader, list[memoryview]]:
    """The segment's header and buffers, some of them views of its arrays.

    Raises:
        CodecError: its arrays break a rule.
    """
    for name, dtype in _DTYPES.items():
        array: NDArray[Any] = getattr(segment, name)
        if array.dtype != dtype or array.ndim != 1:
            raise CodecError(f"{name} has dtype {array.dtype} and shape {array.shape}; it must be {dtype} of shape [T]")
    mask = segment.mask
    spans = _spans(mask)
    _check_prompt(mask, spans, segment.prompt_length)
    sampled = _pick(segment.logprobs, mask, spans)
    lengths, versions = _runs(_pick(segment.versions, mask, spans))
    _check_sampled(sampled, versions)
    # Compared as bits, so that NaN and -0, which the reader could not restore, are no zeros.
    stray = int(np.count_nonzero(segment.logprobs.view(np.int32))) - int(np.count_nonzero(sampled.view(np.int32)))
    if stray:
        raise CodecError(f"{stray} tokens with mask 0 have a logprob other than 0")
    stray = int(np.count_nonzero(segment.versions != -1)) - len(sampled)
    if stray:
        raise CodecError(f"{stray} tokens with mask 0 have a version other than -1")
    id_bytes, ids = _write_ids(segment.ids)
    header = SegmentHeader(len(mask), int(segment.prompt_length), id_bytes, len(sampled), len(versions))
    bits = np.packbits(mask, bitorder="little")
    parts = [*ids, bits, sampled.astype("<f4", order="C", copy=False), lengths.astype("<u4"), versions.astype("<i4")]
    return header, [part.data for part in parts]


def read(header: SegmentHeader, buffers: memoryview, offset: int) -> Segment:
    """The segment whose arrays begin at ``offset``, which ``header.num_bytes`` bytes follow. Its arrays are fresh and writable.

    Raises:
        CodecError: the bytes break a rule.
    """
    n = header.num_tokens
    ids = _read_ids(header, buffers, offset)
    offset += header.id_bytes * n
    mask = _read_mask(buffers, n, offset)
    spans = _spans(mask)
    _check_prompt(mask, spans, header.prompt_length)
    num_sampled = int(np.count_nonzero(mask))
    if num_sampled != header.num_sampled:
        raise CodecError(f"the mask marks {num_sampled} tokens but {header.num_sampled} logprobs follow")
    offset += _mask_bytes(n)
    sampled = np.frombuffer(buffers, "<f4", num_sampled, offset)
    offset += 4 * num_sampled
    lengths = np.frombuffer(buffers, "<u4", header.num_versions, offset)
    runs = np.frombuffer(buffers, "<i4", header.num_versions, offset + 4 * header.num_versions)
    if int(lengths.sum(dtype=np.int64)) != num_sampled:
        raise CodecError(f"the mask marks {num_sampled} tokens but versions of {int(lengths.sum(dtype=np.int64))} follow")
    _check_sampled(sampled, runs)
    logprobs, versions = np.zeros(n, np.float32), np.full(n, -1, np.int32)
    _spread(sampled, logprobs, mask, spans)
    _spread(runs if len(runs) == 1 else np.repeat(runs, lengths), versions, mask, spans)
    return Segment(ids=ids, mask=mask, logprobs=logprobs, versions=versions, prompt_length=header.prompt_length)


def num_bytes_1(header: SegmentHeader) -> int:
    """Bytes that schema 1 has for the segment."""
    return 12 * header.num_tokens + _mask_bytes(header.num_tokens)


def read_1(header: SegmentHeader, buffers: memoryview, offset: int) -> Segment:
    """``read`` for schema 1."""
    n = header.num_tokens
    ids = np.frombuffer(buffers, "<i4", n, offset).astype(np.int32)
    mask = _read_mask(buffers, n, offset + 4 * n)
    offset += 4 * n + _mask_bytes(n)
    logprobs = np.frombuffer(buffers, "<f4", n, offset).astype(np.float32)
    versions = np.frombuffer(buffers, "<i4", n, offset + 4 * n).astype(np.int32)
    segment = Segment(ids=ids, mask=mask, logprobs=logprobs, versions=versions, prompt_length=header.prompt_length)
    write(segment)  # for its checks
    return segment


# -- one array each ---------------------------------------------------------------------------------------------------


def _mask_bytes(num_tokens: int) -> int:
    return (num_tokens + 7) // 8


def _write_ids(ids: "NDArray[np.int32]") -> "tuple[int, list[NDArray[Any]]]":
    # Read without a sign, negative ids are the largest: one pass finds both ends.
    high = int(ids.view(np.uint32).max()) if len(ids) else 0
    if high >= 1 << 31:
        raise CodecError(f"token id {int(ids.min())} is negative")
    if high < 1 << 16:
        return 2, [ids.astype("<u2")]
    if high < 1 << 24:
        return 3, [ids.astype("<u2"), (ids >> 16).astype(np.uint8)]
    return 4, [ids.astype("<i4", order="C", copy=False)]


def _read_ids(header: SegmentHeader, buffers: memoryview, offset: int) -> "NDArray[np.int32]":
    n = header.num_tokens
    if header.id_bytes == 4:
        ids = np.frombuffer(buffers, "<i4", n, offset).astype(np.int32)
        if n and int(ids.min()) < 0:
            raise CodecError(f"token id {int(ids.min())} is negative")
        return ids
    ids = np.frombuffer(buffers, "<u2", n, offset).astype(np.int32)
    if header.id_bytes == 3:
        ids |= np.frombuffer(buffers, np.uint8, n, offset + 2 * n).astype(np.int32) << 16
    return ids


def _read_mask(buffers: memoryview, num_tokens: int, offset: int) -> "NDArray[np.bool_]":
    size = _mask_bytes(num_tokens)
    if num_tokens % 8 and buffers[offset + size - 1] >> num_tokens % 8:
        raise CodecError(f"the mask has bits set past its {num_tokens} tokens")
    bits = np.frombuffer(buffers, np.uint8, size, offset)
    return np.unpackbits(bits, count=num_tokens, bitorder="little").view(np.bool_)


def _edges(values: "NDArray[Any]") -> list[int]:
    """Where a value differs from the one before it."""
    return ((values[1:] != values[:-1]).nonzero()[0] + 1).tolist()


def _runs(values: "NDArray[np.int32]") -> "tuple[NDArray[np.int64], NDArray[np.int32]]":
    """Lengths and values."""
    edges = _edges(values)
    if not edges:
        return np.array([len(values)][: len(values)]), values[:1]
    starts = [0, *edges]
    return np.diff(starts, append=len(values)), values[starts]


def _spans(mask: "NDArray[np.bool_]") -> list[tuple[int, int]] | None:
    """Where the mask is True, as (start, stop); None for so many spans that a boolean index is faster."""
    edges = _edges(mask)
    if len(edges) > 2 * _FEW_SPANS:
        return None
    if len(mask) and mask[0]:
        edges.insert(0, 0)
    if len(edges) % 2:
        edges.append(len(mask))
    return list(zip(edges[::2], edges[1::2], strict=True))


def _pick(values: "NDArray[Any]", mask: "NDArray[np.bool_]", spans: list[tuple[int, int]] | None) -> "NDArray[Any]":
    """``values[mask]``, without a copy where that is one span."""
    if spans is None:
        return values[mask]
    if len(spans) == 1:
        return values[slice(*spans[0])]
    return np.concatenate([values[start:stop] for start, stop in spans] or [values[:0]])


def _spread(
    sampled: "NDArray[Any]", into: "NDArray[Any]", mask: "NDArray[np.bool_]", spans: list[tuple[int, int]] | None
) -> None:
    """``into[mask] = sampled``; one value stands for all."""
    if spans is None:
        into[mask] = sampled
        return
    done = 0
    for start, stop in spans:
        into[start:stop] = sampled if len(sampled) == 1 else sampled[done : done + stop - start]
        done += stop - start


# -- rules ------------------------------------------------------------------------------------------------------------


def _check_prompt(mask: "NDArray[np.bool_]", spans: list[tuple[int, int]] | None, prompt_length: int) -> None:
    if mask[:prompt_length].any() if spans is None else spans and spans[0][0] < prompt_length:
        raise CodecError(f"the mask marks a token of the {prompt_length}-token prompt as sampled")


def _check_sampled(logprobs: "NDArray[np.float32]", versions: "NDArray[np.int32]") -> None:
    """Of the sampled tokens; a version may stand for its run."""
    if not len(logprobs):
        return
    low, high = float(logprobs.min()), float(logprobs.max())
    if not (low > -np.inf and high < np.inf):  # NaN, too, is neither
        raise CodecError(f"{int((~np.isfinite(logprobs)).sum())} sampled tokens have a logprob that is not finite")
    if high > MAX_LOGPROB:
        raise CodecError(f"a sampled token has logprob {high:g}, above {MAX_LOGPROB:g}")
    if int(versions.min()) < 0:
        raise CodecError(f"{int((versions < 0).sum())} sampled tokens have no policy version")
