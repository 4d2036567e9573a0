"""The code interpreter: echo by syntax tree, what the model reads, and what is never the model's fault."""

import asyncio
import contextlib
import io
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from agentrl.errors import ConfigError, SandboxError, ToolError
from agentrl.protocols import ToolContext
from agentrl.testing.fake_sandbox import FakeSandbox, Fault
from tools.code_interpreter import CodeInterpreter, echo_last_value, echo_like_verl, trim_traceback

CONTEXT = ToolContext(trajectory_id="t", task_id="k", sample_index=0)


def printed(code: str) -> str:
    """What a program prints when run here: the tests' own programs only."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "test", "exec"), {"__name__": "__main__"})
    return out.getvalue()


@asynccontextmanager
async def interpreter(sandbox: FakeSandbox, **options: object) -> AsyncGenerator[CodeInterpreter, None]:
    tool = CodeInterpreter(url=sandbox.url, **options)  # pyright: ignore[reportArgumentType]
    await tool.open(CONTEXT)
    try:
        yield tool
    finally:
        await tool.close()


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("1 + 1", "2\n"),
        ("x = 3\nx", "3\n"),
        ("x = 3", ""),
        ("print(5)", "5\n"),
        ("None", ""),
        ("'a'", "'a'\n"),
        ("1, 2", "(1, 2)\n"),
        ("(y := 4)", "4\n"),
        ("a = 1; a", "1\n"),
        ("2  # two", "2\n"),
        ("(1 +\n 2)", "3\n"),
        ("max(\n  1,\n  2,\n)  # the end\n\n", "2\n"),
        ("[\n  1,  # one\n  2,\n]", "[1, 2]\n"),
        ("for i in range(2):\n    print(i)", "0\n1\n"),
        ("if True:\n    print('yes')\n", "yes\n"),
        ("def f():\n    return 7\n\nf()", "7\n"),
        ("s = '''a\nb'''\ns", "'a\\nb'\n"),
        ("'''one\ntwo'''", "'one\\ntwo'\n"),
        ("'ž' + '漢'; 'ž'", "'ž'\n"),
        ("ž = 'é'; ž + 'ž'", "'éž'\n"),
        ("lambda: 1 if 0 else 2\n3", "3\n"),
        ("{i for i in [1]}", "{1}\n"),
        ("x = 1\r\nx + 1\r\n", "2\n"),
        ("f'{1}' f'{2}'", "'12'\n"),
        ("'a' \\\n  'b'", "'ab'\n"),
        ("(1)", "1\n"),
        ("((1, 2))", "(1, 2)\n"),
        ("1 if True else 2", "1\n"),
        ("", ""),
        ("# only a comment", ""),
    ],
)
def test_the_last_expression_is_shown_and_nothing_else_changes(code: str, output: str) -> None:
    assert printed(echo_last_value(code)) == output


@pytest.mark.parametrize("code", ["x = (", "  indented", "print 'old'", "a\0b", "return 5", "(" * 500])
def test_code_that_does_not_parse_is_left_as_it_is(code: str) -> None:
    assert echo_last_value(code) == code or "displayhook" in echo_last_value(code)


def test_echo_moves_no_line() -> None:
    code = "import math\n\nx = 1\n\nmath.sqrt(\n  x - 2\n)"
    assert echo_last_value(code).count("\n") == code.count("\n")


def test_verls_textual_rule_is_available_and_breaks_what_the_syntax_tree_does_not() -> None:
    assert echo_like_verl("x = 1\nx") == "x = 1\nprint(x)"
    assert echo_like_verl("print(1)\n") == "print(1)\n"
    with pytest.raises(SyntaxError):
        compile(echo_like_verl("for i in [1]:\n    y = i"), "verl", "exec")


def test_tracebacks_lose_library_frames_and_keep_the_error() -> None:
    stderr = (
        "Traceback (most recent call last):\n"
        '  File "main.py", line 3, in <module>\n    np.linalg.inv(a)\n    ^^^^^\n'
        '  File "/x/site-packages/numpy/linalg.py", line 609, in inv\n    ainv = _umath(a)\n           ^^^\n'
        '  File "/usr/lib/python3.11/foo.py", line 1, in f\n    g()\n'
        "numpy.linalg.LinAlgError: Singular matrix\n"
    )
    assert trim_traceback(stderr) == (
        'Traceback (most recent call last):\n  File "main.py", line 3, in <module>\n    np.linalg.inv(a)\n    ^^^^^\n'
        "numpy.linalg.LinAlgError: Singular matrix"
    )
    long = trim_traceback("x\n" * 10_000 + "ValueError: last")
    assert len(long) < 3100
    assert long.endswith("ValueError: last")


@pytest.mark.asyncio
async def test_the_model_reads_output_values_and_errors() -> None:
    async with FakeSandbox() as sandbox, interpreter(sandbox) as tool:
        assert await tool.call(code="print(6 * 7)") == "42"
        assert await tool.call(code="x = 6\nx * 7") == "42"
        assert await tool.call(code="```python\n1 + 1\n```") == "2"
        assert "printed nothing" in await tool.call(code="x = 1")
        failed = await tool.call(code="print('before')\n1 / 0")
        assert failed.startswith("before\nTraceback")
        assert failed.endswith("ZeroDivisionError: division by zero")
        assert await tool.call(code="import sys\nsys.exit(3)") == "The code ended with exit status 3."
        assert "SyntaxError" in await tool.call(code="x = (")
        assert "killed by signal 9" in await tool.call(code="import os\nos.kill(os.getpid(), 9)")


@pytest.mark.asyncio
async def test_a_timeout_is_text_for_the_model_with_the_number() -> None:
    async with FakeSandbox() as sandbox, interpreter(sandbox, default_timeout=0.5) as tool:
        assert await tool.call(code="while True: pass") == "Timeout: the code did not finish within 0.5 seconds."
    assert len(sandbox.requests) == 1


@pytest.mark.asyncio
async def test_running_out_of_memory_is_text_for_the_model() -> None:
    result = {"status": "Finished", "return_code": -9, "stdout": "", "stderr": "", "reason": "memory"}
    async with FakeSandbox() as sandbox, interpreter(sandbox, memory_limit_mb=64) as tool:
        sandbox.faults.append(Fault(body={"status": "Failed", "run_result": result}))
        assert await tool.call(code="x") == "Out of memory: the code used more than 64 MiB."


@pytest.mark.asyncio
async def test_the_request_is_sandbox_fusions() -> None:
    async with FakeSandbox() as sandbox, interpreter(sandbox, echo="off", default_timeout=3, memory_limit_mb=100) as tool:
        await tool.call(code="1 + 1")
    assert sandbox.requests == [
        {
            "code": "1 + 1", "language": "python", "compile_timeout": 3.0, "run_timeout": 3.0, "memory_limit_MB": 100,
            "stdin": None, "files": {}, "fetch_files": [],
        }
    ]  # fmt: skip


@pytest.mark.parametrize("code", ["", "  \n", "x" * 100_001])
@pytest.mark.asyncio
async def test_code_that_cannot_be_run_is_the_models_mistake(code: str) -> None:
    tool = CodeInterpreter(url="http://127.0.0.1:1")
    with pytest.raises(ToolError):
        await tool.call(code=code)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=500),
        Fault(status=503),
        Fault(status=429, headers={"Retry-After": "0"}),
        Fault(drop=True),
        Fault(body={"status": "SandboxError", "message": "lost", "run_result": None}),
    ],
    ids=["500", "503", "429", "dropped", "sandbox-error"],
)
@pytest.mark.asyncio
async def test_infrastructure_failures_are_retried_and_then_raised(fault: Fault) -> None:
    async with FakeSandbox() as sandbox, interpreter(sandbox, max_retries=2) as tool:
        sandbox.faults.extend([fault, fault])
        assert await tool.call(code="print(1)") == "1"
        assert len(sandbox.requests) == 3
        sandbox.faults.extend([fault] * 3)
        with pytest.raises(SandboxError, match="failed 3 times"):
            await tool.call(code="print(1)")
        assert len(sandbox.requests) == 6


@pytest.mark.asyncio
async def test_a_refused_request_is_raised_at_once() -> None:
    async with FakeSandbox() as sandbox, interpreter(sandbox) as tool:
        sandbox.faults.append(Fault(status=401))
        with pytest.raises(SandboxError, match="HTTP 401"):
            await tool.call(code="print(1)")
        sandbox.faults.append(Fault(body={"hello": 1}))
        with pytest.raises(SandboxError, match="is it a sandbox"):
            await tool.call(code="print(1)")
    assert len(sandbox.requests) == 2


@pytest.mark.asyncio
async def test_nobody_listening_is_a_sandbox_error_that_says_how_to_start_one() -> None:
    tool = CodeInterpreter(sandbox_fusion_url="http://127.0.0.1:9/run_code", max_retries=1)
    with pytest.raises(SandboxError, match=r"127\.0\.0\.1:9/run_code failed 2 times.*agentrl sandbox"):
        await tool.call(code="print(1)")
    await tool.close()


@pytest.mark.asyncio
async def test_instances_share_one_session_that_ends_with_the_last() -> None:
    async with FakeSandbox() as sandbox:
        tools = [CodeInterpreter(url=sandbox.url) for _ in range(3)]
        for tool in tools:
            await tool.open(CONTEXT)
        sessions = {id(tool._session()) for tool in tools}
        assert len(sessions) == 1
        session = tools[0]._session()
        outputs = await asyncio.gather(*(tool.call(code=f"print({index})") for index, tool in enumerate(tools)))
        assert outputs == ["0", "1", "2"]
        for tool in tools:
            assert not session.closed
            await tool.close()
        assert session.closed
        await tools[0].close()


def test_verls_configuration_loads_unchanged_and_nonsense_is_refused() -> None:
    CodeInterpreter(
        type="native", sandbox_fusion_url="http://h:1/run_code", num_workers=10, enable_global_rate_limit=True, rate_limit=10,
        default_timeout=30, default_language="python", memory_limit_mb=1024, use_ray_execution_pool=False,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="differ"):
        CodeInterpreter(url="http://a", sandbox_fusion_url="http://b")
    with pytest.raises(ConfigError, match="echo"):
        CodeInterpreter(echo="loud")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="default_timeout"):
        CodeInterpreter(default_timeout=0)
    with pytest.raises(ConfigError, match="default_language"):
        CodeInterpreter(default_language="cpp")
