"""Imports point down only, and torch stays out of the async stages."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = {
    "types": 0, "errors": 0, "algorithms": 0,
    "protocols": 1, "config": 1, "supervise": 1, "telemetry": 1, "plugins": 1, "process": 1, "rate_limit": 1, "weights": 1,
    "rollout": 2, "serving": 2, "stream": 2, "learner": 2, "data": 2, "sandbox": 2,
    "testing": 2,
    "assembly": 3, "cli": 3, "dashboard": 3,
}  # fmt: skip
STAGES = {"rollout", "serving", "stream", "learner", "data", "sandbox"}
TORCH_FREE = ["rollout", "stream", "data", "serving", "config", "telemetry", "sandbox", "weights"]
TORCH_ALLOWED_IN = {"agentrl/serving/embedded_engine.py", "agentrl/serving/weight_sender.py"}
"""Processes of their own, which the async stages never import."""


def imports(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module, node.lineno


def modules(folder: str) -> Iterator[Path]:
    yield from sorted((ROOT / folder).rglob("*.py"))


def test_imports_point_down_and_stages_do_not_know_each_other() -> None:
    forbidden: list[str] = []
    for path in modules("agentrl"):
        parts = path.relative_to(ROOT / "agentrl").with_suffix("").parts
        here = parts[0]
        if here not in LAYERS:
            continue
        for module, line in imports(path):
            names = module.split(".")
            if names[0] in ("tools", "envs"):
                forbidden.append(f"{path.relative_to(ROOT)}:{line} imports {module}: config names plugins, code does not")
            if names[0] != "agentrl" or len(names) < 2 or names[1] not in LAYERS:
                continue
            there = names[1]
            upward = LAYERS[there] > LAYERS[here]
            sideways = here in STAGES and there in STAGES and here != there
            if upward or sideways:
                forbidden.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert forbidden == []


@pytest.mark.parametrize("folder", TORCH_FREE)
def test_async_stages_do_not_import_torch(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in modules(f"agentrl/{folder}")
        if str(path.relative_to(ROOT)) not in TORCH_ALLOWED_IN and "embedded" not in path.parts
        for module, line in imports(path)
        if module.split(".")[0] == "torch"
    ]
    assert found == []


@pytest.mark.parametrize("folder", ["tools", "envs"])
def test_plugins_use_contracts_only(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in modules(folder)
        for module, line in imports(path)
        if module.startswith("agentrl.") and LAYERS.get(module.split(".")[1], 0) > 1
    ]
    assert found == []
