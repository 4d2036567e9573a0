"""A black-box agent as a child process: told its task, bounded from outside, and gone with everything it started."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import tempfile
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentrl.errors import AgentError, ConfigError
from agentrl.process import die_with_parent
from agentrl.supervise import waiting
from agentrl.types import Task

TAIL_BYTES = 4096
"""Of the agent's output: shown when it fails."""
ENV_TASK_BYTES = 64 << 10
"""A longer task is in the file and on stdin only: the kernel bounds one variable to 128 KiB."""
OUTPUT_LIMIT_S = 1.0
_NOT_STARTED = (126, 127)
"""What shells and ``env`` answer for a command that cannot be run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentCommand:
    """What to start for each rollout."""

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    """Added to this process's environment, from which agentrl's own secrets are taken out."""
    cwd: str | None = None
    extra_info: Sequence[str] = ()
    """Keys of the row's ``extra_info`` that the agent is told. The ground truth is never told."""
    grace_s: float = 5.0
    """Between asking the process group to end and killing it."""

    def __post_init__(self) -> None:
        if not self.argv:
            raise ConfigError("agent.command is empty: give the program and its arguments, for example [python, my_agent.py]")


def task_json(command: AgentCommand, task: Task) -> str:
    """What the agent is told of its task: ``{id, data_source, split, prompt, messages, extra_info}``."""
    told = {key: task.extra_info[key] for key in command.extra_info if key in task.extra_info}
    prompt = next((str(m.get("content") or "") for m in reversed(task.prompt) if m.get("role") == "user"), "")
    return json.dumps(
        {
            "id": task.id, "data_source": task.data_source, "split": task.split, "prompt": prompt,
            "messages": list(task.prompt), "extra_info": told,
        },
        default=str,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentExit:
    """How an agent ended."""

    code: int
    """Negative: the signal that ended it."""
    tail: str
    """The end of its output."""

    @property
    def was_started(self) -> bool:
        return self.code not in _NOT_STARTED


async def run_agent(command: AgentCommand, task: Task, *, variables: Mapping[str, str]) -> AgentExit:
    """Start the agent, give it the task on stdin, in a file and in the environment, and wait for its end.

    Whatever ends the wait (its exit, a deadline, a cancellation), its process group is gone afterwards.

    Args:
        variables: what it needs to find the endpoint.

    Raises:
        AgentError: it could not be started.
    """
    told = task_json(command, task)
    folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="agentrl-agent-"))
    try:
        file = folder / "task.json"
        await asyncio.to_thread(file.write_text, told)
        environment = _environment(command, told, file) | dict(variables) | dict(command.env)
        with contextlib.closing(_Output()) as output:
            async with _started(command, environment, file, output) as process:
                with waiting("agent"):
                    code = await process.wait()
            with contextlib.suppress(TimeoutError):  # its group is gone; what left the group may still hold the pipe
                async with asyncio.timeout(OUTPUT_LIMIT_S):
                    await output.ended.wait()
            return AgentExit(code=code, tail=output.tail)
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


class _Output:
    """The end of what the agent prints. Our own pipe: asyncio's ``wait`` lasts until every holder of *its* pipes is gone."""

    def __init__(self) -> None:
        self._blocks: deque[bytes] = deque(maxlen=8)
        self._read_fd, self.write_fd = os.pipe()
        self._loop = asyncio.get_running_loop()
        self.ended = asyncio.Event()
        os.set_blocking(self._read_fd, False)
        self._loop.add_reader(self._read_fd, self._read)

    def _read(self) -> None:
        try:
            block = os.read(self._read_fd, TAIL_BYTES)
        except BlockingIOError:
            return
        if block:
            self._blocks.append(block)
        else:
            self._loop.remove_reader(self._read_fd)
            self.ended.set()

    def is_inherited(self) -> None:
        """The child has its end: ours would keep the pipe open."""
        if self.write_fd >= 0:
            os.close(self.write_fd)
            self.write_fd = -1

    def close(self) -> None:
        self.is_inherited()
        self._loop.remove_reader(self._read_fd)
        os.close(self._read_fd)

    @property
    def tail(self) -> str:
        return b"".join(self._blocks)[-TAIL_BYTES:].decode("utf-8", "replace").strip()


@asynccontextmanager
async def _started(
    command: AgentCommand, environment: Mapping[str, str], task_file: Path, output: _Output
) -> AsyncGenerator[asyncio.subprocess.Process]:
    try:
        with task_file.open("rb") as stdin:  # noqa: ASYNC230  # a small file that was just written
            process = await asyncio.create_subprocess_exec(
                *command.argv,
                stdin=stdin,
                stdout=output.write_fd,
                stderr=asyncio.subprocess.STDOUT,
                env=dict(environment),
                cwd=command.cwd,
                start_new_session=True,  # a group of its own, so that all of it can be ended
                preexec_fn=die_with_parent,
            )
    except OSError as error:
        raise AgentError(f"agent.command {command.argv[0]!r} cannot be started: {error}") from error
    output.is_inherited()
    try:
        yield process
    finally:
        await _end(process, command.grace_s)


async def _end(process: asyncio.subprocess.Process, grace_s: float) -> None:
    if process.returncode is None:
        _signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await process.wait()
    _signal_group(process.pid, signal.SIGKILL)
    if process.returncode is None:
        await process.wait()


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _environment(command: AgentCommand, told: str, file: Path) -> dict[str, str]:
    kept: dict[str, str] = {key: value for key, value in os.environ.items() if not key.startswith("AGENTRL_")}
    for key in ("NO_PROXY", "no_proxy"):  # the endpoint is on this machine, whatever proxy the machine uses
        kept[key] = ",".join(filter(None, [kept.get(key, ""), "127.0.0.1,localhost"]))
    prompt: Any = json.loads(told)["prompt"]
    kept["AGENTRL_TASK_FILE"] = str(file)
    if len(told.encode()) <= ENV_TASK_BYTES:
        kept |= {"AGENTRL_TASK": told.replace("\0", ""), "AGENTRL_PROMPT": str(prompt).replace("\0", "")}
    return kept
