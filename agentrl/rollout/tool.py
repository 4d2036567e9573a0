"""What the model is told about a tool: its name, its description, and a JSON Schema read from its signature.

The decorator itself is ``agentrl.plugins.tool`` (a layer that tools may import); it is re-exported here.
"""

import inspect
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from pydantic import ConfigDict, Field, PydanticUserError, create_model

from agentrl.errors import ConfigError
from agentrl.plugins import ToolOptions, tool, tool_options
from agentrl.protocols import ToolContext
from agentrl.rollout.tool_arguments import ArgumentError, Arguments

__all__ = ["ArgumentError", "Arguments", "ToolOptions", "ToolSchema", "schema_of", "tool", "tool_options"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSchema:
    """A tool as the model sees it."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON Schema of the arguments, complete: items, nested objects, defaults, enums."""

    @property
    def as_function(self) -> dict[str, Any]:
        """The form that chat templates and OpenAI's API read."""
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": dict(self.parameters)},
        }


@dataclass(frozen=True, slots=True)
class Signature:
    """A function's schema, and what calls it."""

    schema: ToolSchema
    arguments: Arguments
    context_parameter: str | None
    """The keyword parameter that receives the ``ToolContext``."""


def schema_of(function: Callable[..., Any], *, name: str, description: str = "", is_method: bool = False) -> Signature:
    """Read a function's type hints and Google-style docstring.

    Args:
        function: async or not.
        name: what the model calls.
        description: where the docstring has none.
        is_method: the first parameter is the instance.

    Raises:
        ConfigError: a parameter cannot be described by a JSON Schema.
    """
    where = f"tool `{name}` ({place_of(function)})"
    try:
        hints = get_type_hints(function, include_extras=True)
    except (NameError, TypeError) as error:
        raise ConfigError(f"{where}: its type hints cannot be read: {error}") from error
    summary, described = _docstring(inspect.getdoc(function) or "")
    fields: dict[str, Any] = {}
    names: dict[str, str] = {}
    context: str | None = None
    allow_extra = False
    parameters = list(inspect.signature(function).parameters.values())[1 if is_method else 0 :]
    for index, parameter in enumerate(parameters):
        hint = hints.get(parameter.name, Any)
        if parameter.name == "ctx" or hint is ToolContext:
            context = parameter.name
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            allow_extra = True
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise ConfigError(f"{where}: parameter `{parameter.name}` cannot be passed by name; tools are called with keywords")
        if parameter.name not in hints:
            logger.warning(
                "tool_parameter_untyped tool=%s parameter=%s: add a type hint, so that it is checked", name, parameter.name
            )
        if parameter.name not in described:
            logger.info("tool_parameter_undescribed tool=%s parameter=%s: add it under Args:", name, parameter.name)
        default = ... if parameter.default is parameter.empty else parameter.default
        field: Any = Field(default, alias=parameter.name, description=described.get(parameter.name))
        fields[f"p{index}"] = (hint, field)  # an alias, because `schema` or `_x` are no names for pydantic's fields
        names[parameter.name] = f"p{index}"
    try:
        model = create_model(f"{name}_arguments", __config__=ConfigDict(extra="allow" if allow_extra else "forbid"), **fields)
        raw = model.model_json_schema(by_alias=True)
    except (PydanticUserError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}. Use types that JSON can carry") from error
    defs = raw.pop("$defs", {})
    schema = _tidy(raw, defs, ())
    schema.pop("additionalProperties", None)
    schema.setdefault("properties", {})
    if not (summary or description):
        logger.warning("tool_undescribed tool=%s: write a docstring; the model reads it", name)
    return Signature(
        ToolSchema(name=name, description=summary or description, parameters=schema),
        Arguments(schema, model=model, fields=names, allow_extra=allow_extra),
        context,
    )


def place_of(function: Callable[..., Any]) -> str:
    """File and line where a function is written."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(function)


_SECTION = re.compile(r"^(Args|Arguments|Parameters|Returns?|Raises|Yields|Examples?|Notes?):\s*$")
_ENTRY = re.compile(r"^(\*{0,2}\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)$")


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """The text before the first section, and the entries under ``Args:``."""
    summary: list[str] = []
    entries: dict[str, str] = {}
    section, current, entry_indent = "", "", None
    for line in text.splitlines():
        heading = _SECTION.match(line)
        if heading:
            section, current, entry_indent = heading.group(1), "", None
        elif not section:
            summary.append(line)
        elif section in ("Args", "Arguments", "Parameters") and line.strip():
            indent = len(line) - len(line.lstrip())
            entry_indent = indent if entry_indent is None else entry_indent
            entry = _ENTRY.match(line.strip()) if indent <= entry_indent else None
            if entry:
                current = entry.group(1).lstrip("*")
                entries[current] = entry.group(2).strip()
            elif current:
                entries[current] = f"{entries[current]} {line.strip()}".strip()
    return " ".join("\n".join(summary).split()), entries


def _tidy(schema: Any, defs: Mapping[str, Any], within: tuple[str, ...]) -> Any:
    """The schema without pydantic's titles, with references replaced by what they name (recursive ones are cut)."""
    if isinstance(schema, list):
        return [_tidy(s, defs, within) for s in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        name = str(schema["$ref"]).rsplit("/", 1)[-1]
        rest = {k: v for k, v in schema.items() if k != "$ref"}
        if name in within:
            return {"type": "object", **rest}
        return {**_tidy(defs.get(name, {}), defs, (*within, name)), **_tidy(rest, defs, within)}
    tidy: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "title" and isinstance(value, str):
            continue
        if key == "properties":
            tidy[key] = {k: _tidy(v, defs, within) for k, v in value.items()}
        elif key in ("default", "enum", "const", "examples"):
            tidy[key] = value
        else:
            tidy[key] = _tidy(value, defs, within)
    return tidy
