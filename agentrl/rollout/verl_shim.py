"""The few names of verl that its tool files import, so that such a file runs unchanged where verl is not installed."""

import functools
import importlib.util
import logging
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar
from uuid import uuid4

from pydantic import BaseModel, ConfigDict

logger = logging.getLogger(__name__)

_MARK = "__agentrl_shim__"

F = TypeVar("F", bound=Callable[..., Any])

SHIPPED_INSTEAD = {"verl.tools.sandbox_fusion_tools.SandboxFusionTool": "tools.code_interpreter.CodeInterpreter"}
"""verl's own tools that have a shipped counterpart which reads the same ``config``."""


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="allow")  # a schema keeps every key of JSON Schema, also those verl does not know


class OpenAIFunctionPropertySchema(_Lenient):
    """One argument."""

    type: str | list[str] | None = None
    description: str | None = None
    enum: list[Any] | None = None


class OpenAIFunctionParametersSchema(_Lenient):
    """All of them."""

    type: str = "object"
    properties: dict[str, OpenAIFunctionPropertySchema] = {}
    required: list[str] = []


class OpenAIFunctionSchema(_Lenient):
    """A function."""

    name: str
    description: str = ""
    parameters: OpenAIFunctionParametersSchema = OpenAIFunctionParametersSchema()
    strict: bool = False


class OpenAIFunctionToolSchema(_Lenient):
    """A tool, as chat templates read it."""

    type: str = "function"
    function: OpenAIFunctionSchema


class ToolResponse(_Lenient):
    """What ``execute`` answers; the model reads ``text``."""

    text: str | None = None
    image: list[Any] | None = None
    video: list[Any] | None = None


class BaseTool:
    """What verl's tools inherit from: a config, a schema, and methods that do nothing yet."""

    def __init__(self, config: dict[str, Any], tool_schema: Any = None) -> None:
        self.config = config
        self.tool_schema = tool_schema or self.get_openai_tool_schema()
        self.name: str = self.tool_schema.function.name

    def get_openai_tool_schema(self) -> Any:
        """The schema; tools that are not given one say their own."""
        return self.tool_schema

    async def create(self, instance_id: str | None = None, **kwargs: Any) -> tuple[str, ToolResponse]:
        """Begin a trajectory."""
        return instance_id or str(uuid4()), ToolResponse()

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> tuple[Any, float, dict[str, Any]]:
        """Answer one call."""
        return ToolResponse(text="Updated the tool state."), 0.0, {}

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float:
        """The reward of the tool's state; tools call it themselves."""
        return 0.0

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        """End the trajectory."""


def rollout_trace_op(function: F) -> F:
    """verl records traces here; the trajectory log has them already."""

    @functools.wraps(function)
    async def traced(*args: Any, **kwargs: Any) -> Any:
        return await function(*args, **kwargs)

    return traced  # pyright: ignore[reportReturnType]


_MODULES: dict[str, dict[str, Any]] = {
    "verl": {},
    "verl.tools": {},
    "verl.tools.base_tool": {"BaseTool": BaseTool, "OpenAIFunctionToolSchema": OpenAIFunctionToolSchema},
    "verl.tools.schemas": {
        cls.__name__: cls
        for cls in (
            OpenAIFunctionPropertySchema,
            OpenAIFunctionParametersSchema,
            OpenAIFunctionSchema,
            OpenAIFunctionToolSchema,
            ToolResponse,
        )
    },
    "verl.utils": {},
    "verl.utils.rollout_trace": {"rollout_trace_op": rollout_trace_op},
}


def is_verl_installed() -> bool:
    """Whether verl itself can be imported; what stands in for it does not count."""
    loaded = sys.modules.get("verl")
    return not hasattr(loaded, _MARK) if loaded else importlib.util.find_spec("verl") is not None


def install_verl_shim() -> bool:
    """Make those names importable. False where verl is installed (its own names count) or the shim already is."""
    if "verl" in sys.modules or is_verl_installed():
        return False
    for name, members in _MODULES.items():
        module = ModuleType(name, "Stands in for verl, which is not installed. See agentrl.rollout.verl_shim.")
        module.__spec__ = ModuleSpec(name, None, is_package=True)  # libraries that look for verl would stumble over None
        setattr(module, _MARK, True)
        module.__path__ = []  # a package without files: other submodules are reported as missing, by name
        vars(module).update(members)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    logger.info("verl_shim_installed: verl is not installed; its tool base classes come from agentrl")
    return True
