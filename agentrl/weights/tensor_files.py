"""Where each tensor's bytes lie in a safetensors file, read without any tensor library."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentrl.errors import WeightSyncError

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file."""

    name: str
    dtype: str
    """As safetensors names it: ``BF16``."""
    shape: tuple[int, ...]
    begin: int
    """First byte, from the start of the file."""
    end: int

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]


def read_header(file: Path) -> tuple[bytes, list[TensorEntry]]:
    """The header's bytes, and where each tensor's data lies.

    Raises:
        WeightSyncError: not a complete safetensors file.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = os.fstat(stream.fileno()).st_size
            if not 2 <= length <= size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = stream.read(length)
        entries: Mapping[str, Mapping[str, Any]] = json.loads(header)
        tensors: list[TensorEntry] = []
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            begin, end = (8 + length + int(offset) for offset in entry["data_offsets"])
            shape = tuple(int(size) for size in entry["shape"])
            if not 8 + length <= begin <= end <= size or end - begin != ITEM_BYTES[entry["dtype"]] * math.prod(shape):
                raise ValueError(f"tensor {name} does not fit its file")
            tensors.append(TensorEntry(name, entry["dtype"], shape, begin, end))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightSyncError(f"{file} is not a complete safetensors file ({error!r}): write it anew.") from error
    return header, tensors
