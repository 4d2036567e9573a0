"""Tools as verl's users wrote them: file, YAML and rows unchanged, without verl."""

import sys
from pathlib import Path
from typing import Any

import pytest

from agentrl.errors import ConfigError
from agentrl.rollout.tool_loading import load_tools
from agentrl.rollout.verl_shim import install_verl_shim, is_verl_installed
from agentrl.types import Task, ToolCall

VERL_FILE = """
import logging
from typing import Any, Optional
from uuid import uuid4

from verl.tools.base_tool import BaseTool
from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse
from verl.utils.rollout_trace import rollout_trace_op

EVENTS = []


class AnswerTool(BaseTool):
    def __init__(self, config: dict, tool_schema: OpenAIFunctionToolSchema):
        super().__init__(config, tool_schema)
        self._instances = {}

    def get_openai_tool_schema(self) -> OpenAIFunctionToolSchema:
        return self.tool_schema

    async def create(self, instance_id: Optional[str] = None, ground_truth: Optional[str] = None, **kwargs) -> tuple[str, ToolResponse]:
        if instance_id is None:
            instance_id = str(uuid4())
        if ground_truth is None:
            ground_truth = kwargs.get("create_kwargs", {}).get("ground_truth", None)
        self._instances[instance_id] = {"response": "", "ground_truth": ground_truth, "reward": 0.0}
        EVENTS.append("create")
        return instance_id, ToolResponse()

    @rollout_trace_op
    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs) -> tuple[ToolResponse, float, dict]:
        state = self._instances[instance_id]
        state["response"] = str(parameters.get("answer", ""))
        reward = await self.calc_reward(instance_id)
        step_reward = 0.0 if reward > state["reward"] else -0.05
        state["reward"] = reward
        seen = kwargs["agent_data"].extra_fields.setdefault("seen", [])
        seen.append(state["response"])
        return ToolResponse(text=f"{self.name}: reward={reward} seen={len(seen)}"), step_reward, {"reward": reward}

    async def calc_reward(self, instance_id: str, **kwargs) -> float:
        state = self._instances[instance_id]
        return float(state["response"] == state["ground_truth"])

    async def release(self, instance_id: str, **kwargs) -> None:
        del self._instances[instance_id]
        EVENTS.append("release")


class OwnSchema(BaseTool):
    def get_openai_tool_schema(self):
        return OpenAIFunctionToolSchema.model_validate({
            "type": "function",
            "function": {"name": "own", "description": "Own.", "parameters": {
                "type": "object", "properties": {"xs": {"type": "array", "items": {"type": "integer"}}}, "required": ["xs"]}},
        })

    async def execute(self, instance_id, parameters, **kwargs):
        return ToolResponse(text=str(parameters["xs"])), None, None
"""

VERL_YAML = """
tools:
  - class_name: "verl_answer_tool.AnswerTool"
    config:
      type: native
    tool_schema:
      type: "function"
      function:
        name: "submit"
        description: "Submit an answer."
        parameters:
          type: "object"
          properties:
            answer:
              type: "string"
              description: "The answer."
          required: ["answer"]
  - class_name: "verl_answer_tool.OwnSchema"
    config: {type: native}
"""

