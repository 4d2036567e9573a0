"""Rates, caches, retries, and whose fault a timeout is."""

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest

from agentrl import supervise
from agentrl.errors import ConfigError, ToolBusy, ToolInfraError
from agentrl.plugins import load_object
from agentrl.protocols import ToolResult
from agentrl.rollout import tool_limits
from agentrl.rollout import toolbox as toolbox_module
from agentrl.rollout.tool_limits import CacheLimits, RateLimit, ResultCache, backoff_s, cache_key
from agentrl.rollout.tool_loading import load_tools
from agentrl.rollout.toolbox import Observation, Toolbox
from agentrl.types import Task, ToolCall

FILE = '''
from agentrl import Tool, ToolBusy, ToolError, tool
CALLS = []
FAILURES = []

@tool(idempotent=True)
async def ask(q: str) -> str:
    """Ask."""
    CALLS.append(q)
    if FAILURES:
        raise FAILURES.pop(0)
    if q == "wrong":
        raise ToolError("wrong")
    return f"{q} {len(CALLS)}"

@tool
async def write(q: str) -> str:
    """Write."""
    return "written"

async def unmarked() -> str:
    """Not listed with the file."""

@tool(idempotent=True)
class Notebook(Tool):
    """Notes."""
    async def call(self, q: str) -> str:
        CALLS.append(q)
        return f"{q} {len(CALLS)}"
'''


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "limited.py").write_text(FILE)
    return tmp_path


def make(project: Path, **entry: Any) -> Toolbox:
    return load_tools([{"use": "limited:ask", **entry}], base_dir=project)


async def ask(box: Toolbox, *questions: str, name: str = "ask", task: Task | None = None) -> list[Observation]:
    task = task or Task(id="t", prompt=[], data_source="d")
    async with box.session(task=task, trajectory_id="t", sample_index=0) as tools:
        return [o for q in questions for o in await tools.run([ToolCall(name=name, arguments={"q": q})])]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_rate_limit_allows_a_burst_and_then_its_rate() -> None:
    clock = Clock()
    rate = RateLimit(4.0, 2, clock=clock)
    for _ in range(2):
        assert rate.delay_s() == 0.0
        rate.take()
    assert rate.delay_s() == pytest.approx(0.25)
    clock.now += 0.25
    assert rate.delay_s() == 0.0
    rate.take()
    clock.now += 3600
    starts = 0
    while rate.delay_s() == 0.0:
        rate.take()
        starts += 1
    assert starts == 2  # a quiet hour saves up no more than the burst


def test_in_the_long_run_no_more_calls_start_than_the_rate_allows() -> None:
    clock, jitter, starts = Clock(), random.Random(3), 0
    rate = RateLimit(10.0, clock=clock)
    while clock.now < 200.0:
        delay = rate.delay_s()
        if delay == 0.0:
            rate.take()
            starts += 1
        clock.now += delay if delay else jitter.expovariate(100.0)
    assert 1000 <= starts <= 1011


def test_a_pause_that_the_service_asks_for_holds_with_and_without_a_rate() -> None:
    for per_s in (None, 100.0):
        clock = Clock()
        rate = RateLimit(per_s, clock=clock)
        rate.pause(5.0)
        rate.pause(1.0)
        assert rate.delay_s() == pytest.approx(5.0)
        clock.now += 5.0
        assert rate.delay_s() == 0.0


@pytest.mark.asyncio
async def test_waiting_for_the_rate_is_not_the_calls_time(project: Path) -> None:
    box = make(project, calls_per_s=5, burst=1, timeout_s=0.5)
    loop = asyncio.get_running_loop()
    started = loop.time()
    results = await asyncio.gather(*(ask(box, str(n)) for n in range(4)))
    assert all(r[0].ok for r in results)
    assert loop.time() - started >= 0.59


