"""``agentrl tools``: what a tool list holds, whether it works, what the model is shown, what a call answers."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from agentrl.assembly.parts import load_tokenizer, sandbox_overrides, tool_file, tool_spec
from agentrl.assembly.stalls import Finding
from agentrl.config import Config, load_config
from agentrl.errors import AgentRLError, ConfigError
from agentrl.plugins import TOOL_ENTRY_POINTS, installed_tools, shipped_dir
from agentrl.rollout.tool_entry import Entry
from agentrl.rollout.tool_loading import declare, read_entries
from agentrl.rollout.toolbox import DeclaredTool, Observation, Toolbox
from agentrl.types import Task, ToolCall

LIST_KEYS = {"tools", "defaults"}


class ToolSource:
    """Where the commands take their tools from.

    Args:
        file: a run's YAML, a tool YAML, or the name of a shipped one; None takes every shipped and installed tool.
        model: whose tokenizer counts and cuts; by default the run's.
        overrides: ``key=value``, for a run's YAML.

    Raises:
        ConfigError: the file is neither.
    """

    def __init__(self, file: str | None, *, model: str | None = None, overrides: Sequence[str] = ()) -> None:
        self._file = file
        self._model = model
        self.config: Config | None = None
        if file is not None and not _is_tool_list(file):
            self.config = load_config(file, overrides)

    def entries(self) -> list[Entry]:
        """The entries of the list; nothing is loaded yet."""
        if self.config is not None:
            url = None if self.config.sandbox.url == "auto" else self.config.sandbox.url
            overrides = sandbox_overrides(self.config, url)
            return read_entries(tool_spec(self.config), overrides=overrides, output_tokens=self.config.serve.tool_tokens)
        if self._file is not None:
            return read_entries(tool_file(self._file))
        shipped = [e for path in sorted((shipped_dir("configs") / "tools").glob("*.yaml")) for e in read_entries(path)]
        return [*shipped, *read_entries([{"use": name} for name in installed_tools()])]

    def tokenizer(self) -> Any:
        """The model's; None where no model is named."""
        config = self.config or load_config(None)
        path = self._model or config.model.path
        return load_tokenizer(config, path) if path else None

    def toolbox(self, *, tokenizer: Any = None) -> Toolbox:
        """Every tool of the list, loaded and connected. Close it.

        Raises:
            ConfigError: one cannot be.
        """
        entries = self.entries()
        try:
            return Toolbox([tool for entry in entries for tool in declare(entry)], tokenizer=tokenizer)
        except BaseException:
            for entry in entries:
                for end in entry.on_failure:
                    end()
            raise


def search_order() -> list[str]:
    """Where a name such as ``tools.x:y`` is looked for, first place first."""
    try:
        shipped = str(shipped_dir("tools").parent)
    except ConfigError as error:
        shipped = str(error)
    installed = ", ".join(f"{name} ({point.value})" for name, point in installed_tools().items()) or "none"
    return [
        f"the project: {Path.cwd()}",
        f"shipped with agentrl: {shipped}",
        "installed packages",
        f"a bare name is an entry point of the group {TOOL_ENTRY_POINTS}: {installed}",
    ]


def describe(tool: DeclaredTool) -> dict[str, Any]:
    """One tool as ``agentrl tools list --json`` shows it."""
    return {
        "name": tool.name,
        "kind": tool.kind,
        "reference": tool.reference,
        "place": tool.place,
        "description": tool.schema.description,
        "oracle": tool.oracle,
        "stateful": tool.is_stateful,
        "idempotent": tool.is_idempotent,
        "limits": asdict(tool.limits),
    }


async def check_tools(entries: Sequence[Entry]) -> list[Finding]:
    """Load, connect and validate every entry by itself, so that one that is broken hides no other."""
    findings: list[Finding] = []
    declared: list[DeclaredTool] = []
    for entry in entries:
        try:
            found = declare(entry)
        except AgentRLError as error:
            findings.append(Finding(entry.at.rpartition(": ")[2], "fail", str(error)))
            continue
        declared.extend(found)
        findings.extend([await _check(tool) for tool in found])
    toolbox = Toolbox()
    try:
        toolbox = Toolbox(declared)
    except ConfigError as error:
        findings.append(Finding("names", "fail", str(error)))
    finally:
        await toolbox.aclose()
        for entry in entries:
            for end in entry.on_failure:
                end()
    return findings


