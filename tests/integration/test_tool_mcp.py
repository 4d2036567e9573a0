"""MCP servers as tools: a real one, over stdio and over HTTP."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from agentrl.errors import ConfigError, ToolInfraError
from agentrl.process import ClaimedPort
from agentrl.rollout import mcp_server
from agentrl.rollout.tool_loading import load_tools
from agentrl.rollout.toolbox import Observation, Toolbox
from agentrl.types import Task, ToolCall

KIT = str(Path(__file__).with_name("mcp_kit.py"))
DEADLINE_S = 60.0
STDIO = {"command": [sys.executable, KIT, "stdio"], "start_timeout_s": 200.0}


@asynccontextmanager
async def toolbox(*entries: Any, base_dir: Path | None = None) -> AsyncGenerator[Toolbox]:
    box = load_tools(list(entries), base_dir=base_dir)
    try:
        yield box
    finally:
        await box.aclose()


async def ask(box: Toolbox, name: str, /, **arguments: Any) -> Observation:
    async with box.session(task=Task(id="t", prompt=[], data_source="d"), trajectory_id="t", sample_index=0) as tools:
        (result,) = await tools.run([ToolCall(name=name, arguments=arguments)])
        return result


def is_server(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):  # nor a zombie
        return "mcp_kit" in " ".join(process.cmdline())
    return False


def no_server_is_left() -> bool:
    return eventually(lambda: not any(map(is_server, psutil.Process().children(recursive=True))))


def is_gone(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def eventually(claim: Callable[[], bool]) -> bool:
    ends = time.monotonic() + DEADLINE_S
    while not claim():
        if time.monotonic() > ends:
            return False
        time.sleep(0.05)
    return True


async def gone(pid: int) -> bool:
    return await asyncio.to_thread(eventually, lambda: is_gone(pid))


@pytest.mark.asyncio
async def test_a_servers_tools_are_offered_as_it_describes_them_and_answer_over_one_session() -> None:
    async with toolbox({"mcp": {**STDIO, "exclude": ["die"], "prefix": "kit_"}}) as box:
        assert box.names == ("kit_lookup", "kit_place", "kit_pid", "kit_sleep")
        place = box.tools[1].schema.parameters
        assert place["properties"]["unit"] == {"default": "km", "enum": ["km", "mile"], "title": "Unit", "type": "string"}
        assert place["$defs"]["Point"]["required"] == ["x"]
        assert [t.is_idempotent for t in box.tools] == [True, False, False, False]
        assert box.tools[0].limits.on_timeout == "infra"
        # Coercion follows the server's references: the model wrote text.
        assert (await ask(box, "kit_place", point='{"x": "1.5"}', unit="MILE", tags=["a"])).text == "1.5,0 mile ['a']"
        wrong = await ask(box, "kit_place", point={"z": 1})
        assert (wrong.error_kind, wrong.text) == (
            "arguments", "Error: invalid arguments: point: 'x' is a required property. Parameters: point, unit, tags",
        )  # fmt: skip
        first, second = await asyncio.gather(ask(box, "kit_pid"), ask(box, "kit_pid"))
        assert first.text == second.text
        pid = int(first.text.split()[0])
    assert await gone(pid)


@pytest.mark.asyncio
async def test_what_the_server_calls_an_error_is_text_for_the_model() -> None:
    async with toolbox({"mcp": {**STDIO, "only": ["lookup"]}, "cache": {"size": 2, "scope": "process"}}) as box:
        missing = await ask(box, "lookup", key="e")
        assert (missing.ok, missing.error_kind) == (False, "tool")
        assert "no note e" in missing.text
        assert [(await ask(box, "lookup", key="pi")).text for _ in range(2)] == ["3.14", "3.14"]
        stats = box.stats()["lookup"]
        assert (stats["calls"], stats["ok"], stats["model_errors"], stats["cache_hits"]) == (3, 2, 1, 1)


@pytest.mark.asyncio
async def test_a_server_that_dies_is_infrastructure_and_the_next_call_starts_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIT_TOKEN", "sesame-7")
    monkeypatch.setenv("KIT_OTHER", "kept here")
    async with toolbox({"mcp": {**STDIO, "env": {"KIT_TOKEN": "${env:KIT_TOKEN}"}}}) as box:
        before = (await ask(box, "pid")).text.split()
        assert before[1:] == ["<redacted>", "none"]  # nothing is inherited but what the entry names
        with pytest.raises(ToolInfraError, match="Connection closed") as caught:
            await ask(box, "die")
        assert "about to die of KIT_TOKEN=<redacted>" in str(caught.value)
        after = (await ask(box, "pid")).text.split()
        assert after[0] != before[0]
        assert box.stats()["die"]["infra_error_rate"] == 1.0
        assert await gone(int(before[0]))
        os.kill(int(after[0]), signal.SIGKILL)  # between two calls
        with pytest.raises(ToolInfraError):
            await ask(box, "pid")
        assert (await ask(box, "lookup", key="pi")).text == "3.14"
    assert await gone(int(after[0]))
    assert no_server_is_left()


@pytest.mark.asyncio
async def test_a_call_that_hangs_ends_at_its_deadline_without_blame_and_others_go_on() -> None:
    async with toolbox({"mcp": {**STDIO, "only": ["sleep", "lookup"]}, "timeout_s": 0.3}) as box:
        with pytest.raises(ToolInfraError, match=r"`sleep` did not answer within 0\.3 s"):
            await ask(box, "sleep", seconds=600)
        async with asyncio.timeout(DEADLINE_S):
            while True:
                with suppress(ToolInfraError):  # for this one, too, a slow machine may need longer
                    assert (await ask(box, "lookup", key="pi")).text == "3.14"
                    break
    async with toolbox({"mcp": {**STDIO, "only": ["sleep"]}, "timeout_s": 0.3, "on_timeout": "observe"}) as box:
        assert (await ask(box, "sleep", seconds=600)).error_kind == "timeout"


def test_a_server_that_does_not_start_is_refused_with_its_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIT_TOKEN", "sesame-7")
    broken = {**STDIO, "command": sys.executable, "args": [KIT, "broken"], "env": {"KIT_TOKEN": "${env:KIT_TOKEN}"}}
    with pytest.raises(ConfigError, match=r"tools\[0\]: MCP server .* did not start: ") as caught:
        load_tools([{"mcp": broken}])
    assert "cannot open the notes: KIT_TOKEN=<redacted>" in str(caught.value)
    with pytest.raises(ConfigError, match=r"did not start: did not answer within start_timeout_s=0\.5"):
        load_tools([{"mcp": {"command": [sys.executable, KIT, "silent"], "start_timeout_s": 0.5}}])
    with pytest.raises(ConfigError, match=r"did not start: FileNotFoundError"):
        load_tools([{"mcp": {"command": "/no/such/program"}}])
    with pytest.raises(ConfigError, match=r"environment variable KIT_NOWHERE is not set"):
        load_tools([{"mcp": {**STDIO, "env": {"A": "${env:KIT_NOWHERE}"}}}])
    assert no_server_is_left()


def test_a_list_that_does_not_load_leaves_no_server_behind() -> None:
    with pytest.raises(ConfigError, match="has no tool `lookpu`. Did you mean `lookup`"):
        load_tools([{"mcp": {**STDIO, "only": ["lookpu"]}}])
    with pytest.raises(ConfigError, match="no module `nowhere`"):
        load_tools([{"mcp": STDIO}, "nowhere:tool"])
    assert no_server_is_left()


def test_a_process_that_forgets_to_close_leaves_no_server_behind() -> None:
    program = (
        "from agentrl.rollout.tool_loading import load_tools; import psutil\n"
        f"load_tools([{{'mcp': {STDIO!r}}}])\n"
        "print(psutil.Process().children()[0].pid)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=250, check=True)
    assert eventually(lambda: is_gone(int(done.stdout)))


@pytest.fixture(scope="module")
def http_server() -> Generator[tuple[str, subprocess.Popen[bytes]]]:
    with ClaimedPort("127.0.0.1") as port:
        process = start_http(port)
        yield f"http://127.0.0.1:{port}/mcp", process
        process.terminate()
        process.wait(DEADLINE_S)


def start_http(port: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, KIT, "http", str(port)], stderr=subprocess.DEVNULL)
    ends_at = time.monotonic() + 200
    while time.monotonic() < ends_at and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.05)
    raise AssertionError("the server did not come up")


@pytest.mark.asyncio
async def test_the_same_server_over_http_from_a_file_of_servers(
    http_server: tuple[str, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    (tmp_path / "servers.json").write_text(json.dumps({"mcpServers": {"kit": {"url": http_server[0], "auth_token": "abcdef"}}}))
    verl = {
        "class_name": "verl.tools.mcp_search_tool.MCPSearchTool",
        "config": {"type": "mcp", "rate_limit": 50, "timeout": 20},
        "mcp": {"mcp_servers_config_path": "servers.json", "tool_selected_list": ["lookup", "place"]},
    }
    async with toolbox(verl, base_dir=tmp_path) as box:
        assert box.names == ("lookup", "place")
        assert (box.tools[0].limits.calls_per_s, box.tools[0].limits.timeout_s) == (50, 20)
        assert (await ask(box, "lookup", key="pi")).text == "3.14"
        assert "no note x" in (await ask(box, "lookup", key="x")).text


@pytest.mark.asyncio
async def test_an_http_server_that_goes_and_comes_back_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp_server, "RECONNECT_PAUSE_S", 0.0)
    with ClaimedPort("127.0.0.1") as port:
        process = start_http(port)
        try:
            async with toolbox({"mcp": {"url": f"http://127.0.0.1:{port}/mcp", "only": ["pid"]}}) as box:
                before = (await ask(box, "pid")).text
                process.kill()
                process.wait(DEADLINE_S)
                with pytest.raises(ToolInfraError, match="127.0.0.1"):
                    await ask(box, "pid")
                process = start_http(port)
                for _ in range(5):  # the call that notices the lost session may fail, without blame
                    try:
                        assert (await ask(box, "pid")).text != before
                        break
                    except ToolInfraError:
                        continue
                else:
                    pytest.fail("never found again")
        finally:
            process.kill()
            process.wait(DEADLINE_S)
        with pytest.raises(ConfigError, match="could not be reached"):
            load_tools([{"mcp": {"url": f"http://127.0.0.1:{port}/mcp"}}])
