"""Unit-test rewards: run a program against many tests in the sandbox, in one request, and count what passes.

Two styles. *Streams*: the program gets ``stdin`` and its output is compared here, outside the sandbox, so it cannot be
forged. *Assertions*: the program is loaded, and only then is the test sent to it; a test counts as passed when its last
statement, which prints a number drawn for this test, was reached. Leaving early (``sys.exit``, ``os._exit``) and objects
that claim to equal everything do not pass. Code that attacks its own interpreter could still forge an assertion (it shares the
process), so prefer streams where the reward is worth an attack.

From an env::

    verdict = await run_tests("http://127.0.0.1:8080", code, [StreamTest(stdin="2 3", stdout="5")])
    return Score(value=verdict.score)
"""

import ast
import math
import secrets
from collections.abc import Sequence
from typing import Any, Literal

import aiohttp
import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agentrl.errors import SandboxError
from agentrl.sandbox.wire import CommandRunResult

Compare = Literal["exact", "lines", "numbers"]

MAX_TESTS = 1000
_SHOWN_CHARS = 1000
_RELATIVE_TOLERANCE = 1e-6  # what judges of programming contests commonly allow
_ANSWER_ALLOWANCE_S = 60.0


class StreamTest(BaseModel):
    """What goes in and what must come out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stdin: str = ""
    stdout: str


class AssertTest(BaseModel):
    """Statements that raise when the program is wrong; they see its names. Python only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    test: str


class RunTestsRequest(BaseModel):
    """One program and its tests."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    code: str
    tests: list[StreamTest | AssertTest] = Field(min_length=1, max_length=MAX_TESTS)
    language: str = "python"
    compile_timeout: float = Field(default=10.0, gt=0)
    run_timeout: float = Field(default=10.0, gt=0)
    """Seconds per test."""
    total_timeout: float | None = Field(default=None, gt=0)
    """Seconds for everything, queueing included; tests that did not run by then have failed with reason ``not_run``."""
    memory_limit_MB: int = -1
    files: dict[str, str | None] = Field(default_factory=dict)
    compare: Compare = "lines"
    stop_on_failure: bool = False
    """Skip the rest after the first failure: for rewards that need all of them."""


class TestResult(BaseModel):
    """One test's verdict."""

    __test__ = False  # not for pytest to collect

    passed: bool
    reason: str
    """``ok``, ``wrong_output``, ``assertion``, ``not_run``, or why the run ended: exit, signal, wall, cpu, memory, output."""
    execution_time: float = 0.0
    stdout: str = ""
    stderr: str = ""


class RunTestsResponse(BaseModel):
    """Verdicts in the order of the tests."""

    passed: int
    total: int
    results: list[TestResult]
    compile_result: CommandRunResult | None = None
    queue_time: float = 0.0

    @property
    def score(self) -> float:
        """The share of tests that passed."""
        return self.passed / self.total


def output_matches(output: str, expected: str, compare: Compare) -> bool:
    """Is the output right?

    ``lines`` ignores white space at the ends of lines and of the text; ``numbers`` also takes tokens that are equal as numbers
    within a relative tolerance of 1e-6.
    """
    if compare == "exact":
        return output == expected
    ours, theirs = _lines(output), _lines(expected)
    if ours == theirs:
        return True
    if compare == "lines" or len(ours) != len(theirs):
        return False
    return all(
        len(a.split()) == len(b.split()) and all(map(_same_number, a.split(), b.split()))
        for a, b in zip(ours, theirs, strict=True)
    )


def _lines(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _same_number(ours: str, theirs: str) -> bool:
    if ours == theirs:
        return True
    try:
        return math.isclose(float(ours), float(theirs), rel_tol=_RELATIVE_TOLERANCE, abs_tol=_RELATIVE_TOLERANCE)
    except ValueError:
        return False


_HONEST = """
def {name}(left, right):
    def honest(value):
        kind = type(value)
        if kind in (list, tuple, set, frozenset):
            return all(map(honest, value))
        if kind is dict:
            return all(map(honest, value)) and all(map(honest, value.values()))
        return type(type.__getattribute__(kind, "__eq__")) is type(int.__eq__)
    return honest(left) or not honest(right)
"""


def seal_test(test: str) -> tuple[str, str]:
    """A test as it is sent: equalities made honest, and a last statement that prints the returned number.

    Raises:
        ValueError: it does not parse.
    """
    name, proof = f"_honest_{secrets.token_hex(8)}", secrets.token_hex(16)
    try:
        tree = _HonestEqualities(name).visit(ast.parse(test))
        body = ast.unparse(ast.fix_missing_locations(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"a test does not parse: {error}") from error
    return f"{_HONEST.format(name=name)}\n{body}\n__import__('sys').stdout.write('\\n{proof}')\n", proof


class _HonestEqualities(ast.NodeTransformer):
    """``assert left == right`` also asks that ``left`` brings no ``__eq__`` of its own where ``right`` has none."""

    def __init__(self, name: str) -> None:
        self._name = name

    def visit_Assert(self, node: ast.Assert) -> ast.Assert:
        compared = node.test
        if not (isinstance(compared, ast.Compare) and len(compared.ops) == 1 and isinstance(compared.ops[0], ast.Eq)):
            return node
        arguments: list[ast.expr] = [ast.Name("left", ast.Load()), ast.Name("right", ast.Load())]
        both = ast.BoolOp(
            ast.And(),
            [
                ast.Call(ast.Name(self._name, ast.Load()), arguments, []),
                ast.Compare(ast.Name("left", ast.Load()), [ast.Eq()], [ast.Name("right", ast.Load())]),
            ],
        )
        names = ast.arguments(
            posonlyargs=[], args=[ast.arg("left"), ast.arg("right")], kwonlyargs=[], kw_defaults=[], defaults=[]
        )
        node.test = ast.Call(ast.Lambda(names, both), [compared.left, compared.comparators[0]], [])
        return node


def shown(text: str) -> str:
    """The beginning of a long text."""
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]} ... [{len(text) - _SHOWN_CHARS} more characters]"


async def run_tests(
    url: str,
    code: str,
    tests: Sequence[StreamTest | AssertTest],
    *,
    session: aiohttp.ClientSession | None = None,
    token: str | None = None,
    **options: Any,
) -> RunTestsResponse:
    """Score one program at the sandbox service.

    Args:
        url: the service's base URL.
        code: the program.
        tests: at least one.
        session: an HTTP session to use; otherwise one is opened for this call.
        token: the service's bearer token.
        options: further fields of ``RunTestsRequest``, such as ``language`` or ``run_timeout``.

    Raises:
        SandboxError: the service failed or refused; never the program's fault.
    """
    try:
        request = RunTestsRequest(code=code, tests=list(tests), **options)
    except ValidationError as error:
        raise SandboxError(f"run_tests: {error.errors(include_input=False)}") from error
    owned = session or aiohttp.ClientSession()
    limit_s = request.total_timeout or len(tests) * request.run_timeout + request.compile_timeout
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    try:
        async with owned.post(
            f"{url.rstrip('/')}/run_tests",
            data=orjson.dumps(request.model_dump()),
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=limit_s + _ANSWER_ALLOWANCE_S),
        ) as answer:
            raw = await answer.read()
            if answer.status != 200:
                raise SandboxError(f"the sandbox at {url} answered HTTP {answer.status}: {raw[:300].decode('utf-8', 'replace')}")
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise SandboxError(
            f"the sandbox at {url} failed: {type(error).__name__}: {error}. Is it running (agentrl sandbox)?"
        ) from error
    finally:
        if session is None:
            await owned.close()
    return RunTestsResponse.model_validate_json(raw)
