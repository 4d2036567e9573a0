"""Config in, parts out: what ``serve``, ``learn`` and ``eval`` build in common."""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from agentrl.config import Config, find_config
from agentrl.data.rows import read_rows
from agentrl.errors import ConfigError
from agentrl.plugins import load_object
from agentrl.rollout.chat_template import ChatTemplate
from agentrl.rollout.reward import Scorer
from agentrl.rollout.tool_format import choose_parser, misread
from agentrl.rollout.tool_loading import load_tools
from agentrl.rollout.toolbox import Toolbox
from agentrl.rollout.verl_shim import SHIPPED_INSTEAD
from agentrl.stream.server import EmbeddedServer
from agentrl.telemetry.run_dir import RunDir
from agentrl.types import Task

logger = logging.getLogger(__name__)

REDIS_URL_VARIABLE = "AGENTRL_REDIS_URL"
SUPERVISED_VARIABLE = "AGENTRL_SUPERVISED"
"""Set for the children of ``agentrl run``, which itself starts and ends the stream's server and the sandbox."""
SANDBOX_TOKEN_VARIABLE = "AGENTRL_SANDBOX_TOKEN"
"""Bearer token of the run's own sandbox; made up when it is not set."""
CODE_TOOL = "tools.code_interpreter"
USER_REPLIES = frozenset({"env", "proxy"})
"""Loops in which user messages follow the model's turns, so that the template must keep earlier turns then too."""
LEARNER_DTYPE: dict[str, Literal["fp32", "bf16"]] = {"float32": "fp32", "bfloat16": "bf16"}
"""``model.dtype`` as the learner names it."""


def run_dir_of(config: Config) -> RunDir:
    """The folder of this run."""
    return RunDir(Path(config.run.dir) / config.run.name)


def stream_url(config: Config, directory: RunDir) -> str:
    """Where the stream is: the config's server, ``AGENTRL_REDIS_URL``, or the run's own server, started when it is not up."""
    url = os.environ.get(REDIS_URL_VARIABLE) if config.queue.url == "embedded" else config.queue.url
    if url:
        return url
    server = EmbeddedServer(directory.redis)
    url = server.ensure()
    directory.register("redis", pid=server.pid, url=url)
    return url


def start_stream_server(config: Config, directory: RunDir) -> EmbeddedServer | None:
    """The run's own server, up and recorded; None when the stream lives elsewhere."""
    if config.queue.url != "embedded" or os.environ.get(REDIS_URL_VARIABLE):
        return None
    stream_url(config, directory)
    return EmbeddedServer(directory.redis)


def release_stream_server(config: Config, directory: RunDir) -> None:
    """Stop the run's own server if nobody else uses it; under ``agentrl run`` the supervisor does that at the end."""
    if config.queue.url != "embedded" or os.environ.get(REDIS_URL_VARIABLE) or os.environ.get(SUPERVISED_VARIABLE):
        return
    if EmbeddedServer(directory.redis).release():
        directory.deregister("redis")


def share_sandbox_token(config: Config, directory: RunDir) -> None:
    """Put the token of the run's own sandbox into this process's environment, and so into its children's."""
    if config.sandbox.url == "auto" and not os.environ.get(SANDBOX_TOKEN_VARIABLE):
        os.environ[SANDBOX_TOKEN_VARIABLE] = run_secret(directory, "sandbox_token")


def run_secret(directory: RunDir, name: str) -> str:
    """A random bearer token of this run, in a file that only this user can read: a restarted or later process finds the same."""
    path = directory.root / f".{name}"
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(secrets.token_urlsafe(32))
    with contextlib.suppress(FileExistsError):  # the first process decides
        os.link(fresh, path)
    fresh.unlink()
    return path.read_text()


def load_tasks(path: str, *, what: str) -> list[Task]:
    """Rows of a task file.

    Raises:
        ConfigError: the config names no file, or an empty one.
    """
    if not path:
        raise ConfigError(
            f"{what} is empty: give a parquet or JSONL file of tasks, for example from `agentrl data prepare gsm8k`"
        )
    tasks = read_rows(Path(path))
    if not tasks:
        raise ConfigError(f"{what}={path} holds no rows")
    return tasks


def load_tokenizer(config: Config, path: str | None = None) -> Any:
    """The policy's tokenizer, with the config's chat template when it names one.

    Raises:
        ConfigError: no model is named, or nothing loadable is there.
    """
    from transformers import AutoTokenizer

    location = path or config.model.path
    if not location:
        raise ConfigError(
            "model.path is empty: give a Hugging Face directory or hub name, for example model.path=Qwen/Qwen2.5-0.5B"
        )
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(location)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={location}: no tokenizer could be loaded: {error}") from error
    if config.model.chat_template:
        tokenizer.chat_template = Path(config.model.chat_template).read_text()
    if not tokenizer.chat_template:
        raise ConfigError(f"model.path={location}: the tokenizer has no chat template. Give model.chat_template=FILE.jinja")
    return tokenizer


def vocab_size_of(path: str) -> int:
    """Rows of the model's embedding, which may exceed the tokenizer's vocabulary."""
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(path).get_text_config().vocab_size)