async def _check(tool: DeclaredTool) -> Finding:
    reached = ""
    if tool.probe is not None:
        try:
            reached = f", {await tool.probe()}"
        except AgentRLError as error:
            return Finding(tool.name, "fail", str(error), "start the service, or correct the address")
    properties: Mapping[str, Any] = tool.schema.parameters.get("properties", {})
    silent = [name for name, schema in properties.items() if isinstance(schema, Mapping) and not schema.get("description")]
    text = f"{tool.kind} {tool.place}{reached}"
    if tool.oracle:
        text += ", ORACLE: sees the ground truth"
    if not tool.schema.description:
        return Finding(tool.name, "warn", f"{text}; it has no description", "the model reads it: say what the tool does")
    if silent:
        return Finding(tool.name, "warn", f"{text}; not described: {', '.join(silent)}", "say what each argument means")
    return Finding(tool.name, "ok", text)


def rendered(tokenizer: Any, schemas: Sequence[Mapping[str, Any]]) -> tuple[str, int]:
    """The beginning of a prompt as the model reads it, and how many of its tokens describe the tools."""
    messages = [{"role": "user", "content": "…"}]

    def prompt(tools: Sequence[Mapping[str, Any]] | None) -> str:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)

    text = prompt(list(schemas) or None)
    count = len(tokenizer.encode(text, add_special_tokens=False)) - len(tokenizer.encode(prompt(None), add_special_tokens=False))
    return text, count


def arguments_of(words: Sequence[str]) -> dict[str, Any]:
    """A JSON object in one word, or ``name=value`` words; values are text, which the tool's schema turns into what it takes.

    Raises:
        ConfigError: neither.
    """
    if len(words) == 1 and words[0].lstrip().startswith("{"):
        try:
            parsed: Any = json.loads(words[0])
        except ValueError as error:
            raise ConfigError(f"the arguments are no JSON object: {error}") from error
        return dict(parsed)
    pairs = [word.partition("=") for word in words]
    wrong = [name for name, equals, _ in pairs if not equals]
    if wrong:
        raise ConfigError(f"{wrong[0]!r} is no argument. Write '{{\"name\": value}}' or name=value")
    return {name: value for name, _, value in pairs}


async def call_tool(
    toolbox: Toolbox, name: str, arguments: Mapping[str, Any], *, kwargs: Mapping[str, Any], max_output_tokens: int | None
) -> Observation:
    """One call as a rollout makes it: checked, under the real deadlines, cut to the same length; then the tool is closed.

    Args:
        toolbox: holds the tool; left open.
        name: as the model would write it.
        arguments: as the model would write them.
        kwargs: the row's ``tools_kwargs`` for this tool.
        max_output_tokens: the run's bound over the tool's own.

    Raises:
        ToolInfraError: it failed outside the model's control.
    """
    task = Task(id="cli", prompt=[], data_source="cli", tools_kwargs={name: kwargs})
    async with toolbox.session(
        task=task, trajectory_id=f"cli/{os.getpid()}", sample_index=0, max_output_tokens=max_output_tokens
    ) as session:
        (observation,) = await session.run([ToolCall(name=name, arguments=dict(arguments))])
    return observation


def _is_tool_list(file: str) -> bool:
    """Whether a YAML holds tools and nothing else of a run."""
    try:
        loaded: Any = yaml.safe_load(tool_file(file).read_text(encoding="utf-8"))
    except ConfigError:
        return False  # the run's loader has the better message
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read as YAML: {error}") from error
    return isinstance(loaded, dict) and "tools" in loaded and set(loaded) <= LIST_KEYS  # pyright: ignore[reportUnknownArgumentType]
