"""`scope` of a tool: its object lives for a call, a trajectory or the process."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from agentrl.errors import ConfigError, ToolInfraError
from agentrl.plugins import load_object
from agentrl.rollout.tool_loading import load_tools
from agentrl.rollout.toolbox import Toolbox
from agentrl.testing.waits import until
from agentrl.types import Task, ToolCall

TOOLS_FILE = '''
import asyncio
from agentrl import Tool, ToolContext, ToolError, tool

LOG = []
GATE = asyncio.Event()

class Counter(Tool):
    """Counts."""
    def __init__(self):
        self.n = 0
    async def open(self, ctx):
        LOG.append(("open", ctx.trajectory_id))
    async def call(self, wait: bool = False, *, ctx: ToolContext) -> str:
        self.n += 1
        if wait:
            LOG.append("waits")
            await GATE.wait()
        return f"{self.n} for {ctx.trajectory_id}"
    async def close(self):
        LOG.append(("close", self.n))

class Late(Counter):
    """Opens at the second attempt."""
    tries = 0
    async def open(self, ctx):
        Late.tries += 1
        if Late.tries == 1:
            raise ToolError("not yet")
    async def call(self) -> str:
        return "open"

class Verl:
    def __init__(self, config, tool_schema):
        pass
    def get_openai_tool_schema(self):
        return {"type": "function", "function": {"name": "verl", "parameters": {"type": "object", "properties": {}}}}
    async def create(self, instance_id=None, **kwargs):
        LOG.append("create")
        return instance_id
    async def execute(self, instance_id, parameters, **kwargs):
        return "executed", 0.0, {}
    async def release(self, instance_id, **kwargs):
        LOG.append("release")

@tool
async def plain() -> str:
    """Holds nothing."""
    return ""
'''


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "scoped.py").write_text(TOOLS_FILE)
    return tmp_path


def make(project: Path, name: str, scope: str) -> Toolbox:
    return load_tools([{"use": f"scoped:{name}", "scope": scope, "timeout_s": 60}], base_dir=project)


def log_of(project: Path) -> list[Any]:
    return load_object("scoped:LOG", root=project)


async def ask(box: Toolbox, trajectory_id: str, *calls: ToolCall) -> list[str]:
    task = Task(id="t", prompt=[], data_source="d")
    async with box.session(task=task, trajectory_id=trajectory_id, sample_index=0) as tools:
        return [result.text for result in await tools.run(calls)]


def call(name: str = "counter", **arguments: Any) -> ToolCall:
    return ToolCall(name=name, arguments=arguments)


@pytest.mark.asyncio
async def test_an_object_of_the_worker_is_opened_once_serves_all_rollouts_and_is_closed_at_the_end(project: Path) -> None:
    box = make(project, "Counter", "worker")
    assert log_of(project) == []
    first, second = await asyncio.gather(ask(box, "a", call()), ask(box, "b", call()))
    assert sorted([*first, *second]) == ["1 for a", "2 for b"]
    assert log_of(project) == [("open", "")]
    await box.aclose()
    assert log_of(project) == [("open", ""), ("close", 2)]


@pytest.mark.asyncio
async def test_rollouts_do_not_wait_for_each_others_calls_of_the_workers_object(project: Path) -> None:
    box, log = make(project, "Counter", "worker"), log_of(project)
    waiting = asyncio.create_task(ask(box, "a", call(wait=True)))
    await until(lambda: "waits" in log)
    assert await ask(box, "b", call()) == ["2 for b"]
    load_object("scoped:GATE", root=project).set()
    assert await waiting == ["2 for a"]
    await box.aclose()


@pytest.mark.asyncio
async def test_a_workers_object_that_did_not_open_is_tried_again_by_the_next_call(project: Path) -> None:
    box = make(project, "Late", "worker")
    with pytest.raises(ToolInfraError, match="not yet"):
        await ask(box, "a", call("late"))
    assert log_of(project) == [("close", 0)]
    assert await ask(box, "b", call("late")) == ["open"]
    await box.aclose()


@pytest.mark.asyncio
async def test_an_object_of_a_call_lives_no_longer_than_the_call(project: Path) -> None:
    box = make(project, "Counter", "call")
    assert await ask(box, "a", call(), call()) == ["1 for a", "1 for a"]
    assert sorted(log_of(project)) == [("close", 1), ("close", 1), ("open", "a"), ("open", "a")]


@pytest.mark.asyncio
async def test_not_to_open_for_a_call_is_not_the_models_error(project: Path) -> None:
    box = make(project, "Late", "call")
    with pytest.raises(ToolInfraError, match="`late` did not open: not yet"):
        await ask(box, "a", call("late"))
    assert log_of(project) == [("close", 0)]


@pytest.mark.asyncio
async def test_a_tool_in_verls_shape_creates_and_releases_at_every_call_where_that_is_asked_for(project: Path) -> None:
    box = make(project, "Verl", "call")
    assert await ask(box, "a", call("verl")) == ["executed"]
    assert await ask(box, "a", call("verl")) == ["executed"]
    assert log_of(project) == ["create", "release"] * 2


@pytest.mark.asyncio
async def test_a_rollout_can_be_resumed_where_no_object_lives_as_long_as_the_trajectory(project: Path) -> None:
    for scope, is_replayable in (("trajectory", False), ("call", True), ("worker", True)):
        box = make(project, "Counter", scope)
        async with box.session(task=Task(id="t", prompt=[], data_source="d"), trajectory_id="a", sample_index=0) as tools:
            await tools.run([call()])
            assert tools.is_replayable == is_replayable, scope
        await box.aclose()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"use": "scoped:plain", "scope": "worker"}, "`scope` means nothing here: `scoped:plain` is a function"),
        ({"use": "scoped:Counter", "scope": "workers"}, "`scope` must be call or trajectory or worker here, not 'workers'"),
        ({"use": "scoped:Verl", "scope": "worker"}, "`scope` must be call or trajectory here, not 'worker'"),
        ({"name": "x", "http": {"url": "http://127.0.0.1:1"}, "scope": "call"}, "`scope` means nothing here"),
        ({"mcp": {"url": "http://127.0.0.1:1"}, "scope": "call"}, "`scope` means nothing here"),
    ],
)
def test_a_scope_that_means_nothing_is_refused_at_its_entry(project: Path, entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_tools([entry], base_dir=project)
    assert message in str(error.value)
    assert "tools[0]" in str(error.value)
