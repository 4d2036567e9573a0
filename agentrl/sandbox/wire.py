"""SandboxFusion's ``/run_code`` and ``/run_jupyter`` on the wire, to the letter, with ours added as optional fields; and the
sessions' requests and answers.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from agentrl.sandbox.job import (
    MAX_CODE_BYTES,
    MAX_FILES,
    MAX_FILES_BYTES,
    MAX_WALL_S,
    MIB,
    CellOutcome,
    Job,
    Limits,
    Outcome,
    Reason,
    Tier,
    check_path,
)
from agentrl.sandbox.languages import Language, find

MAX_CELLS = 256
MAX_JUPYTER_S = 300.0
SESSION_CPU_S = 600.0


class BadRequest(ValueError):
    """The request cannot be honoured; the text says why and what is allowed."""


class RunCodeRequest(BaseModel):
    """SandboxFusion's request. Unknown fields are ignored, as it does."""

    model_config = ConfigDict(frozen=True)

    code: str
    """The program."""
    language: str = "python"
    """One of the supported languages."""
    compile_timeout: float = Field(default=10.0, gt=0)
    """Seconds of wall time for compiling, at most 30."""
    run_timeout: float = Field(default=10.0, gt=0)
    """Seconds of wall time, at most 30; waiting in the queue does not count."""
    memory_limit_MB: int = -1
    """MiB, at most the service's own limit; -1 takes that."""
    stdin: str | None = None
    """Standard input; empty when absent."""
    files: dict[str, str | None] = Field(default_factory=dict)
    """Path below /work -> base64 content; null makes an empty file."""
    fetch_files: list[str] = Field(default_factory=list)
    """Paths below /work to return."""
    total_timeout: float | None = Field(default=None, gt=0)
    """Ours: seconds from arrival to answer, queueing included. Passed while waiting: HTTP 504."""


class RunJupyterRequest(BaseModel):
    """SandboxFusion's request: a fresh kernel, all cells, nothing kept."""

    model_config = ConfigDict(frozen=True)

    cells: list[str] = Field(max_length=MAX_CELLS)
    """The cells, run in order; one that fails does not stop the next."""
    cell_timeout: float = Field(default=0.0, ge=0)
    """Seconds per cell; 0 leaves only the total."""
    total_timeout: float = Field(default=45.0, gt=0)
    """Seconds for all cells, at most 300; waiting in the queue does not count."""
    memory_limit_MB: int = -1
    kernel: Literal["python3"] = "python3"
    files: dict[str, str | None] = Field(default_factory=dict)
    fetch_files: list[str] = Field(default_factory=list)


class OpenSessionRequest(BaseModel):
    """Open a kernel that lives for a trajectory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    language: str = "python"
    memory_limit_MB: int = -1
    idle_ttl: float | None = Field(default=None, gt=0)
    """Seconds without a cell until it is given up, at most the service's own."""
    ttl: float | None = Field(default=None, gt=0)
    """Seconds until it is given up in any case, at most the service's own."""


class SessionRunRequest(BaseModel):
    """One cell."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    code: str
    timeout: float = Field(default=10.0, gt=0)
    """Seconds of wall time, at most 30; then the cell is interrupted, and the session killed when that does not help."""
    echo: bool = True
    """Print the value of a last expression."""
    files: dict[str, str | None] = Field(default_factory=dict)
    fetch_files: list[str] = Field(default_factory=list)
    total_timeout: float | None = Field(default=None, gt=0)
    """Seconds from arrival to answer, queueing included."""


class CommandRunResult(BaseModel):
    """SandboxFusion's result of one command, then our additions."""

    status: Literal["Finished", "Error", "TimeLimitExceeded"]
    execution_time: float | None = None
    return_code: int | None = None
    stdout: str | None = None
    stderr: str | None = None
    reason: Literal["ok", "exit", "signal", "wall", "cpu", "memory", "output"] | None = None
    """Why it ended, from the kernel's account, never from what the code printed."""
    truncated: bool = False
    """stdout or stderr were longer than what is kept; the gap is marked in the text."""
    cpu_time: float | None = None
    max_rss_kb: int | None = None


