"""Tool YAML in, ``Toolbox`` out: each entry is checked, its code loaded, its schema made, its limits settled."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import yaml

from agentrl.errors import ConfigError
from agentrl.plugins import shipped_dir
from agentrl.rollout.http_tools import declare_http
from agentrl.rollout.mcp_tools import declare_mcp
from agentrl.rollout.tool_entry import ENTRY_KEYS, LIMIT_KEYS, Entry, check_keys, check_limits, mapping
from agentrl.rollout.tool_python import declare_python
from agentrl.rollout.toolbox import DeclaredTool, Toolbox


def load_tools(
    spec: Path | str | Sequence[Mapping[str, Any] | str] | Mapping[str, Any],
    *,
    base_dir: Path | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    tokenizer: Any = None,
    output_tokens: int | None = None,
    only_schemas: bool = False,
) -> Toolbox:
    """Make the toolbox that a tool list describes.

    Args:
        spec: a YAML file (``tools:`` and optionally ``defaults:``), or the list itself. Each entry has one of ``use``, verl's
            ``class_name``, ``http`` and ``mcp``, and may have the keys of `ENTRY_KEYS`. See docs/tools.md.
        base_dir: the user's project; the working directory by default.
        overrides: tool name or reference -> config keys that replace the entry's. Those that match no entry are ignored.
        tokenizer: counts the tokens of results; None keeps results whole.
        output_tokens: tokens of one result where neither the tool nor its entry nor ``defaults`` say.
        only_schemas: nothing will be called, so secrets of HTTP services need not be here.

    Raises:
        ConfigError: a key, type, reference or schema is wrong; names the file and the entry.
    """
    entries = [
        replace(entry, only_schemas=only_schemas)
        for entry in read_entries(spec, base_dir=base_dir, overrides=overrides, output_tokens=output_tokens)
    ]
    declared: list[DeclaredTool] = []
    try:
        for entry in entries:
            declared.extend(declare(entry))
        return Toolbox(declared, tokenizer=tokenizer)
    except BaseException:
        for end in entries[0].on_failure if entries else ():
            end()
        raise


def read_entries(
    spec: Path | str | Sequence[Mapping[str, Any] | str] | Mapping[str, Any],
    *,
    base_dir: Path | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    output_tokens: int | None = None,
) -> list[Entry]:
    """The entries of a tool list, for `declare`; arguments and errors as of `load_tools`. Nothing is loaded or connected yet."""
    project = (base_dir or Path.cwd()).resolve()
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
        check_keys(spec, ("tools", "defaults"), where)
        defaults = mapping(spec.get("defaults") or {}, f"{where}: defaults")
        check_keys(defaults, LIMIT_KEYS, f"{where}: defaults")
        check_limits(defaults, f"{where}: defaults")
        spec = cast("Sequence[Mapping[str, Any] | str]", spec.get("tools") or [])
    if not isinstance(spec, Sequence) or isinstance(spec, str):
        raise ConfigError(f"{where}: `tools` must be a list")
    if output_tokens is not None:
        defaults = {"output_tokens": output_tokens, **defaults}
    on_failure: list[Callable[[], None]] = []
    return [
        Entry(
            given={"use": item} if isinstance(item, str) else mapping(item, f"{where}: tools[{index}]"),
            at=f"{where}: tools[{index}]",
            project=project,
            defaults=defaults,
            overrides=overrides or {},
            on_failure=on_failure,
        )
        for index, item in enumerate(spec)
    ]


def declare(entry: Entry) -> list[DeclaredTool]:
    """The tools of one entry, loaded and connected.

    Raises:
        ConfigError: it cannot be; names the entry.
    """
    check_keys(entry.given, ENTRY_KEYS, entry.at)
    check_limits(entry.given, entry.at)
    if "mcp" in entry.given:
        return declare_mcp(entry)
    if "http" in entry.given:
        return declare_http(entry)
    if ("use" in entry.given) == ("class_name" in entry.given):
        raise ConfigError(f"{entry.at}: give `use: module:name`, `class_name: module.Class`, `http:` or `mcp:`, one of them")
    return declare_python(entry)


def _find_spec(path: Path, project: Path) -> Path:
    candidates = [path if path.is_absolute() else project / path]
    if not path.is_absolute() and path.parts[:1] == ("configs",):
        with contextlib.suppress(ConfigError):
            candidates.append(shipped_dir("configs") / Path(*path.parts[1:]))
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ConfigError(f"no tool list `{path}`. Looked in: {', '.join(str(c) for c in candidates)}")