@pytest.mark.asyncio
async def test_a_service_that_closes_for_long_is_infrastructure_at_once_and_opens_the_circuit(project: Path) -> None:
    box = make(project, timeout_s=30)
    load_object("limited:FAILURES", root=project)[:] = [ToolBusy("quota", retry_after_s=86_400)]
    with pytest.raises(ToolInfraError, match="quota"):
        await ask(box, "x")
    while box.blocked() is None:  # nothing is waited for: the rollouts' deadlines would blame the model
        with pytest.raises(ToolInfraError, match="`ask`: its service asked not to be called for another 86"):
            await asyncio.wait_for(ask(box, "x"), 60)
    stats = box.stats()["ask"]
    assert stats["infra_errors"] == stats["calls"] > 1
    assert load_object("limited:CALLS", root=project) == ["x"]


@pytest.mark.asyncio
async def test_a_cancelled_waiter_takes_no_turn() -> None:
    rate = RateLimit(1000.0, 1)
    rate.pause(30.0)
    waiter = asyncio.create_task(rate.wait())
    await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    rate = RateLimit(None)
    await asyncio.wait_for(rate.wait(), 60)


def test_a_cache_forgets_the_least_asked_and_the_expired() -> None:
    clock = Clock()
    cache = ResultCache(CacheLimits(size=2, ttl_s=10.0), clock=clock)
    for key in "ab":
        cache.put(key, ToolResult(text=key))
    assert cache.get("a") == ToolResult(text="a")
    cache.put("c", ToolResult(text="c"))
    assert (cache.get("b"), len(cache)) == (None, 2)
    clock.now += 10.0
    assert (cache.get("a"), len(cache)) == (None, 1)


def test_a_cache_key_is_all_that_an_answer_may_depend_on() -> None:
    assert cache_key({"a": 1, "b": [2]}, {}, None) == cache_key({"b": [2], "a": 1}, {}, None)
    keys = [cache_key({"a": 1}, {}, None), cache_key({"a": "1"}, {}, None), cache_key({"a": 1}, {"k": 1}, None)]
    assert len({*keys, cache_key({"a": 1}, {}, "42")}) == 4
    assert cache_key({"a": float("nan")}, {}, None) is None
    assert cache_key({"a": object()}, {}, None) is None


@pytest.mark.asyncio
@pytest.mark.parametrize(("scope", "expected"), [("process", ["x 1", "x 1", "x 1"]), ("trajectory", ["x 1", "x 1", "x 2"])])
async def test_a_cache_is_of_the_trajectory_or_of_the_process(project: Path, scope: str, expected: list[str]) -> None:
    box = make(project, cache={"scope": scope})
    texts = [o.text for o in await ask(box, "x", "x")] + [o.text for o in await ask(box, "x")]
    assert texts == expected
    assert box.stats()["ask"]["cache_hits"] == expected.count("x 1") - 1


@pytest.mark.asyncio
async def test_errors_are_not_cached_nor_answers_of_other_rows(project: Path) -> None:
    box = make(project, cache={"size": 10})
    assert [o.error_kind for o in await ask(box, "wrong", "wrong")] == ["tool", "tool"]
    assert box.stats()["ask"]["cache_hits"] == 0
    rows = [Task(id=str(n), prompt=[], data_source="d", tools_kwargs={"ask": {"db": n}}) for n in (1, 2)]
    assert [(await ask(box, "x", task=row))[0].text for row in rows] == ["x 3", "x 4"]


def test_a_stateful_tool_shares_no_answers(project: Path) -> None:
    with pytest.raises(ConfigError, match="cannot share answers between trajectories"):
        load_tools([{"use": "limited:Notebook", "cache": {"size": 1}}], base_dir=project)
    box = load_tools([{"use": "limited:Notebook", "cache": {"scope": "trajectory"}}], base_dir=project)
    assert [o.text for o in asyncio.run(ask(box, "x", "x", name="notebook"))] == ["x 1", "x 1"]


@pytest.mark.asyncio
async def test_an_idempotent_tool_is_asked_again_after_an_infrastructure_error(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool_limits, "BACKOFF_S", (0.001, 0.001))
    box = make(project, retries=2)
    failures = load_object("limited:FAILURES", root=project)
    failures[:] = [OSError("down"), ToolInfraError("still down")]
    (answer,) = await ask(box, "x")
    assert answer.text == "x 3"
    failures[:] = [OSError(f"down {n}") for n in range(3)]
    with pytest.raises(ToolInfraError, match="`ask` raised OSError: down 2"):
        await ask(box, "x")
    stats = box.stats()["ask"]
    assert (stats["calls"], stats["retries"], stats["infra_errors"], stats["infra_error_rate"]) == (2, 4, 1, 0.5)


