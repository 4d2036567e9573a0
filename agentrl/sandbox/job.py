"""What is run, under which limits, and how it ended: the values that pass between HTTP, the pool and a backend."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

MIB = 1 << 20

Tier = Literal["zygote", "zygote-landlock", "bubblewrap", "nsjail", "unsafe"]
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
    cpu_s: float = 0.0
    """Per process; 0 takes the wall time. Of a session: also of all its processes and cells together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One program. ``files`` are written below the working directory first, ``fetch`` are read from it afterwards."""

    code: str
    limits: Limits
    language: str = "python"
    command: Sequence[str] = ()
    """What to execute; without it the code is Python and runs in the fork server's interpreter."""
    source_name: str | None = None
    """The file below the working directory that the code is written to first."""
    bound_address_space: bool = True
    stdin: bytes | None = None
    files: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    executables: frozenset[str] = frozenset()
    """Which of the files may be executed."""
    fetch: Sequence[str] = ()

    def encode(self) -> bytes:
        """Length, JSON header, code, file contents: what the child unpacks."""
        return encode(self.code, self.files, self.executables)


def encode(code: str, files: Mapping[str, bytes], executables: frozenset[str] = frozenset()) -> bytes:
    """Code and files as the jail's side unpacks them."""
    source = code.encode("utf-8", "replace")
    listed = [[path, len(data), path in executables] for path, data in files.items()]
    header = json.dumps({"code_size": len(source), "files": listed}).encode()
    return b"".join([len(header).to_bytes(4, "little"), header, source, *files.values()])


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


@dataclass(frozen=True, slots=True, kw_only=True)
class CellOutcome(Outcome):
    """How one cell of a session ended. Errors and displays are the session's own account."""

    is_alive: bool
    """Whether the session takes another cell."""
    display: Sequence[Mapping[str, str]] = ()
    error: Sequence[Mapping[str, object]] = ()


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
