"""Tool YAML in, ``Toolbox`` out: each entry is checked, its code loaded, its schema made, its limits settled."""

import contextlib
import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from agentrl.errors import ConfigError
from agentrl.plugins import load_object, shipped_dir, tool_options
from agentrl.rollout.tool import Arguments, Signature, ToolSchema, schema_of
from agentrl.rollout.tool_instances import ClassInstance, FunctionInstance, VerlInstance, VerlSchema
from agentrl.rollout.toolbox import DeclaredTool, Toolbox, ToolLimits

# From YAML

_LIMIT_KEYS = ("timeout_s", "concurrency", "output_tokens", "truncate", "max_infra_error_rate")
_ENTRY_KEYS = ("use", "class_name", "mcp", "http", "config", "tool_schema", "name", "oracle", *_LIMIT_KEYS)


def load_tools(
    spec: Path | str | Sequence[Mapping[str, Any] | str] | Mapping[str, Any],
    *,
    base_dir: Path | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    tokenizer: Any = None,
    output_tokens: int | None = None,
) -> Toolbox:
    """Make the toolbox that a tool list describes.

    Args:
        spec: a YAML file (``tools:`` and optionally ``defaults:``), or the list itself. Each entry has ``use`` or verl's
            ``class_name``, and may have ``config``, ``tool_schema``, ``name``, ``oracle``, ``timeout_s``, ``concurrency``,
            ``output_tokens``, ``truncate`` and ``max_infra_error_rate``.
        base_dir: the user's project; the working directory by default.
        overrides: tool name or reference -> config keys that replace the entry's. Those that match no entry are ignored.
        tokenizer: counts the tokens of results; None keeps results whole.
        output_tokens: tokens of one result where neither the tool nor its entry nor ``defaults`` say.

    Raises:
        ConfigError: a key, type, reference or schema is wrong; names the file and the entry.
    """
    project = base_dir or Path.cwd()
    where = "tools"
    if isinstance(spec, str | Path):
        path = _find_spec(Path(spec), project)
        where = str(spec)
        try:
            spec = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{where}: cannot be read as YAML: {error}") from error
    defaults: dict[str, Any] = {}
    if isinstance(spec, Mapping):
        _check_keys(spec, ("tools", "defaults"), where)
        defaults = _mapping(spec.get("defaults") or {}, f"{where}: defaults")
        _check_keys(defaults, _LIMIT_KEYS, f"{where}: defaults")
        _check_limits(defaults, f"{where}: defaults")
        spec = cast("Sequence[Mapping[str, Any] | str]", spec.get("tools") or [])
    if not isinstance(spec, Sequence) or isinstance(spec, str):
        raise ConfigError(f"{where}: `tools` must be a list")
    if output_tokens is not None:
        defaults = {"output_tokens": output_tokens, **defaults}
    declared: list[DeclaredTool] = []
    for index, item in enumerate(spec):
        at = f"{where}: tools[{index}]"
        entry = {"use": item} if isinstance(item, str) else _mapping(item, at)
        declared.append(_declare(entry, defaults, at, project, overrides or {}))
    return Toolbox(declared, tokenizer=tokenizer)


def _find_spec(path: Path, project: Path) -> Path:
    candidates = [path if path.is_absolute() else project / path]
    if not path.is_absolute() and path.parts[:1] == ("configs",):
        with contextlib.suppress(ConfigError):
            candidates.append(shipped_dir("configs") / Path(*path.parts[1:]))
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ConfigError(f"no tool list `{path}`. Looked in: {', '.join(str(c) for c in candidates)}")


