"""``mcp:`` entries: the tools of a server, as the server describes them, in the toolbox."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from agentrl.errors import ConfigError
from agentrl.plugins import ToolOptions
from agentrl.protocols import ToolResult
from agentrl.rollout.env_values import EnvValues
from agentrl.rollout.mcp_server import ListedTool, McpAddress, McpServer, command_of
from agentrl.rollout.tool import ToolSchema
from agentrl.rollout.tool_entry import Entry, mapping, parsed
from agentrl.rollout.toolbox import DeclaredTool

_OPTIONAL_KEYS = ("name", "config", "tool_schema", "oracle")


class McpSpec(BaseModel):
    """The ``mcp:`` part of an entry: a command, a url, or a file of servers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: str | list[str] | None = None
    """Starts the server, which speaks over stdin and stdout. A bare ``python`` is agentrl's own interpreter."""
    args: list[str] = Field(default_factory=list)
    """Further words of the command."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment of the child, besides PATH, HOME and the like; ``${env:NAME}`` passes a variable on."""
    cwd: str | None = None
    """Its working directory; the project by default."""
    url: str | None = None
    """Where a server speaks streamable HTTP."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Headers of every request to ``url``; ``${env:NAME}`` keeps secrets out of the file."""
    servers: str | None = None
    """A JSON file ``{"mcpServers": {"name": {"command": …} or {"url": …}}}``: all of its servers."""
    only: list[str] = Field(default_factory=list)
    """Tools to offer, by the server's names; all by default."""
    exclude: list[str] = Field(default_factory=list)
    """Tools not to offer."""
    prefix: str = ""
    """Put before the names that the model sees."""
    start_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds for starting, the handshake and the list of tools."""

    @model_validator(mode="after")
    def _check(self) -> "McpSpec":
        if sum(part is not None for part in (self.command, self.url, self.servers)) != 1:
            raise ValueError("give one of command, url and servers")
        return self


class McpInstance:
    """One tool of the server in the hands of one trajectory; the session is the process's."""

    def __init__(self, server: McpServer, name: str) -> None:
        self._server = server
        self._name = name

    async def open(self) -> None:
        return

    async def call(self, arguments: dict[str, Any]) -> ToolResult:
        return await self._server.call(self._name, arguments)

    async def close(self) -> None:
        return


def declare_mcp(entry: Entry) -> list[DeclaredTool]:
    """Connect to the entry's servers and declare their tools.

    Raises:
        ConfigError: a server cannot be reached, or has no tool of a name that the entry gives.
    """
    entry = _from_verl(entry)
    entry.refuse(
        "use",
        "class_name",
        "scope",
        *_OPTIONAL_KEYS,
        why="the server names and describes its tools; use `prefix`, `only`, `exclude`",
    )
    spec: McpSpec = parsed(McpSpec, entry.given["mcp"], f"{entry.at}: mcp")
    values = EnvValues(f"{entry.at}: mcp")
    listed: list[tuple[McpServer, ListedTool]] = []
    for address in _addresses(spec, entry):
        server = McpServer(address, values)
        try:
            tools = server.start()
        except ConfigError as error:
            raise ConfigError(f"{entry.at}: {error}") from error
        entry.on_failure.append(server.stop)
        listed.extend((server, tool) for tool in tools)
    known = [tool.name for _, tool in listed]
    for name in (*spec.only, *spec.exclude):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean `{near[0]}`?" if near else f"It has: {', '.join(known) or 'none'}"
            raise ConfigError(f"{entry.at}: the MCP server has no tool `{name}`. {hint}")
    offered = [(s, t) for s, t in listed if (not spec.only or t.name in spec.only) and t.name not in spec.exclude]
    return [_declare(entry, server, tool, spec.prefix) for server, tool in offered]


def _declare(entry: Entry, server: McpServer, tool: ListedTool, prefix: str) -> DeclaredTool:
    schema = ToolSchema(name=entry.named(prefix + tool.name), description=tool.description, parameters=tool.parameters)
    is_idempotent = entry.is_idempotent(tool.is_idempotent or None)
    return DeclaredTool(
        schema=schema,
        # What the server leaves open stays open: it validates as well.
        arguments=entry.arguments(schema, allow_extra=True),
        limits=entry.limits(ToolOptions(), is_idempotent=is_idempotent, kind={"on_timeout": "infra"}),
        reference=f"mcp:{tool.name}",
        make=lambda _: McpInstance(server, tool.name),
        is_stateful=False,
        is_idempotent=is_idempotent,
        kind="mcp",
        place=str(server.address),
        shutdown=server.aclose,
    )


def _addresses(spec: McpSpec, entry: Entry) -> list[McpAddress]:
    if spec.servers is None:
        return [_address(spec.model_dump(include={"command", "args", "env", "cwd", "url", "headers"}), spec, entry)]
    path = entry.project / spec.servers
    try:
        loaded: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{entry.at}: mcp: servers={spec.servers}: cannot be read as JSON: {error}") from error
    where = f"{entry.at}: mcp: {spec.servers}: mcpServers"
    servers = mapping(mapping(loaded, where).get("mcpServers"), where)
    return [_address(mapping(server, f"{where}.{name}"), spec, entry) for name, server in servers.items()]


def _address(server: Mapping[str, Any], spec: McpSpec, entry: Entry) -> McpAddress:
    if bool(server.get("command")) == bool(server.get("url")):
        raise ConfigError(
            f"{entry.at}: mcp: a server has either `command` or `url`, this one has {', '.join(server) or 'neither'}"
        )
    token = server.get("auth_token")  # verl's spelling
    headers = dict(server.get("headers") or {}) | ({"Authorization": f"Bearer {token}"} if token else {})
    return McpAddress(
        command=command_of(server["command"], server.get("args") or []) if server.get("command") else (),
        env=server.get("env") or {},
        cwd=entry.project / (server.get("cwd") or "."),
        url=server.get("url"),
        headers=headers,
        start_timeout_s=spec.start_timeout_s,
    )


def _from_verl(entry: Entry) -> Entry:
    """verl 0.8 writes ``class_name``, ``config: {type: mcp}`` and ``mcp: {mcp_servers_config_path, tool_selected_list}``."""
    given = dict(entry.given)
    spec = given.get("mcp")
    if "class_name" not in given or not isinstance(spec, Mapping) or "mcp_servers_config_path" not in spec:
        return entry
    config = mapping(given.pop("config", None) or {}, f"{entry.at}: config")
    del given["class_name"]
    given["mcp"] = {"servers": str(spec["mcp_servers_config_path"]), "only": list(spec.get("tool_selected_list") or [])}
    for theirs, ours in (("rate_limit", "calls_per_s"), ("timeout", "timeout_s")):
        if theirs in config:
            given.setdefault(ours, config[theirs])
    return replace(entry, given=given)