@pytest.mark.asyncio
async def test_a_deadline_that_passes_over_retries_is_not_the_models_fault(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "slow.py").write_text(
        "import asyncio\nfrom agentrl import tool\nfrom agentrl.testing.clock import pass_time\nN = []\n@tool(idempotent=True)\nasync def slow() -> str:\n    '''S.'''\n"
        "    N.append(1)\n    if len(N) == 1: raise OSError('down')\n"
        "    asyncio.get_running_loop().call_soon(pass_time, 100)\n    await asyncio.sleep(3600)\n"
    )
    monkeypatch.setattr(tool_limits, "BACKOFF_S", (0.0, 0.0))
    box = load_tools([{"use": "slow:slow", "retries": 1, "timeout_s": 100}], base_dir=project)
    async with box.session(task=Task(id="t", prompt=[], data_source="d"), trajectory_id="t", sample_index=0) as tools:
        with pytest.raises(ToolInfraError, match="down"):
            await tools.run([ToolCall(name="slow", arguments={})])
        (hung,) = await tools.run([ToolCall(name="slow", arguments={})])
    assert hung.error_kind == "timeout"  # no attempt failed: the call itself ran too long


def test_only_an_idempotent_tool_may_be_asked_again(project: Path) -> None:
    with pytest.raises(ConfigError, match=r"tools\[0\]: `retries` .* say `idempotent: true`"):
        load_tools([{"use": "limited:write", "retries": 1}], base_dir=project)
    (allowed,) = load_tools([{"use": "limited:write", "retries": 1, "idempotent": True}], base_dir=project).tools
    assert allowed.limits.retries == 1
    with pytest.raises(ConfigError, match="`cache`"):
        make(project, cache={"size": 1}, idempotent=False)
    spec = {"tools": ["limited:ask", "limited:write"], "defaults": {"retries": 3, "cache": {"size": 5, "ttl_s": 1}}}
    asked, written = load_tools(spec, base_dir=project).tools
    assert (asked.limits.retries, asked.limits.cache) == (3, CacheLimits(size=5, ttl_s=1))
    assert (written.limits.retries, written.limits.cache) == (0, None)


def test_pauses_double_up_to_their_bound_and_differ() -> None:
    jitter = random.Random(1)
    pauses = [[backoff_s(attempt, jitter) for _ in range(200)] for attempt in range(8)]
    assert [max(p) <= min(5.0, 0.2 * 2**n) for n, p in enumerate(pauses)] == [True] * 8
    assert max(pauses[7]) > 4.5
    assert len({round(p, 6) for p in pauses[0]}) > 190


def test_a_file_gives_every_tool_that_it_marks(project: Path) -> None:
    box = load_tools(["limited.py"], base_dir=project)
    assert box.names == ("ask", "write", "notebook")
    (project / "plain.py").write_text("def f(): ...\n")
    with pytest.raises(ConfigError, match="marks nothing with @tool"):
        load_tools(["plain.py"], base_dir=project)
    with pytest.raises(ConfigError, match="may hold several tools"):
        load_tools([{"use": "limited.py", "name": "x"}], base_dir=project)


def test_an_installed_package_offers_its_tools_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    (site / "weather_tools-1.0.dist-info").mkdir(parents=True)
    (site / "weather_tools-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: weather-tools\nVersion: 1.0\n")
    (site / "weather_tools-1.0.dist-info" / "entry_points.txt").write_text(
        "[agentrl.tools]\nweather = weather_tools_pkg:forecast\nbroken = weather_tools_nowhere:x\n"
    )
    (site / "weather_tools_pkg.py").write_text(
        "async def forecast(city: str) -> str:\n    '''Forecast.'''\n    return f'rain in {city}'\n"
    )
    monkeypatch.syspath_prepend(str(site))
    (tool,) = load_tools(["weather"], base_dir=tmp_path).tools
    assert (tool.name, tool.kind) == ("forecast", "function")
    assert tool.place.endswith("weather_tools_pkg.py:1 (entry point weather_tools_pkg:forecast)")
    with pytest.raises(ConfigError, match=r"tools\[0\]: no installed package declares a tool `wether` .* Did you mean `weather`"):
        load_tools(["wether"], base_dir=tmp_path)
    with pytest.raises(ConfigError, match="`broken` .* does not import: ModuleNotFoundError"):
        load_tools(["broken"], base_dir=tmp_path)


