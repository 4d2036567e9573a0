"""``agentrl doctor``: check a machine before a run, or name the stage of a run that waits."""

import asyncio
import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from agentrl.assembly.stalls import Finding, Level, diagnose, take_snapshot
from agentrl.config import Config
from agentrl.errors import AgentRLError
from agentrl.telemetry.run_dir import RunDir

MIN_FREE_GIB = 5.0


def diagnose_machine(config: Config | None) -> list[Finding]:
    """Versions, devices, the stream's server, the sandbox, disk; with a config also its learner's settings, tasks, template and reward."""
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", _python),
        ("torch", _torch),
        ("stream", _stream_server),
        ("sandbox", _sandbox),
        ("disk", lambda: _disk(Path(config.run.dir) if config else Path())),
    ]
    if config is not None:
        checks += [
            ("learner", lambda: _learner(config)),
            ("tasks", lambda: _tasks(config)),
            ("template", lambda: _template(config)),
            ("reward", lambda: _reward(config)),
        ]
    return [_guarded(subject, check) for subject, check in checks]


def diagnose_template(config: Config) -> Finding:
    """The chat template's self-test: the differing tokens where it fails, else the call format and where turns end."""
    return _guarded("template", lambda: _template(config))


def diagnose_run(root: Path) -> list[Finding]:
    """The verdict on the run, then who lives, what each part waits for, and what is not as it should be.

    Raises:
        ConfigError: it is no run directory.
    """
    return diagnose(take_snapshot(RunDir.open(root)))


def _guarded(subject: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except (AgentRLError, OSError, ImportError, ValueError) as error:
        return Finding(subject, "fail", f"{type(error).__name__}: {error}")


def _python() -> Finding:
    names = ("agentrl", "torch", "transformers", "redis", "aiohttp")
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names)
    return Finding("python", "ok", f"{sys.version.split()[0]}; {versions}")


def _torch() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return Finding("torch", "ok", f"CUDA: {names}")
    return Finding("torch", "ok", f"CPU only, {os.cpu_count()} cores")


def _stream_server() -> Finding:
    from agentrl.stream.connection import check_server, connect
    from agentrl.stream.server import EmbeddedServer, find_server_binary

    path, version = find_server_binary()
    with tempfile.TemporaryDirectory(prefix="agentrl-doctor-") as folder:
        server = EmbeddedServer(Path(folder))
        url = server.ensure()
        try:
            with connect(url, role="doctor") as client:
                persistence = check_server(client).persistence
        finally:
            server.stop()
    return Finding("stream", "ok", f"{path} {version} starts and answers; durability {persistence}")


def _sandbox() -> Finding:
    from agentrl.sandbox.job import MIB, Job, Limits
    from agentrl.sandbox.pool import Pool

    async def tried() -> tuple[str, str]:
        pool = Pool()
        async with pool.running():
            outcome = await pool.run(Job(code="print(6 * 7)", limits=Limits(wall_s=5.0, memory_bytes=256 * MIB)), 0)
            return str(pool.active_tier), outcome.stdout.strip()

    tier, answer = asyncio.run(tried())
    if answer != "42":
        return Finding("sandbox", "fail", f"tier {tier} starts but print(6 * 7) gave {answer!r}")
    if tier == "zygote":
        return Finding("sandbox", "ok", "namespaces and seccomp: full isolation; runs code")
    return Finding(
        "sandbox", "warn", f"only the weaker tier {tier} is possible here", "see docs/sandbox.md for what it does not cover"
    )


def _disk(folder: Path) -> Finding:
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free / 2**30
    level: Level = "ok" if free >= MIN_FREE_GIB else "warn"
    return Finding(
        "disk", level, f"{free:.1f} GiB free at {existing}", "" if level == "ok" else "checkpoints and weights may not fit"
    )


def _learner(config: Config) -> Finding:
    from agentrl.assembly.learn import check_learning

    check_learning(config)
    learn = config.learn
    return Finding(
        "learner", "ok", f"{learn.advantage} and {learn.loss} on {learn.ranks} rank(s) are settings that work together"
    )


def _tasks(config: Config) -> Finding:
    from agentrl.assembly.parts import load_tasks

    tasks = load_tasks(config.data.train, what="data.train")
    return Finding("tasks", "ok", f"{len(tasks)} training tasks in {config.data.train}")


def _template(config: Config) -> Finding:
    from agentrl.assembly.parts import build_toolbox, load_tokenizer, unchecked_template
    from agentrl.rollout.tool_format import choose_parser, misread

    tokenizer = load_tokenizer(config)
    toolbox = build_toolbox(config, tokenizer, sandbox_url="http://127.0.0.1:9")
    try:
        template = unchecked_template(config, tokenizer, toolbox)
        notes = template.self_test().notes  # a refusal shows the differing tokens
        parser = choose_parser(config.serve.parser, template)
    finally:
        asyncio.run(toolbox.aclose())
    names = ", ".join(s["function"]["name"] for s in toolbox.schemas()) or "no tools"
    ends = " ".join(template.decode_all([i]) for i in template.stop_ids)
    rewrites = [n for n in notes if "not prefix-preserving" in n]
    text = f"{'rewrites earlier turns' if rewrites else 'is prefix-preserving'}; offers {names}; calls as {parser}; turns end at {ends}"
    text = "\n".join([text, *(f"{'':19}{note}" for note in notes)])
    if problem := misread(parser, template):
        return Finding("template", "warn", text, problem)
    return Finding("template", "warn" if rewrites else "ok", text)


def _reward(config: Config) -> Finding:
    from agentrl.assembly.parts import build_scorer, env_name

    build_scorer(config)
    return Finding("reward", "ok", env_name(config))