def tool_entries(config: Config) -> list[dict[str, Any]]:
    """The ``tools:`` list, from the config or from the YAML file it names."""
    if config.tools is None:
        return []
    if isinstance(config.tools, list):
        return config.tools
    loaded = yaml.safe_load(tool_file(config.tools).read_text())
    entries = loaded.get("tools") if isinstance(loaded, dict) else None
    return [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []


def tool_file(name: str) -> Path:
    """A tool YAML: the path itself, or a shipped one of that name."""
    path = Path(name)
    return path if path.is_file() else find_config(name.removeprefix("configs/"))


def needs_sandbox(config: Config) -> bool:
    """Whether a tool runs code and does not itself say where."""
    return any(_is_code_tool(e) and not _own_url(e) for e in tool_entries(config))


def build_toolbox(config: Config, tokenizer: Any, *, sandbox_url: str | None, only_schemas: bool = False) -> Toolbox:
    """The run's tools; a code tool without an address gets the run's sandbox."""
    return load_tools(
        tool_spec(config),
        tokenizer=tokenizer,
        overrides=sandbox_overrides(config, sandbox_url),
        output_tokens=config.serve.tool_tokens,
        only_schemas=only_schemas,
    )


def tool_spec(config: Config) -> Path | Sequence[Mapping[str, Any]]:
    """The run's tool list: its file, or the list in place."""
    return tool_file(config.tools) if isinstance(config.tools, str) else (config.tools or [])


def sandbox_overrides(config: Config, sandbox_url: str | None) -> dict[str, Mapping[str, Any]]:
    """Where the code tools that do not say so themselves find the sandbox."""
    if not sandbox_url:
        return {}
    access = {"url": sandbox_url}
    if token := os.environ.get(SANDBOX_TOKEN_VARIABLE):
        access["token"] = token
    return {
        str(e.get("class_name") or e.get("use")): access for e in tool_entries(config) if _is_code_tool(e) and not _own_url(e)
    }


def tool_schemas(config: Config, tokenizer: Any, *, sandbox_url: str | None) -> list[dict[str, Any]]:
    """What the model is told about the run's tools. MCP servers are asked for theirs, and ended again."""
    toolbox = build_toolbox(config, tokenizer, sandbox_url=sandbox_url, only_schemas=True)
    try:
        return toolbox.schemas()
    finally:
        asyncio.run(toolbox.aclose())


def build_template(config: Config, tokenizer: Any, toolbox: Toolbox) -> ChatTemplate:
    """The tokenizer's template, self-tested: a template that rewrites earlier tokens is refused before anything is generated."""
    template = unchecked_template(config, tokenizer, toolbox)
    # A black-box agent decides itself what it sends back; where the template would rewrite that, a segment of its own begins.
    template.self_test(
        roles=("tool", "user") if config.serve.agent in USER_REPLIES else ("tool",),
        allow_rewrites=True if config.serve.agent == "proxy" else None,
    )
    choose_parser(config.serve.parser, template)  # an unknown format is refused before an engine is started, too
    return template


def unchecked_template(config: Config, tokenizer: Any, toolbox: Toolbox) -> ChatTemplate:
    """The tokenizer's template with the run's tools, before its self-test."""
    keep = config.model.template_rewrites == "keep"
    return ChatTemplate(tokenizer, tools=toolbox.schemas() or None, allow_rewrites=keep)


def build_parser(config: Config, template: ChatTemplate) -> str:
    """The name of the tool-call format: the configured one, or the one that the template prints.

    Raises:
        ConfigError: no such format, or it cannot be told.
    """
    name = choose_parser(config.serve.parser, template)
    if problem := misread(name, template):
        logger.warning("tool_format_differs %s", problem)
    return name


def build_scorer(config: Config) -> Scorer:
    """Scoring by the config's Env or by its reward function."""
    if config.env:
        env_class = load_object(config.env)
        try:
            return Scorer(env=env_class(**config.env_options), solution=config.reward.solution)
        except TypeError as error:
            raise ConfigError(f"env={config.env} with env_options={config.env_options}: {error}") from error
    if config.reward.fn:
        return Scorer(fn=load_object(config.reward.fn), solution=config.reward.solution)
    if config.agent.reward != "score":
        return Scorer(fn=_unscored)
    raise ConfigError("nothing scores a rollout: set env (for example envs.gsm8k:Gsm8k) or reward.fn (path.py:compute_score)")


def _unscored(**_: Any) -> float:
    raise ConfigError("only agents score in this run (agent.reward): its rows must use the loop `proxy`")


def env_name(config: Config) -> str:
    return config.env or config.reward.fn or (f"agent:{config.agent.reward}" if config.agent.reward != "score" else "")


def fingerprint(config: Config, tokenizer: Any, schemas: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What serve and learn must agree on, as short digests; a mismatch is refused with the fields that differ."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return {
        "tokenizer": _digest(vocabulary),
        "chat_template": _digest(tokenizer.chat_template),
        "tools": _digest(list(schemas)),
        "temperature": str(config.serve.temperature),
        "group_size": str(config.serve.n),
        "greedy_baseline": str(config.learn.needs_greedy_baseline),
        "groups_per_step": str(config.learn.groups),
        "seed": str(config.run.seed),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _is_code_tool(entry: Mapping[str, Any]) -> bool:
    reference = str(entry.get("class_name") or entry.get("use") or "")
    return SHIPPED_INSTEAD.get(reference, reference).startswith(CODE_TOOL)


def _own_url(entry: Mapping[str, Any]) -> bool:
    options = entry.get("config") or {}
    return bool(options.get("url") or options.get("sandbox_fusion_url"))