class CellRunResult(BaseModel):
    """SandboxFusion's result of one cell: media types to data, and errors as a notebook has them."""

    stdout: str = ""
    stderr: str = ""
    display: list[dict[str, Any]] = Field(default_factory=list[dict[str, Any]])
    error: list[dict[str, Any]] = Field(default_factory=list[dict[str, Any]])


class RunCodeResponse(BaseModel):
    """SandboxFusion's response, then our additions."""

    status: Literal["Success", "Failed", "SandboxError"]
    message: str = ""
    compile_result: CommandRunResult | None = None
    run_result: CommandRunResult | None = None
    executor_pod_name: str | None = None
    files: dict[str, str] = Field(default_factory=dict)
    file_errors: dict[str, str] = Field(default_factory=dict)
    """Requested files that were not returned, and why."""
    queue_time: float = 0.0
    """Seconds the request waited for its turn."""
    tier: Tier | None = None


class RunJupyterResponse(BaseModel):
    """SandboxFusion's response, then our additions."""

    status: Literal["Success", "Failed", "SandboxError"]
    message: str = ""
    driver: CommandRunResult | None = None
    cells: list[CellRunResult] = Field(default_factory=list[CellRunResult])
    executor_pod_name: str | None = None
    files: dict[str, str] = Field(default_factory=dict)
    file_errors: dict[str, str] = Field(default_factory=dict)
    queue_time: float = 0.0
    tier: Tier | None = None


class OpenSessionResponse(BaseModel):
    """A session's id and what it may use."""

    session_id: str
    idle_ttl: float
    ttl: float
    memory_limit_MB: int
    tier: Tier | None = None


class SessionRunResponse(RunCodeResponse):
    """As for ``/run_code``, and whether the session still lives."""

    session_id: str = ""
    session_alive: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A checked request: what is compiled, if anything, and what runs."""

    language: Language
    run: Job
    compile: Job | None = None

    def built(self, artifact: bytes) -> Job:
        """The run with what compiling made."""
        name = self.language.artifact
        files = {**self.run.files, name: artifact}
        return replace(self.run, code="", source_name=None, files=files, executables=frozenset([name]))


def to_program(request: RunCodeRequest, *, memory_limit_mb: int) -> Program:
    """A checked program.

    Raises:
        BadRequest: something in it cannot be honoured.
    """
    try:
        language = find(request.language)
    except ValueError as error:
        raise BadRequest(str(error)) from error
    check_code(request.code)
    files, fetch = decode_files(request.files), check_fetch(request.fetch_files)
    memory_bytes = check_memory(request.memory_limit_MB, memory_limit_mb) * MIB
    run = Job(
        code=request.code,
        language=language.name,
        command=language.command,
        source_name=language.source if language.command else None,
        bound_address_space=language.bound_address_space,
        stdin=None if request.stdin is None else request.stdin.encode("utf-8", "replace"),
        files=files,
        fetch=fetch,
        limits=Limits(wall_s=min(request.run_timeout, MAX_WALL_S), memory_bytes=memory_bytes),
    )
    if not language.compile:
        return Program(language=language, run=run)
    compiling = Job(
        code=request.code,
        language=language.name,
        command=language.compile,
        source_name=language.source,
        bound_address_space=language.bound_address_space,
        files=files,
        fetch=[language.artifact],
        limits=Limits(
            wall_s=min(request.compile_timeout, MAX_WALL_S),
            memory_bytes=max(memory_limit_mb, 512) * MIB,
            tmpfs_bytes=256 * MIB,
            inodes=16384,
        ),
    )
    return Program(language=language, run=run, compile=compiling)


def check_code(code: str) -> str:
    """Raises ``BadRequest`` when it is too long."""
    code_bytes = len(code.encode("utf-8", "replace"))
    if code_bytes > MAX_CODE_BYTES:
        raise BadRequest(f"code has {code_bytes} bytes, at most {MAX_CODE_BYTES} are accepted; pass data in files")
    return code


def check_memory(wanted_mb: int, limit_mb: int) -> int:
    """MiB; -1 takes the service's limit, more than that is capped."""
    if wanted_mb == 0 or wanted_mb < -1:
        raise BadRequest(f"memory_limit_MB={wanted_mb} must be positive, or -1 for the service's {limit_mb}")
    return limit_mb if wanted_mb == -1 else min(wanted_mb, limit_mb)