def _declare(
    entry: dict[str, Any], defaults: Mapping[str, Any], at: str, project: Path, overrides: Mapping[str, Mapping[str, Any]]
) -> DeclaredTool:
    _check_keys(entry, _ENTRY_KEYS, at)
    for later in ("mcp", "http"):
        if later in entry:
            raise ConfigError(f"{at}: `{later}` tools are not supported yet; wrap the service in an @tool function and `use:` it")
    if ("use" in entry) == ("class_name" in entry):
        raise ConfigError(f"{at}: give `use: module:name` or `class_name: module.Class`, one of them")
    reference = str(entry.get("use") or entry.get("class_name"))
    try:
        target = load_object(reference, root=project)
    except ConfigError as error:
        raise ConfigError(f"{at}: {error}") from error
    _check_limits(entry, at)
    options = tool_options(target)
    given = {k: entry[k] for k in _LIMIT_KEYS if k in entry}
    marked = {k: getattr(options, k) for k in _LIMIT_KEYS if getattr(options, k, None) is not None}
    limits = ToolLimits(**{**defaults, **marked, **given})
    name = str(entry.get("name") or options.name or _default_name(target, entry))
    if not re.fullmatch(r"[A-Za-z_][\w.-]{0,63}", name):
        raise ConfigError(f"{at}: `{name}` is no tool name; use letters, digits, `_`, `-` and `.`, at most 64")
    config = _mapping(entry.get("config") or {}, f"{at}: config")
    for key in (reference, name):
        config = {**config, **overrides.get(key, {})}
    oracle = bool(entry.get("oracle", options.oracle))
    if inspect.isclass(target) and all(callable(getattr(target, m, None)) for m in ("create", "execute", "release")):
        return _declare_verl(target, entry, config, name, limits, reference, oracle, at)
    if inspect.isclass(target) and callable(getattr(target, "call", None)):
        return _declare_class(target, entry, config, name, limits, reference, oracle, at)
    if inspect.isroutine(target):
        return _declare_function(target, entry, config, name, limits, reference, oracle, at)
    raise ConfigError(
        f"{at}: `{reference}` is neither a function nor a class with `call` (or verl's `create`, `execute`, `release`)"
    )


def _default_name(target: Any, entry: Mapping[str, Any]) -> str:
    in_schema = ((entry.get("tool_schema") or {}).get("function") or {}).get("name")
    if in_schema:
        return str(in_schema)
    if inspect.isclass(target):
        own = target.__dict__.get("name")
        if isinstance(own, str):
            return own
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", target.__name__).lower()
    return str(getattr(target, "__name__", "tool"))


def _declare_function(
    target: Any,
    entry: Mapping[str, Any],
    config: dict[str, Any],
    name: str,
    limits: ToolLimits,
    reference: str,
    oracle: bool,
    at: str,
) -> DeclaredTool:
    if config:
        raise ConfigError(f"{at}: `{reference}` is a function and takes no `config`; write a Tool class for settings")
    signature = _signature(target, entry, name, "", at, is_method=False)
    return DeclaredTool(
        schema=signature.schema,
        arguments=signature.arguments,
        limits=limits,
        reference=reference,
        make=lambda context: FunctionInstance(target, signature, context),
        oracle=oracle,
        is_stateful=False,
    )


def _declare_class(
    target: Any,
    entry: Mapping[str, Any],
    config: dict[str, Any],
    name: str,
    limits: ToolLimits,
    reference: str,
    oracle: bool,
    at: str,
) -> DeclaredTool:
    if config.pop("type", "native") != "native":
        raise ConfigError(f"{at}: only `type: native` tools are supported yet")
    model = getattr(target, "Config", None)
    arguments = {"config": _parsed(model, config, at)} if inspect.isclass(model) and hasattr(model, "model_validate") else config

    def construct() -> Any:
        return target(**arguments)

    try:
        construct()  # a setting that does not fit is found at start-up, not in the first rollout
    except TypeError as error:
        known = [p for p in inspect.signature(target).parameters if p not in ("args", "kwargs")]
        near = {k: difflib.get_close_matches(k, known, n=1) for k in config if k not in known}
        hints = "".join(f" Did you mean `{n[0]}` for `{k}`?" for k, n in near.items() if n)
        raise ConfigError(
            f"{at}: config does not fit {reference}: {error}. It takes: {', '.join(known) or 'nothing'}.{hints}"
        ) from error
    summary = " ".join((inspect.getdoc(target) or "").split("\n\n")[0].split())
    signature = _signature(target.call, entry, name, summary, at, is_method=True)
    return DeclaredTool(
        schema=signature.schema,
        arguments=signature.arguments,
        limits=limits,
        reference=reference,
        make=lambda context: ClassInstance(construct(), signature, context),
        oracle=oracle,
        is_stateful=True,
        shutdown=getattr(target, "aclose", None) if inspect.ismethod(getattr(target, "aclose", None)) else None,
    )


