"""What the model is told about a tool, and what it may pass: JSON Schema from a signature, validation, coercion.

The decorator itself is ``agentrl.plugins.tool`` (a layer that tools may import); it is re-exported here.
"""

import inspect
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

import jsonschema
from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, ValidationError, create_model

from agentrl.errors import ConfigError
from agentrl.plugins import ToolOptions, tool, tool_options
from agentrl.protocols import ToolContext

__all__ = ["Arguments", "ToolOptions", "ToolSchema", "schema_of", "tool", "tool_options"]

logger = logging.getLogger(__name__)

_MAX_MESSAGES = 4
"""Validation messages shown to the model at once."""
_MAX_MESSAGE = 240
"""Characters of one of them; they quote the offending value."""


class ArgumentError(Exception):
    """The arguments do not fit the schema; the text is for the model."""


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


class Arguments:
    """Validates and coerces the arguments of one tool.

    Args:
        parameters: JSON Schema of the arguments.
        model: where the tool is Python: turns nested objects into what the type hints say.
        fields: parameter name -> field of ``model``.
        allow_extra: arguments that the schema does not name are passed on instead of refused.
    """

    def __init__(
        self,
        parameters: Mapping[str, Any],
        *,
        model: type[BaseModel] | None = None,
        fields: Mapping[str, str] | None = None,
        allow_extra: bool = False,
    ) -> None:
        schema = dict(parameters)
        schema.setdefault("type", "object")
        if not allow_extra:
            schema.setdefault("additionalProperties", False)
        try:
            jsonschema.Draft202012Validator.check_schema(schema)
        except jsonschema.SchemaError as error:
            raise ConfigError(f"not a JSON Schema: {error.message}") from error
        self._schema = schema
        self._validator = jsonschema.Draft202012Validator(schema)
        self._model = model
        self._fields = dict(fields or {})

    def bind(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as the tool takes them.

        Raises:
            ArgumentError: they do not fit; says what is wrong, in words for the model.
        """
        coerced = _coerce(dict(arguments), self._schema)
        problems = sorted(self._validator.iter_errors(coerced), key=lambda e: [str(p) for p in e.absolute_path])
        if problems:
            raise ArgumentError(self._explain([_message(p) for p in problems]))
        if self._model is None:
            return coerced
        try:
            parsed = self._model.model_validate(coerced)
        except ValidationError as error:
            raise ArgumentError(
                self._explain([f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)])
            ) from error
        known = {name: getattr(parsed, field) for name, field in self._fields.items() if name in coerced}
        return {**coerced, **known}

    def _explain(self, messages: Sequence[str]) -> str:
        shown = [m if len(m) <= _MAX_MESSAGE else m[: _MAX_MESSAGE - 1] + "…" for m in messages[:_MAX_MESSAGES]]
        names = ", ".join(self._schema.get("properties", {})) or "none"
        return f"invalid arguments: {'; '.join(shown)}. Parameters: {names}"


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
    where = f"tool `{name}` ({_place(function)})"
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


def _place(function: Callable[..., Any]) -> str:
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


# Coercion: only where the schema leaves one reading.

_INTEGER = re.compile(r"[+-]?\d{1,18}")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")


def _coerce(value: Any, schema: Mapping[str, Any]) -> Any:
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return _coerce_union(value, schema[union])
    kinds = schema.get("type")
    if isinstance(kinds, list):
        return _coerce_union(value, [{**schema, "type": kind} for kind in kinds])
    if isinstance(value, str):
        value = _coerce_string(value, kinds)
    elif isinstance(value, float) and kinds == "integer" and value.is_integer():
        value = int(value)
    elif kinds == "string" and isinstance(value, int | float) and not isinstance(value, bool):
        value = json.dumps(value)
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        return {k: _coerce(v, properties[k]) if isinstance(properties.get(k), dict) else v for k, v in value.items()}
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        return [_coerce(v, schema["items"]) for v in value]
    return value


def _coerce_union(value: Any, branches: Sequence[Mapping[str, Any]]) -> Any:
    for branch in branches:
        if jsonschema.Draft202012Validator(branch).is_valid(value):
            return value
    for branch in branches:
        coerced = _coerce(value, branch)
        if jsonschema.Draft202012Validator(branch).is_valid(coerced):
            return coerced
    return value


def _coerce_string(text: str, kind: Any) -> Any:
    bare = text.strip()
    if kind == "integer":
        if _INTEGER.fullmatch(bare):
            return int(bare)
        if _NUMBER.fullmatch(bare) and float(bare).is_integer():
            return int(float(bare))
    elif kind == "number" and _NUMBER.fullmatch(bare):
        return int(bare) if _INTEGER.fullmatch(bare) else float(bare)
    elif kind == "boolean" and bare.lower() in ("true", "false"):
        return bare.lower() == "true"
    elif kind == "null" and bare in ("null", "None"):
        return None  # formats whose values are text have no other way to say it
    elif kind in ("array", "object") and bare[:1] in ("[", "{"):
        try:
            parsed = json.loads(bare)
        except (ValueError, RecursionError):
            return text
        return parsed if isinstance(parsed, list if kind == "array" else dict) else text
    return text


def _message(problem: Any) -> str:
    path = ".".join(str(p) for p in problem.absolute_path)
    return f"{path}: {problem.message}" if path else str(problem.message)