SANDBOX_YAML = """
tools:
  - class_name: "verl.tools.sandbox_fusion_tools.SandboxFusionTool"
    config:
      sandbox_fusion_url: "http://127.0.0.1:9/run_code"
      num_workers: 10
      enable_global_rate_limit: true
      rate_limit: 10
      default_timeout: 30
      default_language: "python"
      memory_limit_mb: 1024
      type: native
    tool_schema:
      type: "function"
      function:
        name: "code_interpreter"
        description: "A tool for executing code."
        parameters:
          type: "object"
          properties:
            code: {type: "string", description: "The code to execute."}
          required: ["code"]
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if is_verl_installed():
        pytest.skip("verl itself is installed")
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "verl_answer_tool.py").write_text(VERL_FILE)
    (tmp_path / "tools.yaml").write_text(VERL_YAML)
    (tmp_path / "sandbox.yaml").write_text(SANDBOX_YAML)
    for name in [n for n in sys.modules if n.split(".")[0] == "verl"]:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path  # type: ignore[misc]
    for name in [n for n in sys.modules if n.split(".")[0] == "verl"]:
        del sys.modules[name]


@pytest.mark.asyncio
async def test_a_verl_tools_reward_may_be_any_number(project: Path) -> None:
    (project / "numbers_tool.py").write_text(
        "import numpy as np\nfrom verl.tools.base_tool import BaseTool\nREWARDS = [np.float32(0.5), np.int64(2), True, 1]\n"
        "class Rewarding(BaseTool):\n"
        "    async def execute(self, instance_id, parameters, **kwargs):\n"
        "        return 'told', REWARDS.pop(0), {'m': np.float32(0.25), 'said': 'x'}\n"
    )
    entry = {
        "class_name": "numbers_tool.Rewarding",
        "config": {"type": "native"},
        "tool_schema": {"type": "function", "function": {"name": "r", "description": "R.", "parameters": {"type": "object"}}},
    }
    box = load_tools([entry], base_dir=project)
    async with box.session(task=Task(id="t", prompt=[], data_source="d"), trajectory_id="t", sample_index=0) as tools:
        answers = [(await tools.run([ToolCall(name="r", arguments={})]))[0] for _ in range(4)]
    assert [(answer.text, answer.reward) for answer in answers] == [("told", 0.5), ("told", 2.0), ("told", 1.0), ("told", 1.0)]


@pytest.mark.asyncio
async def test_a_verl_tool_file_and_its_yaml_run_unchanged_without_verl(project: Path) -> None:
    box = load_tools(Path("tools.yaml"), base_dir=project)
    assert box.names == ("submit", "own")
    assert [t.kind for t in box.tools] == ["verl", "verl"]
    assert box.schemas()[1]["function"]["parameters"]["properties"]["xs"]["items"] == {"type": "integer"}
    # The row as verl's preprocessing writes it: the ground truth goes to an oracle only.
    row: dict[str, Any] = {"submit": {"create_kwargs": {"ground_truth": "42"}}}
    calls = [ToolCall(name="submit", arguments={"answer": a}) for a in ("41", 42)]

    async def play() -> list[tuple[str, float | None]]:
        task = Task(id="t", prompt=[], data_source="openai/gsm8k", tools_kwargs=row)
        async with box.session(task=task, trajectory_id="t", sample_index=0) as tools:
            return [(o.text, o.reward) for call in calls for o in await tools.run([call])]

    assert await play() == [("submit: reward=0.0 seen=1", -0.05), ("submit: reward=0.0 seen=2", -0.05)]
    box.tools[0].oracle = True
    assert await play() == [("submit: reward=0.0 seen=1", -0.05), ("submit: reward=1.0 seen=2", 0.0)]
    from agentrl.plugins import load_object

    assert load_object("verl_answer_tool:EVENTS", root=project) == ["create", "release"] * 2
    async with box.session(task=Task(id="t", prompt=[], data_source="d"), trajectory_id="t", sample_index=0) as tools:
        (own,) = await tools.run([ToolCall(name="own", arguments={"xs": "[1, 2]"})])
        assert (own.text, own.reward) == ("[1, 2]", None)
        (wrong,) = await tools.run([ToolCall(name="own", arguments={"xs": ["a"]})])
        assert wrong.error_kind == "arguments"


def test_verls_sandbox_tool_is_the_shipped_one(project: Path) -> None:
    (tool,) = load_tools(Path("sandbox.yaml"), base_dir=project).tools
    assert (tool.name, tool.kind, tool.reference) == (
        "code_interpreter", "class", "verl.tools.sandbox_fusion_tools.SandboxFusionTool",
    )  # fmt: skip
    assert tool.place.partition(":")[0].endswith("code_interpreter.py")
    assert tool.schema.description == "A tool for executing code."


def test_parts_of_verl_that_nothing_stands_in_for_are_named(project: Path) -> None:
    (project / "needy.py").write_text("from verl.utils.reward_score import gsm8k\n")
    with pytest.raises(
        ConfigError, match=r"needy\.py does not import: ModuleNotFoundError: No module named 'verl.utils.reward_score'"
    ):
        load_tools([{"class_name": "needy.Tool"}], base_dir=project)
    assert not install_verl_shim()  # it is there already
    assert not is_verl_installed()
    assert load_tools(Path("sandbox.yaml"), base_dir=project).names == ("code_interpreter",)
