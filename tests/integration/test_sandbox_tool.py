"""The code interpreter against the real service: the same behaviour as against the shipped double."""

import asyncio
from collections.abc import AsyncGenerator, Generator

import pytest
import pytest_asyncio
from sandbox_harness import AMPLE_S, DEADLINE_S, Service, running_service

from agentrl.errors import SandboxError
from agentrl.protocols import ToolContext
from agentrl.testing.fake_sandbox import FakeSandbox, Fault
from tools.code_interpreter import CodeInterpreter


@pytest.fixture(scope="module")
def service() -> Generator[Service, None, None]:
    try:
        with running_service(memory_limit_mb=256) as running:
            yield running
    except RuntimeError as error:
        pytest.skip(f"no tier isolates on this machine: {error}")


@pytest_asyncio.fixture(params=["service", "fake"])
async def tool(request: pytest.FixtureRequest, service: Service) -> AsyncGenerator[CodeInterpreter, None]:
    async with FakeSandbox() as fake:
        url = service.url if request.param == "service" else fake.url
        made = CodeInterpreter(url=url, default_timeout=AMPLE_S, memory_limit_mb=128)
        await made.open(ToolContext(trajectory_id="t", task_id="k", sample_index=0))
        yield made
        await made.close()


@pytest.mark.asyncio
async def test_programs_answer_alike(tool: CodeInterpreter) -> None:
    assert await tool.call(code="sum(range(10))") == "45"
    assert await tool.call(code="print('é漢')\n'ž'") == "é漢\n'ž'"
    assert "printed nothing" in await tool.call(code="pass")
    error = await tool.call(code="def f():\n    raise KeyError('k')\nf()")
    assert error.splitlines()[-1] == "KeyError: 'k'"
    assert "line 2, in f" in error
    assert await tool.call(code="import sys; sys.exit('why')") == "why"


@pytest.mark.asyncio
async def test_timeouts_are_text_and_other_calls_go_on_meanwhile(tool: CodeInterpreter) -> None:
    hasty = CodeInterpreter(url=tool._base, default_timeout=1.5)
    slow, quick = await asyncio.gather(hasty.call(code="import time; time.sleep(60)"), tool.call(code="2 + 2"))
    assert slow == "Timeout: the code did not finish within 1.5 seconds."
    assert quick == "4"
    await hasty.close()


@pytest.mark.asyncio
async def test_memory_is_the_models_error_on_the_real_service(service: Service) -> None:
    made = CodeInterpreter(url=service.url, memory_limit_mb=128, default_timeout=AMPLE_S)
    assert (await made.call(code="x = bytearray(1 << 28)")).endswith("MemoryError")
    many = "import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n        x = os.urandom(60 << 20); time.sleep(99)\ntime.sleep(99)"
    if service.request("/health").body["tier"] == "zygote":
        assert await made.call(code=many) == "Out of memory: the code used more than 128 MiB."
    await made.close()


@pytest.mark.asyncio
async def test_a_token_opens_the_service_and_its_absence_is_infrastructure() -> None:
    with running_service(token="abc") as guarded:
        inside, outside = CodeInterpreter(url=guarded.url, token="abc"), CodeInterpreter(url=guarded.url)
        assert await inside.call(code="1") == "1"
        with pytest.raises(SandboxError, match="401"):
            await outside.call(code="1")
        await inside.close()
        await outside.close()


@pytest_asyncio.fixture(params=["service", "fake"])
async def kept(request: pytest.FixtureRequest, service: Service) -> AsyncGenerator[CodeInterpreter, None]:
    async with FakeSandbox() as fake:
        url = service.url if request.param == "service" else fake.url
        made = CodeInterpreter(url=url, default_timeout=AMPLE_S, memory_limit_mb=128, mode="session")
        await made.open(ToolContext(trajectory_id="t", task_id="k", sample_index=0))
        yield made
        await made.close()


@pytest.mark.asyncio
async def test_in_session_mode_variables_live_from_call_to_call(kept: CodeInterpreter) -> None:
    assert "printed nothing" in await kept.call(code="x = 20")
    assert await kept.call(code="```python\nprint('now')\nx += 2\nx\n```") == "now\n22"
    assert (await kept.call(code="1 / 0")).endswith("ZeroDivisionError: division by zero")
    assert await kept.call(code="x") == "22"


@pytest.mark.asyncio
async def test_a_session_whose_process_ended_is_replaced_and_the_model_is_told(service: Service) -> None:
    made = CodeInterpreter(url=service.url, default_timeout=AMPLE_S, mode="session")
    assert await made.call(code="y = 1\ny") == "1"
    assert "variables and files of earlier calls are gone" in await made.call(code="import os\nos._exit(1)")
    assert (await made.call(code="y")).endswith("NameError: name 'y' is not defined")
    await made.close()


@pytest.mark.asyncio
async def test_a_session_ends_with_its_trajectory(service: Service) -> None:
    before = service.request("/health").body["sessions"]
    made = CodeInterpreter(url=service.url, mode="session")
    await made.call(code="z = 1")
    assert service.request("/health").body["sessions"] == before + 1
    await made.close()
    assert service.request("/health").body["sessions"] == before


@pytest.mark.asyncio
async def test_a_hedged_call_takes_the_first_answer() -> None:
    async with FakeSandbox() as fake:
        fake.faults.append(Fault(delay_s=600))
        made = CodeInterpreter(url=fake.url, hedge_after_s=0.2)
        async with asyncio.timeout(DEADLINE_S):
            assert await made.call(code="6 * 7") == "42"
        assert len(fake.requests) == 2
        await made.close()


@pytest.mark.asyncio
async def test_the_clients_of_sandbox_fusion_work_unchanged(service: Service) -> None:
    fusion = pytest.importorskip("sandbox_fusion", reason="the package sandbox-fusion is not installed")

    def use() -> None:
        ran = fusion.run_code(fusion.RunCodeRequest(code="print(6 * 7)", language="python"), endpoint=service.url)
        assert (ran.status, ran.run_result.stdout) == (fusion.RunStatus.Success, "42\n")
        failed = fusion.run_code(fusion.RunCodeRequest(code="1 / 0", language="python"), endpoint=service.url)
        assert fusion.summary_run_code_result(failed, fusion.SummaryMapping(RunFailed="wrong")) == "wrong"
        cells = fusion.run_jupyter(fusion.RunJupyterRequest(cells=["a = 1", "a"]), endpoint=service.url)
        assert cells.cells[1].display == [{"text/plain": "1"}]

    await asyncio.to_thread(use)
