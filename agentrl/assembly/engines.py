"""The generation servers of a run: attached ones, processes of this machine, or actors on a Ray cluster."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from agentrl.assembly.parts import (
    run_secret,
    vocab_size_of,
)
from agentrl.assembly.serve_on_ray import RayEngines
from agentrl.config import Config
from agentrl.serving.engine_process import (
    AttachedServers,
    EmbeddedEngineSpec,
    EngineFleet,
    ProcessEntry,
    SGLangEngineSpec,
    kill_stale,
)
from agentrl.serving.load_policy import ConcurrencyPolicy
from agentrl.serving.router_servers import RouterServers
from agentrl.serving.server_manager import AsyncLLMServerManager
from agentrl.supervise import running
from agentrl.telemetry.run_dir import RunDir

ENGINE_ROLE = "engine-"


def new_manager(
    config: Config, session: aiohttp.ClientSession, *, model_path: str, seed: int, sharers: int = 1
) -> AsyncLLMServerManager:
    """A manager without servers.

    Args:
        sharers: processes that send requests to the same servers and divide ``serve.concurrency`` between them.
    """
    concurrency = config.serve.concurrency
    return AsyncLLMServerManager(
        session=session,
        seed=seed,
        vocab_size=vocab_size_of(model_path),
        max_requests_per_server=-(-concurrency // sharers) if isinstance(concurrency, int) else None,
        concurrency=ConcurrencyPolicy() if concurrency == "auto" else None,
    )


@asynccontextmanager
async def engines(
    config: Config, directory: RunDir, *, model_path: str, ray: Any = None
) -> AsyncGenerator[AsyncLLMServerManager]:
    """The manager over running servers: attached ones, or engine processes that are started, watched and stopped here.

    Args:
        ray: the module, connected: then engines are placed on the cluster.
    """
    left_behind = [e for e in directory.recorded_processes() if e["role"].startswith(ENGINE_ROLE)]
    await asyncio.to_thread(kill_stale, [{"role": "engine", "pid": e["pid"], "started": e["created"]} for e in left_behind])
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
        new_manager(config, session, model_path=model_path, seed=config.run.seed) as manager,
    ):
        fleet = _fleet(config, directory, manager, session, model_path, ray)
        async with running(health=manager.run(), fleet=fleet.run()):
            yield manager


def _fleet(
    config: Config, directory: RunDir, manager: AsyncLLMServerManager, session: aiohttp.ClientSession, model_path: str, ray: Any
) -> EngineFleet | AttachedServers | RouterServers | RayEngines:
    def record(processes: Sequence[ProcessEntry]) -> None:
        entries = [{"role": Path(p["log"]).stem, "pid": p["pid"], "url": p["url"]} for p in processes if p["pid"] is not None]
        directory.update_processes(drop_prefix=ENGINE_ROLE, add=entries)

    serve = config.serve
    if serve.urls:
        return AttachedServers(serve.urls, manager=manager, api_key=serve.api_key, admin_key=serve.admin_key)
    if serve.router_url is not None:
        return RouterServers(serve.router_url, manager=manager, session=session, api_key=serve.api_key, admin_key=serve.admin_key)
    spec = _engine_spec(config, directory, model_path)
    if ray is not None:
        return RayEngines(ray, config, [spec] * serve.replicas, manager=manager, directory=directory, on_change=record)
    return EngineFleet(
        [spec] * serve.replicas, manager=manager, log_dir=directory.logs, omp_threads=serve.engine_threads, on_change=record
    )


def _engine_spec(config: Config, directory: RunDir, model_path: str) -> EmbeddedEngineSpec | SGLangEngineSpec:
    serve = config.serve
    if serve.engine == "sglang":
        return SGLangEngineSpec(
            model_path=model_path, command_prefix=serve.sglang_command, extra_args=serve.sglang_args, api_key=serve.api_key
        )
    return EmbeddedEngineSpec(
        model_path=model_path,
        device=None if serve.device == "auto" else serve.device,
        dtype=config.model.dtype,
        max_running_requests=serve.engine_requests,
        api_key=serve.api_key or (run_secret(directory, "engine_key") if serve.engine_auth else None),
        extra_args=[
            "--num-blocks",
            str(serve.engine_blocks),
            "--seed",
            str(config.run.seed),
            "--weights-root",
            str(directory.root.absolute()),
        ],
    )
