"""The sandbox service as a process of its own: in the foreground for the command, beside ``serve`` when a tool needs it."""

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, get_args

from agentrl.assembly.parts import SUPERVISED_VARIABLE
from agentrl.config import Config
from agentrl.errors import ConfigError, SandboxError
from agentrl.process import ClaimedPort, die_with_parent
from agentrl.supervise import deadline
from agentrl.telemetry.run_dir import RunDir

START_LIMIT_S = 60.0
STOP_LIMIT_S = 10.0


def serve_sandbox(
    host: str,
    port: int,
    *,
    workers: int,
    memory_mb: int,
    preload: Sequence[str],
    token: str | None,
    allow_unsafe: bool,
    run_dir: Path | None,
    processes: int = 1,
    tier: str = "auto",
    max_sessions: int | None = None,
    rate_limit: float | None = None,
) -> None:
    """Serve until stopped; with ``run_dir`` the address is recorded there as role ``sandbox``."""
    from agentrl.sandbox.app import serve
    from agentrl.sandbox.pool import TierChoice

    if tier not in get_args(TierChoice):
        raise ConfigError(f"sandbox tier={tier!r} must be one of {', '.join(get_args(TierChoice))}")
    options: dict[str, Any] = {} if rate_limit is None else {"rate_limit": rate_limit or None}
    with ExitStack() as stack:
        port = port or stack.enter_context(ClaimedPort(host))
        if run_dir is not None:
            RunDir(run_dir).register("sandbox", url=f"http://{host}:{port}")
            stack.callback(RunDir(run_dir).deregister, "sandbox")
        serve(
            host,
            port,
            workers=workers,
            processes=processes,
            tier=tier,
            max_sessions=max_sessions,
            memory_limit_mb=memory_mb,
            preload=tuple(preload),
            token=token,
            allow_unsafe=allow_unsafe,
            **options,
        )


@asynccontextmanager
async def sandbox_process(config: Config, directory: RunDir, *, wanted: bool) -> AsyncGenerator[str | None]:
    """A sandbox that lives as long as the block, or None where none is wanted.

    Raises:
        SandboxError: it did not come up; its log says why.
    """
    if not wanted:
        yield None
        return
    if os.environ.get(SUPERVISED_VARIABLE):  # `agentrl run` starts and watches it
        yield await _registered(directory, lambda: None)
        return
    command = [sys.executable, "-m", "agentrl", *sandbox_arguments(config, directory, port=0)]
    log_path = directory.logs / "sandbox.log"
    with log_path.open("ab") as sink:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
            preexec_fn=die_with_parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:

        def check() -> None:
            if process.returncode is not None:
                raise SandboxError(f"the sandbox ended with code {process.returncode} while starting; see {log_path}")

        yield await _registered(directory, check)
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), STOP_LIMIT_S)
            except TimeoutError:
                process.kill()
                await process.wait()
        directory.deregister("sandbox")


async def _registered(directory: RunDir, check: Callable[[], None]) -> str:
    """The address under which the sandbox registers itself; ``check`` raises when it never will."""
    async with deadline(START_LIMIT_S, "sandbox start"):
        while True:
            if url := directory.url_of("sandbox"):
                return url
            check()
            await asyncio.sleep(0.1)


def sandbox_arguments(config: Config, directory: RunDir, *, port: int) -> list[str]:
    """The command line of the run's sandbox."""
    return [
        "sandbox", "--port", str(port), "--run-dir", str(directory.root),
        "--workers", str(config.sandbox.workers), "--memory-mb", str(config.sandbox.memory_mb),
        *(flag for module in config.sandbox.preload for flag in ("--preload", module)),
    ]  # fmt: skip
