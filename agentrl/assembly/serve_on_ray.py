"""``agentrl serve`` with ``serve.launcher=ray``: engines and rollout workers as Ray actors, over the machines of a cluster.

Ray says where: each engine gets a placement group of its own (all GPUs of one engine on one machine), each worker a CPU. What they do
is the same as without Ray: an engine actor runs one engine process and reports its address; a worker actor plays leased tasks.
An actor that dies is made again. Actors are told JSON and answer JSON; weights and trajectories do not pass through Ray. All machines must see the
run directory under the same path: weights and trajectory logs are files there.

Waits for: room in the cluster (``serve.ray_timeout_s``), the engines' first answer, the actors' calls.
"""

import asyncio
import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import msgspec

from agentrl.assembly.ray_cluster import import_ray, joined_ray, last_line, settle, surroundings
from agentrl.assembly.serve_workers import WorkerOrder, orders
from agentrl.assembly.worker_status import fresh_statuses, summed
from agentrl.config import Config
from agentrl.errors import ConfigError
from agentrl.serving.engine_process import EmbeddedEngineSpec, EngineFleet, ProcessEntry, SGLangEngineSpec
from agentrl.serving.server_manager import AsyncLLMServerManager
from agentrl.supervise import running
from agentrl.telemetry.logs import setup_logging
from agentrl.telemetry.run_dir import RunDir

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5
AGAIN_AFTER_S = 2.0
STOP_S = 15.0
"""For an engine to end, before its actor is killed around it."""
OwnEngineSpec: TypeAlias = EmbeddedEngineSpec | SGLangEngineSpec
SPECS: Mapping[str, type[OwnEngineSpec]] = {"embedded": EmbeddedEngineSpec, "sglang": SGLangEngineSpec}


@asynccontextmanager
async def cluster(config: Config) -> AsyncGenerator[Any]:
    """Join the cluster, or start a Ray of our own on this machine; yields the module ``ray``.

    Raises:
        ConfigError: Ray is not installed or cannot be reached.
    """
    serve = config.serve
    needed = serve.workers + serve.replicas * serve.engine_cpus
    connection = contextlib.ExitStack()  # so that both ends of it run in a thread
    try:
        joining = joined_ray("serve.launcher", address=serve.ray_address, num_cpus=needed)
        yield await asyncio.to_thread(connection.enter_context, joining)
    finally:
        await asyncio.to_thread(connection.close)


class RayWorkers:
    """Plays rollouts in one actor per worker; the counterpart of ``WorkerProcesses``."""

    def __init__(
        self,
        ray: Any,
        config: Config,
        directory: RunDir,
        *,
        stream: str,
        sandbox_url: str | None,
        fleet: Callable[[], dict[str, Any]],
    ) -> None:
        self._ray, self._directory, self._fleet = ray, directory, fleet
        self._orders = orders(config, directory, stream=stream, sandbox_url=sandbox_url)
        self._actors: dict[str, Any] = {}
        self._draining = asyncio.Event()
        self._ended: dict[str, asyncio.Event] = {order.name: asyncio.Event() for order in self._orders}

    async def run(self) -> None:
        """Keep every worker playing until cancelled."""
        async with asyncio.TaskGroup() as group:
            for order in self._orders:
                group.create_task(self._keep(order), name=order.name)

    async def drain(self, *, limit_s: float) -> None:
        """Tell every worker to finish what it has open, and wait for them."""
        self._draining.set()
        for actor in self._actors.values():
            actor.stop.remote()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                for ended in self._ended.values():
                    await ended.wait()

    def status(self) -> dict[str, Any]:
        """The workers' statuses, summed, beside the servers'."""
        statuses = fresh_statuses(self._directory, [order.name for order in self._orders])
        return {**self._fleet(), **summed(statuses), "workers": len(self._actors), "draining": self._draining.is_set()}

    async def _keep(self, order: WorkerOrder) -> None:
        remote = self._ray.remote(WorkerActor)
        while not self._draining.is_set():
            actor = remote.options(num_cpus=1, max_concurrency=2).remote(_surroundings())
            self._actors[order.name] = actor
            try:
                await actor.play.remote(msgspec.json.encode(order).decode())
            except self._ray.exceptions.RayError as error:
                if not self._draining.is_set():
                    log.warning("worker actor died name=%s error=%s", order.name, last_line(error))
                    self._directory.event("child_exited", role=order.name, code=None, error=last_line(error))
                    await asyncio.sleep(AGAIN_AFTER_S)
            finally:
                self._actors.pop(order.name, None)
                self._ray.kill(actor)
        self._ended[order.name].set()
        await asyncio.Event().wait()


