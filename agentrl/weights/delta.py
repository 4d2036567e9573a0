"""Snapshots that hold only what changed: sparse index and value per tensor against an earlier snapshot.

A delta directory holds ``delta.json`` (which snapshot it builds on, what the result must be) and ``changes.bin``, a safetensors
file of integers: for each changed tensor ``<file>/<tensor>/gaps`` (differences of the sorted element indexes) and ``.../bits`` (the
new elements' bits). Elements are compared and written as bits, so the result is the learner's file byte for byte and
``weights_digest`` of it is the digest of the policy record, whatever the dtype. No torch: bits need none.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from agentrl.errors import WeightSyncError
from agentrl.weights.tensor_files import TensorEntry, read_header

Bits: TypeAlias = NDArray[np.unsignedinteger[Any]]

SCHEMA = 1
DELTA_FILE = "delta.json"
CHANGES_FILE = "changes.bin"
_CHUNK_ELEMENTS = 1 << 24
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What ``delta.json`` says."""

    base: str
    """Name of the snapshot it builds on, a sibling directory: full or a delta itself."""
    digest: str
    """``weights_digest`` of the result."""
    changed: int
    """Elements that differ."""
    total: int
    num_bytes: int
    """Of ``changes.bin``."""
    full_bytes: int
    """Of the weight files it stands for."""


def read_delta(directory: str | Path) -> Delta | None:
    """What a snapshot's ``delta.json`` says; None for a full snapshot.

    Raises:
        WeightSyncError: the file is damaged or of an unknown schema.
    """
    file = Path(directory) / DELTA_FILE
    try:
        fields: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise WeightSyncError(f"{file} cannot be read ({error}): publish a full snapshot.") from error
    if fields.pop("schema", None) != SCHEMA:
        raise WeightSyncError(f"{file} is not of schema {SCHEMA}: learner and serve must run the same version.")
    try:
        delta = Delta(**fields)
    except TypeError as error:
        raise WeightSyncError(f"{file} is damaged ({error}): publish a full snapshot.") from error
    if not delta.base or Path(delta.base).name != delta.base or delta.base in (".", ".."):
        raise WeightSyncError(f"{file} names the base {delta.base!r}, which is no sibling directory.")
    return delta


def write_delta(out: Path, *, base: Path, base_name: str, new: Path, digest: str) -> Delta | None:
    """Write what changed from the full snapshot ``base`` to the full snapshot ``new``.

    Args:
        out: directory to make; nothing is made durable here.
        base: weight files to compare with.
        base_name: the name readers know that snapshot by.
        new: the snapshot to describe.
        digest: ``weights_digest`` of ``new``.

    Returns:
        What was written; None, and nothing written, when the two differ in more than tensor contents.
    """
    files = sorted(file.name for file in new.glob("*.safetensors"))
    if files != sorted(file.name for file in base.glob("*.safetensors")):
        return None
    changes: dict[str, Bits] = {}
    changed = total = full_bytes = 0
    for name in files:
        header, tensors = read_header(new / name)
        if header != read_header(base / name)[0]:
            return None
        old, fresh = (np.memmap(folder / name, dtype=np.uint8, mode="r") for folder in (base, new))
        if len(old) != len(fresh):
            return None
        full_bytes += len(fresh)
        for tensor in tensors:
            indexes, bits = _differences(_bits(old, tensor), _bits(fresh, tensor))
            total += (tensor.end - tensor.begin) // tensor.item_bytes
            changed += len(indexes)
            if len(indexes):
                changes[f"{name}/{tensor.name}/gaps"] = _narrow(np.diff(indexes, prepend=np.uint64(0)))
                changes[f"{name}/{tensor.name}/bits"] = bits
    from safetensors.numpy import save_file

    out.mkdir(parents=True)
    save_file(changes, str(out / CHANGES_FILE))
    num_bytes = (out / CHANGES_FILE).stat().st_size
    delta = Delta(base=base_name, digest=digest, changed=changed, total=total, num_bytes=num_bytes, full_bytes=full_bytes)
    fields = {name: getattr(delta, name) for name in ("base", "digest", "changed", "total", "num_bytes", "full_bytes")}
    (out / DELTA_FILE).write_text(json.dumps({"schema": SCHEMA, **fields}, indent=1) + "\n")
    return delta


def apply_delta(delta: Path, *, base: Path, out: Path) -> None:
    """Make the full snapshot that ``delta`` describes out of the full snapshot ``base``: its files, with what changed written in.

    The caller checks the result's digest; a wrong base shows there.

    Args:
        delta: a delta directory.
        base: a full directory; everything else in it (config, tokenizer) is taken over.
        out: directory to make.

    Raises:
        WeightSyncError: the delta is torn, or was made for files of another layout.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        changes = load_file(str(delta / CHANGES_FILE))
    except (SafetensorError, OSError) as error:
        raise WeightSyncError(f"{delta / CHANGES_FILE} cannot be read ({error}): publish a full snapshot.") from error
    out.mkdir(parents=True)
    for file in base.iterdir():
        if file.is_file():
            shutil.copyfile(file, out / file.name)
    used = 0
    for file in sorted(out.glob("*.safetensors")):
        _, tensors = read_header(file)
        data = np.memmap(file, dtype=np.uint8, mode="r+")
        for tensor in tensors:
            key = f"{file.name}/{tensor.name}"
            if f"{key}/gaps" in changes:
                _patch(_bits(data, tensor), changes[f"{key}/gaps"], changes.get(f"{key}/bits"), where=f"{delta}: {key}")
                used += 2
        data.flush()
    if used != len(changes):
        raise WeightSyncError(
            f"{delta} changes {len(changes) - used} tensors that {base} does not have: it builds on another snapshot."
        )


def _patch(elements: Bits, gaps: Bits, bits: Bits | None, *, where: str) -> None:
    if bits is None or len(bits) != len(gaps) or bits.dtype != elements.dtype:
        raise WeightSyncError(f"{where}: {len(gaps)} indexes do not pair with the values: publish a full snapshot.")
    indexes = np.cumsum(gaps, dtype=np.uint64)
    if len(indexes) and int(indexes[-1]) >= len(elements):
        raise WeightSyncError(
            f"{where}: index {int(indexes[-1])} is outside a tensor of {len(elements)}: it builds on another model."
        )
    elements[indexes] = bits


def _differences(old: Bits, new: Bits) -> tuple[NDArray[np.uint64], Bits]:
    """Indexes and new bits of the elements that differ, in slices: temporary memory stays small."""
    indexes: list[NDArray[np.uint64]] = []
    for start in range(0, len(new), _CHUNK_ELEMENTS):
        stop = start + _CHUNK_ELEMENTS
        indexes.append(np.flatnonzero(old[start:stop] != new[start:stop]).astype(np.uint64) + np.uint64(start))
    found = np.concatenate(indexes) if indexes else np.zeros(0, np.uint64)
    return found, np.ascontiguousarray(new[found])


def _narrow(values: NDArray[np.uint64]) -> Bits:
    most = int(values.max(initial=0))
    return values.astype(next(kind for kind in (np.uint8, np.uint16, np.uint32, np.uint64) if most <= np.iinfo(kind).max))


def _bits(data: NDArray[np.uint8], tensor: TensorEntry) -> Bits:
    """The tensor's elements as unsigned integers, in the file."""
    raw = data[tensor.begin : tensor.end]
    if tensor.begin % tensor.item_bytes:  # safetensors aligns its data; another writer may not
        raise WeightSyncError(f"tensor {tensor.name} is not aligned in its file: write it with the safetensors library.")
    return raw.view(_UNSIGNED[tensor.item_bytes])
