"""One of ``serve.workers``: plays the tasks it leases, on the servers it follows. Started by ``serve``, told by standard input."""

import asyncio
import logging
import os
import sys
import zlib
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial

import aiohttp
import msgspec
import uvloop

from agentrl.assembly.adopted_progress import AdoptedProgress
from agentrl.assembly.engines import new_manager
from agentrl.assembly.fleet import FleetFollower, Keyring
from agentrl.assembly.parts import run_secret
from agentrl.assembly.rollouts import rollout_status, stage_of
from agentrl.assembly.serve import DRAIN_LIMIT_S, report_status, stop_on_signals
from agentrl.assembly.serve_workers import WorkerOrder
from agentrl.assembly.watchdog import ServeProgress
from agentrl.config import Config, parse_config
from agentrl.process import settle_garbage_collector
from agentrl.rollout.admission import group_budget
from agentrl.stream.fleet_board import FleetBoard
from agentrl.stream.leases import TaskLeases
from agentrl.supervise import running
from agentrl.telemetry.logs import setup_logging
from agentrl.telemetry.run_dir import RunDir

log = logging.getLogger(__name__)


def main() -> None:
    """Play until SIGTERM, then drain; when the parent is gone, end at once."""
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=WorkerOrder)
    setup_logging(order.name, str(order.config["log"]["level"]))
    uvloop.run(play(order, is_orphan=partial(_has_lost, os.getppid())))


def _has_lost(parent: int) -> bool:
    return os.getppid() != parent


async def play(order: WorkerOrder, *, stop: asyncio.Event | None = None, is_orphan: Callable[[], bool] = lambda: False) -> None:
    """Play until ``stop``, by default SIGTERM, then finish the open groups."""
    config, directory = parse_config(order.config, place=f"order of {order.name}"), RunDir(order.root)
    stop = stop or stop_on_signals()
    async with AsyncExitStack() as stack:
        stage = await stack.enter_async_context(
            stage_of(
                config,
                directory,
                stream=order.stream,
                sandbox_url=order.sandbox_url,
                log_name=order.name.replace("serve", "rollouts"),
            )
        )
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        manager = await stack.enter_async_context(
            new_manager(config, session, model_path=config.model.path, seed=_seed(config, order), sharers=config.serve.workers)
        )
        follower = FleetFollower(order.name, FleetBoard(stage.client, stage.keys), manager, keys=_keyring(config, directory))
        budget = group_budget(
            groups_per_step=config.learn.groups,
            max_staleness=config.learn.max_staleness,
            pipeline_depth=config.learn.pipeline_depth,
        )
        leases = TaskLeases(stage.client, stage.keys, owner=order.name, budget=budget)
        progress = AdoptedProgress(stage.read_progress, lambda: follower.served)
        worker = stage.worker(manager, progress, in_flight=order.in_flight, leases=leases)
        lived = ServeProgress()
        status = report_status(directory, order.name, lambda: rollout_status(worker, stage, manager, lived))
        loops = {
            "fleet": follower.run(),
            "health": manager.run(),
            "leases": leases.run(),
            "rollouts": worker.run(),
            "status": status,
        }
        settle_garbage_collector()
        async with running(**loops):
            await stop.wait()
            if not is_orphan():
                log.info("draining name=%s", order.name)
                await worker.drain(limit_s=DRAIN_LIMIT_S)


def _seed(config: Config, order: WorkerOrder) -> int:
    """Of random ties between servers: different workers must not all prefer the same one."""
    return zlib.crc32(f"{config.run.seed}/{order.name}".encode())


def _keyring(config: Config, directory: RunDir) -> Keyring:
    serve = config.serve
    if serve.api_key is None and serve.engine == "embedded" and serve.engine_auth and serve.starts_engines:
        return Keyring(api_key=run_secret(directory, "engine_key"))
    return Keyring(api_key=serve.api_key, admin_key=serve.admin_key)


if __name__ == "__main__":
    main()
