"""``http:`` entries: a service's tool in the toolbox."""

import json
from typing import Any
from urllib.parse import urlsplit

from agentrl.errors import ConfigError
from agentrl.plugins import ToolOptions
from agentrl.rollout.env_values import EnvValues
from agentrl.rollout.http_tool import HttpSpec, HttpTool
from agentrl.rollout.tool import ToolSchema
from agentrl.rollout.tool_entry import Entry, mapping, parsed
from agentrl.rollout.toolbox import DeclaredTool


def declare_http(entry: Entry) -> list[DeclaredTool]:
    """The one tool of an ``http:`` entry.

    Raises:
        ConfigError: the spec is wrong, or its schema lacks what the url takes.
    """
    entry.refuse("use", "class_name", "config", "oracle", "scope", why="the tool is a service. Its settings stand under `http:`")
    spec: HttpSpec = parsed(HttpSpec, entry.given["http"], f"{entry.at}: http")
    schema = _schema(entry, spec)
    _check_url(entry, spec, schema)
    tool = HttpTool(spec, schema.name, EnvValues(f"{entry.at}: http", is_required=not entry.only_schemas))
    is_idempotent = entry.is_idempotent(spec.method == "GET")
    return [
        DeclaredTool(
            schema=schema,
            arguments=entry.arguments(schema, allow_extra=False),
            limits=entry.limits(ToolOptions(), is_idempotent=is_idempotent, kind={"on_timeout": "infra"}),
            reference=f"http:{schema.name}",
            make=tool.instance,
            is_stateful=False,
            is_idempotent=is_idempotent,
            kind="http",
            place=f"{spec.method} {spec.url}",
            probe=tool.probe,
            shutdown=tool.aclose,
        )
    ]


def _schema(entry: Entry, spec: HttpSpec) -> ToolSchema:
    """From ``tool_schema`` (as verl writes it) or ``http.schema``: of the arguments, or of the whole function."""
    name = str(entry.given.get("name") or spec.name or "")
    given = entry.given.get("tool_schema")
    if given is None and isinstance(spec.schema_, str):
        try:
            given = json.loads((entry.project / spec.schema_).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{entry.at}: http: schema={spec.schema_}: cannot be read as JSON: {error}") from error
    elif given is None:
        given = spec.schema_
    if given is None:
        given = _from_url(spec)
    parameters: dict[str, Any] = mapping(given, f"{entry.at}: http: schema")
    if "function" in parameters:
        schema = entry.schema(parameters, name)
        if spec.description:
            schema = ToolSchema(name=schema.name, description=spec.description, parameters=schema.parameters)
    elif name:
        schema = ToolSchema(name=name, description=spec.description, parameters={"type": "object", **parameters})
    else:
        raise ConfigError(f"{entry.at}: http: the tool has no name. Give `name:`")
    entry.named(schema.name)
    return schema


def _from_url(spec: HttpSpec) -> dict[str, Any]:
    """Without a schema: the arguments that the url takes, as text."""
    names = list(dict.fromkeys(spec.path_arguments))
    return {"type": "object", "properties": {n: {"type": "string"} for n in names}, "required": names}


def _check_url(entry: Entry, spec: HttpSpec, schema: ToolSchema) -> None:
    parts = urlsplit(spec.url)
    if "${" not in spec.url and (parts.scheme not in ("http", "https") or not parts.netloc):
        raise ConfigError(f"{entry.at}: http: url={spec.url} is no http address")
    if "{" in parts.netloc.replace("${", ""):
        raise ConfigError(f"{entry.at}: http: url={spec.url}: the model must not choose the host. Put arguments behind it")
    required = schema.parameters.get("required", [])
    missing = [name for name in spec.path_arguments if name not in required]
    if missing:
        raise ConfigError(
            f"{entry.at}: http: the url takes {', '.join(missing)}, which the schema does not require. Name it under `required`"
        )