class WorkerActor:
    """Plays one worker's order. ``stop`` may be called while ``play`` runs."""

    def __init__(self, surroundings: Mapping[str, Any]) -> None:
        _settle(surroundings)
        self._stop = _StopFromThread()

    def play(self, order: str) -> None:
        from agentrl.assembly.serve_worker import play

        decoded = msgspec.json.decode(order, type=WorkerOrder)
        setup_logging(decoded.name, str(decoded.config["log"]["level"]))

        async def until_stopped() -> None:
            await play(decoded, stop=self._stop.of_this_loop())

        directory = RunDir(decoded.root)
        directory.register(decoded.name)
        try:
            asyncio.run(until_stopped())
        finally:
            directory.deregister(decoded.name)  # the actor's process outlives its work, by as long as Ray takes to end it

    def stop(self) -> None:
        self._stop.set()


class RayEngines:
    """Engine processes on the cluster's machines, kept in a manager; the counterpart of ``EngineFleet``."""

    def __init__(
        self,
        ray: Any,
        config: Config,
        specs: Sequence[OwnEngineSpec],
        *,
        manager: AsyncLLMServerManager,
        directory: RunDir,
        on_change: Callable[[list[ProcessEntry]], None],
    ) -> None:
        self._ray, self._config, self._specs, self._manager = ray, config, specs, manager
        self._directory, self._on_change = directory, on_change
        self._entries: dict[int, list[ProcessEntry]] = {}

    async def run(self) -> None:
        """Place the engines and keep the manager informed until cancelled.

        Raises:
            ConfigError: the cluster has no room for an engine.
        """
        async with asyncio.TaskGroup() as group:
            for index, spec in enumerate(self._specs):
                group.create_task(self._keep(index, spec), name=f"engine {index}")

    async def _keep(self, index: int, spec: OwnEngineSpec) -> None:
        group = await self._place(index)
        try:
            while True:
                try:
                    await self._follow(index, spec, group)
                except (self._ray.exceptions.RayError, TimeoutError) as error:
                    log.warning("engine actor died index=%d error=%s", index, last_line(error))
                    self._directory.event("child_exited", role=f"engine-{index}", code=None, error=last_line(error))
                await asyncio.sleep(AGAIN_AFTER_S)
        finally:
            self._ray.util.remove_placement_group(group)

    async def _place(self, index: int) -> Any:
        serve = self._config.serve
        bundle = {"CPU": serve.engine_cpus, **({"GPU": serve.engine_gpus} if serve.engine_gpus else {})}
        # One bundle: all GPUs of an engine on one machine, which is what tensor parallelism wants.
        group = self._ray.util.placement_group([bundle], strategy="STRICT_PACK")
        try:
            async with asyncio.timeout(serve.ray_timeout_s):
                await group.ready()
        except TimeoutError as error:
            self._ray.util.remove_placement_group(group)
            raise ConfigError(
                f"Ray had no room for engine {index} ({bundle}) within serve.ray_timeout_s={serve.ray_timeout_s:g}: it offers "
                f"{self._ray.available_resources()}. Lower serve.replicas, engine_gpus or engine_cpus, or add machines"
            ) from error
        return group

    async def _follow(self, index: int, spec: OwnEngineSpec, group: Any) -> None:
        """One life of one actor: the manager has the server exactly while the actor's process answers."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        serve = self._config.serve
        actor = (
            self._ray.remote(EngineActor)
            .options(
                num_cpus=serve.engine_cpus,
                num_gpus=serve.engine_gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
            )
            .remote(
                _surroundings(),
                index,
                serve.engine,
                json.dumps(asdict(spec)),
                str(self._directory.logs.resolve()),
                serve.engine_threads,
            )
        )
        known: tuple[str, int] | None = None
        try:
            while True:
                report = json.loads(await self._report_of(actor))
                answering = (report["url"], report["incarnation"]) if report["url"] else None
                if answering != known:
                    self._forget(known)
                    known = answering
                    if known is not None:
                        self._manager.add_server(known[0], capacity=spec.capacity, api_key=spec.api_key)
                        log.info("engine answers index=%d url=%s host=%s", index, known[0], report["host"])
                    self._note(index, report)
                await asyncio.sleep(LOOK_EVERY_S)
        finally:
            self._forget(known)
            await self._end(actor)
            self._note(index, None)

    async def _report_of(self, actor: Any) -> str:
        limit_s = self._config.serve.ray_timeout_s
        scope = asyncio.timeout(limit_s)
        try:
            async with scope:
                return await actor.report.remote()
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise TimeoutError(f"no report within serve.ray_timeout_s={limit_s:g}: it was not placed, or hangs") from error

    async def _end(self, actor: Any) -> None:
        """Its engine first: killing the actor ends that too, since its launcher watches the actor, but only some moments later."""
        try:
            with contextlib.suppress(TimeoutError, self._ray.exceptions.RayError):
                async with asyncio.timeout(STOP_S):
                    await actor.stop.remote()
        finally:
            self._ray.kill(actor)

    def _forget(self, known: tuple[str, int] | None) -> None:
        if known is not None:
            self._manager.remove_server(known[0])

    def _note(self, index: int, report: Mapping[str, Any] | None) -> None:
        is_here = report is not None and report["host"] == socket.gethostname()
        self._entries[index] = report["processes"] if report is not None and is_here else []
        self._on_change([entry for entries in self._entries.values() for entry in entries])


@dataclass
class _Address:
    """What ``EngineFleet`` needs of a manager: remembers the one server's address."""

    url: str = ""
    incarnation: int = 0

    @property
    def urls(self) -> Collection[str]:
        return [self.url] if self.url else []

    def add_server(self, url: str, *, capacity: float = 1.0, api_key: str | None = None, admin_key: str | None = None) -> None:
        del capacity, api_key, admin_key
        self.url, self.incarnation = url, self.incarnation + 1

    def remove_server(self, url: str) -> None:
        if url == self.url:
            self.url = ""

    def quarantine(self, url: str, reason: str) -> None:
        log.warning("engine gone url=%s reason=%s", url, reason)
        self.remove_server(url)


