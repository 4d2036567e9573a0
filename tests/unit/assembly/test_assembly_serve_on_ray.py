"""Engines on Ray, with a stand-in for the module ``ray``; ``tests/integration/test_serve_workers.py`` has a real cluster."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from agentrl.assembly.serve_on_ray import RayEngines
from agentrl.config import Config
from agentrl.serving.engine_process import EmbeddedEngineSpec
from agentrl.serving.server_manager import AsyncLLMServerManager
from agentrl.telemetry.run_dir import RunDir
from agentrl.testing.clock import pass_time
from agentrl.testing.waits import until

pytest.importorskip("ray", reason="needs the extra `ray`")


class Actor:
    """An engine actor that reports once, and then only if it is `alive`."""

    def __init__(self, url: str, *, alive: bool) -> None:
        self.url, self.alive, self.num_asked = url, alive, 0
        self.report = SimpleNamespace(remote=self._report)
        self.stop = SimpleNamespace(remote=self._stop)

    async def _report(self) -> str:
        self.num_asked += 1
        if self.num_asked > 1 and not self.alive:
            await asyncio.Event().wait()
        return json.dumps({"url": self.url, "incarnation": 1, "host": "elsewhere", "processes": []})

    async def _stop(self) -> None:
        pass


def ray_of(actors: list[Actor], killed: list[Actor]) -> Any:
    """As much of ``ray`` as `RayEngines` asks for."""

    async def ready() -> None:
        pass

    class RayError(Exception):
        pass

    left = list(actors)
    group = SimpleNamespace(ready=ready)
    options = SimpleNamespace(remote=lambda *_: left.pop(0))
    return SimpleNamespace(
        remote=lambda _: SimpleNamespace(options=lambda **_: options),
        kill=killed.append,
        exceptions=SimpleNamespace(RayError=RayError),
        util=SimpleNamespace(placement_group=lambda *_, **__: group, remove_placement_group=lambda _: None),
    )


@pytest.mark.asyncio
async def test_an_engine_actor_that_no_longer_reports_is_made_again(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentrl.assembly.serve_on_ray._surroundings", dict)
    monkeypatch.setattr("agentrl.assembly.serve_on_ray.AGAIN_AFTER_S", 0.01)
    monkeypatch.setattr("agentrl.assembly.serve_on_ray.LOOK_EVERY_S", 0.01)
    hung, fresh = Actor("http://127.0.0.1:1", alive=False), Actor("http://127.0.0.1:2", alive=True)
    killed: list[Actor] = []
    config = Config.model_validate(
        {"run": {"name": "r"}, "model": {"path": "m"}, "data": {"train": "t"}, "serve": {"ray_timeout_s": 1000}}
    )
    directory = RunDir(tmp_path).create()
    async with AsyncLLMServerManager() as manager:
        engines = RayEngines(
            ray_of([hung, fresh], killed), config, [EmbeddedEngineSpec(model_path="m")], manager=manager, directory=directory,
            on_change=lambda _: None,
        )  # fmt: skip
        running = asyncio.ensure_future(engines.run())
        await until(lambda: hung.num_asked >= 2)
        assert manager.urls == [hung.url]
        pass_time(1000)
        await until(lambda: manager.urls == [fresh.url])
        assert killed == [hung]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert "no report within serve.ray_timeout_s=1000" in directory.events.read_text()