def _declare_verl(
    target: Any,
    entry: Mapping[str, Any],
    config: dict[str, Any],
    name: str,
    limits: ToolLimits,
    reference: str,
    oracle: bool,
    at: str,
) -> DeclaredTool:
    if config.get("type", "native") != "native":
        raise ConfigError(f"{at}: only `type: native` tools are supported yet")
    given = entry.get("tool_schema")
    try:
        made = target(config=config, tool_schema=VerlSchema(given) if given else None)
    except Exception as error:
        raise ConfigError(f"{at}: {reference} could not be made: {type(error).__name__}: {error}") from error
    if not given and hasattr(made, "get_openai_tool_schema"):
        own = made.get_openai_tool_schema()
        given = own.model_dump(exclude_none=True) if hasattr(own, "model_dump") else own
    if not given:
        raise ConfigError(f"{at}: {reference} brings no schema; give `tool_schema:`")
    schema = _given_schema(given, str(entry.get("name") or ""), at)
    return DeclaredTool(
        schema=schema,
        arguments=_arguments(schema, at, allow_extra=True),
        limits=limits,
        reference=reference,
        make=lambda context: VerlInstance(made, context),
        oracle=oracle,
        is_stateful=True,
        shutdown=getattr(made, "aclose", None),
    )


def _signature(function: Any, entry: Mapping[str, Any], name: str, summary: str, at: str, *, is_method: bool) -> Signature:
    """From the signature; a ``tool_schema`` in the entry replaces what the model sees, if it fits."""
    try:
        signature = schema_of(function, name=name, description=summary, is_method=is_method)
    except ConfigError as error:
        raise ConfigError(f"{at}: {error}") from error
    if not entry.get("tool_schema"):
        return signature
    schema = _given_schema(entry["tool_schema"], str(entry.get("name") or ""), at)
    own = set(signature.schema.parameters["properties"])
    foreign = sorted(set(schema.parameters.get("properties", {})) - own)
    missing = sorted(set(signature.schema.parameters.get("required", [])) - set(schema.parameters.get("properties", {})))
    if foreign or missing:
        raise ConfigError(
            f"{at}: tool_schema of `{name}` does not fit the function: "
            f"{'unknown to it: ' + ', '.join(foreign) if foreign else ''}{'; ' if foreign and missing else ''}"
            f"{'required by it: ' + ', '.join(missing) if missing else ''}. Remove `tool_schema:` to use the signature, or rename"
        )
    return Signature(schema, _arguments(schema, at, allow_extra=False), signature.context_parameter)


def _given_schema(given: Any, name: str, at: str) -> ToolSchema:
    function = _mapping(_mapping(given, f"{at}: tool_schema").get("function"), f"{at}: tool_schema.function")
    if not isinstance(function.get("name"), str):
        raise ConfigError(f"{at}: tool_schema.function.name is missing")
    parameters = _mapping(function.get("parameters") or {"type": "object", "properties": {}}, f"{at}: tool_schema parameters")
    return ToolSchema(name=name or function["name"], description=str(function.get("description") or ""), parameters=parameters)


def _arguments(schema: ToolSchema, at: str, *, allow_extra: bool) -> Arguments:
    try:
        return Arguments(schema.parameters, allow_extra=allow_extra)
    except ConfigError as error:
        raise ConfigError(f"{at}: the parameters of `{schema.name}` are {error}") from error


def _parsed(model: Any, config: Mapping[str, Any], at: str) -> Any:
    _check_keys(config, tuple(model.model_fields), f"{at}: config")
    try:
        return model.model_validate(config)
    except ValueError as error:
        raise ConfigError(f"{at}: config: {error}") from error


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a mapping, not {type(value).__name__}")
    return {str(k): v for k, v in value.items()}


def _check_keys(value: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    for key in value:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=1, cutoff=0.5)
            hint = f"Did you mean `{near[0]}`?" if near else f"Known: {', '.join(allowed)}"
            raise ConfigError(f"{where}: unknown key `{key}`. {hint}")


def _check_limits(value: Mapping[str, Any], where: str) -> None:
    for key, kinds, low in (
        ("timeout_s", int | float, 0),
        ("concurrency", int, 1),
        ("output_tokens", int, 1),
        ("max_infra_error_rate", int | float, 0),
    ):
        if key in value and (not isinstance(value[key], kinds) or isinstance(value[key], bool) or value[key] < low):
            raise ConfigError(f"{where}: `{key}` must be a number of at least {low}, not {value[key]!r}")
    if value.get("truncate", "middle") not in ("middle", "left", "right"):
        raise ConfigError(f"{where}: `truncate` must be middle, left or right, not {value['truncate']!r}")