class EngineActor:
    """Runs one engine process on this machine and says where it answers."""

    def __init__(self, surroundings: Mapping[str, Any], index: int, kind: str, spec: str, log_dir: str, threads: int) -> None:
        _settle(surroundings)
        setup_logging(f"engine-{index}", "INFO")
        here = _node_address()
        host = "127.0.0.1" if here == surroundings["address"] else here
        settings = SPECS[kind](**json.loads(spec))
        if host != "127.0.0.1" and settings.api_key is None:
            raise ConfigError(
                f"engine {index} would listen on {host} without a key, for anyone on that network: set serve.api_key, or "
                f"serve.engine_auth=true for embedded engines"
            )
        self._address = _Address()
        self._fleet = EngineFleet(
            [settings],
            manager=self._address,
            log_dir=log_dir,
            host=host,
            omp_threads=threads,
            first_index=index,
        )
        self._error = ""
        self._stop = _StopFromThread()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            asyncio.run(self._until_stopped())
        except BaseException as error:  # noqa: BLE001 - told to the caller of the next report
            self._error = last_line(error)

    async def _until_stopped(self) -> None:
        async with running(engine=self._fleet.run()):
            await self._stop.of_this_loop().wait()

    def report(self) -> str:
        """Where it answers: ``url`` (empty while it does not), ``incarnation``, ``host``, ``processes``."""
        if self._error:
            raise RuntimeError(self._error)
        return json.dumps(
            {
                "url": self._address.url,
                "incarnation": self._address.incarnation,
                "host": socket.gethostname(),
                "processes": self._fleet.processes(),
            }
        )

    def stop(self) -> None:
        """End the engine, and return when it has ended."""
        self._stop.set()
        self._thread.join()


class _StopFromThread:
    """An event of a loop that runs in another thread, or will."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event = asyncio.Event()
        self._has_loop = threading.Event()

    def of_this_loop(self) -> asyncio.Event:
        self._loop = asyncio.get_running_loop()
        self._has_loop.set()
        return self._event

    def set(self) -> None:
        self._has_loop.wait()
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop has ended by itself
            self._loop.call_soon_threadsafe(self._event.set)


def _surroundings() -> dict[str, Any]:
    return {**surroundings(), "address": _node_address()}


def _settle(given: Mapping[str, Any]) -> None:
    settle(given)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["OMP_NUM_THREADS"] = "1"


def _node_address() -> str:
    return str(import_ray("serve.launcher").util.get_node_ip_address())
