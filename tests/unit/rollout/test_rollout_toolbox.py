"""The toolbox: YAML, sessions, whose fault an error is, limits, and the circuit breaker."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from agentrl.errors import ConfigError, SandboxError, ToolInfraError
from agentrl.rollout import tool_stats
from agentrl.rollout import toolbox as toolbox_module
from agentrl.rollout.tool_loading import load_tools
from agentrl.rollout.tool_parsers import ParseFailure
from agentrl.rollout.toolbox import Observation, Toolbox
from agentrl.testing.clock import pass_time
from agentrl.testing.tiny_model import make_tiny_tokenizer
from agentrl.types import Task, ToolCall

TOOLS_FILE = '''
import asyncio
from agentrl.errors import SandboxError, ToolError, ToolInfraError
from agentrl.plugins import tool
from agentrl.protocols import Tool, ToolContext, ToolResult

LOG = []

@tool(timeout_s=0.05, name="sleepy")
async def sleep(seconds: float) -> str:
    """Sleep."""
    await asyncio.sleep(seconds)
    return "slept"

GATES = []

@tool(timeout_s=100)
async def gated() -> str:
    """Waits to be let go."""
    GATES.append(asyncio.Event())
    await GATES[-1].wait()
    return "through"

async def add(a: int, b: int = 1) -> str:
    """Add."""
    return str(a + b)

def blocking(n: int) -> dict:
    """Runs in a thread."""
    import threading
    return {"n": n, "main": threading.current_thread() is threading.main_thread()}

async def picky(x: int) -> str:
    """Refuses."""
    raise ToolError("x must be even; try 2")

async def broken() -> str:
    """Fails."""
    raise ConnectionError("connection refused")

async def sandboxed() -> str:
    """Fails in the sandbox."""
    raise SandboxError("no worker")

async def own_timeout() -> str:
    """A timeout of its own."""
    raise TimeoutError("read timed out")

async def who(*, ctx: ToolContext) -> str:
    """Says who asks."""
    ctx.state["n"] = ctx.state.get("n", 0) + 1
    return f"{ctx.trajectory_id} {ctx.sample_index} {ctx.turn} {ctx.state['n']} {ctx.ground_truth} {dict(ctx.kwargs)}"

async def long() -> str:
    """Talks."""
    return " ".join(str(i) for i in range(300))

class Counter(Tool):
    """Counts the calls of a trajectory."""
    def __init__(self, start: int = 0) -> None:
        self.n = start
    async def open(self, ctx):
        LOG.append(("open", ctx.trajectory_id))
    async def call(self, step: int = 1) -> ToolResult:
        before = self.n
        await asyncio.sleep(0)
        self.n = before + step
        return ToolResult(text=str(self.n), reward=0.25)
    async def close(self):
        LOG.append(("close", self.n))

class NoOpen(Tool):
    """Never opens."""
    async def open(self, ctx):
        raise OSError("no such host")
    async def call(self) -> str:
        return ""
    async def close(self):
        LOG.append("closed anyway")

class Verl:
    def __init__(self, config, tool_schema):
        self.config, self.name = config, tool_schema.function.name
        self.totals = {}
    async def create(self, instance_id=None, ground_truth=None, offset=0, **kwargs):
        self.totals[instance_id] = offset
        LOG.append(("create", ground_truth))
        return instance_id, None
    async def execute(self, instance_id, parameters, **kwargs):
        self.totals[instance_id] += parameters["x"]
        return f"total {self.totals[instance_id]}", 0.5, {"m": 1}
    async def calc_reward(self, instance_id, **kwargs):
        return 0.0
    async def release(self, instance_id, **kwargs):
        LOG.append(("release", self.totals.pop(instance_id)))
'''

TASK = Task(id="t/1", prompt=[{"role": "user", "content": "q"}], data_source="d", ground_truth="secret")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "mytools.py").write_text(TOOLS_FILE)
    return tmp_path


def log_of(project: Path) -> list[Any]:
    from agentrl.plugins import load_object

    return load_object("mytools:LOG", root=project)


def make(project: Path, *entries: Any, tokenizer: Any = None, **overrides: Any) -> Toolbox:
    return load_tools(list(entries), base_dir=project, tokenizer=tokenizer, **overrides)


async def ask(toolbox: Toolbox, *calls: Any, task: Task = TASK, **session: Any) -> list[Observation]:
    async with toolbox.session(task=task, trajectory_id="t/1/0/3/0", sample_index=3, **session) as tools:
        return await tools.run(calls)


def call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall(name=name, arguments=arguments)


# Calls and whose fault


@pytest.mark.asyncio
async def test_calls_are_answered_in_order_with_coerced_arguments(project: Path) -> None:
    box = make(project, "mytools:add", "mytools:blocking")
    results = await ask(box, call("add", a="2", b=3), call("blocking", n=1), call("add", a=1))
    assert [r.text for r in results] == ["5", '{"n": 1, "main": false}', "2"]
    assert all(r.ok and r.error_kind == "" for r in results)


@pytest.mark.asyncio
async def test_the_models_mistakes_are_observations_it_can_learn_from(project: Path) -> None:
    box = make(project, "mytools:add", "mytools:picky", "mytools:sleep")
    results = await ask(
        box,
        ParseFailure(reason="use double quotes", raw="{'"),
        call("ad", a=1),
        call("add", b=1),
        call("picky", x=3),
        call("sleepy", seconds=5),
    )
    assert [r.error_kind for r in results] == ["parse", "unknown_tool", "arguments", "tool", "timeout"]
    assert [r.text for r in results] == [
        "Error: use double quotes",
        "Error: there is no tool 'ad'. Tools: add, picky, sleepy. Did you mean add?",
        "Error: invalid arguments: 'a' is a required property. Parameters: a, b",
        "Error: x must be even; try 2",
        "Error: sleepy did not finish within 0.05 s",
    ]
    assert not any(r.ok for r in results)


@pytest.mark.asyncio
async def test_what_the_model_did_not_cause_ends_the_rollout(project: Path) -> None:
    box = make(project, "mytools:broken", "mytools:sandboxed", "mytools:own_timeout", "mytools:sleep", "mytools:NoOpen")
    with pytest.raises(ToolInfraError, match="`broken` raised ConnectionError: connection refused"):
        await ask(box, call("broken"), call("sleepy", seconds=0.01))
    with pytest.raises(SandboxError, match="no worker"):
        await ask(box, call("sandboxed"))
    with pytest.raises(ToolInfraError, match="read timed out"):
        await ask(box, call("own_timeout"))
    with pytest.raises(ToolInfraError, match="no such host"):
        await ask(box, call("no_open"))
    assert log_of(project) == ["closed anyway"]
    stats = box.stats()
    assert {name: s["infra_errors"] for name, s in stats.items()} == {
        "broken": 1, "sandboxed": 1, "own_timeout": 1, "sleepy": 0, "no_open": 1,
    }  # fmt: skip


@pytest.mark.asyncio
async def test_a_tool_that_does_not_open_in_time_is_infrastructure(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "slowopen.py").write_text(
        "import asyncio\nclass Slow:\n    '''S.'''\n    async def open(self, ctx): await asyncio.sleep(9)\n"
        "    async def call(self) -> str: return ''\n"
    )
    monkeypatch.setattr(toolbox_module, "OPEN_TIMEOUT_S", 0.01)
    with pytest.raises(ToolInfraError, match="slow open did not finish"):
        await ask(make(project, "slowopen:Slow"), call("slow"))


@pytest.mark.asyncio
async def test_a_stateful_tool_lives_as_long_as_the_trajectory_and_apart_from_its_siblings(project: Path) -> None:
    box = make(project, {"class_name": "mytools.Counter", "config": {"type": "native", "start": 10}})
    async with (
        box.session(task=TASK, trajectory_id="a", sample_index=0) as a,
        box.session(task=TASK, trajectory_id="b", sample_index=1) as b,
    ):
        first = await a.run([call("counter"), call("counter", step=5)])
        assert [r.text for r in await b.run([call("counter")])] == ["11"]
        second = await a.run([call("counter")], turn=1)
    assert [r.text for r in first + second] == ["11", "16", "17"]
    assert sum(r.reward or 0 for r in first + second) == 0.75
    assert log_of(project) == [("open", "a"), ("open", "b"), ("close", 11), ("close", 17)]


@pytest.mark.asyncio
async def test_close_runs_when_the_rollout_is_cancelled(project: Path) -> None:
    box = make(project, "mytools:Counter", {"use": "mytools:sleep", "timeout_s": 60})
    called = asyncio.Event()

    async def rollout() -> None:
        async with box.session(task=TASK, trajectory_id="a", sample_index=0) as tools:
            await tools.run([call("counter")])
            called.set()
            await tools.run([call("sleepy", seconds=60)])

    running = asyncio.create_task(rollout())
    await called.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert log_of(project) == [("open", "a"), ("close", 1)]


@pytest.mark.asyncio
async def test_a_tools_chance_is_its_trajectorys_and_turns_and_what_it_logs_is_for_people(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (project / "dice.py").write_text(
        "from agentrl import tool\n@tool\nasync def roll(*, ctx) -> str:\n    'Roll.'\n"
        "    ctx.log('rolled', sides=6)\n    return f'{ctx.group_index} {ctx.rng.randrange(10**9)}'\n"
    )

    async def rolled(trajectory_id: str, *turns: int) -> list[str]:
        box = load_tools(["dice:roll"], base_dir=project)
        async with box.session(task=TASK, trajectory_id=trajectory_id, sample_index=2) as tools:
            return [(await tools.run([ToolCall(name="roll", arguments={})], turn=turn))[0].text for turn in turns]

    with caplog.at_level("INFO"):
        first, second, third = await rolled("t/0/2/0", 0, 0, 1)
    assert len({first, second, third}) == 3
    assert {text.split()[0] for text in (first, second, third)} == {"2"}
    assert await rolled("t/0/2/0", 1) == [third]  # resumed after the first turn
    assert await rolled("t/0/3/0", 1) != [third]
    assert "tool_log trajectory=t/0/2/0 turn=1: rolled sides=6" in caplog.text


@pytest.mark.asyncio
async def test_only_an_oracle_sees_the_ground_truth(project: Path) -> None:
    task = Task(id="t", prompt=[], data_source="d", ground_truth="42", tools_kwargs={"who": {"k": 1, "ground_truth": "42"}})
    (plain,) = await ask(make(project, "mytools:who"), call("who"), task=task)
    assert plain.text == "t/1/0/3/0 3 0 1 None {'k': 1}"
    (oracle,) = await ask(make(project, {"use": "mytools:who", "oracle": True}), call("who"), task=task)
    assert oracle.text == "t/1/0/3/0 3 0 1 42 {'k': 1, 'ground_truth': '42'}"


VERL_SCHEMA = {
    "type": "function",
    "function": {
        "name": "adder",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
    },
}


@pytest.mark.asyncio
async def test_a_tool_in_verls_shape_runs_unchanged(project: Path) -> None:
    box = make(project, {"class_name": "mytools.Verl", "config": {"type": "native"}, "tool_schema": VERL_SCHEMA})
    kwargs = {"adder": {"create_kwargs": {"ground_truth": "42", "offset": 100}}}
    task = Task(id="t", prompt=[], data_source="d", tools_kwargs=kwargs)
    results = await ask(box, call("adder", x="2"), call("adder", x=3), task=task)
    assert [(r.text, r.reward) for r in results] == [("total 102", 0.5), ("total 105", 0.5)]
    assert log_of(project) == [("create", None), ("release", 105)]
    assert box.schemas() == [VERL_SCHEMA]


@pytest.mark.asyncio
async def test_long_results_are_cut_in_tokens_on_the_asked_side(project: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    for side, start, end in (("left", "[", " 299"), ("right", "0 1 2", "]"), ("middle", "0 1 2", " 299")):
        box = make(project, {"use": "mytools:long", "output_tokens": 60, "truncate": side}, tokenizer=tokenizer)
        (result,) = await ask(box, call("long"))
        assert "tokens cut" in result.text
        assert result.text.strip().startswith(start)
        assert result.text.rstrip().endswith(end)
        assert len(tokenizer.encode(result.text)) <= 63
    (shorter,) = await ask(box, call("long"), max_output_tokens=10)
    assert len(tokenizer.encode(shorter.text)) <= 13


@pytest.mark.asyncio
async def test_concurrency_is_bounded_and_waiting_for_a_place_is_not_the_calls_time(project: Path) -> None:
    from agentrl.plugins import load_object

    box = make(project, {"use": "mytools:gated", "concurrency": 1})
    gates = load_object("mytools:GATES", root=project)
    async with asyncio.TaskGroup() as group:
        asked = group.create_task(ask(box, *[call("gated") for _ in range(4)]))
        for n in range(4):
            async with asyncio.timeout(3600):
                while len(gates) == n:
                    await asyncio.sleep(0.001)
            pass_time(60)  # of 100, for the one that runs and those that wait alike
            assert len(gates) == n + 1
            gates[n].set()
    assert [r.text for r in asked.result()] == ["through"] * 4


@pytest.mark.asyncio
async def test_a_task_sees_and_calls_only_its_selection(project: Path) -> None:
    box = make(project, "mytools:add", "mytools:picky")
    task = Task(id="t", prompt=[], data_source="d", tool_selection=["add"])
    assert [s["function"]["name"] for s in box.schemas(["add"])] == ["add"]
    (result,) = await ask(box, call("picky", x=1), task=task)
    assert result.error_kind == "unknown_tool"
    with pytest.raises(ConfigError, match="`nope`, which the run does not declare. Declared: add, picky"):
        box.schemas(["nope"])


@pytest.mark.asyncio
async def test_a_tool_that_keeps_failing_pauses_rollouts_until_a_probe_succeeds(
    project: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tool_stats, "COOLDOWN_S", 0.0)
    (project / "flaky.py").write_text(
        "DOWN = [True]\nasync def flaky() -> str:\n    '''F.'''\n    if DOWN[0]: raise OSError('down')\n    return 'up'\n"
    )
    box = make(project, "flaky:flaky")
    for n in range(20):
        assert box.blocked() is None, n
        with pytest.raises(ToolInfraError):
            await ask(box, call("flaky"))
    assert box.stats()["flaky"]["circuit_open"] == 1
    assert "20 of the last 20 calls failed" in caplog.text
    assert box.blocked() is None  # a probe, because the cooldown here is nothing
    from agentrl.plugins import load_object

    load_object("flaky:DOWN", root=project)[0] = False
    with caplog.at_level(logging.WARNING):
        await ask(box, call("flaky"))
    assert box.stats()["flaky"]["circuit_open"] == 0
    assert "tool_circuit_closed" in caplog.text


@pytest.mark.asyncio
async def test_an_open_circuit_is_the_wait_reason(project: Path) -> None:
    box = make(project, "mytools:broken")
    for _ in range(20):
        with pytest.raises(ToolInfraError):
            await ask(box, call("broken"))
    assert box.blocked() == "tool:broken"


@pytest.mark.asyncio
async def test_counters_tell_the_models_errors_from_the_tools(project: Path) -> None:
    box = make(project, "mytools:add", "mytools:sleep")
    await ask(box, call("add", a=1), call("add"), call("sleepy", seconds=1))
    stats = box.stats()
    assert {k: stats["add"][k] for k in ("calls", "ok", "model_errors", "timeouts", "infra_errors")} == {
        "calls": 2, "ok": 1, "model_errors": 1, "timeouts": 0, "infra_errors": 0,
    }  # fmt: skip
    assert stats["sleepy"]["timeouts"] == 1
    assert stats["sleepy"]["p50_ms"] >= 45


# YAML


def test_a_yaml_file_gives_tools_with_defaults_under_marks_under_entries(project: Path) -> None:
    (project / "tools.yaml").write_text(
        "tools:\n  - use: mytools:sleep\n  - {use: mytools:add, name: plus, timeout_s: 3}\n"
        "defaults: {timeout_s: 7, output_tokens: 99, truncate: left, concurrency: 2}\n"
    )
    sleepy, plus = load_tools(Path("tools.yaml"), base_dir=project, output_tokens=10).tools
    assert (sleepy.name, sleepy.limits.timeout_s) == ("sleepy", 0.05)
    assert (plus.name, plus.limits.timeout_s, plus.limits.output_tokens, plus.limits.truncate) == ("plus", 3, 99, "left")
    assert make(project, "mytools:add", output_tokens=10).tools[0].limits.output_tokens == 10


@pytest.mark.asyncio
async def test_overrides_replace_config_by_reference_or_name(project: Path) -> None:
    entry = {"class_name": "mytools.Counter", "config": {"start": 1}}
    by_reference = make(project, entry, overrides={"mytools.Counter": {"start": 5}, "absent": {"x": 1}})
    by_name = make(project, entry, overrides={"counter": {"start": 7}})
    assert [(await ask(b, call("counter")))[0].text for b in (by_reference, by_name)] == ["6", "8"]


def test_the_shipped_tool_lists_load() -> None:
    box = load_tools("configs/tools/calculator.yaml")
    (schema,) = box.schemas()
    assert schema["function"]["name"] == "calculator"
    assert schema["function"]["parameters"]["required"] == ["expression"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"usee": "mytools:add"}, "tools[0]: unknown key `usee`. Did you mean `use`?"),
        ({"use": "mytools:add", "timeout": 3}, "unknown key `timeout`. Did you mean `timeout_s`?"),
        ({"use": "mytools:add", "timeout_s": "3"}, "`timeout_s` must be a number"),
        ({"use": "mytools:add", "truncate": "top"}, "middle, left or right"),
        ({"use": "mytools:nothing"}, "has no `nothing`"),
        ({"use": "nowhere:add"}, "no module `nowhere`"),
        ({"name": "x"}, "give `use: module:name`, `class_name: module.Class`"),
        ({"use": "mytools:add", "class_name": "mytools.Counter"}, "one of them"),
        ({"use": "mytools:add", "config": {"a": 1}}, "takes no `config`"),
        ({"use": "mytools:Counter", "config": {"strat": 1}}, "Did you mean `start` for `strat`?"),
        ({"use": "mytools:Counter", "config": {"type": "mcp"}}, "`type: native` only"),
        ({"use": "mytools:LOG"}, "neither a function nor a class"),
        ({"use": "mytools:add", "name": "a b"}, "no tool name"),
        ({"class_name": "mytools.Verl", "config": {}}, "could not be made"),
        ({"use": "mytools:add", "tool_schema": VERL_SCHEMA}, "unknown to it: x; required by it: a"),
        (3, "must be a mapping, not int"),
    ],
)
def test_a_wrong_entry_is_refused_at_its_place(project: Path, entry: Any, message: str) -> None:
    (project / "bad.yaml").write_text("")
    with pytest.raises(ConfigError) as caught:
        make(project, entry)
    assert message in str(caught.value)
    assert "tools[0]" in str(caught.value)


def test_errors_of_a_file_name_the_file(project: Path) -> None:
    (project / "a.yaml").write_text("tols: []\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: unknown key `tols`. Did you mean `tools`"):
        load_tools(Path("a.yaml"), base_dir=project)
    (project / "a.yaml").write_text("tools: {a: 1}\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: `tools` must be a list"):
        load_tools(Path("a.yaml"), base_dir=project)
    (project / "a.yaml").write_text("defaults: {timeout_s: 1, on_error: x}\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: defaults: unknown key `on_error`"):
        load_tools(Path("a.yaml"), base_dir=project)
    (project / "a.yaml").write_text("a: [\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: cannot be read as YAML"):
        load_tools(Path("a.yaml"), base_dir=project)
    with pytest.raises(ConfigError, match=r"no tool list `b\.yaml`"):
        load_tools(Path("b.yaml"), base_dir=project)


def test_two_tools_of_one_name_are_refused(project: Path) -> None:
    with pytest.raises(ConfigError, match="two tools are named `add`"):
        make(project, "mytools:add", {"use": "mytools:picky", "name": "add"})