def check_fetch(paths: Sequence[str]) -> list[str]:
    """Paths below the working directory."""
    if len(paths) > MAX_FILES:
        raise BadRequest(f"fetch_files has more than {MAX_FILES} entries")
    try:
        return [check_path(path) for path in paths]
    except ValueError as error:
        raise BadRequest(str(error)) from error


def decode_files(files: Mapping[str, str | None]) -> dict[str, bytes]:
    """Input files by path below the working directory."""
    if len(files) > MAX_FILES:
        raise BadRequest(f"files has {len(files)} entries, at most {MAX_FILES} are accepted")
    decoded: dict[str, bytes] = {}
    for path, content in files.items():
        try:
            decoded[check_path(path)] = base64.b64decode(content or "", validate=True)
        except binascii.Error as error:
            raise BadRequest(f"files[{path[:80]!r}] is not base64: {error}") from error
        except ValueError as error:
            raise BadRequest(str(error)) from error
    parents = {path.rsplit("/", depth)[0] for path in decoded for depth in range(1, path.count("/") + 1)}
    if both := sorted(parents & decoded.keys()):
        raise BadRequest(f"files: {both[0][:80]!r} is both a file and a directory")
    total = sum(map(len, decoded.values()))
    if total > MAX_FILES_BYTES:
        raise BadRequest(f"files hold {total} bytes, at most {MAX_FILES_BYTES} are accepted")
    return decoded


def to_result(outcome: Outcome) -> CommandRunResult:
    """One command's outcome on the wire."""
    timed_out = outcome.reason in ("wall", "cpu")
    return CommandRunResult(
        status="TimeLimitExceeded" if timed_out else "Finished",
        execution_time=outcome.wall_s,
        return_code=None if timed_out else outcome.code,
        stdout=outcome.stdout,
        stderr=outcome.stderr,
        reason=outcome.reason,
        truncated=outcome.truncated,
        cpu_time=outcome.cpu_s,
        max_rss_kb=outcome.max_rss_kb,
    )


def to_response(
    outcome: Outcome | None, limits: Limits, *, compiled: Outcome | None = None, queue_time_s: float, tier: Tier | None
) -> RunCodeResponse:
    """SandboxFusion's mapping: a non-zero exit and a timeout are both Failed, the detail is in the results."""
    last = outcome or compiled
    assert last is not None
    return RunCodeResponse(
        status="Success" if outcome is not None and outcome.code == 0 and outcome.reason == "ok" else "Failed",
        message=explain(last.reason, last.code, limits),
        compile_result=to_result(compiled) if compiled is not None else None,
        run_result=to_result(outcome) if outcome is not None else None,
        files=encode_files(outcome) if outcome is not None else {},
        file_errors=dict(outcome.file_errors) if outcome is not None else {},
        queue_time=queue_time_s,
        tier=tier,
    )


def to_cell(outcome: CellOutcome) -> CellRunResult:
    """A notebook cell's outcome on the wire."""
    return CellRunResult(
        stdout=outcome.stdout,
        stderr=outcome.stderr,
        display=[dict(d) for d in outcome.display],
        error=[dict(e) for e in outcome.error],
    )


def encode_files(outcome: Outcome) -> dict[str, str]:
    """Fetched files as base64."""
    return {path: base64.b64encode(data).decode() for path, data in outcome.files.items()}


def explain(reason: Reason, code: int, limits: Limits) -> str:
    """One line about an end that was not ordinary."""
    return {
        "wall": f"killed after {limits.wall_s:g} s of wall time",
        "cpu": "killed at the CPU time limit",
        "memory": f"killed: its processes held more than {limits.memory_bytes // MIB} MiB",
        "output": f"killed: more than {limits.killed_output_bytes} bytes of output on one stream",
        "signal": f"killed by signal {-code}",
    }.get(reason, "")
