"""Servers, models and the table of rows at the end of the run."""

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import pytest_asyncio
from contract_api import Api
from contract_reference import CheckpointReference, FunctionReference, Reference
from contract_servers import DIFFERENCES, FAKE_VOCAB_SIZE, SERVERS, Models, Server, Unavailable

from agentrl.testing.fake_model import FakeModel
from agentrl.testing.tiny_model import make_tiny_model

_outcomes: dict[str, dict[str, str]] = {}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("models")
    a, b = make_tiny_model(folder / "a", seed=0), make_tiny_model(folder / "b", seed=1)
    wide = make_tiny_model(folder / "wide", hidden_size=96)
    nan = make_tiny_model(folder / "nan", seed=2)
    tensors = load_file(nan / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, nan / "model.safetensors")
    return Models(a, b, wide, nan)


@pytest.fixture(scope="session")
def checkpoints(models: Models) -> Reference:
    return CheckpointReference({"v0": models.a, "v1": models.b})


@pytest.fixture(scope="session")
def reference(server: Server, request: pytest.FixtureRequest) -> Reference:
    if server.name == "fake":
        return FunctionReference(FakeModel(FAKE_VOCAB_SIZE))
    return request.getfixturevalue("checkpoints")


@pytest.fixture(scope="session", params=list(SERVERS))
def server(request: pytest.FixtureRequest, models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with ExitStack() as stack:
        try:
            started = stack.enter_context(SERVERS[request.param](models.a, tmp_path_factory.mktemp("logs")))
        except Unavailable as missing:
            pytest.skip(str(missing))
        yield started


@pytest_asyncio.fixture
async def api(server: Server, models: Models, request: pytest.FixtureRequest) -> AsyncIterator[Api]:
    """A client of a server that is idle, not paused, and serves model a as v0."""
    row = request.node.originalname
    difference = DIFFERENCES.get((row, server.name))
    if difference is not None and difference.handling == "not run":
        pytest.skip(f"documented difference: {difference.what}")
    async with Api.connect(server.url) as client:
        await client.settle(models.a)
        yield client
        await client.settle(models.a)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path, _, name = report.nodeid.rpartition("::")
    if "tests/contract" not in path or "[" not in name:
        return
    row, _, parameters = name.rstrip("]").partition("[")
    engine = next((part for part in parameters.split("-") if part in SERVERS), None)
    if engine is None or (report.when != "call" and report.outcome == "passed"):
        return
    known = DIFFERENCES.get((row, engine))
    outcome = {"passed": "ok", "failed": "FAILED", "skipped": "-"}[report.outcome]
    if known is not None and outcome != "FAILED":
        ran = {"asserted": "differs", "avoided": "ok*"}.get(known.handling, outcome)
        outcome = ran if outcome == "ok" else "not run" if "documented difference" in str(report.longrepr) else outcome
    cells = _outcomes.setdefault(row, {})
    if cells.get(engine) != "FAILED":
        cells[engine] = outcome


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _outcomes:
        return
    terminalreporter.section("engine contract")
    width = max(len(row) for row in _outcomes)
    terminalreporter.write_line(" | ".join(["row".ljust(width), *(name.ljust(8) for name in SERVERS)]))
    notes: list[str] = []
    for row, cells in _outcomes.items():
        title = row.removeprefix("test_").replace("_", " ")
        terminalreporter.write_line(" | ".join([title.ljust(width), *(cells.get(name, "").ljust(8) for name in SERVERS)]))
        notes += [
            f"{cell}: {title}: {name} {DIFFERENCES[row, name].what}"
            for name, cell in cells.items()
            if cell in ("differs", "ok*", "not run")
        ]
    for note in notes:
        terminalreporter.write_line(f"  {note}")
