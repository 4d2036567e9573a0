"""What is run, under which limits, and how it ended: the values that pass between HTTP, the pool and a backend."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

MIB = 1 << 20

Tier = Literal["zygote", "zygote-landlock", "unsafe"]
Reason = Literal["ok", "exit", "signal", "wall", "cpu", "memory", "output"]

MAX_CODE_BYTES = MIB
MAX_FILES = 256
MAX_FILES_BYTES = 32 * MIB
MAX_WALL_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one run may use."""

    wall_s: float
    memory_bytes: int
    """Address space on top of the warm interpreter, and private memory of all the run's processes together."""
    tmpfs_bytes: int = 64 * MIB
    """Shared by /work, /tmp and /dev/shm."""
    inodes: int = 4096
    file_bytes: int = 16 * MIB
    open_files: int = 64
    processes: int = 32
    kept_output_bytes: int = 64 * 1024
    """Per stream: head and tail are kept, the middle is counted."""
    killed_output_bytes: int = MIB
    """Per stream: more than this ends the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One program. ``files`` are written below the working directory first, ``fetch`` are read from it afterwards."""

    code: str
    limits: Limits
    language: Literal["python", "bash"] = "python"
    stdin: bytes | None = None
    files: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    fetch: Sequence[str] = ()

    def encode(self) -> bytes:
        """Length, JSON header, code, file contents: what the child unpacks."""
        code = self.code.encode("utf-8", "replace")
        header = json.dumps({"code_size": len(code), "files": [[path, len(data)] for path, data in self.files.items()]}).encode()
        return b"".join([len(header).to_bytes(4, "little"), header, code, *self.files.values()])


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended. ``code`` is negative for a signal; stdout and stderr are already cut to what is kept."""

    code: int
    reason: Reason
    stdout: str
    stderr: str
    wall_s: float
    cpu_s: float
    max_rss_kb: int
    truncated: bool = False
    files: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    file_errors: Mapping[str, str] = field(default_factory=dict[str, str])


def check_path(path: str) -> str:
    """A path below the working directory, normalised; ``/work/x`` means ``x``.

    Raises:
        ValueError: it leaves the working directory or is no usable name.
    """
    relative = path.removeprefix("/work/")
    parts = relative.split("/")
    if not relative or relative.startswith("/") or "\0" in relative or ".." in parts or len(relative.encode()) > 1024:
        raise ValueError(f"file path {path[:80]!r} must stay below the working directory /work: no '..', no other absolute path")
    normal = os.path.normpath(relative)
    if normal == ".":
        raise ValueError(f"file path {path[:80]!r} names the working directory itself")
    return normal
