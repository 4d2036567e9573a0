"""The arguments of a tool call against its JSON Schema: what has one reading is coerced, what does not fit is explained.

The text of an `ArgumentError` is for the model: it names the argument, what is wrong with it and the nearest right name.
"""

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, cast

import jsonschema
import jsonschema.validators
from pydantic import BaseModel, ValidationError
from referencing import Registry

from agentrl.errors import ConfigError

_MAX_MESSAGES = 4
"""Validation messages shown to the model at once."""
_MAX_MESSAGE = 240
"""Characters of one of them; they quote the offending value."""
_MAX_DEPTH = 64
"""Nested schemas that coercion follows; a ``$ref`` to itself ends there."""
_NO_REMOTE_SCHEMAS: Registry[Any] = Registry()
"""A schema that comes from a tool server must not make this process fetch addresses: only local references resolve."""
_COMPOSITION = frozenset({"allOf", "anyOf", "oneOf", "if", "$ref", "$dynamicRef", "dependentSchemas"})
"""Keywords by which other schemas than ``properties`` name parameters."""
_KNOW_UNEVALUATED = (jsonschema.Draft201909Validator, jsonschema.Draft202012Validator)


class ArgumentError(Exception):
    """The arguments do not fit the schema; the text is for the model."""


class Arguments:
    """Validates and coerces the arguments of one tool.

    Args:
        parameters: JSON Schema of the arguments, in the draft that ``$schema`` names; without one 2020-12, or draft 7 if it is none
            of 2020-12 (lists of ``items``). References within it (``#/$defs/…``) are followed.
        model: where the tool is Python: turns nested objects into what the type hints say.
        fields: parameter name -> field of ``model``.
        allow_extra: arguments that the schema does not name are passed on instead of refused.

    Raises:
        ConfigError: not a JSON Schema, or a reference in it leads nowhere.
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
        draft = _draft_of(schema)
        if not allow_extra and not schema.keys() & _COMPOSITION:
            schema.setdefault("additionalProperties", False)
        elif not allow_extra and draft in _KNOW_UNEVALUATED and "additionalProperties" not in schema:
            schema.setdefault("unevaluatedProperties", False)
        try:
            draft.check_schema(schema)
        except jsonschema.SchemaError as error:
            raise ConfigError(f"not a JSON Schema: {error.message}") from error
        for reference in _references(schema):
            if _resolve(reference, schema) is None:
                raise ConfigError(f"not a JSON Schema of its own: `$ref: {reference}` leads nowhere in it. Give the whole schema")
        self._schema = schema
        exact = jsonschema.validators.extend(draft, {"multipleOf": _multiple_of})
        self._validator: Any = exact(schema, registry=_NO_REMOTE_SCHEMAS)
        self._model = model
        self._fields = dict(fields or {})
        self._plain = _plain_parameters(schema)

    def bind(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as the tool takes them.

        Raises:
            ArgumentError: they do not fit; says what is wrong, in words for the model.
        """
        coerced = dict(arguments) if _fits_plainly(arguments, self._plain) else self._validated(arguments)
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

    def _validated(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        try:
            coerced: dict[str, Any] = self._coerce(dict(arguments), self._schema, 0)
            problems = sorted(self._validator.iter_errors(coerced), key=lambda e: [str(p) for p in e.absolute_path])
        except RecursionError:
            raise ArgumentError(self._explain(["nested too deeply"])) from None
        if problems:
            raise ArgumentError(self._explain(_messages(problems)))
        return coerced

    def _explain(self, messages: Sequence[str]) -> str:
        shown = [m if len(m) <= _MAX_MESSAGE else m[: _MAX_MESSAGE - 1] + "…" for m in messages[:_MAX_MESSAGES]]
        names = ", ".join(self._schema.get("properties", {})) or "none"
        return f"invalid arguments: {'; '.join(shown)}. Parameters: {names}"

    # Coercion: only where the schema leaves one reading.

    def _coerce(self, value: Any, schema: Any, depth: int) -> Any:
        if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
            return value
        schema = cast("Mapping[str, Any]", schema)
        if "$ref" in schema:
            value = self._coerce(value, _resolve(str(schema["$ref"]), self._schema), depth + 1)
        for part in schema.get("allOf", ()):
            value = self._coerce(value, part, depth + 1)
        for union in ("anyOf", "oneOf"):
            if union in schema:
                value = self._coerce_union(value, schema[union], depth)
        kinds = schema.get("type")
        if isinstance(kinds, list):
            return self._coerce_union(value, [{**schema, "type": kind} for kind in kinds], depth)
        options = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(options, list):
            return _coerce_option(value, options)
        return self._coerce_inside(_coerce_scalar(value, kinds), schema, depth)

    def _coerce_inside(self, value: Any, schema: Mapping[str, Any], depth: int) -> Any:
        if isinstance(value, dict):
            members = cast("dict[str, Any]", value)
            return {k: self._coerce(v, _member_schema(k, schema), depth + 1) for k, v in members.items()}
        if isinstance(value, list):
            elements, first, rest = cast("list[Any]", value), schema.get("prefixItems", []), schema.get("items")
            if isinstance(rest, list):  # drafts before 2020-12
                first, rest = cast("list[Any]", rest), schema.get("additionalItems")
            return [self._coerce(v, first[i] if i < len(first) else rest, depth + 1) for i, v in enumerate(elements)]
        return value

    def _coerce_union(self, value: Any, branches: Sequence[Any], depth: int) -> Any:
        for branch in branches:
            if self._validator.evolve(schema=branch).is_valid(value):
                return value
        for branch in branches:
            coerced = self._coerce(value, branch, depth + 1)
            if self._validator.evolve(schema=branch).is_valid(coerced):
                return coerced
        return value


def _draft_of(schema: Mapping[str, Any]) -> Any:
    named = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    if "$schema" not in schema and not _is_schema(schema, named) and _is_schema(schema, jsonschema.Draft7Validator):
        return jsonschema.Draft7Validator
    return named


def _is_schema(schema: Mapping[str, Any], draft: Any) -> bool:
    try:
        draft.check_schema(schema)
    except jsonschema.SchemaError:
        return False
    return True


def _member_schema(name: str, schema: Mapping[str, Any]) -> Any:
    if name in (properties := schema.get("properties", {})):
        return properties[name]
    patterns: Mapping[str, Any] = schema.get("patternProperties", {})
    return next((member for pattern, member in patterns.items() if re.search(pattern, name)), schema.get("additionalProperties"))


def _multiple_of(_: Any, step: Any, value: Any, __: Any) -> Iterator[jsonschema.ValidationError]:
    """As the numbers are written: in binary, 0.07 is no multiple of 0.01."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and (not math.isfinite(value) or Fraction(str(value)) % Fraction(str(step))):
        yield jsonschema.ValidationError(f"{value!r} is not a multiple of {step}")


class _Plain(NamedTuple):
    """Parameters whose schemas say nothing but their types."""

    types: Mapping[str, type]
    required: frozenset[str]


_PLAIN_TYPES = {"string": str, "integer": int, "number": float, "boolean": bool}
_WORDS_ONLY = frozenset({"$schema", "title", "description", "default", "examples", "type"})
"""Keywords that forbid nothing, and the type."""


def _plain_parameters(schema: Mapping[str, Any]) -> _Plain | None:
    """What most tools' schemas come to; None for one that says more, so that only a validator can apply it."""
    if schema.get("type") != "object" or schema.keys() - _WORDS_ONLY - {"properties", "required", "additionalProperties"}:
        return None
    types: dict[str, type] = {}
    for name, parameter in schema.get("properties", {}).items():
        kind = parameter.get("type") if isinstance(parameter, Mapping) else None  # pyright: ignore[reportUnknownMemberType]
        if not isinstance(kind, str) or kind not in _PLAIN_TYPES or parameter.keys() - _WORDS_ONLY:
            return None
        types[name] = _PLAIN_TYPES[kind]
    return _Plain(types, frozenset(schema.get("required", ())))


def _fits_plainly(arguments: Mapping[str, Any], plain: _Plain | None) -> bool:
    """Nothing is missing, unknown or of another type: a validator would accept it, and there is nothing to coerce.

    False says nothing: an integer where a number belongs, for one, is for the validator to judge.
    """
    if plain is None or not plain.required <= arguments.keys():
        return False
    types = plain.types
    return all(name in types and type(value) is types[name] for name, value in arguments.items())


def _references(schema: Any) -> Iterator[str]:
    """Every ``$ref`` in a schema; data (defaults, enums, examples) is not looked into."""
    if isinstance(schema, list):
        for element in cast("list[Any]", schema):
            yield from _references(element)
    elif isinstance(schema, Mapping):
        for key, value in cast("Mapping[str, Any]", schema).items():
            if key == "$ref" and isinstance(value, str):
                yield value
            elif key in ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas"):
                for member in value.values():
                    yield from _references(member)
            elif key not in ("default", "enum", "const", "examples"):
                yield from _references(value)


def _resolve(reference: str, root: Mapping[str, Any]) -> Any:
    """What a local reference names, or None."""
    found: Any = root
    if reference != "#" and not reference.startswith("#/"):
        return None
    for part in reference.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdigit() and int(name) < len(cast("list[Any]", found)):
            found = found[int(name)]
        elif isinstance(found, Mapping) and name in found:
            found = found[name]
        else:
            return None
    return found


_INTEGER = re.compile(r"[+-]?\d{1,18}")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")


def _coerce_scalar(value: Any, kind: Any) -> Any:
    if isinstance(value, str):
        return _coerce_string(value, kind)
    if isinstance(value, float) and kind == "integer" and value.is_integer():
        return int(value)
    if kind == "string" and isinstance(value, int | float) and not isinstance(value, bool):
        return json.dumps(value)
    return value


def _coerce_string(text: str, kind: Any) -> Any:
    bare = text.strip()
    if kind == "integer":
        if _INTEGER.fullmatch(bare):
            return int(bare)
        if _NUMBER.fullmatch(bare) and float(bare).is_integer():
            return int(float(bare))
    elif kind == "number" and _NUMBER.fullmatch(bare):
        number = int(bare) if _INTEGER.fullmatch(bare) else float(bare)
        return number if math.isfinite(number) else text
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


def _coerce_option(value: Any, options: Sequence[Any]) -> Any:
    """The option that the value spells, where exactly one does: ``"2"`` of ``[1, 2]``, ``"Celsius"`` of ``["celsius", "kelvin"]``."""
    if isinstance(value, bool) or any(value == option and type(value) is type(option) for option in options):
        return value
    spelled = [o for o in options if isinstance(o, str | int | float) and str(o).lower() == str(value).strip().lower()]
    return spelled[0] if len(spelled) == 1 else value


def _messages(problems: Sequence[Any]) -> list[str]:
    """Each problem in one line. A misspelt name is one problem, not a missing and an unexpected one."""
    missing = {(tuple(p.absolute_path), _missing(p)) for p in problems if p.validator == "required"}
    lines: list[str] = []
    explained: set[tuple[Any, ...]] = set()
    for problem in problems:
        if problem.validator == "additionalProperties" and isinstance(problem.instance, dict):
            for name, near in _unexpected(problem):
                hint = f" (did you mean '{near}'?)" if near else ""
                lines.append(f"{_path(problem)}'{_short(name)}' was unexpected{hint}")
                if near:
                    explained.add((tuple(problem.absolute_path), near))
    for problem in problems:
        if problem.validator == "additionalProperties" and isinstance(problem.instance, dict):
            continue
        if problem.validator == "required" and (tuple(problem.absolute_path), _missing(problem)) in explained & missing:
            continue
        lines.append(f"{_path(problem)}{_message(problem)}")
    return lines


def _missing(problem: Any) -> str:
    """The name that a ``required`` error misses; jsonschema reports one at a time, in its message only."""
    return next((n for n in problem.validator_value if problem.message.startswith(f"{n!r} ")), "")


def _unexpected(problem: Any) -> Iterable[tuple[str, str]]:
    """Names the schema does not know, each with the nearest one that is still free."""
    known = list(problem.schema.get("properties", {}))
    free = [name for name in known if name not in problem.instance]
    patterns = list(problem.schema.get("patternProperties", {}))
    for name in problem.instance:
        if name not in known and not any(re.search(p, name) for p in patterns):
            exact = [n for n in free if n.lower().replace("_", "") == name.lower().replace("_", "").replace("-", "")]
            near = exact or difflib.get_close_matches(name, free, n=1)
            yield name, near[0] if near else ""


def _message(problem: Any) -> str:
    if problem.validator in ("anyOf", "oneOf") and problem.context:
        causes = list(dict.fromkeys(cause.message for cause in problem.context))
        return " or ".join(causes)
    if problem.validator == "enum" and isinstance(problem.instance, str):
        names = [str(option) for option in problem.validator_value]
        near = difflib.get_close_matches(problem.instance, names, n=1)
        if near:
            return f"{problem.message} (did you mean '{near[0]}'?)"
    return str(problem.message)


def _path(problem: Any) -> str:
    path = ".".join(str(p) for p in problem.absolute_path)
    return f"{path}: " if path else ""


def _short(name: str) -> str:
    return name if len(name) <= 60 else name[:59] + "…"