@pytest.mark.asyncio
async def test_two_open_circuits_whose_cooldowns_differ_do_not_block_for_ever(project: Path) -> None:
    box = load_tools(["limited:ask", "limited:write"], base_dir=project)
    clock = Clock()
    for declared, opened_at in zip(box.tools, (100.0, 101.0), strict=True):
        breaker = declared.stats.breaker
        breaker._clock = clock  # type: ignore[reportPrivateUsage]
        clock.now = opened_at
        while not breaker.is_open:
            breaker.record(ok=False)
    seen: list[str | None] = []
    for _ in range(40):
        seen.append(box.blocked())
        clock.now += 1.0
    assert seen[:3] == ["tool:ask", "tool:write", None]
    assert [n for n, reason in enumerate(seen) if reason is None] == [2, 6, 14, 29], "each probe is one for both"


def test_results_in_verls_forms_are_read_and_other_data_is_json() -> None:
    from agentrl.rollout.tool_instances import as_result
    from agentrl.rollout.verl_shim import ToolResponse

    assert as_result(("done", 0.5, {"m": 1})) == ToolResult(text="done", reward=0.5, metrics={"m": 1.0})
    assert as_result(({"a": 1}, None)) == ToolResult(text='{"a": 1}')
    assert as_result(ToolResponse(text="hello")).text == "hello"
    assert as_result((ToolResponse(), 1, None)) == ToolResult(text="", reward=1.0)
    assert as_result((1, 2)).text == "[1, 2]"
    assert as_result(("a", "b")).text == '["a", "b"]'
    assert json.loads(as_result([("a", 1)]).text) == [["a", 1]]


STUBBORN = '''
import asyncio
from agentrl import Tool, tool
ENDS = asyncio.Event()

async def ignore() -> None:
    while not ENDS.is_set():
        try:
            await ENDS.wait()
        except asyncio.CancelledError:
            continue

async def stubborn() -> str:
    """Ignores its cancellation."""
    await ignore()
    return "late"

async def selfish() -> str:
    """Cancels itself."""
    raise asyncio.CancelledError

class Sticky(Tool):
    """Does not close."""
    async def call(self) -> str:
        return "ok"
    async def close(self) -> None:
        await ignore()
'''


@pytest.mark.asyncio
async def test_a_tool_that_ignores_its_cancellation_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervise, "GRACE_S", 0.05)
    monkeypatch.setattr(toolbox_module, "CLOSE_TIMEOUT_S", 0.05)
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    entries = [{"use": f"stubborn:{name}", "timeout_s": 0.1} for name in ("stubborn", "selfish", "Sticky")]
    box = load_tools(entries, base_dir=tmp_path)
    ends = load_object("stubborn:ENDS", root=tmp_path)
    try:
        async with asyncio.timeout(250):
            async with box.session(task=Task(id="t", prompt=[], data_source="d"), trajectory_id="t", sample_index=0) as tools:
                (late,) = await tools.run([ToolCall(name="stubborn", arguments={})])
                assert late.error_kind == "timeout"
                with pytest.raises(ToolInfraError, match="tool:selfish cancelled itself"):
                    await tools.run([ToolCall(name="selfish", arguments={})])
                assert (await tools.run([ToolCall(name="sticky", arguments={})]))[0].text == "ok"
            assert "cancellation_ignored stage=tool:stubborn" in caplog.text
            assert "tool_close_failed tool=sticky" in caplog.text
            # A rollout that is cancelled in the middle of such a call ends as well.
            async with box.session(task=Task(id="t", prompt=[], data_source="d"), trajectory_id="t", sample_index=0) as tools:
                rollout = asyncio.create_task(tools.run([ToolCall(name="stubborn", arguments={})]))
                await asyncio.sleep(0.01)
                rollout.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await rollout
    finally:
        ends.set()
        while supervise._LEFT_BEHIND:
            await asyncio.sleep(0.01)
