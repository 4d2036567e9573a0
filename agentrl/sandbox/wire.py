"""SandboxFusion's ``/run_code`` on the wire: request and response to the letter, ours added as optional fields."""

import base64
import binascii
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from agentrl.sandbox.job import (
    MAX_CODE_BYTES,
    MAX_FILES,
    MAX_FILES_BYTES,
    MAX_WALL_S,
    MIB,
    Job,
    Limits,
    Outcome,
    Tier,
    check_path,
)

SUPPORTED_LANGUAGES = ("python", "bash")


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
    """Seconds; neither language has a compile step."""
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


def to_job(request: RunCodeRequest, *, memory_limit_mb: int) -> Job:
    """A checked job.

    Raises:
        BadRequest: something in it cannot be honoured.
    """
    language = request.language.lower()
    if language not in SUPPORTED_LANGUAGES:
        raise BadRequest(f"language {request.language[:40]!r} is not supported; supported: {', '.join(SUPPORTED_LANGUAGES)}")
    code_bytes = len(request.code.encode("utf-8", "replace"))
    if code_bytes > MAX_CODE_BYTES:
        raise BadRequest(f"code has {code_bytes} bytes, at most {MAX_CODE_BYTES} are accepted; pass data in files")
    if request.memory_limit_MB == 0 or request.memory_limit_MB < -1:
        raise BadRequest(f"memory_limit_MB={request.memory_limit_MB} must be positive, or -1 for the service's {memory_limit_mb}")
    memory_mb = memory_limit_mb if request.memory_limit_MB == -1 else min(request.memory_limit_MB, memory_limit_mb)
    try:
        fetch = [check_path(path) for path in request.fetch_files[: MAX_FILES + 1]]
    except ValueError as error:
        raise BadRequest(str(error)) from error
    if len(fetch) > MAX_FILES:
        raise BadRequest(f"fetch_files has more than {MAX_FILES} entries")
    return Job(
        code=request.code,
        language="python" if language == "python" else "bash",
        stdin=None if request.stdin is None else request.stdin.encode("utf-8", "replace"),
        files=_decode_files(request.files),
        fetch=fetch,
        limits=Limits(wall_s=min(request.run_timeout, MAX_WALL_S), memory_bytes=memory_mb * MIB),
    )


def _decode_files(files: dict[str, str | None]) -> dict[str, bytes]:
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


def to_response(outcome: Outcome, job: Job, *, queue_time_s: float, tier: Tier | None) -> RunCodeResponse:
    """SandboxFusion's mapping: a non-zero exit and a timeout are both Failed, the detail is in ``run_result``."""
    timed_out = outcome.reason in ("wall", "cpu")
    return RunCodeResponse(
        status="Success" if outcome.code == 0 and outcome.reason == "ok" else "Failed",
        message=_explain(outcome, job),
        run_result=CommandRunResult(
            status="TimeLimitExceeded" if timed_out else "Finished",
            execution_time=outcome.wall_s,
            return_code=None if timed_out else outcome.code,
            stdout=outcome.stdout,
            stderr=outcome.stderr,
            reason=outcome.reason,
            truncated=outcome.truncated,
            cpu_time=outcome.cpu_s,
            max_rss_kb=outcome.max_rss_kb,
        ),
        files={path: base64.b64encode(data).decode() for path, data in outcome.files.items()},
        file_errors=dict(outcome.file_errors),
        queue_time=queue_time_s,
        tier=tier,
    )


def _explain(outcome: Outcome, job: Job) -> str:
    limits = job.limits
    return {
        "wall": f"killed after {limits.wall_s:g} s of wall time",
        "cpu": "killed at the CPU time limit",
        "memory": f"killed: its processes held more than {limits.memory_bytes // MIB} MiB",
        "output": f"killed: more than {limits.killed_output_bytes} bytes of output on one stream",
        "signal": f"killed by signal {-outcome.code}",
    }.get(outcome.reason, "")
