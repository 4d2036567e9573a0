"""One entry of a tool list: its keys checked, its limits settled. What every kind of tool is declared from."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from agentrl.errors import ConfigError
from agentrl.plugins import ToolOptions
from agentrl.rollout.tool import ToolSchema
from agentrl.rollout.tool_arguments import Arguments
from agentrl.rollout.tool_limits import CacheLimits, CacheScope, OnTimeout, ToolLimits
from agentrl.rollout.tool_scopes import ToolScope

LIMIT_KEYS = (
    "timeout_s", "on_timeout", "concurrency", "calls_per_s", "burst", "output_tokens", "truncate", "max_infra_error_rate", "retries",
    "cache",
)  # fmt: skip
ENTRY_KEYS = ("use", "class_name", "mcp", "http", "config", "tool_schema", "name", "oracle", "idempotent", "scope", *LIMIT_KEYS)
_CACHE_KEYS = ("size", "ttl_s", "scope")
_ONLY_IDEMPOTENT = ("retries", "cache")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One entry of a tool list, and where it stands."""

    given: Mapping[str, Any]
    """As written."""
    at: str
    """The file and the entry, for errors."""
    project: Path
    """The user's project: relative paths and modules are looked for there first."""
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Limits of the whole list."""
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    """Tool name or reference -> config keys that replace the entry's."""
    only_schemas: bool = False
    """Nobody will call the tool: secrets of an HTTP service may be missing."""
    on_failure: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])
    """Ends what this and earlier entries started, if the list cannot be loaded."""

    def limits(self, options: ToolOptions, *, is_idempotent: bool, kind: Mapping[str, Any] | None = None) -> ToolLimits:
        """The kind's own limits, under the list's, under the tool's marks, under the entry's."""
        own = {k: self.given[k] for k in LIMIT_KEYS if k in self.given}
        shared = dict(self.defaults)
        if not is_idempotent:
            for key in _ONLY_IDEMPOTENT:
                shared.pop(key, None)
                if own.get(key):
                    raise ConfigError(
                        f"{self.at}: `{key}` asks a tool again or not at all, which is only right when that makes no difference. "
                        f"If so, say `idempotent: true`; else remove `{key}`"
                    )
        marked = {k: getattr(options, k) for k in LIMIT_KEYS if getattr(options, k, None) is not None}
        merged = {**(kind or {}), **shared, **marked, **own}
        if isinstance(merged.get("cache"), Mapping):
            merged["cache"] = CacheLimits(**merged["cache"])
        elif not merged.get("cache"):
            merged["cache"] = None
        return ToolLimits(**merged)

    def is_idempotent(self, *hints: bool | None) -> bool:
        """As the entry says, else as the first hint that says something."""
        said = (self.given.get("idempotent"), *hints)
        return bool(next((h for h in said if h is not None), False))

    def scope(self, *allowed: ToolScope, why: str) -> ToolScope:
        """How long an object of the tool lives."""
        scope = self.given.get("scope", "trajectory")
        if scope not in allowed:
            raise ConfigError(f"{self.at}: `scope` must be {' or '.join(allowed)} here, not {scope!r}: {why}")
        return scope

    def config(self, *names: str) -> dict[str, Any]:
        """The entry's ``config``, with what the run replaces in it."""
        config = mapping(self.given.get("config") or {}, f"{self.at}: config")
        for name in names:
            config = {**config, **self.overrides.get(name, {})}
        return config

    def refuse(self, *keys: str, why: str) -> None:
        """Keys that mean nothing for this kind of entry."""
        for key in keys:
            if key in self.given:
                raise ConfigError(f"{self.at}: `{key}` means nothing here: {why}")

    def arguments(self, schema: ToolSchema, *, allow_extra: bool) -> Arguments:
        try:
            return Arguments(schema.parameters, allow_extra=allow_extra)
        except ConfigError as error:
            raise ConfigError(f"{self.at}: the parameters of `{schema.name}` are {error}") from error

    def named(self, name: str) -> str:
        """``name``, if a model can call a tool by it."""
        if not re.fullmatch(r"[A-Za-z_][\w.-]{0,63}", name):
            raise ConfigError(f"{self.at}: `{name}` is no tool name; use letters, digits, `_`, `-` and `.`, at most 64")
        return name

    def schema(self, given: Any, name: str = "") -> ToolSchema:
        """A function schema as OpenAI and verl write it."""
        function = mapping(mapping(given, f"{self.at}: tool_schema").get("function"), f"{self.at}: tool_schema.function")
        if not isinstance(function.get("name"), str):
            raise ConfigError(f"{self.at}: tool_schema.function.name is missing")
        where = f"{self.at}: tool_schema parameters"
        parameters = mapping(function.get("parameters") or {"type": "object", "properties": {}}, where)
        return ToolSchema(
            name=name or function["name"], description=str(function.get("description") or ""), parameters=parameters
        )


def mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a mapping, not {type(value).__name__}")
    return {str(k): v for k, v in value.items()}


def parsed(model: type[BaseModel], value: Any, where: str) -> Any:
    """``value`` as a pydantic model; errors name the key and the nearest right one."""
    given = mapping(value, where)
    check_keys(given, [f.alias or n for n, f in model.model_fields.items()], where)
    try:
        return model.model_validate(given)
    except ValidationError as error:
        problems = "; ".join(f"`{'.'.join(map(str, e['loc']))}`: {e['msg']}" for e in error.errors(include_url=False))
        raise ConfigError(f"{where}: {problems}") from error


def check_keys(value: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    for key in value:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=1, cutoff=0.5)
            hint = f"Did you mean `{near[0]}`?" if near else f"Known: {', '.join(allowed)}"
            raise ConfigError(f"{where}: unknown key `{key}`. {hint}")


def check_limits(value: Mapping[str, Any], where: str) -> None:
    for key, kinds, low in (
        ("timeout_s", int | float, 0),
        ("concurrency", int, 1),
        ("calls_per_s", int | float, 0.001),
        ("burst", int, 1),
        ("output_tokens", int, 1),
        ("max_infra_error_rate", int | float, 0),
        ("retries", int, 0),
    ):
        _check_number(value, key, kinds, low, where)
    if value.get("truncate", "middle") not in ("middle", "left", "right"):
        raise ConfigError(f"{where}: `truncate` must be middle, left or right, not {value['truncate']!r}")
    if value.get("on_timeout", "observe") not in get_args(OnTimeout):
        raise ConfigError(f"{where}: `on_timeout` must be observe or infra, not {value['on_timeout']!r}")
    for key in ("idempotent", "oracle"):
        if not isinstance(value.get(key, False), bool):
            raise ConfigError(f"{where}: `{key}` must be true or false, not {value[key]!r}")
    if value.get("cache"):
        cache = mapping(value["cache"], f"{where}: cache")
        check_keys(cache, _CACHE_KEYS, f"{where}: cache")
        _check_number(cache, "size", int, 1, f"{where}: cache")
        _check_number(cache, "ttl_s", int | float, 0, f"{where}: cache")
        if cache.get("scope", "process") not in get_args(CacheScope):
            raise ConfigError(f"{where}: cache: `scope` must be trajectory or process, not {cache['scope']!r}")


def _check_number(value: Mapping[str, Any], key: str, kinds: Any, low: float, where: str) -> None:
    if key in value and (not isinstance(value[key], kinds) or isinstance(value[key], bool) or value[key] < low):
        raise ConfigError(f"{where}: `{key}` must be a number of at least {low}, not {value[key]!r}")
